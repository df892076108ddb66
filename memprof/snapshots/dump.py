"""A predicted window as torch would have dumped it: what :mod:`memprof.snapshots.recording` reads, this writes.

The layout is that of ``torch.cuda.memory._snapshot()``, so pytorch.org/memory_viz and ``torch/cuda/_memory_viz.py``
open it. Addresses and segments are the decisions of :mod:`memprof.simulator.allocator`. There is no Python stack behind
a predicted allocation; its frames are the levels that memprof knows, innermost first::

    aten.mm.default:0:float32[1, 3426, 92553]           the operator, and the first tensor on the storage
    <logits>:0:lm_head                                  the part, and the module
    <token>:0:prefill                                   token 0, and the phase
    <predicted by memprof>:0:InternVL2-2B under TopV    what was run

A free carries the frames of what is freed, as the viewer labels a block by them; nobody knows who let go. No clock ran:
``time_us`` counts events. Each event's ``category`` is its part, which the viewer colours by.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from memprof.errors import OutOfMemory
from memprof.simulator.allocator import AllocatorSettings, CachingAllocator
from memprof.simulator.trace import Trace
from memprof.units import MIB

Frame = dict[str, str | int]
Frames = list[Frame]


class Lasting(NamedTuple):
    """What lay in memory before the window began: its name, the static part it counts to, and the bytes asked for."""

    name: str
    group: str
    n_bytes: int


def dump(
    trace: Trace, start: CachingAllocator, lasting: Mapping[int, Lasting], title: str, about: Mapping[str, Any]
) -> dict[str, Any]:
    """The snapshot of ``trace``, served from the state ``start`` (left as it is) up to the end of its last token.

    Args:
        trace: One window's births and deaths.
        start: The allocator when it began.
        lasting: What is handed out in ``start``, by address.
        title: What was run, in a few words, for the outermost frame.
        about: Where the numbers come from, as plain data; stands under ``memprof``, beside ``status: predicted``.
    """
    writer = _Writer(start, lasting, title)
    writer.play(trace)
    return {
        "segments": writer.segments(),
        "device_traces": [writer.events],
        "allocator_settings": _settings(start.settings),
        "external_annotations": writer.annotations,
        "memprof": {"status": "predicted", "clock": "time_us counts events", **about},
    }


class _Writer:
    """Runs a trace through a copy of the allocator and writes down what torch would."""

    def __init__(self, start: CachingAllocator, lasting: Mapping[int, Lasting], title: str) -> None:
        self._allocator = start.copy(self._saw_segment)
        self._outermost = _frame("<predicted by memprof>", title)
        self._now: Frame = _frame("<token>", "before the first")
        self._known: dict[tuple[Any, ...], Frames] = {}
        self._asking: Frames = []
        self._segment_frames: dict[int, Frames] = {}
        self.events: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        #: Bytes asked for, and frames, of what is handed out, by address.
        self._held = {
            address: (each.n_bytes, [_frame("loaded", each.name), _frame("<static>", each.group), self._outermost])
            for address, each in lasting.items()
        }
        # What has no category is drawn as "unknown": weights. The viewer needs to have met the word once.
        self._note("snapshot", 0, 0, [self._now, self._outermost], category="unknown")

    # -- forward -------------------------------------------------------------------------------------------------------

    def play(self, trace: Trace) -> None:
        """Run the trace up to the end of its last token, or to the allocation that is refused."""
        at: dict[int, int] = {}
        for begin, end, token, phase in _stretches(trace):
            name = f"token {token}: {phase}"
            self._now = {"filename": "<token>", "line": token, "name": phase}
            self._annotate(name, "START")
            try:
                for event in trace.events[begin:end]:
                    if event >= 0:
                        at[event] = self._allocate(trace, event)
                    else:
                        self._free(at.pop(~event), trace.parts[~event])
            except OutOfMemory:
                return
            finally:
                self._annotate(name, "END")

    def _allocate(self, trace: Trace, slot: int) -> int:
        allocator, n_bytes, part = self._allocator, trace.nbytes[slot], trace.parts[slot]
        frames = self._asking = self._frames(trace, slot)
        try:
            address = allocator.malloc(n_bytes)
        except OutOfMemory:
            free = (allocator.limit_bytes or 0) - allocator.reserved
            self.events.append(self._event("oom", n_bytes, frames) | {"device_free": free, "category": part})
            raise
        if address:
            self._held[address] = n_bytes, frames
            self._note("alloc", address, n_bytes, frames, category=part)
        return address

    def _free(self, address: int, part: str) -> None:
        if not address:  # storages of no bytes are no allocations
            return
        n_bytes, frames = self._held.pop(address)
        self._allocator.free(address)
        for action in ("free_requested", "free_completed"):
            self._note(action, address, n_bytes, frames, category=part)

    def _saw_segment(self, kind: str, address: int, n_bytes: int) -> None:
        self._segment_frames[address] = self._asking
        self._note(kind, address, n_bytes, self._asking)

    def _note(self, action: str, address: int, n_bytes: int, frames: Frames, **more: str) -> None:
        self.events.append({"addr": address, **self._event(action, n_bytes, frames), **more})

    def _event(self, action: str, n_bytes: int, frames: Frames) -> dict[str, Any]:
        return {"action": action, "size": n_bytes, "stream": 0, "time_us": len(self.events), "frames": frames}

    def _annotate(self, name: str, stage: str) -> None:
        """As torch notes the ends of ``record_function``."""
        self.annotations.append({"name": name, "stage": stage, "device": 0, "time_us": len(self.events)})

    def _frames(self, trace: Trace, slot: int) -> Frames:
        """The frames of a slot born now; one list for all that have the same, so that the file names it once."""
        (module, op), shape = trace.sites[slot], list(trace.shapes[slot])
        key = (op, module, trace.parts[slot], trace.dtypes[slot], *shape, *self._now.values())
        if key not in self._known:
            self._known[key] = [
                _frame(op, f"{trace.dtypes[slot]}{shape}"),
                _frame(f"<{trace.parts[slot]}>", module or "(outside any layer)"),
                self._now,
                self._outermost,
            ]
        return self._known[key]

    # -- the end -------------------------------------------------------------------------------------------------------

    def segments(self) -> list[dict[str, Any]]:
        """Memory got from the driver as it stands, with its blocks, by address."""
        found = [
            self._segment(address, blocks, small)
            for small in (True, False)
            for first, whole in self._allocator.segments(small=small)
            for address, blocks in _mapped(first, whole)
        ]
        return sorted(found, key=lambda segment: segment["address"])

    def _segment(self, address: int, states: list[tuple[int, bool]], small: bool) -> dict[str, Any]:
        blocks, at = list[dict[str, Any]](), address
        for size, live in states:
            requested, frames = self._held[at] if live else (0, [])
            state = "active_allocated" if live else "inactive"
            blocks.append({"address": at, "size": size, "requested_size": requested, "state": state, "frames": frames})
            at += size
        in_use = sum(size for size, live in states if live)
        return {
            "device": 0,
            "address": address,
            "total_size": at - address,
            "allocated_size": in_use,
            "active_size": in_use,
            "requested_size": sum(block["requested_size"] for block in blocks),
            "stream": 0,
            "segment_type": "small" if small else "large",
            "segment_pool_id": (0, 0),
            "is_expandable": self._allocator.settings.expandable_segments,
            "frames": self._segment_frames.get(address, [self._outermost]),
            "blocks": blocks,
        }


def _frame(filename: str, name: str) -> Frame:
    return {"filename": filename, "line": 0, "name": name}


def _stretches(trace: Trace) -> Iterator[tuple[int, int, int, str]]:
    """(first event, one after the last, token, phase) of each stretch in which neither changes."""
    stop = trace.marks[-1] if trace.marks else len(trace.events)
    bounds = {0, stop, *trace.marks, *(start for start, _ in trace.phases if start < stop)}
    for begin, end in pairwise(sorted(bounds)):
        yield begin, end, bisect_right(trace.marks, begin), trace.phase_at(begin)


def _mapped(address: int, blocks: tuple[tuple[int, bool | None], ...]) -> Iterator[tuple[int, list[tuple[int, bool]]]]:
    """The stretches of a segment that have memory behind them: all of it, or what is mapped of an expandable one."""
    run: list[tuple[int, bool]] = []
    for size, live in blocks:
        if live is None:
            if run:
                yield address - sum(n for n, _ in run), run
            run = []
        else:
            run.append((size, live))
        address += size
    if run:
        yield address - sum(n for n, _ in run), run


def _settings(settings: AllocatorSettings) -> dict[str, Any]:
    """The settings by the names a snapshot has for them."""
    divisions = settings.roundup_power2_divisions
    every = divisions if isinstance(divisions, tuple) else (divisions,) * 16
    return {
        "PYTORCH_CUDA_ALLOC_CONF": str(settings),
        "max_split_size": -1 if settings.max_split_size_mb is None else settings.max_split_size_mb * MIB,
        "garbage_collection_threshold": settings.garbage_collection_threshold,
        "expandable_segments": settings.expandable_segments,
        "roundup_power2_divisions": {str(2**i): every[i] for i in range(16)},
    }
