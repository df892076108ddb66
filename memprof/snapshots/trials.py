"""What if: a recording's allocations under other settings, on another card, without some of them. All predicted.

Each answer is a replay through memprof's model of the allocator, with a limit where there is one: the driver refuses,
cached memory is given back, and only then does a request fail, as in torch. Which cached segments stood before the
recording under other settings, nobody recorded; so a trial with other settings starts empty, allocates what was in use
at the start (in the order of addresses), and then follows the events.

A recorded return of memory is either the user's ``empty_cache()``, which a trial repeats, or came of pressure (a
request to the driver follows at once), which a trial must find for itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import numpy as np
import numpy.typing as npt

from memprof.errors import OutOfMemory
from memprof.simulator.allocator import ROUND_LARGE, AllocatorSettings, CachingAllocator
from memprof.snapshots.lives import Lives, Program
from memprof.snapshots.recording import (
    ALLOC,
    FREE_COMPLETED,
    OOM,
    SEGMENT_ALLOC,
    SEGMENT_FREE,
    SEGMENT_MAP,
    SEGMENT_UNMAP,
    Ints,
)
from memprof.snapshots.replay import take_over

#: A card that is larger than any: addresses of expandable segments are kept for 9/8 of it.
_LARGE = 2**41
_EMPTY = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class Room:
    """How much the driver would give: the card, less the context and whatever others took. ``source`` in words."""

    n_bytes: int
    source: str
    #: Whether it is known, or only that it was no more.
    exact: bool = True


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a trial ended. Sizes in bytes; the peaks are those up to the refusal, where there was one."""

    fits: bool
    peak_allocated: int
    peak_reserved: int


@dataclass(frozen=True, slots=True)
class WhatIf:
    """The same allocations under other settings (predicted). Sizes in bytes."""

    settings: str
    #: Reserved at its highest in the room that was there; without a limit where no limit is known.
    peak_reserved_bytes: int
    peak_allocated_bytes: int
    #: The recorded settings, tried in the same way: what to compare with.
    baseline_reserved_bytes: int
    #: baseline minus this; negative where the settings would cost memory.
    saved_bytes: int
    #: Whether everything fits in the room that was there; None where no limit is known.
    fits: bool | None
    #: The least room in which everything still fits.
    smallest_card_bytes: int
    baseline_smallest_card_bytes: int

    def to_json(self) -> dict[str, str | int | bool | None]:
        """Every field by its name."""
        return asdict(self)


class Trials:
    """Tries a recording, or its first events, under whatever one wants to know.

    Args:
        lives: The recording's blocks.
        room: The limit that was there, if it is known.
        stop: The event before which trials end; None: all events. Where that event is an ``oom``, what it asked for is
            the last thing that a trial allocates.
    """

    def __init__(self, lives: Lives, room: Room | None = None, stop: int | None = None) -> None:
        self.lives, self.room = lives, room
        recording = lives.recording
        self.stop = len(recording) if stop is None else stop
        self._program = lives.program(self.stop)
        self._returns = returns(lives, room_of(lives))
        self._extra: tuple[int, int] | None = None
        if stop is not None and stop < len(recording) and recording.actions[stop] == OOM:
            self._extra = int(recording.sizes[stop]), int(recording.lane_ids[stop])
        self._private = [i for i, lane in enumerate(recording.lanes) if _is_private(lane)]

    def run(
        self,
        settings: AllocatorSettings | None = None,
        room: int | None = None,
        *,
        as_recorded: bool = False,
        empty_at: int | None = None,
        without: npt.NDArray[np.bool_] | None = None,
    ) -> Outcome:
        """One trial.

        Args:
            settings: None: the recorded ones.
            room: Bytes that the driver gives; None: any number.
            as_recorded: Start with the memory and blocks as they lay, not from an empty allocator.
            empty_at: Call ``empty_cache()`` after this event, too.
            without: For each block, whether it is left out.
        """
        settings = settings or self.lives.recording.settings
        allocator = _allocator(settings, room)
        for lane in self._private:
            allocator.keep(lane)
        wants: list[int] = settings.round_sizes(self.lives.requested).tolist()
        live = [0] * len(wants)
        try:
            self._begin(allocator, wants, live, as_recorded, without)
            for start, stop, lane in self._program.turns():
                orders = self._orders(self._program, start, stop, empty_at, without)
                allocator.follow(_told(orders, allocator), wants, live, lane)
            if self._extra is not None:
                allocator.malloc(*self._extra)
        except OutOfMemory:
            return Outcome(False, allocator.peak_allocated, allocator.peak_reserved)
        return Outcome(True, allocator.peak_allocated, allocator.peak_reserved)

    def _begin(
        self,
        allocator: CachingAllocator,
        wants: list[int],
        live: list[int],
        as_recorded: bool,
        without: npt.NDArray[np.bool_] | None,
    ) -> None:
        """Allocate what was in use when the recording began."""
        made = len(wants) - len(self.lives.older)
        if as_recorded:
            take_over(allocator, self.lives)
        for number, block in sorted(enumerate(self.lives.older, made), key=lambda pair: pair[1].address):
            if as_recorded:
                live[number] = allocator.row_at(block.address)
                if without is not None and without[number] and live[number]:
                    allocator.follow([~number], wants, live)
            elif without is None or not without[number]:
                allocator.follow([number], wants, live, block.lane)

    def _orders(
        self, program: Program, start: int, stop: int, empty_at: int | None, without: npt.NDArray[np.bool_] | None
    ) -> Iterator[int]:
        """The numbers of a stretch as the allocator takes them, and :data:`_EMPTY` where the cache is emptied."""
        emptied = 0 if empty_at is None else int(np.searchsorted(program.events, empty_at, side="right"))
        for begin in range(start, stop, 2**16):
            part = slice(begin, min(begin + 2**16, stop))
            actions, numbers = program.actions[part], program.numbers[part].astype(np.int64)
            orders = np.where(actions == ALLOC, numbers, np.where(actions == FREE_COMPLETED, ~numbers, _EMPTY))
            kept = (actions == ALLOC) | (actions == FREE_COMPLETED) | np.isin(program.events[part], self._returns)
            if without is not None:
                about = (actions == ALLOC) | (actions == FREE_COMPLETED)
                kept &= ~(about & without[np.where(about, numbers, 0)])
            if part.start < emptied <= part.stop:
                at = emptied - part.start
                orders, kept = np.insert(orders, at, _EMPTY), np.insert(kept, at, True)
            yield from orders[kept].tolist()

    def smallest(self, settings: AllocatorSettings | None = None, halvings: int = 64) -> int:
        """A room, in bytes, in which everything fits: the least to the nearest 2 MiB above, if ``halvings`` suffice."""
        settings = settings or self.lives.recording.settings
        low = self.least(settings) // ROUND_LARGE
        if self.run(settings, low * ROUND_LARGE).fits:
            return low * ROUND_LARGE
        high = max(low + 1, -(-self.run(settings).peak_reserved // ROUND_LARGE))
        while high - low > 1 and halvings > 0:
            middle, halvings = (low + high) // 2, halvings - 1
            if self.run(settings, middle * ROUND_LARGE).fits:
                high = middle
            else:
                low = middle
        return high * ROUND_LARGE

    def least(self, settings: AllocatorSettings | None = None, without: npt.NDArray[np.bool_] | None = None) -> int:
        """Bytes that no room can be below, rounded up to 2 MiB: all blocks that are there at once."""
        settings = settings or self.lives.recording.settings
        wants = settings.round_sizes(self.lives.requested)
        if without is not None:
            wants = np.where(without, 0, wants)
        change = np.zeros(len(self.lives.recording) + 2, dtype=np.int64)
        np.add.at(change, self.lives.born + 1, wants)
        np.subtract.at(change, np.minimum(self.lives.gone, len(change) - 2) + 1, wants)
        level = change.cumsum()[: self.stop + 1]
        extra = settings.round_size(self._extra[0]) if self._extra else 0
        return -(-max(int(level.max()), int(level[-1]) + extra) // ROUND_LARGE) * ROUND_LARGE

    def what_if(self, name: str, settings: AllocatorSettings) -> WhatIf:
        """What ``settings`` would have led to; ``name`` is how they were asked for."""
        room = self.room.n_bytes if self.room else None
        before, after = self.run(room=room), self.run(settings, room)
        return WhatIf(
            settings=name,
            peak_reserved_bytes=after.peak_reserved,
            peak_allocated_bytes=after.peak_allocated,
            baseline_reserved_bytes=before.peak_reserved,
            saved_bytes=before.peak_reserved - after.peak_reserved,
            fits=after.fits if self.room else None,
            smallest_card_bytes=self.smallest(settings),
            baseline_smallest_card_bytes=self.smallest(),
        )


def room_of(lives: Lives) -> Room | None:
    """The limit under which a recording was made: from its last ``oom``, else from where memory was given back.

    An out-of-memory event says what the device still had; with what was reserved, that is the room. Where cached memory
    went back and a request to the driver followed at once, both together were more than there was.
    """
    recording = lives.recording
    (ooms,) = np.nonzero(recording.actions == OOM)
    if len(ooms):
        last = int(ooms[-1])
        reserved, free = int(lives.reserved[last]), int(recording.addresses[last])
        return Room(reserved + free, "what was reserved and free when memory ran out")
    peak = int(lives.reserved.max(initial=lives.reserved_at_start))
    bounds = [had + asked - 1 for _, had, asked in _bursts(lives) if asked and had + asked > peak]
    return Room(min(bounds), "more was refused once", exact=False) if bounds else None


def returns(lives: Lives, room: Room | None) -> Ints:
    """The events at which the user emptied the cache: memory went back, and not because of ``room``."""
    limit = room.n_bytes if room else None
    own = [at for at, had, asked in _bursts(lives) if asked is not None and (limit is None or had + asked <= limit)]
    return np.array(own, dtype=np.int64)


def _bursts(lives: Lives) -> list[tuple[int, int, int | None]]:
    """Every run of events that give memory back: its first event, bytes reserved before, bytes asked for after it.

    Asked for is 0 where something else follows, and None where that is an ``oom``. Memory that goes back under pressure
    does so in the middle of a request and carries its stack, so a request with another stack only happens to come next.
    """
    recording = lives.recording
    giving = (SEGMENT_FREE, SEGMENT_UNMAP)
    (at,) = np.nonzero(np.isin(recording.actions, (ALLOC, FREE_COMPLETED, SEGMENT_ALLOC, SEGMENT_MAP, OOM, *giving)))
    gives = np.isin(recording.actions[at], giving)
    (first,) = np.nonzero(gives & ~np.concatenate([[False], gives[:-1]]))
    (last,) = np.nonzero(gives & ~np.concatenate([gives[1:], [False]]))
    found = []
    for begin, end in zip(at[first].tolist(), last.tolist(), strict=True):
        had = int(lives.reserved[begin - 1]) if begin else lives.reserved_at_start
        after = int(at[end + 1]) if end + 1 < len(at) else -1
        action = int(recording.actions[after]) if after >= 0 else -1
        asked = int(recording.sizes[after]) if action in (SEGMENT_ALLOC, SEGMENT_MAP) else None if action == OOM else 0
        if after >= 0 and recording.stack_ids[begin] != recording.stack_ids[after]:
            asked = 0
        found.append((begin, had, asked))
    return found


def _allocator(settings: AllocatorSettings, room: int | None) -> CachingAllocator:
    """An empty allocator whose driver gives ``room`` bytes."""
    if room is None:
        return CachingAllocator(settings)
    share = settings.per_process_memory_fraction
    if share < 1:
        return CachingAllocator(settings, int(room / share) + 1)
    large = max(_LARGE, 2 * room)
    return CachingAllocator(replace(settings), large, large - room)


def _told(orders: Iterator[int], allocator: CachingAllocator) -> Iterator[int]:
    """The events alone; the cache is emptied where that was said."""
    for order in orders:
        if order == _EMPTY:
            allocator.empty_cache()
        else:
            yield order


def _is_private(lane: object) -> bool:
    """Whether a lane, a (stream, pool id), is a pool of its own: (0, 0) is the one that all share."""
    return isinstance(lane, tuple) and len(lane) == 2 and lane[1] != (0, 0)
