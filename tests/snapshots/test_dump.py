"""What is written as a torch snapshot is read back decision by decision, and torch's own tools take it."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import pytest
from torch.cuda import _memory_viz

from memprof.simulator.allocator import AllocatorSettings, CachingAllocator
from memprof.simulator.trace import Trace
from memprof.snapshots.dump import Lasting, dump
from memprof.snapshots.recording import read_recordings
from memprof.snapshots.report import analyse, check_replay
from memprof.units import MIB

WEIGHTS = (300, 5 * MIB, 30 * MIB, 1000, 3 * MIB)


def loaded(
    settings: str = "", capacity: int | None = None, weights: tuple[int, ...] = WEIGHTS
) -> tuple[CachingAllocator, dict[int, Lasting]]:
    """An allocator with a few weights in it."""
    allocator = CachingAllocator(AllocatorSettings.parse(settings), capacity)
    lasting = {allocator.malloc(n): Lasting(f"layers.{i}.weight", "language", n) for i, n in enumerate(weights)}
    return allocator, lasting


def a_trace(seed: int, events: int = 900, largest: int = 40 * MIB) -> Trace:
    """Births and deaths at random: prefill with a vision phase, then three decode steps; some storages are empty."""
    draw, trace, live = random.Random(seed), Trace(), list[int]()
    trace.phase("prefill")
    trace.phase("vision")
    for number in range(events):
        if number == events // 4:
            trace.phase("prefill")
        if live and draw.random() < 0.47:
            trace.death(live.pop(draw.randrange(len(live))))
        else:
            n_bytes = draw.choice((0, 1, 700, 4096, 900_000, MIB + 1, draw.randrange(largest)))
            part, site = draw.choice((("mlp", "layers.1.mlp"), ("kv_cache", "layers.0.self_attn"), ("inputs", "")))
            live.append(trace.birth(n_bytes, part, (site, "aten.mm.default"), (1, n_bytes)))
        if number % (events // 4) == events // 4 - 1:
            trace.mark()
            if len(trace.marks) == 1:
                trace.phase("decode")
    trace.birth(77 * MIB, "other", ("after", "the last token"))
    return trace


def written(folder: Path, trace: Trace, start: CachingAllocator, lasting: dict[int, Lasting]) -> Path:
    path = folder / "made.pickle"
    path.write_bytes(pickle.dumps(dump(trace, start, lasting, "a model", {"sample": "a"}), protocol=4))
    return path


def peaks(trace: Trace, start: CachingAllocator) -> tuple[int, int]:
    """Highest allocated and reserved bytes of the whole window, by the allocator itself."""
    served = start.copy().replay(trace.events[: trace.marks[-1]], trace.nbytes)
    return max(served.peak_allocated), max(served.peak_reserved)


@pytest.mark.parametrize(
    "settings", ["", "expandable_segments:True", "roundup_power2_divisions:4", "max_split_size_mb:32"]
)
@pytest.mark.parametrize("seed", range(3))
def test_it_is_read_back_address_for_address(tmp_path: Path, settings: str, seed: int) -> None:
    start, lasting = loaded(settings)
    trace = a_trace(seed)
    path = written(tmp_path, trace, start, lasting)
    report = analyse(path)
    born = sum(1 for e in trace.events[: trace.marks[-1]] if e >= 0 and trace.nbytes[e])
    assert report.replay.addresses_total == born > 300
    assert report.replay.segments_total > 3
    assert report.replay.exact
    assert (report.peak_allocated_bytes, report.peak_reserved_bytes) == peaks(trace, start)
    assert (report.settings == "default") is (not settings)
    assert report.status == "predicted"


def test_the_state_it_began_from_is_left_as_it_was(tmp_path: Path) -> None:
    start, lasting = loaded()
    before = start.allocated, start.reserved, start.segments(small=True), start.segments(small=False)
    first, second = (written(tmp_path, a_trace(1), start, lasting).read_bytes() for _ in range(2))
    assert (start.allocated, start.reserved, start.segments(small=True), start.segments(small=False)) == before
    assert first == second


def test_a_refused_allocation_ends_it(tmp_path: Path) -> None:
    trace, (start, lasting) = a_trace(2), loaded(capacity=200 * MIB)
    path = written(tmp_path, trace, start, lasting)
    events = pickle.loads(path.read_bytes())["device_traces"][0]
    served = start.copy().replay(trace.events, trace.nbytes)
    assert served.refused is not None
    assert [e["action"] for e in events].count("oom") == 1
    last = events[-1]
    assert (last["action"], last["size"]) == ("oom", trace.nbytes[trace.events[served.refused_event or 0]])
    assert 0 <= last["device_free"] < served.refused.segment_bytes
    (recording,) = read_recordings(path)
    check = check_replay(recording)
    # The segments given back for the allocation that failed all the same are the replay's to release, too.
    assert check.addresses_matched == check.addresses_total > 20
    assert analyse(path).peak_allocated_bytes == served.peak_allocated[-1]


def test_what_was_unmapped_under_pressure_is_in_no_segment(tmp_path: Path) -> None:
    start, lasting = loaded("expandable_segments:True", capacity=240 * MIB)
    trace = Trace()
    first = trace.birth(100 * MIB, "mlp", ("m", "op"), ())
    trace.birth(3 * MIB, "mlp", ("m", "op"), ())
    trace.death(first)
    trace.birth(110 * MIB, "mlp", ("m", "op"), ())  # fits nowhere before the pages of the first are given back
    trace.mark()
    data = dump(trace, start, lasting, "a model", {})
    gone = [(e["addr"], e["size"]) for e in data["device_traces"][0] if e["action"] == "segment_unmap"]
    assert gone
    assert not [
        s for s in data["segments"] for a, n in gone if s["address"] < a + n and a < s["address"] + s["total_size"]
    ]
    reserved = start.copy().replay(trace.events, trace.nbytes).reserved[-1]
    assert sum(segment["total_size"] for segment in data["segments"]) == reserved
    assert analyse(written(tmp_path, trace, start, lasting)).replay.exact


def test_frames_name_what_memprof_knows(tmp_path: Path) -> None:
    start, lasting = loaded()
    trace = Trace()
    trace.phase("prefill")
    cache = trace.birth(2 * MIB, "attention", ("layers.3.self_attn", "aten.cat.default"), (1, 8, 64, 2048), "bfloat16")
    trace.parts[cache] = "kv_cache"  # claimed later, as a cache is
    trace.mark()
    trace.phase("decode")
    trace.birth(600, "other", ("", "aten.add.Tensor"), (150,), "float32")
    trace.mark()
    data = dump(trace, start, lasting, "a model", {"sample": "a"})
    first, second = (e for e in data["device_traces"][0] if e["action"] == "alloc")
    assert [f"{f['filename']}:{f['line']}:{f['name']}" for f in first["frames"]] == [
        "aten.cat.default:0:bfloat16[1, 8, 64, 2048]",
        "<kv_cache>:0:layers.3.self_attn",
        "<token>:0:prefill",
        "<predicted by memprof>:0:a model",
    ]
    assert first["category"] == "kv_cache"
    assert [f["name"] for f in second["frames"][1:3]] == ["(outside any layer)", "decode"]
    assert second["frames"][2]["line"] == 1
    names = [
        (b["frames"][0]["name"], b["frames"][1]["filename"], b["requested_size"])
        for s in data["segments"] for b in s["blocks"] if b["state"] == "active_allocated"
    ]  # fmt: skip
    assert {(f"layers.{i}.weight", "<static>", n) for i, n in enumerate(WEIGHTS)} < set(names)
    assert [(a["name"], a["stage"]) for a in data["external_annotations"]] == [
        ("token 0: prefill", "START"), ("token 0: prefill", "END"),
        ("token 1: decode", "START"), ("token 1: decode", "END"),
    ]  # fmt: skip
    assert data["memprof"] == {"status": "predicted", "clock": "time_us counts events", "sample": "a"}
    holders = {h.site: h for h in analyse(written(tmp_path, trace, start, lasting)).holders}
    assert holders["<kv_cache>:0 layers.3.self_attn"].bytes == 2 * MIB
    assert holders["<static>:0 language"].blocks == len(WEIGHTS)


def test_torchs_own_tools_take_it(tmp_path: Path) -> None:
    start, lasting = loaded()
    path = written(tmp_path, a_trace(4), start, lasting)

    def data() -> dict[str, Any]:
        return pickle.loads(path.read_bytes())

    lines = _memory_viz.memory(data(), format_flamegraph=str).splitlines()
    assert any(";<static>:0:language;loaded:0:layers.2.weight " in line for line in lines)
    assert len(_memory_viz.segments(data(), format_flamegraph=str).splitlines()) == len(lines)
    assert "segments: " in _memory_viz.segsum(data())
    assert f"{len(data()['device_traces'][0])} entries" in _memory_viz.trace(data())
    for page in (_memory_viz.trace_plot(data()), _memory_viz.trace_plot(data(), plot_segments=True)):
        assert "snapshot.pickle" in page
    assert "Allocator State History" in _memory_viz.segment_plot(data())
    changed = _memory_viz.compare(data()["segments"][1:], data()["segments"], format_flamegraph=str)
    assert changed.startswith("only_after;")


def test_the_viewer_finds_every_category_it_looks_for(tmp_path: Path) -> None:
    # Blocks from before have none and are looked up as "unknown": the viewer fails where no event has that one.
    start, lasting = loaded()
    events = dump(a_trace(5), start, lasting, "a model", {})["device_traces"][0]
    assert events[0]["category"] == "unknown"
    assert {e["category"] for e in events if e["action"] == "alloc"} == {"mlp", "kv_cache", "inputs"}
    assert [e["time_us"] for e in events] == list(range(len(events)))


def test_addresses_that_no_driver_gave_are_not_called_exact(tmp_path: Path) -> None:
    start, lasting = loaded()
    data = dump(a_trace(6), start, lasting, "a model", {})
    next(e for e in data["device_traces"][0] if e["action"] == "alloc")["addr"] += 512
    path = tmp_path / "wrong.pickle"
    path.write_bytes(pickle.dumps(data, protocol=4))
    (recording,) = read_recordings(path)
    assert not check_replay(recording).exact
