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
from itertools import islice

import numpy as np

from memprof.errors import OutOfMemory
from memprof.simulator.allocator import ROUND_LARGE, AllocatorSettings, CachingAllocator
from memprof.snapshots.columns import gathered, stretches
from memprof.snapshots.lives import Lives
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
#: Beside the actions of a recording: to empty the cache.
_EMPTY = -1
GIVING = (SEGMENT_FREE, SEGMENT_UNMAP)


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
        without: Ints | None = None,
    ) -> Outcome:
        """One trial.

        Args:
            settings: None: the recorded ones.
            room: Bytes that the driver gives; None: any number.
            as_recorded: Start with the memory and blocks as they lay, not from an empty allocator.
            empty_at: Call ``empty_cache()`` after this event, too.
            without: The numbers of blocks that are left out.
        """
        settings = settings or self.lives.recording.settings
        allocator = _allocator(settings, room)
        for lane in self._private:
            allocator.keep(lane)
        trial = _Trial(self.lives, self._returns, allocator, settings, without)
        try:
            trial.begin(as_recorded)
            if empty_at is not None:
                trial.follow(0, min(empty_at + 1, self.stop))
                allocator.empty_cache()
            trial.follow(0 if empty_at is None else empty_at + 1, self.stop)
            if self._extra is not None:
                allocator.malloc(*self._extra)
        except OutOfMemory:
            return Outcome(False, allocator.peak_allocated, allocator.peak_reserved)
        return Outcome(True, allocator.peak_allocated, allocator.peak_reserved)

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

    def least(self, settings: AllocatorSettings | None = None, without: Ints | None = None) -> int:
        """Bytes that no room can be below, rounded up to 2 MiB: all blocks that are there at once."""
        settings = settings or self.lives.recording.settings
        lives = self.lives
        most = last = int(_wants(lives, settings, lives.older_numbers, without).sum())
        for levels in lives.levels(lives.freed, lambda numbers: _wants(lives, settings, numbers, without), self.stop):
            most, last = max(most, int(levels.max())), int(levels[-1])
        extra = settings.round_size(self._extra[0]) if self._extra else 0
        return -(-max(most, last + extra) // ROUND_LARGE) * ROUND_LARGE

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


class _Trial:
    """One run of the blocks through ``allocator``, which knows them by their slots."""

    def __init__(
        self,
        lives: Lives,
        returns: Ints,
        allocator: CachingAllocator,
        settings: AllocatorSettings,
        without: Ints | None,
    ) -> None:
        self._lives, self._returns, self._without = lives, returns, without
        self._allocator, self._settings = allocator, settings
        self._wants, self._live = [0] * lives.most_slots, [0] * lives.most_slots

    def begin(self, as_recorded: bool) -> None:
        """Allocate what was in use when the recording began."""
        lives, allocator, live = self._lives, self._allocator, self._live
        if as_recorded:
            take_over(allocator, lives)
        sizes = _wants(lives, self._settings, lives.older_numbers, self._without).tolist()
        away = np.isin(lives.older_numbers, () if self._without is None else self._without).tolist()
        rows = zip(lives.older, lives.slots[lives.made :].tolist(), sizes, away, strict=True)
        for block, slot, self._wants[slot], left_out in sorted(rows, key=lambda row: row[0].address):
            if as_recorded:
                live[slot] = allocator.row_at(block.address)
                if left_out:
                    allocator.follow([~slot], self._wants, live)
            elif not left_out:
                allocator.follow([slot], self._wants, live, block.lane)

    def follow(self, start: int, stop: int) -> None:
        """Run the events from number ``start`` up to ``stop``; a block that is left out is one of no bytes."""
        for part in self._lives.program(start, stop):
            low, high = np.searchsorted(self._returns, part.events[[0, -1]] + (0, 1))
            actions = np.where(np.isin(part.events, self._returns[low:high]), _EMPTY, part.actions)
            wants = _wants(self._lives, self._settings, np.maximum(part.numbers, 0), self._without)
            rows = zip(actions.tolist(), part.slots.tolist(), wants.tolist(), strict=True)
            for lane, count in part.turns:
                self._allocator.follow(self._orders(islice(rows, count)), self._wants, self._live, lane)

    def _orders(self, rows: Iterator[tuple[int, int, int]]) -> Iterator[int]:
        """The events for the allocator; the cache is emptied where the user did that."""
        for action, slot, want in rows:
            if action == ALLOC:
                if self._live[slot]:
                    yield ~slot
                self._wants[slot] = want
                yield slot
            elif action == FREE_COMPLETED:
                yield ~slot
            elif action == _EMPTY:
                self._allocator.empty_cache()


def _wants(lives: Lives, settings: AllocatorSettings, numbers: Ints, without: Ints | None) -> Ints:
    """The rounded bytes of the blocks ``numbers``; 0 for those that are left out."""
    wants = settings.round_sizes(lives.requested(numbers))
    return wants if without is None else np.where(np.isin(numbers, without), 0, wants)


def room_of(lives: Lives) -> Room | None:
    """The limit under which a recording was made: from its last ``oom``, else from where memory was given back.

    An out-of-memory event says what the device still had; with what was reserved, that is the room. Where cached memory
    went back and a request to the driver followed at once, both together were more than there was.
    """
    last = lives.recording.last_oom
    if last is not None:
        reserved, free = int(lives.reserved[last]), int(lives.recording.addresses[last])
        return Room(reserved + free, "what was reserved and free when memory ran out")
    peak = int(lives.reserved.max(initial=lives.reserved_at_start))
    bounds = (had + asked - 1 for _, had, asked in _bursts(lives) if asked and had + asked > peak)
    least = min(bounds, default=None)
    return None if least is None else Room(least, "more was refused once", exact=False)


def returns(lives: Lives, room: Room | None) -> Ints:
    """The events at which the user emptied the cache: memory went back, and not because of ``room``."""
    limit = room.n_bytes if room else None
    own = (at for at, had, asked in _bursts(lives) if asked is not None and (limit is None or had + asked <= limit))
    return gathered("q", (np.array([at]) for at in own))


def _bursts(lives: Lives) -> Iterator[tuple[int, int, int | None]]:
    """Every run of events that give memory back: its first event, bytes reserved before, bytes asked for after it.

    Asked for is 0 where something else follows, and None where that is an ``oom``. Memory that goes back under pressure
    does so in the middle of a request and carries its stack, so a request with another stack only happens to come next.
    """
    first = None
    for begin, (actions,) in stretches(lives.recording.actions):
        (at,) = np.nonzero(np.isin(actions, (ALLOC, FREE_COMPLETED, SEGMENT_ALLOC, SEGMENT_MAP, OOM, *GIVING)))
        gives = np.isin(actions[at], GIVING)
        before = np.concatenate([[first is not None], gives[:-1]])[: len(at)]
        for event in (begin + at[gives != before]).tolist():
            if first is None:
                first = event
            else:
                yield _burst(lives, first, event)
                first = None
    if first is not None:
        yield _burst(lives, first, None)


def _burst(lives: Lives, first: int, after: int | None) -> tuple[int, int, int | None]:
    """One of :func:`_bursts`, from ``first`` on; ``after`` is the event that follows it."""
    recording = lives.recording
    had = int(lives.reserved[first - 1]) if first else lives.reserved_at_start
    if after is None or recording.stack_ids[first] != recording.stack_ids[after]:
        return first, had, 0
    if recording.actions[after] == OOM:
        return first, had, None
    return first, had, int(recording.sizes[after]) if recording.actions[after] in (SEGMENT_ALLOC, SEGMENT_MAP) else 0


def _allocator(settings: AllocatorSettings, room: int | None) -> CachingAllocator:
    """An empty allocator whose driver gives ``room`` bytes."""
    if room is None:
        return CachingAllocator(settings)
    share = settings.per_process_memory_fraction
    if share < 1:
        return CachingAllocator(settings, int(room / share) + 1)
    large = max(_LARGE, 2 * room)
    return CachingAllocator(replace(settings), large, large - room)


def _is_private(lane: object) -> bool:
    """Whether a lane, a (stream, pool id), is a pool of its own: (0, 0) is the one that all share."""
    return isinstance(lane, tuple) and len(lane) == 2 and lane[1] != (0, 0)
