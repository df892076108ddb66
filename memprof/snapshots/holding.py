"""Who holds what at one instant of a recording, and what lies unused between them. Sizes are bytes throughout."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache

import numpy as np

from memprof.simulator.allocator import SMALL_SEGMENT
from memprof.snapshots.recording import Frame, Ints, Recording
from memprof.snapshots.replay import Replayed
from memprof.snapshots.sites import BEFORE_RECORDING, call_site
from memprof.units import MIB

Way = Callable[[Sequence[Frame]], str]


@dataclass(frozen=True, slots=True)
class Fragmentation:
    """What was reserved but not allocated at one instant, in bytes."""

    allocated_bytes: int
    reserved_bytes: int
    #: reserved minus allocated.
    cached_bytes: int
    #: cached / reserved.
    share: float
    #: Cached bytes in segments that are partly in use: ``empty_cache`` cannot give them back.
    stuck_bytes: int
    largest_free_block_bytes: int

    def to_json(self) -> dict[str, int | float]:
        """Every field by its name."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class SiteHolder:
    """What one call site (or module, or operator) held at one instant."""

    site: str
    bytes: int
    blocks: int
    #: Of all that was allocated then.
    share: float

    def to_json(self) -> dict[str, str | int | float]:
        """Every field by its name."""
        return asdict(self)


@dataclass(frozen=True)
class Instant:
    """The memory at one instant: every block that counts as allocated, every one that takes room, every segment.

    Attributes:
        stacks: The stack of each allocated block; -1 for one of which only is known that it was there before.
        sizes: Its bytes.
        occupied: ``(address, bytes)`` of each block that nothing else can use, by address.
        spans: ``(address, bytes, page)`` of the memory got from the driver; page is 0 where only all of it goes back.
    """

    recording: Recording
    stacks: Ints
    sizes: Ints
    occupied: list[tuple[int, int]]
    spans: list[tuple[int, int, int]]

    @classmethod
    def of(cls, replayed: Replayed, event: int) -> Instant:
        """After event number ``event`` (-1: before the first)."""
        lives = replayed.lives
        held, taken = lives.held_at(event), lives.occupied_at(event)
        where = zip(lives.addresses(taken).tolist(), replayed.granted[taken].tolist(), strict=True)
        spans = [
            (address, span.size, _page(lives.recording, span.small) if span.expandable else 0)
            for address, span in sorted(lives.spans_at(event).items())
        ]
        return cls(lives.recording, lives.stacks(held), replayed.granted[held], sorted(where), spans)

    @classmethod
    def at_end(cls, recording: Recording) -> Instant:
        """When the snapshot was taken, without any replay."""
        live = [(b, s) for s in recording.segments for b in s.blocks if b.live]
        spans = [(s.address, s.size, _page(recording, s.small) if s.expandable else 0) for s in recording.segments]
        return cls(
            recording,
            np.array([block.stack for block, _ in live], dtype=np.int64),
            np.array([block.size for block, _ in live], dtype=np.int64),
            sorted((block.address, block.size) for block, _ in live),
            spans,
        )

    @property
    def allocated(self) -> int:
        """Bytes in blocks."""
        return int(self.sizes.sum())

    @property
    def reserved(self) -> int:
        """Bytes got from the driver."""
        return sum(size for _, size, _ in self.spans)

    def fragmentation(self) -> Fragmentation:
        """What lies unused between the blocks."""
        stuck, largest = 0, 0
        for start, size, page, gaps in self._gaps():
            for at, n_bytes in gaps:
                largest = max(largest, n_bytes)
                if n_bytes < size:
                    stuck += n_bytes - (_whole_pages(at - start, n_bytes, page) if page else 0)
        allocated, reserved = self.allocated, self.reserved
        cached = max(0, reserved - allocated)
        return Fragmentation(allocated, reserved, cached, cached / reserved if reserved else 0.0, stuck, largest)

    def _gaps(self) -> Iterable[tuple[int, int, int, list[tuple[int, int]]]]:
        """Of each segment its start, bytes, page, and ``(address, bytes)`` of the gaps between its blocks."""
        i, blocks = 0, self.occupied
        for start, size, page in self.spans:
            at, gaps = start, []
            while i < len(blocks) and blocks[i][0] < start:
                i += 1
            while i < len(blocks) and blocks[i][0] < start + size:
                address, n_bytes = blocks[i]
                if address > at:
                    gaps.append((at, address - at))
                at = max(at, address + n_bytes)
                i += 1
            if at < start + size:
                gaps.append((at, start + size - at))
            yield start, size, page, gaps

    def holders(self, way: Way = call_site) -> tuple[SiteHolder, ...]:
        """Who holds what is allocated, the largest first."""
        label = labeller(self.recording, way)
        sums: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
        numbers, place, counts = np.unique(self.stacks, return_inverse=True, return_counts=True)
        held = np.bincount(place.reshape(-1), self.sizes, len(numbers)).astype(np.int64)
        for number, n_bytes, count in zip(numbers.tolist(), held.tolist(), counts.tolist(), strict=True):
            entry = sums[label(number)]
            entry[0] += n_bytes
            entry[1] += count
        total = max(self.allocated, 1)
        found = [SiteHolder(site, n, count, n / total) for site, (n, count) in sums.items()]
        return tuple(sorted(found, key=lambda holder: (-holder.bytes, holder.site)))


def labeller(recording: Recording, way: Way) -> Callable[[int], str]:
    """The label of a stack by its number; -1 stands for what was there before the recording."""

    @cache
    def label(number: int) -> str:
        return BEFORE_RECORDING if number < 0 else way(recording.stacks[number])

    return label


def _page(recording: Recording, small: bool) -> int:
    return SMALL_SEGMENT if small else recording.settings.large_segment_size_mb * MIB


def _whole_pages(offset: int, n_bytes: int, page: int) -> int:
    """Bytes of the whole pages between ``offset`` and ``offset + n_bytes`` of a range."""
    first, last = -(-offset // page) * page, (offset + n_bytes) // page * page
    return max(0, last - first)
