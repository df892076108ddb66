"""Which block each event is about: the lives of all blocks of a recording, and what was there before it began.

Nobody recorded the state at the start. Two things tell of it: a free without an allocation, and the final snapshot. The
size of an older block that was freed during the recording stands nowhere; what was asked for does, and the rest of a
large block is not split off where it is 1 MiB or less. But no free block of the large pool is so small, so wherever
something was allocated within that distance behind the older block, the older block reaches exactly to it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from memprof.simulator.allocator import SMALL_LIMIT, AllocatorSettings
from memprof.snapshots.columns import Column, gathered, stretches
from memprof.snapshots.recording import ALLOC, FREE_COMPLETED, Ints, Recording
from memprof.snapshots.spans import Span, about_segments, got, running, spans_after, spans_before
from memprof.units import MIB

Bools = npt.NDArray[np.bool_]


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


@dataclass(frozen=True)
class Part:
    """A stretch of the events that an allocator must hear of, as columns.

    Attributes:
        actions: What each is.
        events: Which of the recording's.
        numbers: The block that each allocates; that of the allocation before where it is none.
        slots: The slot (:class:`Lives`) of the block that it allocates or makes free; -1 for one about segments.
        turns: ``(lane, events)`` of runs whose allocations are all on one lane; together they are the stretch.
    """

    actions: npt.NDArray[np.int8]
    events: Ints
    numbers: Ints
    slots: npt.NDArray[np.int32]
    turns: list[tuple[int, int]]


@dataclass(frozen=True)
class Lives:
    """Every block of a recording by a number: first those allocated in it, in order, then the older ones.

    A block also has a slot while it is there, which no other has then: whoever runs the events again needs a table of
    slots alone, and that is as long as there were blocks at once. Where a recording has lost a free, its block goes
    when something else is allocated in its place, and that takes over the slot.

    Attributes:
        recording: Whose blocks they are.
        spans: Memory got from the driver when the recording began, by address.
        older: The blocks in use then, by address.
        born: The event of each block's allocation; -1 for an older one.
        slots: Each block's slot.
        ended: The block that each event ends, as far as bytes count (its free was asked for, or completed without
            having been asked for); -1 where it ends none.
        freed: The block that each event makes free for others, in the same way.
    """

    recording: Recording
    spans: dict[int, Span]
    older: tuple[OlderBlock, ...]
    born: Ints
    slots: npt.NDArray[np.int32]
    ended: npt.NDArray[np.int32]
    freed: npt.NDArray[np.int32]

    @property
    def made(self) -> int:
        """How many blocks were allocated in the recording: the number of the first older one."""
        return len(self.born) - len(self.older)

    @cached_property
    def older_numbers(self) -> Ints:
        """The numbers of the older blocks."""
        return np.arange(self.made, len(self.born))

    @cached_property
    def most_slots(self) -> int:
        """How many slots there are."""
        return 1 + max((int(part.max()) for _, (part,) in stretches(self.slots)), default=-1)

    @cached_property
    def _of_older(self) -> Ints:
        """Address, bytes asked for and stack of the older blocks; -1 is the stack of one of which it is not known."""
        rows = [(block.address, block.requested, block.stack or -1) for block in self.older]
        return np.array(rows, dtype=np.int64).reshape(-1, 3).T

    def addresses(self, numbers: Ints) -> Ints:
        """Where the blocks ``numbers`` lie."""
        return self._looked_up(numbers, self.recording.addresses, self._of_older[0])

    def requested(self, numbers: Ints) -> Ints:
        """Bytes that the blocks ``numbers`` were asked for."""
        return self._looked_up(numbers, self.recording.sizes, self._of_older[1])

    def stacks(self, numbers: Ints) -> Ints:
        """The stacks that allocated the blocks ``numbers``; -1 for one that was there before, if it did not stay."""
        return self._looked_up(numbers, self.recording.stack_ids, self._of_older[2])

    def _looked_up(self, numbers: Ints, column: npt.NDArray[Any], older: Ints) -> Ints:
        found = column[self.born[numbers]].astype(np.int64)
        before = numbers >= self.made
        found[before] = older[numbers[before] - self.made]
        return found

    @cached_property
    def reserved(self) -> Ints:
        """Bytes got from the driver after each event."""
        return gathered("q", running(got(self.recording), self.reserved_at_start))

    @property
    def reserved_at_start(self) -> int:
        """Bytes got from the driver before the first event."""
        return sum(span.size for span in self.spans.values())

    def levels(
        self, over: npt.NDArray[np.int32], n_bytes: Callable[[Ints], Ints], stop: int | None = None
    ) -> Iterator[Ints]:
        """The bytes in blocks after each event up to number ``stop``, a stretch at a time.

        ``over`` says which block goes (:attr:`ended` or :attr:`freed`), ``n_bytes`` the bytes of blocks by number.
        """

        def changes() -> Iterator[Ints]:
            number = 0
            for _, (actions, gone) in stretches(self.recording.actions, over, stop=stop):
                (allocs,), (frees,) = np.nonzero(actions == ALLOC), np.nonzero(gone >= 0)
                change = np.zeros(len(actions), dtype=np.int64)
                change[allocs] = n_bytes(np.arange(number, number + len(allocs)))
                change[frees] -= n_bytes(gone[frees].astype(np.int64))
                number += len(allocs)
                yield change

        return running(changes(), int(n_bytes(self.older_numbers).sum()))

    def program(self, start: int = 0, stop: int | None = None) -> Iterator[Part]:
        """The events from number ``start`` up to ``stop`` that an allocator must hear of."""
        recording = self.recording
        number = int(np.searchsorted(self.born[: self.made], start))
        lane = int(recording.lane_ids[self.born[number]]) if number < self.made else 0
        for begin, (actions, lanes, freed) in stretches(
            recording.actions, recording.lane_ids, self.freed, start=start, stop=stop
        ):
            allocs = actions == ALLOC
            frees = (freed >= 0) & ~allocs
            numbers = number - 1 + np.cumsum(allocs)
            slots = np.full(len(actions), -1, dtype=np.int32)
            slots[allocs] = self.slots[numbers[allocs]]
            slots[frees] = self.slots[freed[frees]]
            (at,) = np.nonzero((slots >= 0) | about_segments(actions))
            turns = _turns(allocs[at], lanes[at], lane)
            number += int(np.count_nonzero(allocs))
            lane = turns[-1][0]
            if len(at):
                yield Part(actions[at], begin + at, numbers[at], slots[at], turns)

    def held_at(self, event: int) -> Ints:
        """The numbers of the blocks that are allocated after event number ``event`` (-1: before the first)."""
        return self._there(self.ended, event)

    def occupied_at(self, event: int) -> Ints:
        """As :meth:`held_at`, with the blocks whose free was asked for but not completed."""
        return self._there(self.freed, event)

    def _there(self, over: npt.NDArray[np.int32], event: int) -> Ints:
        there = set(self.older_numbers.tolist())
        for born, gone in self.changes(over, 0, event + 1):
            there.update(born)
            there.difference_update(gone)
        return np.array(sorted(there), dtype=np.int64)

    def changes(self, over: npt.NDArray[np.int32], start: int, stop: int) -> Iterator[tuple[range, list[int]]]:
        """The blocks that come and those that go (``over`` says which) from event ``start`` up to ``stop``."""
        number = int(np.searchsorted(self.born[: self.made], start))
        for _, (actions, gone) in stretches(self.recording.actions, over, start=start, stop=stop):
            after = number + int(np.count_nonzero(actions == ALLOC))
            yield range(number, after), gone[gone >= 0].tolist()
            number = after

    def spans_at(self, event: int) -> dict[int, Span]:
        """Memory got from the driver after event number ``event``, by address."""
        return spans_after(self.recording, self.spans, event)


def _turns(allocs: Bools, lanes: npt.NDArray[np.int32], lane: int) -> list[tuple[int, int]]:
    """``(lane, events)`` of the runs whose allocations are all on one lane; ``lane`` is that of the first run."""
    (made,) = np.nonzero(allocs)
    (changes,) = np.nonzero(np.diff(lanes[made], prepend=lane))
    cuts = [0, *made[changes].tolist(), len(allocs)]
    return list(zip([lane, *lanes[made[changes]].tolist()], (b - a for a, b in pairwise(cuts)), strict=True))


# ------------------------------------------------------------------------------------------------- following the blocks


class _Stray(NamedTuple):
    """A free of what nobody allocated, as far as is known: the first at its address."""

    address: int
    event: int
    slot: int


class _Freed(NamedTuple):
    """A block that may be an older one: bytes asked for, lane, its first event, the one that frees it, its stray."""

    address: int
    requested: int
    lane: int
    event: int
    gone: int
    stray: int
    slot: int


#: In :attr:`_Follower.here`, for an address where nothing is.
_NOTHING = -(2**62)


class _Follower:
    """Goes through the events once, knowing what is where.

    Blocks are numbered as :class:`Lives` does, but the stray number ``k`` is ``-2 - k``, as nobody knows how many
    allocations are to come, nor yet whether it is about an older block.

    Attributes:
        here: By address the slot of the block there; inverted where its free was asked for.
        strays: By address.
        ends, gone: The events that end a stray and make it free.
    """

    def __init__(self) -> None:
        self.born, self.slots, self.ended, self.freed = Column("q"), Column("i"), Column("i"), Column("i")
        self.here: dict[int, int] = {}
        self.strays: dict[int, _Stray] = {}
        self.ends: dict[int, int] = {}
        self.gone: dict[int, int] = {}
        self.holders: list[int] = []  # by slot, whose it is
        self._spare: list[int] = []

    def follow(self, recording: Recording) -> None:
        """Go through all events."""
        for begin, (actions, addresses) in stretches(recording.actions, recording.addresses):
            self.born.extend(begin + np.nonzero(actions == ALLOC)[0])
            ended, freed = self._stretch(begin, actions.tolist(), addresses.tolist())
            for numbers, column, stray_events in ((ended, self.ended, self.ends), (freed, self.freed, self.gone)):
                part = np.array(numbers, dtype=np.int32)
                (at,) = np.nonzero(part < -1)
                stray_events.update(zip((-2 - part[at]).tolist(), (begin + at).tolist(), strict=True))
                part[at] = -1
                column.extend(part)

    def _stretch(self, begin: int, actions: list[int], addresses: list[int]) -> tuple[list[int], list[int]]:
        """The blocks that each event ends and makes free."""
        here, holders, spare, new_slot = self.here, self.holders, self._spare, self.slots.tail.append
        ended, freed, number = [-1] * len(actions), [-1] * len(actions), len(self.slots)
        for i, (action, address) in enumerate(zip(actions, addresses, strict=True)):
            if action > FREE_COMPLETED:
                continue
            slot = here.get(address, _NOTHING)
            if action == ALLOC:
                if slot == _NOTHING:
                    slot = spare.pop() if spare else self._more_slots()
                else:  # a free was lost
                    if slot >= 0:
                        ended[i] = holders[slot]
                    slot = max(slot, ~slot)
                    freed[i] = holders[slot]
                here[address] = slot
                holders[slot] = number
                new_slot(slot)
                number += 1
                continue
            if slot == _NOTHING:
                if address in self.strays:
                    continue
                slot = self._stray(address, begin + i)
            if slot >= 0:
                ended[i] = holders[slot]
                here[address] = ~slot
            if action == FREE_COMPLETED:
                slot = max(slot, ~slot)
                freed[i] = holders[slot]
                spare.append(slot)
                del here[address]
        self.slots.settle()
        return ended, freed

    def _more_slots(self) -> int:
        self.holders.append(-1)
        return len(self.holders) - 1

    def _stray(self, address: int, event: int) -> int:
        """A slot that nothing had before, for what may have been there from the start."""
        slot = self._more_slots()
        self.holders[slot] = -2 - len(self.strays)
        self.strays[address] = _Stray(address, event, slot)
        return slot


def trace_lives(recording: Recording) -> Lives:
    """Follow every block of a recording through its events."""
    found, n = _Follower(), len(recording)
    found.follow(recording)
    spans, made = spans_before(recording), len(found.born)
    freed = [
        _Freed(each.address, int(recording.sizes[each.event]), int(recording.lane_ids[each.event]),
               each.event, found.gone.get(k, n), k, each.slot)
        for k, each in enumerate(found.strays.values())
    ]  # fmt: skip
    older, freed = _sized(recording, spans, sorted(freed), _staying(recording))
    for number, each in enumerate(freed, made):
        for events, column in ((found.ends, found.ended), (found.gone, found.freed)):
            if each.stray in events:
                column[events[each.stray]] = number
    slots = [each.slot for each in freed]
    slots += range(len(found.holders), len(found.holders) + len(older) - len(freed))
    found.slots.extend(np.array(slots))
    found.born.extend(np.full(len(older), -1))
    columns = (column.whole() for column in (found.born, found.slots, found.ended, found.freed))
    return Lives(recording, spans, tuple(older), *columns)


def _staying(recording: Recording) -> list[OlderBlock]:
    """Blocks of the final snapshot that no event is about: they were there before the recording."""
    places = np.array([b.address for s in recording.segments for b in s.blocks if b.live], dtype=np.int64)
    for _, (actions, addresses) in stretches(recording.actions, recording.addresses):
        places = places[~np.isin(places, addresses[actions <= FREE_COMPLETED])]
    untouched = set(places.tolist())
    return [
        OlderBlock(block.address, block.size, block.requested, segment.lane, block.stack, known=True)
        for segment in recording.segments
        for block in segment.blocks
        if block.live and block.address in untouched
    ]


def _sized(
    recording: Recording, spans: dict[int, Span], freed: list[_Freed], stay: list[OlderBlock]
) -> tuple[list[OlderBlock], list[_Freed]]:
    """The older blocks, those that were freed with the sizes that what lies behind them leaves; and which those are."""
    settings, starts = recording.settings, sorted(spans)
    final = {b.address: b for s in recording.segments for b in s.blocks if b.live}
    reaches = [_reach(each, settings, spans, starts) for each in freed]
    earliest = _first_allocations(recording, freed, reaches)
    # Of a block that was allocated and freed, a second free is no sign that one was there before.
    kept = [(each, reach) for each, reach in zip(freed, reaches, strict=True)
            if earliest.get(each.address, len(recording)) > each.event]  # fmt: skip
    places, fixed = sorted(earliest), sorted([block.address for block in stay] + [each.address for each, _ in kept])
    firsts = np.array([earliest[place] for place in places], dtype=np.int64)
    blocks = []
    for each, reach in kept:
        want = size = settings.round_size(each.requested)
        still = final.get(each.address) if each.gone == len(recording) else None
        if still is not None:
            size = still.size
        elif reach > each.address:
            low, high = bisect_right(places, each.address), bisect_right(places, reach)
            (near,) = np.nonzero(firsts[low:high] < each.gone)
            j = bisect_right(fixed, each.address)
            behind = [*(places[low + i] for i in near[:1].tolist()), *fixed[j : j + 1], _stop(each, spans, starts)]
            if min(behind) <= reach:
                size = max(want, min(behind) - each.address)
        stack = still.stack if still is not None else 0
        known = still is not None or size > want
        blocks.append(OlderBlock(each.address, size, each.requested, each.lane, stack, known))
    return blocks + stay, [each for each, _ in kept]


def _stop(each: _Freed, spans: dict[int, Span], starts: list[int]) -> int:
    """Where the memory from the driver ends that starts last below a block."""
    start = starts[bisect_right(starts, each.address) - 1]
    return start + spans[start].size


def _reach(each: _Freed, settings: AllocatorSettings, spans: dict[int, Span], starts: list[int]) -> int:
    """How far a block may have reached at most; its own address where it is not larger than what was asked for."""
    i = bisect_right(starts, each.address) - 1
    if i < 0 or spans[starts[i]].small or settings.expandable_segments:
        return each.address
    want, stop = settings.round_size(each.requested), _stop(each, spans, starts)
    whole = settings.max_split_size_mb is not None and want >= settings.max_split_size_mb * MIB
    return stop if whole else min(stop, each.address + want + SMALL_LIMIT)


def _first_allocations(recording: Recording, freed: list[_Freed], reaches: list[int]) -> dict[int, int]:
    """By address, the first allocation at each that lies between a block and its reach."""
    found: dict[int, int] = {}
    lows = np.array([each.address for each in freed], dtype=np.int64)
    highs = np.maximum.accumulate(np.array(reaches, dtype=np.int64))
    stop = max((each.gone for each in freed), default=0)
    for begin, (actions, addresses) in stretches(recording.actions, recording.addresses, stop=stop):
        (at,) = np.nonzero(actions == ALLOC)
        below = np.searchsorted(lows, addresses[at], side="right") - 1
        at = at[(below >= 0) & (addresses[at] <= np.maximum(highs[below], lows[below]))]
        places, first = np.unique(addresses[at], return_index=True)
        for place, event in zip(places.tolist(), (begin + at[first]).tolist(), strict=True):
            found.setdefault(place, event)
    return found
