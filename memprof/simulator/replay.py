"""From a trace to numbers: what was allocated and reserved token by token, when it was highest, and who held it then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from memprof.records import PARTS, Holder
from memprof.simulator.allocator import CachingAllocator
from memprof.simulator.trace import Trace

#: How many of the largest tensors at the peak a record keeps.
LARGEST = 24


@dataclass
class Reading:
    """What a meter read in one window. Bytes are absolute: static bytes are included.

    Attributes:
        peak_allocated_bytes, allocated_bytes, reserved_bytes: One entry a token (see ``TokenColumns``).
        device_used_bytes: One entry a token; None where no driver was asked.
        peak_token: Token of the highest instant.
        peak_phase: Its phase.
        vision_peak_bytes: Highest allocated bytes in phase ``vision``; 0 where there was none.
        parts: Bytes above static at that instant, by part.
        holders: The largest tensors alive then, biggest first.
        refused: The allocation a card of the given size would have refused, in words, or None.
    """

    peak_allocated_bytes: list[int] = field(default_factory=list)
    allocated_bytes: list[int] = field(default_factory=list)
    reserved_bytes: list[int] = field(default_factory=list)
    device_used_bytes: list[int | None] = field(default_factory=list)
    peak_token: int = 0
    peak_phase: str = ""
    vision_peak_bytes: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    holders: list[Holder] = field(default_factory=list)
    refused: str | None = None


def read_plain(trace: Trace, static_bytes: int, rounding: int = 1) -> Reading:
    """Read ``trace`` with every storage rounded up to ``rounding`` bytes and no allocator behind it."""
    sizes = -(-np.asarray(trace.nbytes, dtype=np.int64) // rounding) * rounding
    level = _level(trace, sizes)
    reading = Reading()
    for start, stop, before in _windows(trace.marks, level):
        reading.peak_allocated_bytes.append(static_bytes + max(before, int(level[start:stop].max(initial=0))))
        reading.allocated_bytes.append(static_bytes + (int(level[stop - 1]) if stop else 0))
    reading.reserved_bytes = list(reading.peak_allocated_bytes)
    reading.device_used_bytes = [None] * len(trace.marks)
    ends = [start for start, _ in trace.phases[1:]] + [trace.marks[-1] if trace.marks else len(level)]
    for (start, name), stop in zip(trace.phases, ends, strict=True):
        if name == "vision" and stop > start:
            reading.vision_peak_bytes = max(reading.vision_peak_bytes, static_bytes + int(level[start:stop].max()))
    in_window = level[: trace.marks[-1]] if trace.marks else level
    if len(in_window):
        _read_peak(reading, trace, int(np.argmax(in_window)), dict(enumerate(sizes.tolist())))
    return reading


def read_cuda(trace: Trace, start: CachingAllocator) -> Reading:
    """Read ``trace`` as the caching allocator would have served it, beginning from the state ``start`` (left as it is).

    Allocated bytes are those of blocks, as the allocator's own counter has them: a request rounded up, and what was
    too little to split off.
    """
    events = trace.events[: trace.marks[-1]] if trace.marks else trace.events
    begins = sorted({*trace.marks[:-1], *(at for at, _ in trace.phases if 0 < at < len(events))} - {0})
    served = start.copy().replay(events, trace.nbytes, begins)
    reading, token = Reading(), 0
    peak, reserved = 0, 0
    for number, top in enumerate(served.peak_allocated):
        begin, stop = ([0, *begins][number], [*begins, len(events)][number])
        peak, reserved = max(peak, top), max(reserved, served.peak_reserved[number])
        if trace.phase_at(begin) == "vision":
            reading.vision_peak_bytes = max(reading.vision_peak_bytes, top)
        if token < len(trace.marks) and stop == trace.marks[token]:
            reading.peak_allocated_bytes.append(peak)
            reading.allocated_bytes.append(served.allocated[number])
            reading.reserved_bytes.append(reserved)
            token, peak, reserved = token + 1, 0, 0
    reading.device_used_bytes = [None] * len(reading.peak_allocated_bytes)
    reading.refused = str(served.refused) if served.refused is not None else None
    if served.peak_event >= 0:
        _read_peak(reading, trace, served.peak_event, _blocks_at(trace, start, served.peak_event))
    return reading


def _blocks_at(trace: Trace, start: CachingAllocator, event: int) -> dict[int, int]:
    """Block bytes of each slot alive after event number ``event``."""
    allocator, address = start.copy(), dict[int, int]()
    for slot in trace.events[: event + 1]:
        if slot < 0:
            if ~slot in address:
                allocator.free(address.pop(~slot))
        elif trace.nbytes[slot]:
            address[slot] = allocator.malloc(trace.nbytes[slot])
    return {slot: allocator.size_of(at) for slot, at in address.items()}


def _level(trace: Trace, sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Bytes above static after each event, ``(events,)`` int64."""
    events = np.asarray(trace.events, dtype=np.int64)
    born = events >= 0
    change = sizes[np.where(born, events, ~events)]
    return np.cumsum(np.where(born, change, -change))


def _windows(marks: list[int], level: npt.NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """For each token its first event, the one after its last, and the level it began at."""
    return [(a, b, int(level[a - 1]) if a else 0) for a, b in pairwise([0, *marks])]


def _read_peak(reading: Reading, trace: Trace, event: int, sizes: Mapping[int, int]) -> None:
    """Who holds what right after event number ``event``, the highest instant."""
    reading.peak_token = next((i for i, mark in enumerate(trace.marks) if event < mark), 0)
    reading.peak_phase = trace.phase_at(event)
    live = trace.live_after(event + 1)
    reading.parts = dict.fromkeys(PARTS, 0)
    for slot in live:
        reading.parts[trace.parts[slot]] += sizes.get(slot, 0)
    births = {slot: i for i, slot in enumerate(trace.events[: event + 1]) if slot >= 0}
    reading.holders = [
        Holder(
            bytes=sizes.get(slot, 0),
            part=trace.parts[slot],
            module=trace.sites[slot][0],
            op=trace.sites[slot][1],
            shape=list(trace.shapes[slot]),
            dtype=trace.dtypes[slot],
            phase=trace.phase_at(births[slot]),
        )
        for slot in sorted(live, key=lambda slot: -sizes.get(slot, 0))[:LARGEST]
    ]
