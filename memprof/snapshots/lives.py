"""Which block each event is about: the lives of all blocks of a recording, and what was there before it began.

Nobody recorded the state at the start. Two things tell of it: a free without an allocation, and the final snapshot. The
memory got from the driver is found by undoing its events, last to first. The size of an older block that was freed
during the recording stands nowhere; what was asked for does, and the rest of a large block is not split off where it is
1 MiB or less. But no free block of the large pool is so small, so wherever something was allocated within that distance
behind the older block, the older block reaches exactly to it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from memprof.simulator.allocator import SMALL_LIMIT, SMALL_SEGMENT
from memprof.snapshots.recording import (
    ALLOC,
    FREE_COMPLETED,
    FREE_REQUESTED,
    SEGMENT_ALLOC,
    SEGMENT_FREE,
    SEGMENT_MAP,
    SEGMENT_UNMAP,
    Ints,
    Recording,
    chunks,
)
from memprof.units import MIB

Bools = npt.NDArray[np.bool_]


@dataclass(slots=True)
class Span:
    """Memory got from the driver: a segment, or a contiguous mapped part of an expandable one."""

    size: int
    lane: int
    small: bool
    expandable: bool


@dataclass(frozen=True, slots=True)
class OlderBlock:
    """A block that was in use when the recording began. Sizes in bytes.

    ``known`` says whether the size is (from the final snapshot), or may be up to 1 MiB more than the least it can be.
    """

    address: int
    size: int
    requested: int
    lane: int
    stack: int
    known: bool


#: What an allocator does, as against what it is asked to note.
HEARD = (ALLOC, FREE_COMPLETED, SEGMENT_ALLOC, SEGMENT_FREE, SEGMENT_MAP, SEGMENT_UNMAP)


@dataclass(frozen=True)
class Program:
    """Events that an allocator must hear of, as columns: what, where, bytes, which block, which lane, which event."""

    actions: npt.NDArray[np.int8]
    addresses: Ints
    sizes: Ints
    numbers: npt.NDArray[np.int32]
    lanes: npt.NDArray[np.int32]
    events: Ints

    def turns(self) -> list[tuple[int, int, int]]:
        """``(start, stop, lane)`` of the stretches whose allocations are all on one lane."""
        (allocs,) = np.nonzero(self.actions == ALLOC)
        lanes = self.lanes[allocs]
        (changes,) = np.nonzero(lanes[1:] != lanes[:-1])
        starts = [0, *allocs[changes + 1].tolist()]
        own = [*lanes[:1].tolist(), *lanes[changes + 1].tolist()] or [0]
        return list(zip(starts, [*starts[1:], len(self.actions)], own, strict=True))


@dataclass(frozen=True)
class Lives:
    """Every block of a recording by a number: first those allocated in it, in order, then the older ones.

    Attributes:
        recording: Whose blocks they are.
        spans: Memory got from the driver when the recording began, by address.
        older: The blocks in use then, by address.
        born: The event of each block's allocation; -1 for an older one.
        ends: The event from which each block no longer counts as allocated (its free was asked for, or completed
            without having been asked for); the number of events for one that stays.
        gone: The event that made each block free for others.
        numbers: Each event's block; -1 for an event about none.
    """

    recording: Recording
    spans: dict[int, Span]
    older: tuple[OlderBlock, ...]
    born: Ints
    ends: Ints
    gone: Ints
    numbers: npt.NDArray[np.int32]

    @cached_property
    def requested(self) -> Ints:
        """Bytes each block was asked for."""
        made = self.recording.sizes[self.born[: len(self.born) - len(self.older)]]
        return np.concatenate([made, np.array([block.requested for block in self.older], dtype=np.int64)])

    @cached_property
    def stacks(self) -> npt.NDArray[np.int32]:
        """The stack of each block's allocation; 0 for an older one that did not live to the final snapshot."""
        made = self.recording.stack_ids[self.born[: len(self.born) - len(self.older)]]
        return np.concatenate([made, np.array([block.stack for block in self.older], dtype=np.int32)])

    @cached_property
    def reserved(self) -> Ints:
        """Bytes got from the driver after each event."""
        return _got(self.recording).cumsum() + self.reserved_at_start

    @property
    def reserved_at_start(self) -> int:
        """Bytes got from the driver before the first event."""
        return sum(span.size for span in self.spans.values())

    def program(self, stop: int | None = None) -> Program:
        """The events that an allocator must hear of, up to event number ``stop``.

        Where a recording has lost a free, its block goes when something else is allocated in its place.
        """
        recording, n = self.recording, len(self.recording)
        stop = n if stop is None else stop
        heard = np.isin(recording.actions, HEARD)
        heard[stop:] = False
        (at,) = np.nonzero(heard)
        lost = np.nonzero(self.gone < stop)[0]
        lost = lost[recording.actions[self.gone[lost]] == ALLOC]
        where = np.searchsorted(at, self.gone[lost])
        actions = np.insert(recording.actions[at], where, np.int8(FREE_COMPLETED))
        return Program(
            actions=actions,
            addresses=np.insert(recording.addresses[at], where, 0),
            sizes=np.insert(recording.sizes[at], where, 0),
            numbers=np.insert(self.numbers[at], where, lost.astype(np.int32)),
            lanes=np.insert(recording.lane_ids[at], where, 0),
            events=np.insert(at, where, self.gone[lost]),
        )

    def held_at(self, event: int) -> Ints:
        """The numbers of the blocks that are allocated after event number ``event`` (-1: before the first)."""
        return np.nonzero((self.born <= event) & (self.ends > event))[0]

    def occupied_at(self, event: int) -> Ints:
        """As :meth:`held_at`, with the blocks whose free was asked for but not completed."""
        return np.nonzero((self.born <= event) & (self.gone > event))[0]

    def addresses(self, numbers: Ints) -> Ints:
        """Where the blocks ``numbers`` lie."""
        made = len(self.born) - len(self.older)
        places = np.array([block.address for block in self.older], dtype=np.int64)
        found = self.recording.addresses[self.born[numbers]]
        if len(places):
            found = np.where(numbers >= made, places[np.maximum(numbers - made, 0)], found)
        return found

    def spans_at(self, event: int) -> dict[int, Span]:
        """Memory got from the driver after event number ``event``, by address."""
        if event >= len(self.recording) - 1:
            return _final(self.recording)
        spans = _Spans({address: replace(span) for address, span in self.spans.items()})
        for action, address, size, lane in _segment_events(self.recording, event + 1):
            if action in (SEGMENT_ALLOC, SEGMENT_MAP):
                spans.add(address, _span(self.recording, action, size, lane))
            else:
                spans.cut(address, size)
        return spans.found


def _got(recording: Recording) -> Ints:
    """Bytes got from the driver at each event; negative where they went back."""
    change = np.zeros(len(recording), dtype=np.int64)
    for sign, actions in ((1, (SEGMENT_ALLOC, SEGMENT_MAP)), (-1, (SEGMENT_FREE, SEGMENT_UNMAP))):
        where = np.isin(recording.actions, actions)
        change[where] = sign * recording.sizes[where]
    return change


def peak_reserved(recording: Recording) -> int:
    """Reserved at its highest, in bytes, reckoned back from what was reserved at the end."""
    change = _got(recording)
    later = change[::-1].cumsum()
    return recording.reserved_at_end - int(later.min(initial=0))


def trace_lives(recording: Recording) -> Lives:
    """Follow every block of a recording through its events."""
    n = len(recording)
    about = np.nonzero(np.isin(recording.actions, (ALLOC, FREE_REQUESTED, FREE_COMPLETED)))[0]
    order = about[np.argsort(recording.addresses[about], kind="stable")]
    action, address = recording.actions[order], recording.addresses[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = address[1:] != address[:-1]
    allocs = action == ALLOC
    # A life begins with an allocation, or with the first event at an address; all others belong to the latest one.
    begins = allocs | first
    which = np.cumsum(begins) - 1
    start = np.nonzero(begins)[0]
    older = ~allocs[start]
    births = np.where(older, -1, order[start])
    asked = _first(which, order, action == FREE_REQUESTED, len(start), n)
    gone = _first(which, order, action == FREE_COMPLETED, len(start), n)
    # A recording may have lost a free: then the next allocation at the place ends the life.
    next_start = np.full(len(start), n, dtype=np.int64)
    same = ~first[start[1:]]
    next_start[:-1][same] = order[start[1:]][same]
    gone = np.minimum(gone, next_start)
    ends = np.minimum(asked, gone)

    made = np.argsort(np.where(older, n, births), kind="stable")[: int((~older).sum())]
    before = np.nonzero(older)[0]
    number = np.empty(len(start), dtype=np.int32)
    number[made] = np.arange(len(made), dtype=np.int32)
    number[before] = len(made) + np.arange(len(before), dtype=np.int32)
    numbers = np.full(n, -1, dtype=np.int32)
    numbers[order] = number[which]
    spans = _undone(recording)
    at = order[start[before]]
    freed = list(chunks(address[start[before]], recording.sizes[at], recording.lane_ids[at], gone[before]))
    stay = _staying(recording, address)
    blocks = _sized(recording, spans, freed, stay)
    rest = np.full(len(stay), n, dtype=np.int64)
    return Lives(
        recording,
        spans,
        tuple(blocks),
        born=np.concatenate([births[made], np.full(len(blocks), -1, dtype=np.int64)]),
        ends=np.concatenate([ends[made], ends[before], rest]),
        gone=np.concatenate([gone[made], gone[before], rest]),
        numbers=numbers,
    )


def _first(which: Ints, order: Ints, chosen: Bools, count: int, missing: int) -> Ints:
    """For each life, the first of its events that is ``chosen``."""
    found = np.full(count, missing, dtype=np.int64)
    np.minimum.at(found, which[chosen], order[chosen])
    return found


def _staying(recording: Recording, addresses: Ints) -> list[OlderBlock]:
    """Blocks of the final snapshot that no event is about: they were there before the recording."""
    touched = set(np.unique(addresses).tolist())
    return [
        OlderBlock(block.address, block.size, block.requested, segment.lane, block.stack, known=True)
        for segment in recording.segments
        for block in segment.blocks
        if block.live and block.address not in touched
    ]


def _sized(
    recording: Recording,
    spans: dict[int, Span],
    freed: list[tuple[int, int, int, int]],
    stay: list[OlderBlock],
) -> list[OlderBlock]:
    """The older blocks, those that were freed with the sizes that what lies behind them leaves."""
    settings = recording.settings
    max_split = None if settings.max_split_size_mb is None else settings.max_split_size_mb * MIB
    starts, final = sorted(spans), {b.address: b for s in recording.segments for b in s.blocks if b.live}
    (made,) = np.nonzero(recording.actions == ALLOC)
    places, at = np.unique(recording.addresses[made], return_index=True)
    earliest = made[at]
    fixed = np.array(sorted([block.address for block in stay] + [address for address, *_ in freed]), dtype=np.int64)
    blocks = []
    for address, requested, lane, gone in freed:
        want = size = settings.round_size(requested)
        i = bisect_right(starts, address) - 1
        span = spans[starts[i]] if i >= 0 else None
        still = final.get(address) if gone == len(recording) else None
        if still is not None:
            size = still.size
        elif span is not None and not span.small and not settings.expandable_segments:
            stop = starts[i] + span.size
            whole = max_split is not None and want >= max_split
            reach = stop if whole else min(stop, address + want + SMALL_LIMIT)
            low, high = np.searchsorted(places, [address, reach], side="right")
            near = places[low:high][earliest[low:high] < gone]
            j = int(np.searchsorted(fixed, address, side="right"))
            behind = [*near[:1].tolist(), *fixed[j : j + 1].tolist(), stop]
            if min(behind) <= reach:
                size = max(want, min(behind) - address)
        stack = still.stack if still is not None else 0
        blocks.append(OlderBlock(address, size, requested, lane, stack, known=still is not None or size > want))
    return blocks + stay


# ----------------------------------------------------------------------------------------------- memory from the driver


class _Spans:
    """Memory by address; neighbouring pages of one expandable segment are one span."""

    def __init__(self, found: dict[int, Span]) -> None:
        self.found, self._starts = found, sorted(found)

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


def _segment_events(recording: Recording, stop: int | None = None) -> list[tuple[int, int, int, int]]:
    """``(action, address, size, lane)`` of every event about memory from the driver."""
    part = slice(0, stop)
    actions = recording.actions[part]
    (at,) = np.nonzero((actions >= SEGMENT_ALLOC) & (actions <= SEGMENT_UNMAP))
    columns = (recording.actions, recording.addresses, recording.sizes, recording.lane_ids)
    return list(chunks(*(column[part][at] for column in columns)))


def _span(recording: Recording, action: int, size: int, lane: int) -> Span:
    """What an event about memory is about: the sizes of segments and pages tell the pool."""
    if action in (SEGMENT_MAP, SEGMENT_UNMAP):
        return Span(size, lane, size % (recording.settings.large_segment_size_mb * MIB) != 0, True)
    return Span(size, lane, size == SMALL_SEGMENT, False)


def _undone(recording: Recording) -> dict[int, Span]:
    """The memory before the first event: the final one, with every event taken back, last to first."""
    spans = _Spans(_final(recording))
    for action, address, size, lane in reversed(_segment_events(recording)):
        if action in (SEGMENT_ALLOC, SEGMENT_MAP):
            spans.cut(address, size)
        else:
            spans.add(address, _span(recording, action, size, lane))
    return spans.found
