"""Memory got from the driver: segments, and what is mapped of expandable ones; how much, and where, at any event.

What there was before a recording is found by undoing its events, last to first, from what the snapshot shows.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from memprof.simulator.allocator import SMALL_SEGMENT
from memprof.snapshots.columns import stretches
from memprof.snapshots.recording import (
    SEGMENT_ALLOC,
    SEGMENT_FREE,
    SEGMENT_MAP,
    SEGMENT_UNMAP,
    Ints,
    Recording,
)
from memprof.units import MIB


@dataclass(slots=True)
class Span:
    """Memory got from the driver: a segment, or a contiguous mapped part of an expandable one."""

    size: int
    lane: int
    small: bool
    expandable: bool


class Spans:
    """Memory by address; neighbouring pages of one expandable segment are one span."""

    def __init__(self, found: dict[int, Span]) -> None:
        self.found, self._starts = found, sorted(found)

    def is_free(self, address: int, size: int) -> bool:
        """Whether no memory lies in ``[address, address + size)``."""
        i = bisect_left(self._starts, address + size) - 1
        return i < 0 or self._starts[i] + self.found[self._starts[i]].size <= address

    def add(self, address: int, span: Span) -> None:
        """Put memory into the map."""
        i = bisect_left(self._starts, address)
        if span.expandable:
            for neighbour in self._starts[max(i - 1, 0) : i + 1]:
                other = self.found[neighbour]
                touches = address in (neighbour + other.size, neighbour - span.size)
                if touches and (other.lane, other.small, other.expandable) == (span.lane, span.small, True):
                    self._starts.remove(neighbour)
                    del self.found[neighbour]
                    address, span = min(address, neighbour), replace(span, size=span.size + other.size)
        if address not in self.found:
            insort(self._starts, address)
        self.found[address] = span

    def cut(self, address: int, size: int) -> None:
        """Take ``[address, address + size)`` out of the map; it may be part of a larger mapped range."""
        i = bisect_right(self._starts, address) - 1
        if i < 0 or self._starts[i] + self.found[self._starts[i]].size < address + size:
            return
        first = self._starts.pop(i)
        span = self.found.pop(first)
        if first < address:
            self.add(first, replace(span, size=address - first))
        if address + size < first + span.size:
            self.add(address + size, replace(span, size=first + span.size - address - size))


def _final(recording: Recording) -> dict[int, Span]:
    return {s.address: Span(s.size, s.lane, s.small, s.expandable) for s in recording.segments}


def about_segments(actions: npt.NDArray[np.int8]) -> npt.NDArray[np.bool_]:
    """Whether each action is about memory from the driver."""
    return (actions >= SEGMENT_ALLOC) & (actions <= SEGMENT_UNMAP)


def _segment_events(
    recording: Recording, *, stop: int | None = None, backwards: bool = False
) -> Iterator[tuple[int, int, int, int]]:
    """``(action, address, size, lane)`` of every event about memory from the driver."""
    columns = (recording.actions, recording.addresses, recording.sizes, recording.lane_ids)
    for _, parts in stretches(*columns, stop=stop, backwards=backwards):
        (at,) = np.nonzero(about_segments(parts[0]))
        yield from zip(*(part[at[::-1] if backwards else at].tolist() for part in parts), strict=True)


def _span(recording: Recording, action: int, size: int, lane: int) -> Span:
    """What an event about memory is about: the sizes of segments and pages tell the pool."""
    if action in (SEGMENT_MAP, SEGMENT_UNMAP):
        return Span(size, lane, size % (recording.settings.large_segment_size_mb * MIB) != 0, True)
    return Span(size, lane, size == SMALL_SEGMENT, False)


def spans_before(recording: Recording) -> dict[int, Span]:
    """The memory before the first event: the final one, with every event taken back, last to first."""
    spans = Spans(_final(recording))
    for action, address, size, lane in _segment_events(recording, backwards=True):
        if action in (SEGMENT_ALLOC, SEGMENT_MAP):
            spans.cut(address, size)
        else:
            spans.add(address, _span(recording, action, size, lane))
    return spans.found


def spans_after(recording: Recording, before: dict[int, Span], event: int) -> dict[int, Span]:
    """The memory after event number ``event``, by address; ``before`` is that before the first."""
    if event >= len(recording) - 1:
        return _final(recording)
    spans = Spans({address: replace(span) for address, span in before.items()})
    for action, address, size, lane in _segment_events(recording, stop=event + 1):
        if action in (SEGMENT_ALLOC, SEGMENT_MAP):
            spans.add(address, _span(recording, action, size, lane))
        else:
            spans.cut(address, size)
    return spans.found


def running(changes: Iterator[Ints], level: int) -> Iterator[Ints]:
    """The levels that ``changes`` lead to from ``level`` on."""
    for change in changes:
        levels = change.cumsum() + level
        level = int(levels[-1])
        yield levels


def got(recording: Recording) -> Iterator[Ints]:
    """Bytes got from the driver at each event, a stretch at a time; negative where they went back."""
    for _, (actions, sizes) in stretches(recording.actions, recording.sizes):
        more, less = (np.isin(actions, each) for each in ((SEGMENT_ALLOC, SEGMENT_MAP), (SEGMENT_FREE, SEGMENT_UNMAP)))
        yield sizes * (more.astype(np.int64) - less)


def peak_reserved(recording: Recording) -> int:
    """Reserved at its highest, in bytes, reckoned back from what was reserved at the end."""
    highest = last = 0
    for levels in running(got(recording), 0):
        highest, last = max(highest, int(levels.max())), int(levels[-1])
    return recording.reserved_at_end - last + highest
