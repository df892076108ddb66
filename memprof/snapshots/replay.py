"""A recording run again through memprof's model of the allocator, decision by decision.

Every address that the model chooses and every segment that it asks for is compared with the recorded one. Where all
agree, what the same allocator says of other settings can be believed.

A block is counted as allocated until its free was *requested*, as torch's ``allocated_bytes`` counts it, and can be
used again once its free was *completed* (``record_stream`` may delay that). Sizes are bytes throughout.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice

import numpy as np

from memprof.simulator.allocator import SMALL_LIMIT, SMALL_SEGMENT, CachingAllocator
from memprof.snapshots.columns import Column, gathered
from memprof.snapshots.lives import Lives, trace_lives
from memprof.snapshots.recording import (
    ALLOC,
    FREE_COMPLETED,
    HIGHEST_ADDRESS,
    SEGMENT_ALLOC,
    SEGMENT_FREE,
    SEGMENT_MAP,
    Ints,
    Recording,
)
from memprof.snapshots.spans import Span, Spans

#: How many older blocks may be given another size before memprof says that the replay is not exact.
MOST_MENDED = 64


@dataclass(frozen=True, slots=True)
class ReplayCheck:
    """How much of the recording the model reproduced, decision by decision."""

    addresses_matched: int
    addresses_total: int
    segments_matched: int
    segments_total: int

    @property
    def exact(self) -> bool:
        """Whether every address and every segment agreed."""
        return (self.addresses_matched, self.segments_matched) == (self.addresses_total, self.segments_total)

    def to_json(self) -> dict[str, int]:
        """The four counts."""
        return asdict(self)


@dataclass(frozen=True)
class Replayed:
    """What the replay found.

    Attributes:
        lives: The blocks, the older ones with the sizes under which most addresses came out.
        check: How much agreed.
        granted: Bytes of each block: the request, its rounding, and what was too little to split off.
    """

    lives: Lives
    check: ReplayCheck
    granted: Ints

    def allocated(self) -> Ints:
        """Bytes allocated after each event."""
        return gathered("q", self.lives.levels(self.lives.ended, self.granted.__getitem__))


def check_replay(recording: Recording) -> ReplayCheck:
    """Replay a recording and count the addresses and segments on which model and recording agree."""
    return replayed(recording).check


def replayed(recording: Recording) -> Replayed:
    """Replay a recording; where an address does not come out because of an older block's size, mend that size."""
    lives = trace_lives(recording)
    best = player = _Player(lives)
    player.play()
    for _ in range(MOST_MENDED):
        mended = player.mended()
        if mended is None:
            break
        player = _Player(mended)
        player.play()
        if player.addresses_matched > best.addresses_matched:
            best = player
    return Replayed(best.lives, best.check(), best.granted())


class _Player:
    """Runs a recording through the model of the allocator, with the recorded addresses for new segments."""

    def __init__(self, lives: Lives) -> None:
        self.lives, self.recording = lives, lives.recording
        self._asked: list[tuple[int, int, int]] = []  # recorded segment events since the last allocation
        self._unmapped: set[tuple[int, int]] = set()
        self._elsewhere = HIGHEST_ADDRESS  # where the model's own segments go, if the recording has none for them
        self._held = Spans({})  # the model's memory, whosever it is
        for address, span in lives.spans.items():
            self._held.add(address, Span(span.size, 0, False, span.expandable))
        self.allocator = CachingAllocator(self.recording.settings, place=self._place, on_segment=self._saw_segment)
        # By slot: the bytes of the block that has it, and its row in the allocator's table.
        self._wants, self._live = [0] * lives.most_slots, [0] * lives.most_slots
        self._granted = Column("q")
        self._left_of: tuple[int, int, int] | None = None  # the first wrong address, bytes asked, bytes free there
        self.addresses_matched = self.addresses_total = self.segments_matched = self.segments_total = 0
        self._adopt()

    def _adopt(self) -> None:
        """Take over the memory and the blocks that stood when the recording began."""
        take_over(self.allocator, self.lives)
        slots = self.lives.slots[self.lives.made :].tolist()
        for slot, block in zip(slots, self.lives.older, strict=True):
            self._live[slot] = row = self.allocator.row_at(block.address)
            self._wants[slot] = self.allocator.where(row)[1]
        self._of_older = np.array([self._wants[slot] for slot in slots], dtype=np.int64)

    def play(self) -> None:
        """Run all events, a stretch of one lane at a time."""
        recording = self.recording
        for part in self.lives.program():
            addresses, sizes = recording.addresses[part.events], recording.sizes[part.events]
            columns = (part.actions, addresses, sizes, recording.settings.round_sizes(sizes), part.slots)
            rows = zip(*(column.tolist() for column in columns), strict=True)
            for lane, count in part.turns:
                self.allocator.follow(self._events(islice(rows, count)), self._wants, self._live, lane)
            self._granted.settle()

    def _events(self, rows: Iterator[tuple[int, int, int, int, int]]) -> Iterator[int]:
        """The events for the allocator; between two of them its choices are compared with the recording."""
        wants, live, where, asked = self._wants, self._live, self.allocator.where, self._asked
        grant = self._granted.tail.append
        matched = total = 0
        for action, address, size, want, slot in rows:
            if action == ALLOC:
                total += 1
                if live[slot]:
                    yield ~slot
                wants[slot] = want
                yield slot
                grant(wants[slot])
                chosen, _ = where(live[slot])
                if chosen == address:
                    matched += 1
                elif self._left_of is None:
                    self._left_of = chosen, size, address
                if asked:
                    asked.clear()
                    self._unmapped.clear()
            elif action == FREE_COMPLETED:
                yield ~slot
            else:
                self._segment(action, address, size)
        self.addresses_matched += matched
        self.addresses_total += total

    def _segment(self, action: int, address: int, size: int) -> None:
        """A recorded event about memory from the driver: what the model does then, and whether it agrees."""
        self.segments_total += 1
        if action in (SEGMENT_ALLOC, SEGMENT_MAP):
            self._asked.append((action, address, size))
        elif action == SEGMENT_FREE:
            self.segments_matched += self.allocator.release(address, size)
        else:
            if (address, size) not in self._unmapped:
                self.allocator.empty_cache()
            self.segments_matched += (address, size) in self._unmapped
            self._unmapped.discard((address, size))

    def _place(self, n_bytes: int) -> int:
        """The recorded address of the segment, or of the first page, that the model asks for; else one far away.

        So also where the model still has what the recording had given back by then: no memory lies in two segments.
        """
        for action, address, size in self._asked:
            if (action == SEGMENT_MAP or size == n_bytes) and self._held.is_free(address, size):
                return address
        self._elsewhere += n_bytes + SMALL_SEGMENT
        return self._elsewhere - n_bytes

    def _saw_segment(self, kind: str, address: int, n_bytes: int) -> None:
        if kind in ("segment_alloc", "segment_map"):
            self._held.add(address, Span(n_bytes, 0, False, kind == "segment_map"))
        else:
            self._held.cut(address, n_bytes)
        if kind == "segment_unmap":
            self._unmapped.add((address, n_bytes))
        action = {"segment_alloc": SEGMENT_ALLOC, "segment_map": SEGMENT_MAP}.get(kind)
        if action is not None and (action, address, n_bytes) in self._asked:
            self._asked.remove((action, address, n_bytes))
            self.segments_matched += 1

    def check(self) -> ReplayCheck:
        """The counts so far."""
        return ReplayCheck(self.addresses_matched, self.addresses_total, self.segments_matched, self.segments_total)

    def granted(self) -> Ints:
        """Bytes of each block."""
        self._granted.extend(self._of_older)
        return self._granted.whole()

    def mended(self) -> Lives | None:
        """The same blocks, one older one larger: the one whose end is where the model first chose wrongly.

        What is free behind it was then too small for the request that the model put there, so the block is larger by
        what makes it too small. None where no such block explains the first wrong address.
        """
        if self._left_of is None:
            return None
        chosen, asked, _ = self._left_of
        older = list(self.lives.older)
        for i, block in enumerate(older):
            if block.address + block.size == chosen and not block.known:
                least = self.recording.settings.round_size(block.requested)
                free = self._free_behind(chosen)
                grown = block.size + free - self.recording.settings.round_size(asked) + 512
                if block.size < grown <= least + SMALL_LIMIT:
                    older[i] = replace(block, size=grown)
                    return replace(self.lives, older=tuple(older))
        return None

    def _free_behind(self, address: int) -> int:
        """Bytes from ``address`` to the next older block, or to the end of the memory there, at the start."""
        starts = sorted(self.lives.spans)
        i = bisect_left(starts, address + 1) - 1
        if i < 0:
            return 0
        stop = starts[i] + self.lives.spans[starts[i]].size
        return min([b.address for b in self.lives.older if address <= b.address] + [stop]) - address


def take_over(allocator: CachingAllocator, lives: Lives) -> None:
    """Put an allocator into the state in which the recording began."""
    for base, span, blocks in _ranges(lives.spans, {block.address: block.size for block in lives.older}):
        allocator.adopt(base, blocks, small=span.small, stream=span.lane, expandable=span.expandable)


def _ranges(spans: dict[int, Span], sizes: dict[int, int]) -> list[tuple[int, Span, list[tuple[int, bool | None]]]]:
    """Every segment with its blocks as :meth:`CachingAllocator.adopt` takes them.

    The mapped parts of one expandable segment become one range, with the gaps between them.
    """
    addresses = sorted(sizes)
    ranges: list[tuple[int, Span, list[tuple[int, bool | None]]]] = []
    last: dict[tuple[int, bool], int] = {}
    end = 0
    for base in sorted(spans):
        span = spans[base]
        if base < end:  # nor two segments
            continue
        end = base + span.size
        blocks: list[tuple[int, bool | None]] = []
        at, stop = base, base + span.size
        for address in addresses[bisect_left(addresses, base) : bisect_left(addresses, stop)]:
            size = min(sizes[address], stop - address)
            if address < at:  # two blocks that overlap cannot both have been there
                continue
            if at < address:
                blocks.append((address - at, False))
            blocks.append((size, True))
            at = address + size
        if at < stop:
            blocks.append((stop - at, False))
        key = (span.lane, span.small)
        if span.expandable and key in last:
            first, _, before = ranges[last[key]]
            gap = base - first - sum(size for size, _ in before)
            before.extend([(gap, None)] if gap else [])
            before.extend(blocks)
        else:
            if span.expandable:
                last[key] = len(ranges)
            ranges.append((base, span, blocks))
    return [(base, span, _merged(blocks)) for base, span, blocks in ranges]


def _merged(blocks: list[tuple[int, bool | None]]) -> list[tuple[int, bool | None]]:
    """Neighbouring free blocks as one: they lie in one range."""
    merged: list[tuple[int, bool | None]] = []
    for size, state in blocks:
        if merged and state is not True and merged[-1][1] is state:
            merged[-1] = (merged[-1][0] + size, state)
        else:
            merged.append((size, state))
    return merged
