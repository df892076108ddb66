"""Snapshots: real ones where they are at hand, made ones everywhere; and files that do harm, or are cut short."""

from __future__ import annotations

import json
import os
import pickle
import tracemalloc
from pathlib import Path

import pytest
import typer
from made import Recorder, frames
from typer.testing import CliRunner

from memprof.cli.snapshot import snapshot
from memprof.errors import BadValue, DataError
from memprof.simulator.allocator import AllocatorSettings
from memprof.snapshots.recording import Frame, read_recordings
from memprof.snapshots.report import analyse, call_site, check_replay, what_if
from memprof.units import MIB

HERE = Path(__file__).resolve()
TRACES = HERE.parents[2].parent / "shared" / "traces"
REAL = sorted(TRACES.glob("*.pickle"))

# ------------------------------------------------------------------------------------------------------ made snapshots


def _made(path: Path, *, expandable: bool = False, protocol: int = 4) -> tuple[Path, Recorder]:
    """A warm-up that is not recorded, then work that frees some of it, empties the cache once, and leaves some."""
    recorder = Recorder(expandable=expandable)
    weights = [recorder.malloc(size * MIB, "load") for size in (30, 7, 7, 11)] + [recorder.malloc(4096, "load")]
    recorder.free(recorder.malloc(64 * MIB))
    recorder.free(weights.pop(1))
    recorder.recording = True
    for step in range(6):
        acts = [
            recorder.malloc(size, "forward") for size in (3 * MIB + step * 5000, 700, (25 + 9 * step) * MIB, 11 * MIB)
        ]
        kept = recorder.malloc(5 * MIB, "keep")
        for address in acts[::-1] if step % 2 else acts:
            recorder.free(address)
        if step == 2:
            recorder.free(weights.pop(0))
            recorder.empty_cache()
        if step % 2:
            recorder.free(kept)
    with path.open("wb") as file:
        pickle.dump(recorder.dump(), file, protocol=protocol)
    return path, recorder


@pytest.mark.parametrize("expandable", [False, True])
def test_a_made_snapshot_replays_exactly_and_tells_its_peak(tmp_path, expandable):
    path, recorder = _made(tmp_path / "made.pickle", expandable=expandable)
    report = analyse(path)
    assert report.replay.exact
    assert report.replay.addresses_total == 30
    assert report.replay.segments_total > 3
    assert report.peak_allocated_bytes == recorder.peak_allocated
    assert report.peak_reserved_bytes == recorder.peak_reserved
    at_peak = report.fragmentation
    assert at_peak.cached_bytes == at_peak.reserved_bytes - at_peak.allocated_bytes >= at_peak.largest_free_block_bytes
    assert at_peak.allocated_bytes == report.peak_allocated_bytes == sum(holder.bytes for holder in report.holders)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_binary_pickle_protocol_is_read(tmp_path, protocol):
    path, _ = _made(tmp_path / "made.pickle", protocol=protocol)
    expected, _ = _made(tmp_path / "expected.pickle")
    assert analyse(path).to_json() | {"file": ""} == analyse(expected).to_json() | {"file": ""}


def test_holders_are_call_sites_outside_torch_and_add_up(tmp_path):
    path, _ = _made(tmp_path / "made.pickle")
    holders = {holder.site: holder for holder in analyse(path).holders}
    assert set(holders) <= {"model.py:7 load", "model.py:7 forward", "model.py:7 keep", "(before the recording)"}
    assert holders["model.py:7 forward"].blocks == 4
    assert sum(holder.share for holder in holders.values()) == pytest.approx(1)
    assert len(analyse(path, top=1).holders) == 1


def test_what_if_with_the_recorded_settings_changes_nothing(tmp_path):
    path, _ = _made(tmp_path / "made.pickle")
    (recording,) = read_recordings(path)
    assert what_if(recording, recording.settings).saved_bytes == 0
    answer = what_if(recording, AllocatorSettings(expandable_segments=True))
    assert answer.peak_reserved_bytes == answer.baseline_reserved_bytes - answer.saved_bytes
    assert answer.peak_reserved_bytes % (2 * MIB) == 0


def test_a_wrong_recording_is_not_called_exact(tmp_path):
    path, recorder = _made(tmp_path / "made.pickle")
    data = recorder.dump()
    alloc = next(event for event in data["device_traces"][0] if event["action"] == "alloc")
    alloc["addr"] += 512
    path.write_bytes(pickle.dumps(data))
    assert not analyse(path).replay.exact


def _bytes_to_read(path: Path, count: int) -> int:
    """Peak of Python memory while reading ``count`` events, each with frames of its own."""
    event = {"action": "alloc", "stream": 0, "time_us": 1}
    events = [event | {"addr": 512 * i, "size": 10**6 + i, "frames": frames(str(i % 9))} for i in range(count)]
    path.write_bytes(pickle.dumps({"segments": [], "device_traces": [events]}, protocol=4))
    del events
    tracemalloc.start()
    try:
        (recording,) = read_recordings(path)
        assert (len(recording), len(recording.stacks)) == (count, 1 + 9)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_events_are_folded_as_they_are_read(tmp_path, monkeypatch):
    # Kept as dicts, an event would take more than 1,000 bytes.
    monkeypatch.setattr("memprof.snapshots.plain._CHUNK", 2**14)
    few, many = (_bytes_to_read(tmp_path / "long.pickle", count) for count in (1000, 4000))
    assert (many - few) / 3000 < 250


# ------------------------------------------------------------------------------------------------------- files that lie


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("where", ["root", "frames", "settings"])
def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(tmp_path, protocol, where):
    target = tmp_path / "ran"
    data = {"segments": [], "device_traces": [[]], "allocator_settings": {}}
    evil = _Touch(target)
    if where == "root":
        data = evil
    elif where == "frames":
        data["device_traces"][0].append({"action": "alloc", "addr": 0, "size": 1, "frames": [evil]})
    else:
        data["allocator_settings"] = evil
    path = tmp_path / "evil.pickle"
    path.write_bytes(pickle.dumps(data, protocol=protocol))
    with pytest.raises(DataError, match=r"refused|protocol") as caught:
        read_recordings(path)
    assert not target.exists()
    assert "\n" not in str(caught.value)
    pickle.loads(path.read_bytes())  # the file does work elsewhere, so the refusal was ours
    assert target.exists()


def test_a_file_cut_short_is_a_data_error_in_one_line(tmp_path):
    path, _ = _made(tmp_path / "made.pickle")
    whole = path.read_bytes()
    for length in {0, 1, 2, 10, len(whole) - 1, *range(0, len(whole), 97)}:
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="cut short") as caught:
            read_recordings(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps([1, 2]),
        pickle.dumps({"segments": 1, "device_traces": []}),
        pickle.dumps({"segments": [{}], "device_traces": []}),
        pickle.dumps({"segments": [], "device_traces": [[3]]}),
        pickle.dumps({"segments": [], "device_traces": [], "more": [{"action": "alloc"}]}),
        b"not a pickle at all",
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\xff.",
        b"\x80\x04}}u.",
    ],
)
def test_anything_else_is_a_data_error_in_one_line(tmp_path, content):
    path = tmp_path / "other.pickle"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_recordings(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_an_empty_recording_say_so(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        analyse(tmp_path / "nowhere.pickle")
    path = tmp_path / "empty.pickle"
    path.write_bytes(pickle.dumps({"segments": [], "device_traces": [[], []]}))
    with pytest.raises(DataError, match="holds no events"):
        analyse(path)


# ----------------------------------------------------------------------------------------------------------- call sites


def test_the_call_site_is_the_nearest_python_line_outside_torch():
    inner = Frame("/usr/lib/python3/site-packages/torch/nn/functional.py", 9, "softmax")
    user = Frame("/home/me/model.py", 31, "forward")
    operator = Frame("??", 0, "at::_ops::bmm::call(at::Tensor const&)")
    redispatch = Frame("??", 0, "at::_ops::empty_strided::redispatch()")
    assert call_site([operator, inner, user]) == "model.py:31 forward"
    assert call_site([operator, inner]) == "functional.py:9 softmax"
    assert call_site([redispatch, operator]) == "bmm (no Python frame)"
    assert call_site([]) == "(no stack recorded)"
    assert call_site([Frame("linear.py", 1, "forward"), user]) == "model.py:31 forward"
    # An environment may lie in a folder called torch.
    own = Frame("/envs/torch/lib/python3.12/site-packages/mine/model.py", 5, "forward")
    assert call_site([inner, own, user]) == "model.py:5 forward"


# ---------------------------------------------------------------------------------------------------------- real traces


@pytest.mark.skipif(not REAL, reason="the real traces are not part of the repository")
@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_a_real_trace_replays_address_for_address_and_segment_for_segment(path):
    (recording,) = read_recordings(path)
    check = check_replay(recording)
    assert check.exact, check
    assert check.addresses_total > 1000


@pytest.mark.skipif(not REAL, reason="the real traces are not part of the repository")
def test_the_facts_of_a_real_trace():
    report = analyse(TRACES / "unet_train.pickle", ["expandable_segments=True"])
    assert (report.peak_allocated_bytes, report.peak_reserved_bytes) == (110_110_720, 134_217_728)
    assert report.replay.to_json() == {
        "addresses_matched": 1935, "addresses_total": 1935, "segments_matched": 7, "segments_total": 7
    }  # fmt: skip
    assert report.what_if[0].peak_reserved_bytes == 113_246_208


# --------------------------------------------------------------------------------------------------------- command line


def _run(*arguments: str):
    app = typer.Typer()
    app.command()(snapshot)
    return CliRunner().invoke(app, list(arguments), catch_exceptions=True)


def test_json_is_one_document_with_the_promised_keys(tmp_path):
    path, _ = _made(tmp_path / "made.pickle")
    result = _run(str(path), "--json", "--what-if", "expandable_segments=True", "--what-if", "max_split_size_mb=64")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert set(document["replay"]) == {"addresses_matched", "addresses_total", "segments_matched", "segments_total"}
    assert {"peak_allocated_bytes", "peak_reserved_bytes", "fragmentation", "holders", "what_if"} <= set(document)
    assert [answer["settings"] for answer in document["what_if"]] == [
        "expandable_segments=True",
        "max_split_size_mb=64",
    ]


def test_tables_fit_80_columns(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    path, _ = _made(tmp_path / "made.pickle")
    result = _run(str(path), "--what-if", "expandable_segments=True", "--unit", "MiB")
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "model.py:7 forward" in result.stdout
    assert "(exact)" in result.stdout.replace("\n", " ")


def test_a_wrong_option_is_a_usage_error(tmp_path):
    path, _ = _made(tmp_path / "made.pickle")
    assert isinstance(_run(str(path), "--what-if", "nonsense=1").exception, BadValue)
    assert isinstance(_run(str(path), "--unit", "bits").exception, BadValue)
