"""What a torch CUDA snapshot says: the peak, who held it, how fragmented it was, what other settings would have done.

The state before the recording is found by undoing the events from the final snapshot, last to first. From there the
events run forward again through :mod:`memprof.simulator.allocator`; every address it chooses and every segment it asks
for is compared with the recorded one. Where all agree, what the same allocator says of other settings can be believed.

A block is counted as allocated until its free was *requested*, as torch's ``allocated_bytes`` counts it, and can be
used again once its free was *completed* (``record_stream`` may delay that). Sizes are bytes throughout.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right, insort
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from memprof.errors import DataError
from memprof.records import Status
from memprof.simulator.allocator import SMALL_LIMIT, SMALL_SEGMENT, AllocatorSettings, CachingAllocator
from memprof.simulator.recording import (
    ALLOC,
    FREE_COMPLETED,
    FREE_REQUESTED,
    SEGMENT_ALLOC,
    SEGMENT_FREE,
    SEGMENT_MAP,
    SEGMENT_UNMAP,
    Frame,
    Recording,
    read_recordings,
)
from memprof.units import MIB

BEFORE_RECORDING = "(before the recording)"
NO_STACK = "(no stack recorded)"


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


@dataclass(frozen=True, slots=True)
class Fragmentation:
    """What was reserved but not allocated at the instant of the allocated peak, in bytes."""

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
    """What one call site held at the instant of the allocated peak."""

    site: str
    bytes: int
    blocks: int
    #: Of all that was allocated then.
    share: float

    def to_json(self) -> dict[str, str | int | float]:
        """Every field by its name."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class WhatIf:
    """The same allocations under other settings, from a fresh start (see :func:`what_if`). Sizes in bytes."""

    settings: str
    peak_reserved_bytes: int
    peak_allocated_bytes: int
    #: The recorded settings, from the same fresh start: what to compare with.
    baseline_reserved_bytes: int
    #: baseline minus this; negative where the settings would cost memory.
    saved_bytes: int

    def to_json(self) -> dict[str, str | int]:
        """Every field by its name."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class SnapshotReport:
    """Everything that ``memprof snapshot`` tells about one device of a file. Sizes in bytes."""

    file: str
    device: int
    #: ``predicted`` where memprof wrote the file, else ``measured``.
    status: Status
    events: int
    settings: str
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    #: Index of the event that set the allocated peak, -1 if that stood before the recording.
    peak_event: int
    fragmentation: Fragmentation
    holders: tuple[SiteHolder, ...]
    replay: ReplayCheck
    what_if: tuple[WhatIf, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """One JSON document, plain dicts and lists."""
        return asdict(self)


def analyse(path: Path, what_ifs: Sequence[str] = (), top: int = 10) -> SnapshotReport:
    """Read ``path`` and report on its busiest device: the ``top`` holders, and one answer per entry of ``what_ifs``.

    A ``what_ifs`` entry is what changes against the recorded settings: ``"expandable_segments=True"``, or several
    options with commas between them.

    Raises:
        DataError: The file is not a snapshot, is cut short, or holds anything but plain data.
        BadValue: An entry of ``what_ifs`` is not an allocator option.
    """
    recordings = [r for r in read_recordings(path) if len(r) or r.segments]
    if not recordings:
        raise DataError(f"{path}: the snapshot holds no events; call torch.cuda.memory._record_memory_history() first")
    recording = max(recordings, key=len)
    asked = [recording.settings.updated(text) for text in what_ifs]
    start = rewind(recording)
    whole = _Player(recording, start)
    whole.play(len(recording))
    at_peak = _Player(recording, start)
    at_peak.play(whole.peak_event + 1)
    answers: tuple[WhatIf, ...] = ()
    if asked:
        baseline = _fresh_peaks(recording, start, recording.settings)
        answers = tuple(
            _what_if(text, _fresh_peaks(recording, start, settings), baseline)
            for text, settings in zip(what_ifs, asked, strict=True)
        )
    return SnapshotReport(
        file=path.name,
        device=recording.device,
        status=recording.status,
        events=len(recording),
        settings=str(recording.settings) or "default",
        peak_allocated_bytes=whole.peak_allocated,
        peak_reserved_bytes=whole.peak_reserved,
        peak_event=whole.peak_event,
        fragmentation=at_peak.fragmentation(),
        holders=at_peak.holders()[:top],
        replay=whole.check(),
        what_if=answers,
    )


def check_replay(recording: Recording) -> ReplayCheck:
    """Replay a recording and count the addresses and segments on which model and recording agree."""
    player = _Player(recording, rewind(recording))
    player.play(len(recording))
    return player.check()


def what_if(recording: Recording, settings: AllocatorSettings) -> WhatIf:
    """The reserved peak that ``settings`` would have led to.

    Which cached segments stood before the recording under other settings, nobody recorded. So both this and the
    baseline start empty, allocate what was live at the start (in the order of addresses), and then follow the events.
    Recorded returns of segments count as ``empty_cache()``.
    """
    start = rewind(recording)
    baseline = _fresh_peaks(recording, start, recording.settings)
    return _what_if(str(settings) or "default", _fresh_peaks(recording, start, settings), baseline)


def _what_if(name: str, peaks: tuple[int, int], baseline: tuple[int, int]) -> WhatIf:
    (allocated, reserved), (_, before) = peaks, baseline
    return WhatIf(name, reserved, allocated, before, before - reserved)


# ---------------------------------------------------------------------------------------------------- back to the start


@dataclass(slots=True)
class Span:
    """Memory got from the driver: a segment, or a contiguous mapped part of an expandable one."""

    size: int
    lane: int
    small: bool
    expandable: bool


@dataclass(frozen=True, slots=True)
class LiveBlock:
    """A block that was in use when the recording began. Sizes in bytes."""

    size: int
    requested: int
    lane: int
    stack: int


@dataclass(frozen=True, slots=True)
class Start:
    """The state before the first event: memory and blocks in use, by address."""

    spans: dict[int, Span]
    live: dict[int, LiveBlock]


def rewind(recording: Recording) -> Start:
    """Undo every event from the final snapshot, last to first.

    Undoing an allocation frees its block. Undoing a free needs the block's size, of which the event tells only what was
    requested: the block is the request rounded up, or reaches to the end of the free space around it where the rest
    would have been too small to split off.
    """
    settings = recording.settings
    max_split = None if settings.max_split_size_mb is None else settings.max_split_size_mb * MIB
    spans = {s.address: Span(s.size, s.lane, s.small, s.expandable) for s in recording.segments}
    live = {
        block.address: LiveBlock(block.size, block.requested, segment.lane, block.stack)
        for segment in recording.segments
        for block in segment.blocks
        if block.live
    }
    span_starts, live_starts = sorted(spans), sorted(live)

    def add_span(address: int, span: Span) -> None:
        """Put memory into the map; neighbouring pages of one expandable segment become one span."""
        i = bisect_left(span_starts, address)
        if span.expandable:
            for neighbour in span_starts[max(i - 1, 0) : i + 1]:
                other = spans[neighbour]
                touches = address in (neighbour + other.size, neighbour - span.size)
                if touches and (other.lane, other.small, other.expandable) == (span.lane, span.small, True):
                    span_starts.remove(neighbour)
                    del spans[neighbour]
                    address, span = min(address, neighbour), replace(span, size=span.size + other.size)
        spans[address] = span
        insort(span_starts, address)

    def cut_span(address: int, size: int) -> None:
        """Take ``[address, address + size)`` out of the memory map; it may be part of a larger mapped range."""
        i = bisect_right(span_starts, address) - 1
        if i < 0 or span_starts[i] + spans[span_starts[i]].size < address + size:
            return
        first = span_starts.pop(i)
        span = spans.pop(first)
        if first < address:
            add_span(first, replace(span, size=address - first))
        if address + size < first + span.size:
            add_span(address + size, replace(span, size=first + span.size - address - size))

    def block_size(address: int, requested: int) -> int:
        want = settings.round_size(requested)
        i = bisect_right(span_starts, address) - 1
        if i < 0:
            return want
        span = spans[span_starts[i]]
        stop = span_starts[i] + span.size
        j = bisect_right(live_starts, address)
        if j < len(live_starts):
            stop = min(stop, live_starts[j])
        rest = stop - address - want
        never_split = max_split is not None and want >= max_split
        unsplit = not span.small and not settings.expandable_segments and (rest <= SMALL_LIMIT or never_split)
        return want + rest if unsplit and rest > 0 else want

    for action, address, size, _, lane in _events(recording, reverse=True):
        if action == ALLOC:
            if live.pop(address, None):
                del live_starts[bisect_left(live_starts, address)]
        elif action == FREE_COMPLETED:
            if address not in live:
                live[address] = LiveBlock(block_size(address, size), size, lane, 0)
                insort(live_starts, address)
        elif action in (SEGMENT_ALLOC, SEGMENT_MAP):
            cut_span(address, size)
        elif action in (SEGMENT_FREE, SEGMENT_UNMAP):
            expandable = action == SEGMENT_UNMAP
            small = size == SMALL_SEGMENT if not expandable else size % (settings.large_segment_size_mb * MIB) != 0
            add_span(address, Span(size, lane, small, expandable))
    return Start(spans, live)


def _events(
    recording: Recording, start: int = 0, stop: int | None = None, *, reverse: bool = False
) -> Iterator[tuple[int, int, int, int, int]]:
    """(action, address, bytes, stack, lane) of each event, as Python ints, a chunk of the columns at a time."""
    stop = len(recording) if stop is None else stop
    chunk, step = 1 << 16, -1 if reverse else 1
    for first in range(start, stop, chunk)[::step]:
        part = slice(first, min(first + chunk, stop))
        columns = (
            recording.actions[part], recording.addresses[part], recording.sizes[part],
            recording.stack_ids[part], recording.lane_ids[part],
        )  # fmt: skip
        yield from zip(*(column[::step].tolist() for column in columns), strict=True)


# ------------------------------------------------------------------------------------------------- forward, and compare


class _Player:
    """Runs a recording through the model of the allocator, with the recorded addresses for new segments."""

    def __init__(self, recording: Recording, start: Start) -> None:
        self.recording = recording
        self._asked: list[tuple[int, int, int]] = []  # recorded segment events since the last allocation
        self._unmapped: set[tuple[int, int]] = set()
        self._elsewhere = 2**60  # where the model's own segments go, if the recording has none for them
        self.allocator = CachingAllocator(recording.settings, place=self._place, on_segment=self._saw_segment)
        self._at: dict[int, int] = {}  # recorded address -> the model's
        self._held: dict[int, tuple[int, int]] = {}  # recorded address -> (bytes, stack), until a free is requested
        self.allocated = self.peak_allocated = 0
        self.addresses_matched = self.addresses_total = self.segments_matched = self.segments_total = 0
        self._adopt(start)
        self.reserved = self.peak_reserved = sum(span.size for span in start.spans.values())
        self.peak_allocated, self.peak_event = self.allocated, -1

    def _adopt(self, start: Start) -> None:
        ranges: list[tuple[int, Span, list[tuple[int, bool | None]]]] = []
        addresses = sorted(start.live)
        last: dict[tuple[int, bool], int] = {}
        for base in sorted(start.spans):
            span = start.spans[base]
            blocks: list[tuple[int, bool | None]] = []
            at, stop = base, base + span.size
            for address in addresses[bisect_left(addresses, base) : bisect_left(addresses, stop)]:
                block = start.live[address]
                if at < address:
                    blocks.append((address - at, False))
                blocks.append((block.size, True))
                at = address + block.size
                self._at[address] = address
                self._held[address] = (block.size, -1 - block.stack)
                self.allocated += block.size
            if at < stop:
                blocks.append((stop - at, False))
            # The mapped parts of one expandable segment become one range, with the gaps between them.
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
        for base, span, blocks in ranges:
            state = _merged(blocks)
            self.allocator.adopt(base, state, small=span.small, stream=span.lane, expandable=span.expandable)

    def play(self, stop: int) -> None:
        """Run the first ``stop`` events."""
        allocator, at, held = self.allocator, self._at, self._held
        for index, (action, address, size, stack, lane) in enumerate(_events(self.recording, 0, stop)):
            if action == ALLOC:
                self.addresses_total += 1
                chosen = allocator.malloc(size, lane)
                self.addresses_matched += chosen == address
                self._asked.clear()
                self._unmapped.clear()
                at[address] = chosen
                block = allocator.size_of(chosen)
                held[address] = (block, stack)
                self.allocated += block
                if self.allocated > self.peak_allocated:
                    self.peak_allocated, self.peak_event = self.allocated, index
            elif action == FREE_REQUESTED:
                self.allocated -= held.pop(address, (0, 0))[0]
            elif action == FREE_COMPLETED:
                self.allocated -= held.pop(address, (0, 0))[0]
                chosen = at.pop(address, 0)
                if allocator.size_of(chosen):  # a recording may lack the allocation
                    allocator.free(chosen)
            elif action in (SEGMENT_ALLOC, SEGMENT_MAP):
                self.segments_total += 1
                self._count(size)
                self._asked.append((action, address, size))
            elif action == SEGMENT_FREE:
                self.segments_total += 1
                self._count(-size)
                self.segments_matched += allocator.release(address)
            elif action == SEGMENT_UNMAP:
                self.segments_total += 1
                self._count(-size)
                if (address, size) not in self._unmapped:
                    allocator.empty_cache()
                self.segments_matched += (address, size) in self._unmapped
                self._unmapped.discard((address, size))

    def _count(self, n_bytes: int) -> None:
        self.reserved += n_bytes
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def _place(self, n_bytes: int) -> int:
        """The recorded address of the segment, or of the first page, that the model asks for; else one far away."""
        for action, address, size in self._asked:
            if action == SEGMENT_MAP or size == n_bytes:
                return address
        self._elsewhere += n_bytes + SMALL_SEGMENT
        return self._elsewhere - n_bytes

    def _saw_segment(self, kind: str, address: int, n_bytes: int) -> None:
        if kind == "segment_unmap":
            self._unmapped.add((address, n_bytes))
        action = {"segment_alloc": SEGMENT_ALLOC, "segment_map": SEGMENT_MAP}.get(kind)
        if action is not None and (action, address, n_bytes) in self._asked:
            self._asked.remove((action, address, n_bytes))
            self.segments_matched += 1

    def check(self) -> ReplayCheck:
        return ReplayCheck(self.addresses_matched, self.addresses_total, self.segments_matched, self.segments_total)

    def fragmentation(self) -> Fragmentation:
        free = self.allocator.free_blocks()
        cached = self.reserved - self.allocated
        return Fragmentation(
            allocated_bytes=self.allocated,
            reserved_bytes=self.reserved,
            cached_bytes=cached,
            share=cached / self.reserved if self.reserved else 0.0,
            stuck_bytes=sum(block.size for block in free if not block.whole_segment),
            largest_free_block_bytes=max((block.size for block in free), default=0),
        )

    def holders(self) -> tuple[SiteHolder, ...]:
        """Who holds what is allocated now, the largest first."""
        sums: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
        for n_bytes, stack in self._held.values():
            frames = self.recording.stacks[stack if stack >= 0 else -1 - stack]
            entry = sums[call_site(frames) if frames else NO_STACK if stack >= 0 else BEFORE_RECORDING]
            entry[0] += n_bytes
            entry[1] += 1
        total = max(self.allocated, 1)
        found = [SiteHolder(site, n, count, n / total) for site, (n, count) in sums.items()]
        return tuple(sorted(found, key=lambda holder: (-holder.bytes, holder.site)))


def _merged(blocks: list[tuple[int, bool | None]]) -> list[tuple[int, bool | None]]:
    """Neighbouring free blocks as one: they lie in one range."""
    merged: list[tuple[int, bool | None]] = []
    for size, state in blocks:
        if merged and state is not True and merged[-1][1] is state:
            merged[-1] = (merged[-1][0] + size, state)
        else:
            merged.append((size, state))
    return merged


def _fresh_peaks(recording: Recording, start: Start, settings: AllocatorSettings) -> tuple[int, int]:
    """(peak allocated, peak reserved) of the recorded allocations from an empty allocator with ``settings``."""
    allocator = CachingAllocator(settings)
    at = {a: allocator.malloc(start.live[a].requested, start.live[a].lane) for a in sorted(start.live)}
    for action, address, size, _, lane in _events(recording):
        if action == ALLOC:
            at[address] = allocator.malloc(size, lane)
        elif action == FREE_COMPLETED:
            allocator.free(at.pop(address, 0))
        elif action in (SEGMENT_FREE, SEGMENT_UNMAP):
            allocator.empty_cache()
    return allocator.peak_allocated, allocator.peak_reserved


# -------------------------------------------------------------------------------------------------------- who called it

#: Files of torch that stand in the way of a call site where a snapshot has lost its folders.
_TORCH_FILES = frozenset({
    "_contextlib.py", "_tensor.py", "activation.py", "adam.py", "adamw.py", "batchnorm.py", "container.py", "conv.py",
    "dropout.py", "function.py", "functional.py", "grad_mode.py", "graph.py", "linear.py", "loss.py", "module.py",
    "normalization.py", "optimizer.py", "pooling.py", "sgd.py", "sparse.py",
})  # fmt: skip
_OPERATOR = re.compile(r"at::_ops::(\w+)::")


def call_site(frames: Sequence[Frame]) -> str:
    """The line that a stack (innermost frame first) is best known by: ``model.py:31 forward``.

    That is the first Python frame outside torch; where the recorded stack does not reach that far out, the outermost
    Python frame; where it holds no Python at all, the outermost operator.
    """
    python = [frame for frame in frames if frame.filename.endswith(".py") or frame.filename.startswith("<")]
    outside = next((frame for frame in python if not _is_torch(frame.filename)), None)
    best = outside or (python[-1] if python else None)
    if best is not None:
        return f"{_file_name(best.filename)}:{best.line} {best.name}"
    operators = [match[1] for frame in frames if (match := _OPERATOR.search(frame.name))]
    return f"{operators[-1]} (no Python frame)" if operators else NO_STACK


def _file_name(path: str) -> str:
    return path.replace("\\", "/").rsplit("/", 1)[-1]


def _is_torch(path: str) -> bool:
    path = path.replace("\\", "/")
    return "/torch/" in path or path.startswith("torch/") or path in _TORCH_FILES
