"""PyTorch's CUDA caching allocator, without CUDA: what would be allocated, reserved, split, merged and refused.

The rules are those of PyTorch 2.13 (``c10/cuda/CUDACachingAllocator.cpp``, ``c10/core/AllocatorConfig.{h,cpp}``). Those
that decide addresses and segments were compared with the file as it stood at four earlier times from 2.1 on, and are
the same for the pools that all share. In short:

* **rounding**: a request is rounded up to 512 B, or to a division of the power of two below it where
  ``roundup_power2_divisions`` says so;
* **pools**: up to 1 MiB a request belongs to the small pool, above to the large pool, each one per stream;
* **best fit**: the smallest free block that is large enough, the lowest address among equals;
* **split**: the rest stays free if it is at least 512 B (small pool, expandable segments) or more than 1 MiB (large
  pool); otherwise the request gets the whole block, and ``allocated`` counts the whole block, as torch's
  ``allocated_bytes`` does;
* **new segment**: 2 MiB for the small pool, 20 MiB for a large request below 10 MiB, and from there on the request
  itself, rounded up to 2 MiB;
* **merge**: a freed block joins its free neighbours in the same segment;
* **pressure**: when the driver refuses, first oversize cached blocks go (``max_split_size_mb`` only), then everything
  that is free as a whole segment, and only then the request fails;
* **expandable segments**: one range of virtual addresses per pool and stream, mapped upwards in pages of 2 MiB (small)
  or 20 MiB (large); under pressure wholly free pages are unmapped.

Left out on purpose, because they need a running GPU: delayed frees of ``record_stream`` (free when the memory is really
free), CUDA graph pools, and peer access. A stream may be any hashable thing, so a private pool is just another stream.

**One implementation, two ways in.** :meth:`CachingAllocator._run` holds every rule that an ordinary allocation or free
meets. :meth:`~CachingAllocator.replay` hands it a whole program; :meth:`~CachingAllocator.malloc` and
:meth:`~CachingAllocator.free` hand it a program of one event. Blocks are rows of a table (one list a column, an index
is a block), because a row costs nothing to make; row 0 is the edge of every segment.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from memprof.errors import BadValue, OutOfMemory
from memprof.simulator.driver import Downwards
from memprof.units import MIB, say_bytes

#: Every block is a multiple of this many bytes (``kMinBlockSize``).
BLOCK_BYTES = 512
#: The largest request of the small pool (``kSmallSize``).
SMALL_LIMIT = MIB
#: A segment of the small pool, and its page under expandable segments (``kSmallBuffer``).
SMALL_SEGMENT = 2 * MIB
#: From this size on a large request gets a segment of its own (``kMinLargeAlloc``).
OWN_SEGMENT_FROM = 10 * MIB
#: What a segment of its own is rounded up to (``kRoundLarge``).
ROUND_LARGE = 2 * MIB
#: The address range kept for an expandable segment on a device of unknown size; torch takes 9/8 of the device.
UNKNOWN_DEVICE_BYTES = 2**40

_NEVER = 2**62  # larger than any block: the last entry of every free list, and the limit that limits nothing
_INTERVALS = 16  # roundup_power2_divisions has one entry per power of two from 1 MiB to 32 GiB

SizeOrSizes = TypeVar("SizeOrSizes", int, "npt.NDArray[np.int64]")


def _up_to_blocks(n_bytes: SizeOrSizes) -> SizeOrSizes:
    """Round up to whole blocks of 512 B; 0 stays 0."""
    return (n_bytes + (BLOCK_BYTES - 1)) & -BLOCK_BYTES


def _up(n_bytes: int, unit: int) -> int:
    return -(-n_bytes // unit) * unit


@dataclass(frozen=True, slots=True)
class AllocatorSettings:
    """The options of ``PYTORCH_ALLOC_CONF`` that decide where memory goes. Sizes are in MiB, as torch spells them.

    Raises :class:`memprof.errors.BadValue` for a value that torch would refuse.
    """

    #: Blocks of at least this size are never split; None: no limit.
    max_split_size_mb: int | None = None
    #: Divisions between two powers of two, one per power from 1 MiB on, or one number for all sizes; 0: off.
    roundup_power2_divisions: int | tuple[int, ...] = 0
    #: Share of the allowed memory above which old cached segments are returned; 0: off.
    #: torch obeys it only where ``per_process_memory_fraction`` is below 1, and so does this model.
    garbage_collection_threshold: float = 0.0
    #: Grow one range of addresses instead of asking for segments.
    expandable_segments: bool = False
    #: Share of the device that this process may use.
    per_process_memory_fraction: float = 1.0
    #: Segment for large requests below 10 MiB, and the page of a large expandable segment.
    large_segment_size_mb: int = 20
    #: How much larger than the request an unsplit oversize block may be; None: as ``large_segment_size_mb``.
    max_non_split_rounding_mb: int | None = None

    def __post_init__(self) -> None:
        if self.large_segment_size_mb * MIB <= OWN_SEGMENT_FROM:
            raise BadValue(f"large_segment_size_mb must be more than 10, not {self.large_segment_size_mb}")
        for name in ("max_split_size_mb", "max_non_split_rounding_mb"):
            value = getattr(self, name)
            if value is not None and value < self.large_segment_size_mb:
                least = self.large_segment_size_mb
                raise BadValue(f"{name} must be at least {least}, the large_segment_size_mb, not {value}")
        if not 0 <= self.garbage_collection_threshold < 1:
            raise BadValue(f"garbage_collection_threshold must lie in (0, 1), not {self.garbage_collection_threshold}")
        if not 0 < self.per_process_memory_fraction <= 1:
            raise BadValue(f"per_process_memory_fraction must lie in (0, 1], not {self.per_process_memory_fraction}")
        divisions = self.roundup_power2_divisions
        if isinstance(divisions, tuple) and len(divisions) != _INTERVALS:
            raise BadValue(f"roundup_power2_divisions needs one number or {_INTERVALS}, not {len(divisions)}")
        for value in divisions if isinstance(divisions, tuple) else (divisions,):
            if value < 0 or value & (value - 1):
                raise BadValue(f"roundup_power2_divisions must be powers of two or 0, not {value}")

    @classmethod
    def parse(cls, text: str) -> AllocatorSettings:
        """Read ``"expandable_segments:True,max_split_size_mb:128"``, the syntax of ``PYTORCH_ALLOC_CONF``.

        Options that do not move device memory (pinned memory, locks) are accepted and leave no trace. Raises
        :class:`memprof.errors.BadValue` with one line for anything that torch would not take, and for
        ``backend:cudaMallocAsync``, which is another allocator.
        """
        return cls().updated(text)

    def updated(self, text: str) -> AllocatorSettings:
        """These settings with the options in ``text`` changed; ``:`` or ``=`` between name and value."""
        changes: dict[str, bool | int | float | tuple[int, ...]] = {}
        for item in _top_level_items(text):
            name, _, value = (part.strip() for part in re.sub(r"=", ":", item, count=1).partition(":"))
            if name in _IGNORED:
                continue
            if name == "backend":
                if value != "native":
                    raise BadValue(f"allocator backend {value!r} is not modelled; only 'native' is")
                continue
            reader = _READERS.get(name)
            if reader is None:
                raise BadValue(f"unknown allocator option {name!r}; modelled: {', '.join(sorted(_READERS))}")
            try:
                changes[name] = reader(value)
            except ValueError:
                raise BadValue(f"cannot read allocator option {item.strip()!r}") from None
        return replace(self, **changes)  # type: ignore[arg-type]

    def __str__(self) -> str:
        """The same settings in the syntax of ``PYTORCH_ALLOC_CONF``; defaults are left out."""
        default = AllocatorSettings()
        said = []
        for name in _READERS:
            value = getattr(self, name)
            if value != getattr(default, name):
                if isinstance(value, tuple):
                    value = "[" + ",".join(f"{2**i}:{d}" for i, d in enumerate(value)) + "]"
                said.append(f"{name}:{value}")
        return ",".join(said)

    def to_json(self) -> dict[str, object]:
        """Every option by its torch name."""
        values = {name: getattr(self, name) for name in _READERS}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def round_size(self, n_bytes: int) -> int:
        """Bytes of the block that a request of ``n_bytes`` asks for (0 stays 0: torch allocates nothing)."""
        divisions = self.roundup_power2_divisions
        if isinstance(divisions, tuple):
            divisions = divisions[min(max(n_bytes.bit_length() - 21, 0), _INTERVALS - 1)]
        if divisions > 1 and n_bytes > BLOCK_BYTES * divisions:
            return _up(n_bytes, (1 << (n_bytes.bit_length() - 1)) // divisions)
        return _up_to_blocks(n_bytes)

    def round_sizes(self, sizes: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """:meth:`round_size` of many requests at once, in bytes."""
        requests = np.asarray(sizes, dtype=np.int64)
        if self.roundup_power2_divisions in (0, 1):
            return _up_to_blocks(requests)
        values, index = np.unique(requests, return_inverse=True)
        rounded = np.array([self.round_size(value) for value in values.tolist()], dtype=np.int64)
        return rounded[index.reshape(-1)]

    def segment_size(self, block_bytes: int) -> int:
        """Bytes asked of the driver for a block of ``block_bytes`` when segments are not expandable."""
        if block_bytes <= SMALL_LIMIT:
            return SMALL_SEGMENT
        if block_bytes < OWN_SEGMENT_FROM:
            return self.large_segment_size_mb * MIB
        return _up(block_bytes, ROUND_LARGE)


def _top_level_items(text: str) -> Iterator[str]:
    """Split ``a:1,b:[2:3,4:5]`` at the commas outside brackets."""
    depth, start = 0, 0
    for i, char in enumerate(text + ","):
        depth += (char == "[") - (char == "]")
        if depth < 0 or (depth and i == len(text)):
            raise BadValue(f"unbalanced brackets in allocator settings {text!r}")
        if char == "," and not depth:
            if text[start:i].strip():
                yield text[start:i]
            start = i + 1


def _read_bool(text: str) -> bool:
    if text not in ("True", "False"):
        raise ValueError
    return text == "True"


def _read_divisions(text: str) -> int | tuple[int, ...]:
    """``4``, or ``[256:1,512:2,>:4]``: up to 512 MiB 1, from 512 MiB on 2, from 1 GiB on 4."""
    if not text.startswith("["):
        return int(text)
    divisions = [0] * _INTERVALS
    last: int | None = None
    for entry in text.removeprefix("[").removesuffix("]").split(","):
        bound, _, value = (part.strip() for part in entry.partition(":"))
        if bound == ">":
            first = 1 if last is None else last + 1
            divisions[first:] = [int(value)] * (_INTERVALS - first)
            continue
        if int(bound) <= 0 or int(bound) & (int(bound) - 1):
            raise ValueError
        index = min(int(bound).bit_length() - 1, _INTERVALS - 1)
        if last is None:
            divisions[:index] = [int(value)] * index
        divisions[index], last = int(value), index
    return tuple(divisions)


_READERS: dict[str, Callable[[str], bool | int | float | tuple[int, ...]]] = {
    "max_split_size_mb": int,
    "roundup_power2_divisions": _read_divisions,
    "garbage_collection_threshold": float,
    "expandable_segments": _read_bool,
    "per_process_memory_fraction": float,
    "large_segment_size_mb": int,
    "max_non_split_rounding_mb": int,
}
#: Options of torch 2.13 that leave the device's memory as it is.
_IGNORED = frozenset({
    "release_lock_on_cudamalloc", "release_lock_on_hipmalloc", "pinned_use_cuda_host_register",
    "pinned_use_hip_host_register", "pinned_num_register_threads", "pinned_use_background_threads",
    "pinned_reserve_segment_size_mb", "pinned_max_round_threshold_mb", "pinned_max_cached_size_mb",
    "pinned_free_catch_all", "graph_capture_record_stream_reuse", "throw_on_cudamalloc_oom",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Refusal:
    """The allocation that did not fit, and what stood when it was refused. All sizes in bytes."""

    #: What was asked for, rounded up to a block.
    requested_bytes: int
    #: What the driver would have had to give.
    segment_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    #: The device, or the share of it that the settings allow, whichever refused.
    capacity_bytes: int
    #: What the process takes of the device beside segments; 0 where the share refused, which does not count it.
    context_bytes: int = 0

    def __str__(self) -> str:
        """One line: what, how much more, and what holds the rest."""
        if self.context_bytes >= self.capacity_bytes:
            context, capacity = say_bytes(self.context_bytes), say_bytes(self.capacity_bytes)
            return f"out of memory: the CUDA context alone takes {context}, and there are {capacity}"
        context = f"{say_bytes(self.context_bytes)} are the CUDA context, " if self.context_bytes else ""
        return (
            f"out of memory: allocating {say_bytes(self.requested_bytes)} needs a segment of "
            f"{say_bytes(self.segment_bytes)}; of {say_bytes(self.capacity_bytes)}, {context}"
            f"{say_bytes(self.reserved_bytes)} are reserved and {say_bytes(self.allocated_bytes)} allocated"
        )


@dataclass(frozen=True, slots=True)
class Replay:
    """What a program of allocations did, window by window. All sizes in bytes.

    A peak counts what stood when its window began, as torch does after ``reset_peak_memory_stats``.
    """

    peak_allocated: tuple[int, ...]
    allocated: tuple[int, ...]
    peak_reserved: tuple[int, ...]
    reserved: tuple[int, ...]
    #: Index of the event that set each window's allocated peak; -1 where the window never rose above its start.
    peak_events: tuple[int, ...]
    #: Bytes of the block each number got: the request, its rounding, and what was too little to split off.
    granted: list[int]
    #: The allocation that did not fit, if one did not: then the last window ends there.
    refused: Refusal | None = None
    #: Index of the event that was refused.
    refused_event: int | None = None

    @property
    def peak_event(self) -> int:
        """Index of the event that set the overall allocated peak; -1 where that is the start."""
        best = max(self.peak_allocated, default=0)
        return next((e for e, peak in zip(self.peak_events, self.peak_allocated, strict=True) if peak == best), -1)


@dataclass(frozen=True, slots=True)
class FreeBlock:
    """A cached block; ``size`` in bytes. Only a whole segment can go back to the driver without expandable segments."""

    address: int
    size: int
    small: bool
    whole_segment: bool


#: ``(kind, address, bytes)`` with torch's kinds: segment_alloc, segment_free, segment_map, segment_unmap.
SegmentHook = Callable[[str, int, int], None]


#: Address, and ``(bytes, state)`` of each block from there upwards, one entry a segment; see
#: :meth:`CachingAllocator.adopt` for the states.
Segments = tuple[tuple[int, tuple[tuple[int, bool | None], ...]], ...]


class _Pool:
    """The free blocks of one size class on one stream, by size and then address; the last entry is the sentinel."""

    __slots__ = ("blocks", "index", "page", "sizes", "small", "unmapped")

    def __init__(self, index: int, small: bool, page: int) -> None:
        self.index, self.small, self.page = index, small, page
        self.sizes: list[int] = [_NEVER]
        self.blocks: list[int] = [0]
        #: Rows of unmapped address ranges, by address.
        self.unmapped: list[int] = []

    def copy(self) -> _Pool:
        twin = _Pool(self.index, self.small, self.page)
        twin.sizes, twin.blocks, twin.unmapped = self.sizes[:], self.blocks[:], self.unmapped[:]
        return twin


class CachingAllocator:
    """One device's caching allocator: ``malloc`` and ``free``, or a whole program with ``replay``.

    ``capacity_bytes`` is the device (None: no limit), and ``context_bytes`` what this process takes of it beside
    segments: the driver gives the rest. ``per_process_memory_fraction`` is of the whole device, as in torch. ``place``
    says at which address the driver puts a new segment of so many bytes (None: upwards, never adjacent); it matters
    only to meet a recorded trace address for address, since addresses break ties between equal blocks.

    Raises :class:`memprof.errors.OutOfMemory` from :meth:`malloc` when even releasing the cache does not help;
    :attr:`refused` then says what was refused.
    """

    def __init__(
        self,
        settings: AllocatorSettings | None = None,
        capacity_bytes: int | None = None,
        context_bytes: int = 0,
        *,
        place: Callable[[int], int] | None = None,
        on_segment: SegmentHook | None = None,
    ) -> None:
        self.settings = settings = settings or AllocatorSettings()
        self.capacity_bytes = capacity_bytes
        self.context_bytes = context_bytes
        self._driver_limit = _NEVER if capacity_bytes is None else max(0, capacity_bytes - context_bytes)
        share = settings.per_process_memory_fraction
        self._allowed = int(share * capacity_bytes) if share < 1 and capacity_bytes is not None else None
        self._gc = self._allowed is not None and settings.garbage_collection_threshold > 0
        self._max_split = _NEVER if settings.max_split_size_mb is None else settings.max_split_size_mb * MIB
        self._place = place or self._next_address
        self._free_address = 2**32
        self._on_segment = on_segment
        self.refused: Refusal | None = None
        self._allocated = self._peak_allocated = self._reserved = self._peak_reserved = 0
        self._pools: list[_Pool] = []
        self._pools_by_stream: dict[Hashable, int] = {}
        self._at: dict[int, int] = {}  # address -> row, of blocks handed out by malloc or left by a replay
        self._ranges: dict[int, tuple[int, int]] = {}  # expandable: base address -> (bytes, page)
        self._unmapped: set[int] = set()  # rows that are addresses without memory
        self._kept: set[int] = set()  # indices into _pools: what is cached there is never given back
        # The table. Row 0 is the edge of every segment: never free, never moved.
        self._address = [0]
        self._size = [0]
        self._room = [0]  # the size while free and mapped, else 0
        self._before = [0]
        self._after = [0]
        self._home = [0]  # index into _pools
        self._born = [0]  # only under garbage collection: the large pools' request count when the block became free
        self._spare: list[int] = []
        self._large_requests = 0
        self._interrupted = -1, -1  # where a refused program stood: the number that set the peak, the number refused

    def copy(self, on_segment: SegmentHook | None = None) -> CachingAllocator:
        """An independent allocator in the same state: warm up once, replay many times; ``on_segment`` is the copy's."""
        twin = CachingAllocator.__new__(CachingAllocator)
        for name, value in vars(self).items():
            setattr(twin, name, value.copy() if isinstance(value, list | dict | set) else value)
        twin._pools = [pool.copy() for pool in self._pools]
        if self._place == self._next_address:
            twin._place = twin._next_address
        elif isinstance(self._place, Downwards):
            twin._place = self._place.copy()
        twin._on_segment = on_segment
        return twin

    def unlimited(self) -> CachingAllocator:
        """A copy on a device that never refuses."""
        twin = self.copy()
        twin.capacity_bytes, twin._driver_limit, twin._allowed, twin._gc = None, _NEVER, None, False
        return twin

    # ------------------------------------------------------------------------------------------------ what it holds

    @property
    def limit_bytes(self) -> int | None:
        """The most it may reserve: the device less the context, or the share allowed; None without a limit."""
        if self.capacity_bytes is None:
            return None
        return self._driver_limit if self._allowed is None else min(self._allowed, self._driver_limit)

    @property
    def allocated(self) -> int:
        """Bytes in blocks that are handed out (torch: ``allocated_bytes.all.current``)."""
        return self._allocated

    @property
    def reserved(self) -> int:
        """Bytes got from the driver and not given back (torch: ``reserved_bytes.all.current``)."""
        return self._reserved

    @property
    def peak_allocated(self) -> int:
        """Highest :attr:`allocated` since the start or the last :meth:`reset_peaks`."""
        return self._peak_allocated

    @property
    def peak_reserved(self) -> int:
        """Highest :attr:`reserved` since the start or the last :meth:`reset_peaks`."""
        return self._peak_reserved

    def size_of(self, address: int) -> int:
        """Bytes of the block handed out at ``address`` (0 if there is none): the request and its rounding."""
        return self._size[self._at.get(address, 0)]

    def free_blocks(self) -> list[FreeBlock]:
        """Every cached block, small pools first, by size."""
        return [
            FreeBlock(self._address[block], self._size[block], pool.small, self._is_whole_segment(block))
            for pool in sorted(self._pools, key=lambda pool: not pool.small)
            for block in pool.blocks[:-1]
        ]

    def segments(self, *, small: bool) -> Segments:
        """The segments of one size class as they stand, in a form that :meth:`adopt` takes."""
        own = [pool for pool in self._pools if pool.small == small]
        home = {pool.index for pool in own}
        free = [block for pool in own for block in (*pool.blocks[:-1], *pool.unmapped)]
        live = [block for block in self._at.values() if self._home[block] in home]
        found = []
        for block in [*free, *live]:
            if self._before[block]:
                continue
            address, blocks = self._address[block], list[tuple[int, bool | None]]()
            while block:
                blocks.append((self._size[block], None if block in self._unmapped else not self._room[block]))
                block = self._after[block]
            found.append((address, tuple(blocks)))
        return tuple(sorted(found))

    def reset_peaks(self) -> None:
        """Let both peaks start again from what is held now."""
        self._peak_allocated, self._peak_reserved = self._allocated, self._reserved

    # ---------------------------------------------------------------------------------------------------- the ways in

    def malloc(self, nbytes: int, stream: Hashable = 0) -> int:
        """Allocate ``nbytes`` for ``stream``; returns the address (0 for 0 bytes, as torch's null pointer)."""
        live = [0]
        self._run((0,), [self.settings.round_size(nbytes)], live, stream)
        block = live[0]
        if block:
            self._at[self._address[block]] = block
        return self._address[block]

    def free(self, address: int) -> None:
        """Free what :meth:`malloc` returned. Raises :class:`memprof.errors.BadValue` for any other address."""
        if not address:
            return
        block = self._at.pop(address, 0)
        if not block:
            raise BadValue(f"address {address:#x} is not allocated")
        self._run((-1,), [], [block], 0)

    def replay(
        self,
        order: Sequence[int],
        sizes: Sequence[int] | npt.NDArray[np.int64],
        windows: Sequence[int] = (),
        stream: Hashable = 0,
        live: list[int] | None = None,
    ) -> Replay:
        """Run a whole program: the order of events is one thing, their sizes another, so many sizes share one order.

        ``order[i] = k >= 0`` allocates number ``k``, which has ``sizes[k]`` bytes; ``order[i] = ~k`` (negative) frees
        it. Every number is allocated at most once and freed at most once; what is not freed stays. Allocations of 0
        bytes do nothing. ``windows`` are the event indices at which a new window begins (ascending; the first begins at
        event 0 anyway). Pass ``order`` as a list: it is read as it is. A refusal is an answer here, not an error: see
        :attr:`Replay.refused`.

        ``live``, where a program comes in several calls, is the caller's table of rows, one a number: those of numbers
        that an earlier call left come in, and what this one leaves is written there (else kept by address).
        """
        wants: list[int] = self.settings.round_sizes(sizes).tolist()
        events = order if isinstance(order, list | tuple) else [int(k) for k in order]
        rows = [0] * len(wants) if live is None else live
        bounds = [0, *windows, len(events)]
        peaks, ends, reserved_peaks, reserved_ends, peak_events = [], [], [], [], []
        refused_event = None
        self.refused = None
        for start, stop in pairwise(bounds):
            self.reset_peaks()
            try:
                number = self._run(events[start:stop], wants, rows, stream)
            except OutOfMemory:
                number, failed = self._interrupted
                refused_event = events.index(failed, start, stop)
            peaks.append(self._peak_allocated)
            ends.append(self._allocated)
            reserved_peaks.append(self._peak_reserved)
            reserved_ends.append(self._reserved)
            peak_events.append(-1 if number < 0 else events.index(number, start, stop))
            if refused_event is not None:
                break
        if live is None:
            self._at.update((self._address[block], block) for block in rows if block)
        return Replay(
            tuple(peaks), tuple(ends), tuple(reserved_peaks), tuple(reserved_ends), tuple(peak_events), wants,
            self.refused, refused_event,
        )  # fmt: skip

    def follow(self, events: Iterable[int], wants: list[int], live: list[int], stream: Hashable = 0) -> None:
        """Run events as they come: between two of them, whoever makes them may look at what was chosen.

        Like :meth:`replay`, one event a number, but over the caller's own tables, so that a program may go on in a
        further call and on another stream: ``wants[k]`` is the rounded size of number ``k``, and is set to the bytes it
        was given; ``live[k]`` is set to its row, which :meth:`where` knows, and to 0 when it is freed.

        Raises:
            OutOfMemory: An allocation was refused; :attr:`refused` says which.
        """
        self._run(events, wants, live, stream)

    def where(self, row: int) -> tuple[int, int]:
        """Address and bytes of a row of ``live`` (zeros for row 0)."""
        return self._address[row], self._size[row]

    def row_at(self, address: int) -> int:
        """The row of the block handed out at ``address`` by :meth:`malloc` or :meth:`adopt`; 0 if there is none."""
        return self._at.get(address, 0)

    def keep(self, stream: Hashable) -> None:
        """Give nothing of ``stream`` back from now on: what a CUDA graph's pool does while the graph lives."""
        self._kept |= {self._pool(stream, True).index, self._pool(stream, False).index}

    def empty_cache(self) -> None:
        """Give every wholly free segment back, and every wholly free page of an expandable one."""
        for small in (False, True):
            for pool in self._pools:
                if pool.small == small and pool.index not in self._kept:
                    self._release_all(pool)

    def release(self, address: int, nbytes: int) -> bool:
        """Give back the segment of ``nbytes`` that starts at ``address``; False if there is none that is free."""
        where = self._address.__getitem__
        for pool in self._pools:
            i, stop = bisect_left(pool.sizes, nbytes), bisect_right(pool.sizes, nbytes)
            i = bisect_left(pool.blocks, address, i, stop, key=where)
            if i < stop and where(pool.blocks[i]) == address and self._is_whole_segment(pool.blocks[i]):
                self._release(pool, pool.blocks[i])
                return True
        return False

    def adopt(
        self,
        address: int,
        blocks: Sequence[tuple[int, bool | None]],
        *,
        small: bool,
        stream: Hashable = 0,
        expandable: bool = False,
    ) -> None:
        """Take over a segment as it stands: ``blocks`` are its (bytes, state) from ``address`` upwards.

        State: True handed out, False free, None an address without memory (expandable segments only). An expandable
        segment becomes one range of addresses, with room to grow behind it. Neighbours must not both be free.
        """
        pool = self._pool(stream, small)
        before = 0
        if expandable:
            total = self._range_bytes(pool.page) + sum(size for size, _ in blocks)
            self._ranges[address] = (_up(total, pool.page), pool.page)
            blocks = [*blocks, (self._ranges[address][0] - sum(size for size, _ in blocks), None)]
        for size, state in blocks:
            block = self._new_row(address, size, pool.index)
            self._link(before, block)
            if state is None:
                self._set_unmapped(pool, block)
            else:
                self._reserved += size
                if state:
                    self._at[address] = block
                    self._allocated += size
                else:
                    self._insert(pool, block)
            before, address = block, address + size
        self._free_address = max(self._free_address, _up(address, ROUND_LARGE) + ROUND_LARGE)
        self._peak_allocated = max(self._peak_allocated, self._allocated)
        self._peak_reserved = max(self._peak_reserved, self._reserved)

    # ------------------------------------------------------------------------------- the rules that every event meets

    def _run(self, order: Iterable[int], wants: list[int], live: list[int], stream: Hashable) -> int:
        """Run events (see :meth:`replay`) over ``live``, the row of each number, 0 where it holds none.

        ``wants`` are block sizes, already rounded; where a whole larger block was handed out, its size takes the place
        of what was wanted. Returns the number whose allocation set the peak, or -1. This is the hot loop of the
        predictor: it keeps everything in locals and speaks to the table directly.
        """
        address, size, room = self._address, self._size, self._room
        before, after, home, born, spare = self._before, self._after, self._home, self._born, self._spare
        pools = self._pools
        settings, gc, expandable = self.settings, self._gc, self.settings.expandable_segments
        small, large = self._pool(stream, True), self._pool(stream, False)
        small_home, large_home = small.index, large.index
        small_sizes, small_blocks, large_sizes, large_blocks = small.sizes, small.blocks, large.sizes, large.blocks
        max_split = self._max_split
        slack = (settings.max_non_split_rounding_mb or settings.large_segment_size_mb) * MIB
        large_least = BLOCK_BYTES if expandable else SMALL_LIMIT + BLOCK_BYTES
        oversize_least = BLOCK_BYTES if expandable else _NEVER
        small_limit, block_bytes, unusual = SMALL_LIMIT, BLOCK_BYTES, gc or expandable
        find = bisect_left
        allocated, peak, peak_number = self._allocated, self._peak_allocated, -1
        number = -1
        try:
            for number in order:
                if number >= 0:
                    want = wants[number]
                    # The pool, the smallest rest worth splitting off, and the size from which a block is too large.
                    if want <= small_limit:
                        if not want:
                            continue
                        sizes, blocks, own, least, limit = small_sizes, small_blocks, small_home, block_bytes, max_split
                    elif want < max_split:
                        sizes, blocks, own, least, limit = large_sizes, large_blocks, large_home, large_least, max_split
                    else:
                        sizes, blocks, own, least, limit = (
                            large_sizes, large_blocks, large_home, oversize_least, want + slack
                        )  # fmt: skip
                    i = find(sizes, want)
                    if unusual:
                        i = self._before_choosing(pools[own], i)
                    if sizes[i] >= limit:  # the sentinel (nothing fits), or a block that must stay whole
                        self._allocated = allocated
                        i = self._grow(pools[own], want)
                    block = blocks[i]
                    rest = sizes[i] - want
                    if rest < least:
                        if rest:
                            want += rest
                            wants[number] = want
                        del sizes[i], blocks[i]
                        room[block] = 0
                    else:
                        # A new row for the front; the free block keeps its row, and mostly its place in the list.
                        remainder, start = block, address[block]
                        if not spare:
                            self._more_rows()
                        block = spare.pop()
                        left = before[remainder]
                        address[block] = start
                        size[block] = want
                        before[block] = left
                        after[left] = block
                        after[block] = remainder
                        before[remainder] = block
                        home[block] = own
                        address[remainder] = start + want
                        size[remainder] = room[remainder] = rest
                        if i and sizes[i - 1] >= rest:
                            del sizes[i], blocks[i]
                            self._insert(pools[own], remainder)
                        else:
                            sizes[i] = rest
                            if gc:
                                born[remainder] = self._large_requests
                    live[number] = block
                    allocated += want
                    if allocated > peak:
                        peak, peak_number = allocated, number
                else:
                    block = live[~number]
                    if not block:
                        continue
                    live[~number] = 0
                    mine = size[block]
                    allocated -= mine
                    left, right = before[block], after[block]
                    rest = room[right]
                    if rest:
                        # The free block to the right grows down over this one.
                        pool = pools[home[block]]
                        sizes, blocks = pool.sizes, pool.blocks
                        i = find(sizes, rest)
                        if blocks[i] != right:
                            i = self._position(pool, right)
                        spare.append(block)
                        start = address[block]
                        mine += rest
                        if room[left]:
                            gone = self._position(pool, left)
                            del sizes[gone], blocks[gone]
                            if gone < i:
                                i -= 1
                            mine += room[left]
                            start = address[left]
                            room[left] = 0
                            spare.append(left)
                            left = before[left]
                        before[right] = left
                        after[left] = right
                        address[right] = start
                        block = right
                    elif room[left]:
                        # The free block to the left grows up over this one.
                        pool = pools[home[block]]
                        sizes, blocks = pool.sizes, pool.blocks
                        i = find(sizes, room[left])
                        if blocks[i] != left:
                            i = self._position(pool, left)
                        spare.append(block)
                        after[left] = right
                        before[right] = left
                        mine += room[left]
                        block = left
                    else:
                        room[block] = mine
                        self._insert(pools[home[block]], block)
                        continue
                    size[block] = room[block] = mine
                    if mine < sizes[i + 1]:
                        sizes[i] = mine
                        if gc:
                            born[block] = self._large_requests
                    else:
                        del sizes[i], blocks[i]
                        self._insert(pool, block)
        except OutOfMemory:
            self._interrupted = peak_number, number
            raise
        finally:
            self._allocated, self._peak_allocated = allocated, peak
        return peak_number

    def _before_choosing(self, pool: _Pool, i: int) -> int:
        """The rare part of best fit: count the request (for ages), and prefer the block with the least room to grow."""
        if self._gc and not pool.small:
            self._large_requests += 1
        if self.settings.expandable_segments:
            blocks, last = pool.blocks, len(pool.blocks) - 1
            while i + 1 < last and self._room_to_grow(blocks[i + 1]) < self._room_to_grow(blocks[i]):
                i += 1
        return i

    def _room_to_grow(self, block: int) -> int:
        right = self._after[block]
        return self._size[block] + (self._size[right] if right in self._unmapped else 0)

    # --------------------------------------------------------------------------------------------- asking the driver

    def _grow(self, pool: _Pool, want: int) -> int:
        """Get ``want`` bytes from the driver, releasing what torch would; returns their place in the free list."""
        if self._gc:
            self._collect_garbage()
        i = self._obtain(pool, want)
        if i < 0 and self._release_oversize(pool, want):
            i = self._obtain(pool, want)
        if i < 0:
            self.empty_cache()
            i = self._obtain(pool, want)
        if i < 0:
            by_share = self.limit_bytes == self._allowed
            capacity, context = (self._allowed, 0) if by_share else (self.capacity_bytes, self.context_bytes)
            request = self.settings.segment_size(want)
            self.refused = Refusal(want, request, self._allocated, self._reserved, capacity or 0, context)
            raise OutOfMemory(str(self.refused))
        return i

    def _obtain(self, pool: _Pool, want: int) -> int:
        """One attempt: the place of a free block of at least ``want`` bytes, or -1 if the driver refuses."""
        request = self.settings.segment_size(want)
        if self._allowed is not None and self._reserved + request > self._allowed:
            return -1
        if self.settings.expandable_segments:
            return self._expand(pool, want)
        if self._reserved + request > self._driver_limit:
            return -1
        block = self._new_row(self._place(request), request, pool.index)
        self._count("segment_alloc", self._address[block], request)
        return self._insert(pool, block)

    def _release_oversize(self, pool: _Pool, want: int) -> bool:
        """With ``max_split_size_mb``: give back one cached block that is large enough, or several oversize ones."""
        if self._max_split == _NEVER:
            return False
        wanted = max(want, self._max_split)
        i = bisect_left(pool.sizes, wanted)
        block = pool.blocks[i]
        if block and self._is_whole_segment(block):
            self._release(pool, block)
            return True
        released = 0
        for block in reversed(pool.blocks[:i]):
            if released >= wanted or self._size[block] < self._max_split:
                break
            if self._is_whole_segment(block):
                released += self._size[block]
                self._release(pool, block)
        return released >= wanted

    def _collect_garbage(self) -> None:
        """Above the threshold: give back the large cached segments that waited longest, oldest half first."""
        assert self._allowed is not None
        threshold = int(self.settings.garbage_collection_threshold * self._allowed)
        target, reclaimed = self._reserved - threshold, 0
        if target <= 0:
            return
        aged = [
            (self._large_requests - self._born[block], pool, block)
            for pool in self._pools
            if not pool.small
            for block in pool.blocks[:-1]
            if self._is_whole_segment(block)
        ]
        while aged and reclaimed < target:
            mean = sum(age for age, _, _ in aged) / len(aged)
            for age, pool, block in aged:
                if age >= mean:
                    reclaimed += self._size[block]
                    self._release(pool, block)
            aged = [entry for entry in aged if entry[0] < mean]

    def _release_all(self, pool: _Pool) -> None:
        for block in pool.blocks[:-1]:
            if self._base_of(block) is not None:
                self._unmap(pool, block)
            elif self._is_whole_segment(block):
                self._release(pool, block)

    def _release(self, pool: _Pool, block: int) -> None:
        self._take_out(pool, block)
        self._spare.append(block)
        self._count("segment_free", self._address[block], -self._size[block])

    def _is_whole_segment(self, block: int) -> bool:
        return not self._before[block] and not self._after[block] and self._base_of(block) is None

    def _count(self, kind: str, address: int, n_bytes: int) -> None:
        self._reserved += n_bytes
        self._peak_reserved = max(self._peak_reserved, self._reserved)
        if self._on_segment:
            self._on_segment(kind, address, abs(n_bytes))

    # --------------------------------------------------------------------------------------------- expandable segments

    def _range_bytes(self, page: int) -> int:
        device = UNKNOWN_DEVICE_BYTES if self.capacity_bytes is None else self.capacity_bytes
        return max(_up(device + device // 8, page), page)

    def _base_of(self, block: int) -> int | None:
        """The start of the expandable range that ``block`` lies in, None where its segment is an ordinary one."""
        if not self._ranges:
            return None
        where = self._address[block]
        # The nearest: the room behind a range taken over from a recording of an unknown device reaches over the next.
        return max((base for base, (total, _) in self._ranges.items() if base <= where < base + total), default=None)

    def _expand(self, pool: _Pool, want: int) -> int:
        """Map pages at the lowest addresses where ``want`` bytes can lie; the place of the block, or -1.

        Pages mapped before the driver refused stay mapped, as they do in torch.
        """
        block = self._expandable_gap(pool, want)
        if block in self._unmapped and not self._map(pool, block, min(self._size[block], want)):
            return -1
        while self._size[block] < want:
            gap = self._after[block]
            if not self._map(pool, gap, min(self._size[gap], want - self._size[block])):
                return -1
            block = gap  # it has taken in the free block to its left
        return self._position(pool, block)

    def _expandable_gap(self, pool: _Pool, want: int) -> int:
        """The lowest run of free and unmapped blocks that offers ``want`` bytes; a new range where there is none."""
        room, size, after = self._room, self._size, self._after
        for gap in pool.unmapped:
            left = self._before[gap]
            first = block = left if room[left] else gap
            offered = 0
            while block and offered < want and (room[block] or block in self._unmapped):
                offered += size[block]
                block = after[block]
            if offered >= want:
                return first
        total = self._range_bytes(pool.page)
        base = self._place(total)
        self._ranges[base] = (total, pool.page)
        gap = self._new_row(base, total, pool.index)
        self._set_unmapped(pool, gap)
        return gap

    def _map(self, pool: _Pool, gap: int, n_bytes: int) -> bool:
        """Put memory behind the first ``n_bytes`` of an unmapped block, in whole pages."""
        n_bytes = _up(n_bytes, pool.page)
        if self._reserved + n_bytes > self._driver_limit:
            return False
        start, rest = self._address[gap], self._size[gap] - n_bytes
        self._clear_unmapped(pool, gap)
        if rest:
            tail = self._new_row(start + n_bytes, rest, self._home[gap])
            self._link(tail, self._after[gap])
            self._link(gap, tail)
            self._set_unmapped(pool, tail)
            self._size[gap] = n_bytes
        self._count("segment_map", start, n_bytes)
        self._absorb_neighbours(pool, gap, self._take_out, self._room.__getitem__)
        self._insert(pool, gap)
        return True

    def _unmap(self, pool: _Pool, block: int) -> None:
        """Take the memory from behind the whole pages of a free block; what lies outside them stays free."""
        base = self._base_of(block)
        assert base is not None
        total, page = self._ranges[base]
        start, stop = self._address[block], self._address[block] + self._size[block]
        first, last = base + _up(start - base, page), base + (stop - base) // page * page
        if first >= last:
            return
        self._take_out(pool, block)
        if start < first:
            front = self._new_row(start, first - start, self._home[block])
            self._link(self._before[block], front)
            self._link(front, block)
            self._insert(pool, front)
        if last < stop:
            back = self._new_row(last, stop - last, self._home[block])
            self._link(back, self._after[block])
            self._link(block, back)
            self._insert(pool, back)
        self._address[block], self._size[block] = first, last - first
        self._count("segment_unmap", first, first - last)
        self._absorb_neighbours(pool, block, self._clear_unmapped, self._unmapped.__contains__)
        if self._size[block] == total:
            del self._ranges[base]
            self._spare.append(block)
        else:
            self._set_unmapped(pool, block)

    def _absorb_neighbours(
        self, pool: _Pool, block: int, take_out: Callable[[_Pool, int], None], is_like: Callable[[int], object]
    ) -> None:
        """Merge ``block`` with those neighbours that are free, or unmapped, as it is."""
        left, right = self._before[block], self._after[block]
        if left and is_like(left):
            take_out(pool, left)
            self._address[block] = self._address[left]
            self._size[block] += self._size[left]
            self._link(self._before[left], block)
            self._spare.append(left)
        if right and is_like(right):
            take_out(pool, right)
            self._size[block] += self._size[right]
            self._link(block, self._after[right])
            self._spare.append(right)

    def _set_unmapped(self, pool: _Pool, block: int) -> None:
        self._unmapped.add(block)
        where = self._address.__getitem__
        pool.unmapped.insert(bisect_left(pool.unmapped, where(block), key=where), block)

    def _clear_unmapped(self, pool: _Pool, block: int) -> None:
        self._unmapped.remove(block)
        pool.unmapped.remove(block)

    # ------------------------------------------------------------------------------------- the table and the free lists

    def _pool(self, stream: Hashable, small: bool) -> _Pool:
        index = self._pools_by_stream.get(stream)
        if index is None:
            index = self._pools_by_stream[stream] = len(self._pools)
            self._pools.append(_Pool(index, True, SMALL_SEGMENT))
            self._pools.append(_Pool(index + 1, False, self.settings.large_segment_size_mb * MIB))
        return self._pools[index + (not small)]

    def _next_address(self, n_bytes: int) -> int:
        """Upwards in steps of 2 MiB, with a gap, so that no two segments touch."""
        address = self._free_address
        self._free_address = _up(address + n_bytes, ROUND_LARGE) + ROUND_LARGE
        return address

    def _more_rows(self) -> None:
        """Make spare rows. The lists grow in place, because the hot loop holds them."""
        first, count = len(self._size), max(64, len(self._size))
        for column in (self._address, self._size, self._room, self._before, self._after, self._home, self._born):
            column.extend([0] * count)
        self._spare.extend(range(first + count - 1, first - 1, -1))

    def _new_row(self, address: int, size: int, home: int) -> int:
        if not self._spare:
            self._more_rows()
        row = self._spare.pop()
        self._address[row], self._size[row], self._home[row] = address, size, home
        self._room[row] = self._before[row] = self._after[row] = 0
        return row

    def _link(self, left: int, right: int) -> None:
        """Make two rows neighbours; row 0 is the edge."""
        self._after[left], self._before[right] = right, left

    def _insert(self, pool: _Pool, block: int) -> int:
        """Put a block into its pool's free list; returns its place."""
        sizes, blocks, size = pool.sizes, pool.blocks, self._size[block]
        i = bisect_left(sizes, size)
        if sizes[i] == size and self._address[blocks[i]] < self._address[block]:
            where = self._address.__getitem__
            i = bisect_left(blocks, where(block), i, bisect_right(sizes, size, i), key=where)
        sizes.insert(i, size)
        blocks.insert(i, block)
        self._room[block] = size
        if self._gc:
            self._born[block] = self._large_requests
        return i

    def _position(self, pool: _Pool, block: int) -> int:
        """The place of a free block in its pool's free list."""
        sizes, size = pool.sizes, self._size[block]
        i = bisect_left(sizes, size)
        if pool.blocks[i] == block:
            return i
        where = self._address.__getitem__
        return bisect_left(pool.blocks, where(block), i, bisect_right(sizes, size, i), key=where)

    def _take_out(self, pool: _Pool, block: int) -> None:
        i = self._position(pool, block)
        del pool.sizes[i], pool.blocks[i]
        self._room[block] = 0
