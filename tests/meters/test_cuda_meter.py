"""What the CUDA meter does, on a card played by CPU tensors: its counters are the live storages, seen from below."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import state_of, tiny_model, tiny_prompt
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as modes

from memprof.bench.generate import place, profile_prompt
from memprof.errors import BadValue, DeviceUnavailable, UsageError
from memprof.meters import cuda, weights_of
from memprof.meters.cuda import ATTRIBUTIONS, CudaMeter, Driver, PeakCounter
from memprof.profiler import Profiler
from memprof.pruning import build_pruner
from memprof.records import PARTS, SampleRecord
from memprof.simulator import replay
from memprof.simulator.replay import Reading
from memprof.simulator.trace import Trace
from memprof.tracing.ledger import Ledger

STATIC, BLOCK = 10**6, 512


class PlayedCard:
    """A device's counters: by hand (:meth:`hold`), or from every CPU storage there is (:meth:`follow`)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.by_hand, self.peak, self.peak_reserved, self.read = 0, 0, 0, 0
        self.ledger: Ledger | None = None
        for name, answer in {
            "memory_stats_as_nested_dict": lambda _: self.stats(),
            "reset_peak_memory_stats": lambda _: self.reset(),
            "memory_allocated": lambda _: self.now,
            "memory_reserved": lambda _: self.now,
            "mem_get_info": lambda _: (60, 100),
            "synchronize": lambda _: None,
            "get_device_properties": lambda _: SimpleNamespace(uuid="0000-1111"),
        }.items():
            monkeypatch.setattr(torch.cuda, name, answer)

    @property
    def now(self) -> int:
        self.look()
        return self.level

    def look(self) -> None:
        """Catch up with what happened since the last look."""
        if self.ledger is not None:
            trace = self.ledger.trace
            for event in trace.events[self.read :]:
                size = -(-trace.nbytes[max(event, ~event)] // BLOCK) * BLOCK
                self.level += size if event >= 0 else -size
                self.peak = max(self.peak, self.level)
            self.read = len(trace.events)
            self.peak_reserved = max(self.peak_reserved, self.peak)

    level = 0

    def hold(self, n: int, reserved: int = 0) -> None:
        self.level = n
        self.peak = max(self.peak, n)
        self.peak_reserved = max(self.peak_reserved, reserved)

    def reset(self) -> None:
        self.look()
        self.peak = self.peak_reserved = self.level

    def stats(self) -> dict[str, Any]:
        self.look()
        return {
            "allocated_bytes": {"all": {"current": self.level, "peak": self.peak}},
            "reserved_bytes": {"all": {"current": self.level, "peak": self.peak_reserved}},
        }


class PlayedMeter(CudaMeter):
    """The CUDA meter over a CPU model."""

    def __init__(self, model: nn.Module, attribution: str = "prefill", ask_driver: str = "changed") -> None:
        self.model, self.ledger = model, None
        self.attribution, self.ask_driver = attribution, ask_driver
        self.weights = [tensor for _, tensor in weights_of(model)]
        self.device = torch.device("cpu")
        self.counter = PeakCounter(self.device)
        self._driver, self._static = Driver(self.device), None


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlayedCard]:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    played = PlayedCard(monkeypatch)
    yield played
    assert not PeakCounter._open, "every window gave the counters back"


def sums(columns: dict[str, list[int]]) -> list[int]:
    return [sum(row) for row in zip(*columns.values(), strict=True)]


def measured(card: PlayedCard, attribution: str, tokens: int = 4, hook: Any = None) -> tuple[Profiler, Reading, Any]:
    kind, about, model = tiny_model("internvl")
    prompt, meter = tiny_prompt(kind, about), PlayedMeter(model, attribution)
    before = state_of(model)
    card.ledger = Ledger("cpu")
    card.ledger.ignore(meter.weights)
    card.level = card.peak = STATIC
    card.ledger.listen()
    handle = model.register_forward_pre_hook(hook) if hook else None
    try:
        with Profiler(model, meter) as profiler:
            assert meter.static_bytes == STATIC
            model.generate(**place(prompt, model), max_new_tokens=tokens, do_sample=False)
    finally:
        card.ledger.close()
        card.ledger = None
        if handle is not None:
            handle.remove()
    assert state_of(model) == before
    return profiler, profiler.reading, prompt


@pytest.mark.parametrize("attribution", ATTRIBUTIONS)
def test_counters_are_the_truth_and_parts_sum_to_them(card: PlayedCard, attribution: str) -> None:
    _, true, _ = measured(card, "all")
    profiler, reading, _ = measured(card, attribution)
    for column in ("peak_allocated_bytes", "allocated_bytes", "reserved_bytes"):
        assert getattr(reading, column) == getattr(true, column), column
    assert all(len(column) == 4 for column in vars(profiler.tokens).values())
    top = max(reading.peak_allocated_bytes)
    assert (reading.peak_token, reading.peak_phase) == (0, true.peak_phase)
    assert STATIC < reading.vision_peak_bytes <= top
    assert set(reading.parts) == set(PARTS)
    assert sum(reading.parts.values()) == top - STATIC
    assert sums(reading.token_parts) == [peak - STATIC for peak in reading.peak_allocated_bytes]
    if attribution == "none":
        assert reading.parts["unexplained"] == top - STATIC
    else:
        assert reading.parts == true.parts
        prefill, truly = ({p: c[0] for p, c in r.token_parts.items() if c[0]} for r in (reading, true))
        assert prefill == truly
        assert [vars(h) for h in reading.holders] == [vars(h) for h in true.holders]
        assert reading.parts["unexplained"] == 0


def hoarder(at: int) -> Any:
    """Holds two million bytes from forward number ``at`` on."""
    calls: list[torch.Tensor | None] = []

    def hoard(*_: Any) -> None:
        calls.append(torch.empty(2_000_000, dtype=torch.uint8) if len(calls) == at else None)

    return hoard


def test_a_peak_in_decoding_is_told_apart_as_far_as_it_was_watched(card: PlayedCard) -> None:
    profiler, reading, _ = measured(card, "prefill", hook=hoarder(2))
    _, all_along, _ = measured(card, "all", hook=hoarder(2))
    assert reading.peak_token == all_along.peak_token == 3 or reading.peak_token == all_along.peak_token == 2
    assert reading.peak_phase == "decode"
    blocks = sum(-(-n // BLOCK) * BLOCK for n in profiler.kv_bytes_per_layer)
    assert reading.parts["kv_cache"] >= blocks
    assert reading.parts["kv_cache"] <= all_along.parts["kv_cache"] + BLOCK * 20
    assert reading.parts["inputs"] == all_along.parts["inputs"] > 0
    assert reading.parts["unexplained"] >= 2_000_000
    assert all_along.parts["unexplained"] == 0
    assert sum(reading.parts.values()) == max(reading.peak_allocated_bytes) - STATIC


def test_the_trace_is_gone_through_once_however_many_tokens(card: PlayedCard, monkeypatch: pytest.MonkeyPatch) -> None:
    made = list[replay.Timeline]()

    class Counted(replay.Timeline):
        def __init__(self, trace: Trace) -> None:
            super().__init__(trace)
            made.append(self)

    monkeypatch.setattr(replay, "Timeline", Counted)
    measured(card, "all", tokens=6)
    assert len(made) == 1


def test_after_prefill_nothing_but_ends_and_caches_is_watched(card: PlayedCard) -> None:
    kind, about, model = tiny_model("internvl")
    meter, seen = PlayedMeter(model), []
    card.level = STATIC
    hook = model.lm_head.register_forward_hook(lambda *_: seen.append(len(modes())))
    profile_prompt(model, meter, build_pruner("topv"), "current", tiny_prompt(kind, about), new_tokens=3)
    hook.remove()
    assert seen == [1, 0, 0]
    assert not modes()


@pytest.mark.parametrize("attribution", ATTRIBUTIONS)
def test_hooks_that_serve_prefill_alone_are_gone_when_decode_begins(card: PlayedCard, attribution: str) -> None:
    _, _, model = tiny_model("internvl")

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    unwatched, seen = hooks(), list[int]()
    measured(card, attribution, hook=lambda *_: seen.append(hooks()))
    around = 3  # the profiler's two on the model, and the one that counts
    prefill, until, *decode = seen  # counted before the profiler is told of a forward
    assert prefill == until > unwatched + around
    assert len(decode) == 2
    assert set(decode) == {prefill if attribution == "all" else unwatched + around}


def test_a_cache_that_keeps_its_storages_is_counted_once(card: PlayedCard) -> None:
    """While resting, what is new in the cache is one slot; what was seen in prefill stays what it was."""
    _, _, model = tiny_model("internvl")
    meter = PlayedMeter(model)
    meter.open()
    assert meter.ledger is not None
    kept = torch.zeros(1000, dtype=torch.uint8)
    meter.ledger.adopt(kept, "aten.zeros")
    seen = {kept.untyped_storage()._cdata: 1000}
    meter.ledger.claim(seen, "kv_cache")
    card.hold(10)
    meter.mark()
    for grown in ({}, {-2: 600}, {-2: 600}, {-3: 1, -4: 1025}):
        meter.ledger.claim(seen | grown, "kv_cache")
        card.hold(10)
        meter.mark()
    parts = meter.close().token_parts["kv_cache"]
    assert parts == [1024, 1024, 1024 + 1024, 1024 + 1024, 1024 + 512 + 1536]


def test_an_exception_leaves_nothing_open(card: PlayedCard) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        measured(card, "prefill", hook=fail)
    assert not modes()


OUT = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.00 GiB is "
    "free. Process 7 has 3.00 GiB memory in use. Including non-PyTorch memory, this process has 75.10 GiB memory in "
    "use. Of the allocated memory 70.00 GiB is allocated by PyTorch, and 4.00 GiB is reserved by PyTorch but "
    "unallocated. If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True "
    "to avoid fragmentation.  See documentation for Memory Management  (https://pytorch.org/docs/stable/notes/cuda.html)"
)


@pytest.mark.parametrize("forward", [1, 3])
def test_where_a_card_ran_out_and_who_held_the_rest(card: PlayedCard, forward: int) -> None:
    """In a layer's MLP, of the first forward or a later one: said in the sample, and the model is as before."""
    kind, about, model = tiny_model("internvl")
    meter, prompt, before, calls = PlayedMeter(model), tiny_prompt(kind, about), state_of(model), list[int]()
    card.level = card.peak = STATIC

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == forward:
            raise torch.cuda.OutOfMemoryError(OUT)

    name, mlp = next((n, m) for n, m in model.named_modules() if n.endswith("layers.1.mlp"))
    handle = mlp.register_forward_pre_hook(fail)
    found = profile_prompt(model, meter, build_pruner("topv"), "current", prompt, new_tokens=4)
    handle.remove()
    assert found.tokens is None
    assert state_of(model) == before
    assert not modes()
    said, done = str(found.refused), forward - 1
    assert "\n" not in said
    for words in ("Tried to allocate 2.00 GiB", "1.00 GiB is free", "Process 7 has 3.00 GiB", "4.00 GiB is reserved"):
        assert words in said
    assert "documentation" not in said
    assert f"it ended in {'decode' if done else 'prefill'} of token {done}" in said
    assert "held then: static " in said
    assert " kv_cache " in said
    if not done:
        assert f"asking for mlp ({name})" in said
    record = SampleRecord("a").with_memory(found.memory)
    record.check()
    assert len(record.tokens) == done
    calls.clear()
    again = profile_prompt(model, meter, build_pruner("topv"), "current", prompt, new_tokens=4)
    assert again.refused is None
    assert len(again.memory.fullest.tokens) == 4


def test_one_peak_counter_serves_nested_windows_and_the_outside(card: PlayedCard) -> None:
    device = torch.device("cpu")
    card.hold(70, reserved=90)
    card.hold(10)
    outer, inner = PeakCounter(device), PeakCounter(device)
    outer.open()
    assert (outer.outer_bytes, outer.outer_reserved_bytes) == (70, 90)
    card.hold(30)
    card.hold(10)
    inner.open()
    card.hold(50, reserved=80)
    card.hold(10)
    assert inner.take()[:2] == (10, 50)
    card.hold(20)
    assert inner.take().peak_allocated == 20
    inner.close()
    taken = outer.take()
    assert (taken.peak_allocated, taken.peak_reserved) == (50, 80), "the outer window sees the inner one's peaks"
    assert outer.take().peak_allocated == 20, "and what is held now"
    outer.close()
    assert (outer.outer_bytes, outer.outer_reserved_bytes) == (70, 90), "what an outside reader would have seen"


def test_windows_on_other_devices_are_left_alone(card: PlayedCard) -> None:
    here, there = PeakCounter(torch.device("cpu")), PeakCounter(torch.device("meta"))
    there.open()
    here.open()
    card.hold(50)
    here.close()
    assert there._allocated == 0
    there.close()


def test_weights_must_lie_on_one_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = nn.Linear(1, 1)
    with pytest.raises(UsageError, match="no card"):
        CudaMeter(model)
    with pytest.raises(BadValue, match="prefill, all, none"):
        CudaMeter(model, "some")


# -- the driver --------------------------------------------------------------------------------------------------------


class Nvml(ModuleType):
    """NVML with one device and these processes: ``(pid, bytes)``."""

    class NVMLError(Exception):
        pass

    def __init__(self, processes: list[tuple[int, int | None]], known: str = "GPU-0000-1111") -> None:
        super().__init__("pynvml")
        self.processes, self.known = processes, known
        self.nvmlInit = lambda: None
        self.nvmlSystemGetDriverVersion = lambda: "580.1"
        self.nvmlDeviceGetHandleByUUID = self.find
        self.nvmlDeviceGetComputeRunningProcesses = self.running

    def find(self, uuid: str) -> str:
        if uuid != self.known:
            raise self.NVMLError("Not Found")
        return uuid

    def running(self, handle: str) -> list[Any]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self.processes]


@pytest.fixture
def driver(card: PlayedCard, monkeypatch: pytest.MonkeyPatch) -> Any:
    card.level = 50

    def make(*processes: tuple[int, int | None], **how: Any) -> Driver:
        monkeypatch.setitem(sys.modules, "pynvml", Nvml(list(processes), **how))
        return Driver(torch.device("cpu"))

    return make


def test_the_driver_says_what_this_process_uses(driver: Any) -> None:
    asked = driver((1, 900), (os.getpid(), 70))
    assert (asked.used_bytes(), asked.whose, asked.problem, asked.version) == (70, "process", "", "580.1")


def test_a_slice_of_a_card_is_found(driver: Any) -> None:
    assert driver((os.getpid(), 70), known="MIG-0000-1111").used_bytes() == 70


@pytest.mark.parametrize(
    "processes",
    [[], [(1, 900)], [(os.getpid(), None)], [(os.getpid(), 0)], [(os.getpid(), 49)]],
    ids=["none", "another id", "not told", "nothing", "less than torch reserved"],
)
def test_where_ids_do_not_match_the_whole_card_stands_in_and_it_is_said(driver: Any, processes: Any) -> None:
    asked = driver(*processes)
    assert (asked.used_bytes(), asked.whose, asked.version) == (40, "card", "580.1")
    assert asked.problem.startswith("device bytes are the whole card's, of all processes: NVML has no figure for")


def test_without_nvml_too(card: PlayedCard) -> None:
    asked = Driver(torch.device("cpu"))
    assert (asked.used_bytes(), asked.whose, asked.version) == (40, "card", None)
    assert "memprof-vlm[cuda]" in asked.problem


def test_an_error_of_nvml_is_quoted(driver: Any) -> None:
    assert "NVML says Not Found" in driver(known="GPU-another").problem


def test_without_the_right_to_ask_nvml_the_whole_card_stands_in(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def no(_: Nvml, handle: str) -> Any:
        raise Nvml.NVMLError("Insufficient Permissions")

    monkeypatch.setattr(Nvml, "running", no)
    asked = driver((os.getpid(), 70))
    assert (asked.used_bytes(), asked.whose, asked.version) == (40, "card", "580.1")
    assert asked.problem.endswith("NVML says Insufficient Permissions")


def test_other_processes_on_the_card_are_not_ours(driver: Any) -> None:
    """One process may stand there more than once: compute and graphics."""
    assert driver((1, 900), (os.getpid(), 70), (2, None), (os.getpid(), 5)).used_bytes() == 75


@pytest.mark.parametrize("visible", ["", "-1", "3"])
def test_no_card_says_what_hides_them(visible: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(DeviceUnavailable, match=f"CUDA_VISIBLE_DEVICES={visible!r}"):
        CudaMeter.check()


def test_whose_bytes_they_are_does_not_change_on_the_way(driver: Any) -> None:
    asked = driver((os.getpid(), 70))
    sys.modules["pynvml"].processes.clear()
    assert (asked.used_bytes(), asked.whose) == (None, "process")

    def fail(_: str) -> Any:
        raise RuntimeError("lost")

    sys.modules["pynvml"].nvmlDeviceGetComputeRunningProcesses = fail
    assert asked.used_bytes() is None
    assert asked.problem == "device bytes are missing in places: NVML says lost"


@pytest.mark.parametrize(("how", "expected"), [("changed", [40, 40, None, 40, None]), ("always", [40] * 5)])
def test_the_driver_is_asked_when_reserved_bytes_change(card: PlayedCard, how: str, expected: list[int | None]) -> None:
    _, _, model = tiny_model("internvl")
    meter = PlayedMeter(model, "none", how)
    meter.open()
    for held in (10, 10, 10, 20, 20):
        card.hold(held)
        meter.mark()
    assert meter.close().device_used_bytes == expected
    assert [note.partition(":")[0] for note in meter.notes()] == [
        "device bytes are the whole card's, of all processes", "parts unknown",
    ]  # fmt: skip


def test_what_cuda_is_it_is_kept(card: PlayedCard, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="H", total_memory=8, major=9, minor=0, uuid="u")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: {"allocator_settings": {"expandable_segments": True}})
    here = PlayedMeter(tiny_model("internvl")[2]).environment()
    assert here["allocator_in_force"] == {"expandable_segments": True}
    assert (here["gpu"], here["compute_capability"], here["device_bytes_of"]) == ("H", "9.0", "card")
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", dict)
    assert cuda.allocator_in_force() is None
