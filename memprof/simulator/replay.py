"""From a trace to numbers: what was allocated and reserved after each event, when it was highest, and who held it then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from memprof.records import PARTS, Holder
from memprof.simulator.trace import Trace

#: Bytes the CUDA caching allocator rounds every request to.
CUDA_ROUNDING = 512
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
        vision_peak_bytes: Highest allocated bytes in phase ``vision``.
        parts: Bytes above static at that instant, by part.
        holders: The largest tensors alive then.
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


def rounded(nbytes: Sequence[int] | npt.NDArray[np.int64], to: int) -> npt.NDArray[np.int64]:
    """Each size rounded up to a multiple of ``to`` (bytes)."""
    sizes = np.asarray(nbytes, dtype=np.int64)
    return -(-sizes // to) * to


def allocated_after(trace: Trace, sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Bytes above static after each event, ``(events,)`` int64, given each slot's bytes."""
    events = np.asarray(trace.events, dtype=np.int64)
    births = events >= 0
    return np.cumsum(np.where(births, sizes[np.where(births, events, ~events)], -sizes[np.where(births, events, ~events)]))


def read_trace(trace: Trace, static_bytes: int, rounding: int) -> Reading:
    """Columns, peak and holders of ``trace``, with every storage rounded up to ``rounding`` bytes.

    Reserved bytes are left empty: they are the allocator's to say.
    """
    sizes = rounded(trace.nbytes, rounding)
    level = allocated_after(trace, sizes)
    reading = Reading()
    before = 0
    for mark in trace.marks:
        start = int(level[before - 1]) if before else 0
        reading.peak_allocated_bytes.append(static_bytes + max(start, int(level[before:mark].max(initial=0))))
        reading.allocated_bytes.append(static_bytes + (int(level[mark - 1]) if mark else 0))
        before = mark
    reading.device_used_bytes = [None] * len(trace.marks)
    in_window = level[: trace.marks[-1]] if trace.marks else level
    if len(in_window):
        peak = int(np.argmax(in_window))
        reading.peak_token = next(i for i, mark in enumerate(trace.marks) if peak < mark) if trace.marks else 0
        reading.peak_phase = trace.phase_at(peak)
        live = trace.live_after(peak + 1)
        reading.parts = {part: 0 for part in PARTS}
        for slot in live:
            reading.parts[trace.parts[slot]] += int(sizes[slot])
        reading.holders = largest(trace, live, sizes, peak)
        reading.vision_peak_bytes = static_bytes + _peak_in(trace, level, "vision")
    return reading


def largest(trace: Trace, live: list[int], sizes: npt.NDArray[np.int64], event: int) -> list[Holder]:
    """The largest of the slots in ``live``, biggest first; equals in order of birth."""
    births = {slot: i for i, slot in enumerate(trace.events[: event + 1]) if slot >= 0}
    top = sorted(live, key=lambda slot: -int(sizes[slot]))[:LARGEST]
    return [
        Holder(
            bytes=int(sizes[slot]),
            part=trace.parts[slot],
            module=trace.sites[slot][0],
            op=trace.sites[slot][1],
            shape=list(trace.shapes[slot]),
            dtype=trace.dtypes[slot],
            phase=trace.phase_at(births[slot]),
        )
        for slot in top
    ]


def _peak_in(trace: Trace, level: npt.NDArray[np.int64], phase: str) -> int:
    """Highest level while ``phase`` ran; 0 if it never did."""
    peak = 0
    ends = [start for start, _ in trace.phases[1:]] + [len(level)]
    for (start, name), end in zip(trace.phases, ends, strict=True):
        if name == phase:
            peak = max(peak, int(level[start:end].max(initial=0)))
    return peak
