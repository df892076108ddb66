"""From a trace to numbers: allocated and reserved bytes token by token, the highest instant, and who held what then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

from memprof.records import PARTS, Holder
from memprof.simulator.allocator import SMALL_LIMIT, AllocatorSettings, CachingAllocator
from memprof.simulator.small_pool import Known
from memprof.simulator.trace import Trace

#: How many of the largest tensors at the peak a record keeps.
LARGEST = 24

_PART_NUMBER = {part: number for number, part in enumerate(PARTS)}

Ints = npt.NDArray[np.int64]


@dataclass
class Reading:
    """What a meter read in one window. Bytes are absolute: static bytes are included.

    Attributes:
        peak_allocated_bytes, allocated_bytes, reserved_bytes: One entry a token (see ``TokenColumns``).
        device_used_bytes: One entry a token; None where no driver was asked.
        peak_token: Token of the highest instant.
        peak_phase: Its phase.
        vision_peak_bytes: Highest allocated bytes in phase ``vision``; 0 where there was none.
        parts: Bytes above static at that instant, by part.
        token_parts: The same at each token's own highest instant, one entry a token; without parts that are zero
            throughout.
        holders: The largest tensors alive then, biggest first.
        refused: The allocation a card of the given size would have refused, in words, or None. Then the columns end
            with the last token that was done before, and the highest instant is that up to the refusal.
    """

    peak_allocated_bytes: list[int] = field(default_factory=list)
    allocated_bytes: list[int] = field(default_factory=list)
    reserved_bytes: list[int] = field(default_factory=list)
    device_used_bytes: list[int | None] = field(default_factory=list)
    peak_token: int = 0
    peak_phase: str = ""
    vision_peak_bytes: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    token_parts: dict[str, list[int]] = field(default_factory=dict)
    holders: list[Holder] = field(default_factory=list)
    refused: str | None = None


class Timeline:
    """A trace's order of events as arrays: what many traces of one program share, made once for all of them.

    Attributes:
        events: Up to the last mark (all of them where there is none), as the trace has them.
        slots: The slot each is about, ``(events,)``.
        born: Whether it is a birth, ``(events,)``.
        birth, death: Event number of each slot's birth and death, ``(slots,)``; past the end where there was none.
        owner: Number of each slot's part in :data:`PARTS`, ``(slots,)``.
        ends: For each token, the number of events when it was done; where there is no token, that of all.
        joints: The number of events at the end of each piece that may come again: of tokens, and of what they are made
            of where that is known. The last is that of all events.
    """

    #: How many ways to part the events are kept: which tensors are small changes little from prompt to prompt.
    _MOST_SHARES = 32

    def __init__(self, trace: Trace, joints: Sequence[int] = ()) -> None:
        self.marks, self.phases = trace.marks, trace.phases
        self.events = np.asarray(trace.events[: trace.marks[-1]] if trace.marks else trace.events, dtype=np.int64)
        self.born = self.events >= 0
        self.slots = np.where(self.born, self.events, ~self.events)
        self.birth = np.full(len(trace.parts), len(self.events))
        self.death = self.birth.copy()
        (at,) = np.nonzero(self.born)
        self.birth[self.slots[at]] = at
        (at,) = np.nonzero(~self.born)
        self.death[self.slots[at]] = at
        self.owner = np.array([_PART_NUMBER[part] for part in trace.parts], dtype=np.int64)
        self.ends = trace.marks or [len(self.events)]
        self.joints = sorted([*set(joints).difference(self.ends), *self.ends])
        self._shares: dict[bytes, Share] = {}

    def share(self, own: npt.NDArray[np.bool_]) -> Share:
        """The events about the slots that ``own`` says, ``(slots,)``."""
        key = own.tobytes()
        if key not in self._shares:
            if len(self._shares) >= self._MOST_SHARES:
                self._shares.clear()
            self._shares[key] = Share(self, own)
        return self._shares[key]

    def level(self, sizes: Ints, start: int = 0) -> Ints:
        """Bytes held before each event and after the last, given each slot's bytes: ``(events + 1,)``."""
        change = sizes[self.slots]
        return start + np.concatenate(([0], np.cumsum(np.where(self.born, change, -change))))

    def live_after(self, event: int) -> Ints:
        """Slots alive right after event number ``event``, in order of birth."""
        return np.nonzero((self.birth <= event) & (self.death > event))[0]

    def vision(self) -> list[tuple[int, int]]:
        """First event, and the one after the last, of each stretch of phase ``vision``."""
        bounds = [*self.phases, (len(self.events), "")]
        return [(a, min(b, len(self.events))) for (a, name), (b, _) in pairwise(bounds) if name == "vision"]


def read_plain(trace: Trace, static_bytes: int, rounding: int = 1) -> Reading:
    """Read ``trace`` with every storage rounded up to ``rounding`` bytes and no allocator behind it."""
    line = Timeline(trace)
    sizes = _rounded(trace, rounding)
    reading = _read(trace, line, sizes, line.level(sizes, static_bytes))
    reading.reserved_bytes = list(reading.peak_allocated_bytes)
    return reading


def _rounded(trace: Trace, rounding: int) -> Ints:
    """Each slot's bytes, rounded up: ``(slots,)``."""
    return -(-np.asarray(trace.nbytes, dtype=np.int64) // rounding) * rounding


def read_spans(trace: Trace, spans: Sequence[tuple[int, int]], top: int, rounding: int = 1) -> Reading:
    """Who held what at the highest instant inside each of ``spans`` (``token_parts``) and inside span number ``top``.

    A span is its first event and the one after its last; they are in order. Storages are rounded up to ``rounding``
    bytes.
    """
    line = Timeline(trace)
    sizes = _rounded(trace, rounding)
    level = line.level(sizes)
    tops = [begin + int(np.argmax(level[begin : stop + 1])) for begin, stop in spans]
    reading = Reading(token_parts=_parts_after(line, sizes, tops))
    _read_peak(reading, trace, line, sizes, tops[top] - 1)
    return reading


def read_cuda(
    trace: Trace, start: CachingAllocator, line: Timeline | None = None, known: Known | None = None
) -> Reading:
    """Read ``trace`` as the caching allocator would have served it, beginning from the state ``start`` (left as it is).

    Allocated bytes are those of blocks, as the allocator's own counter has them: a request rounded up, and what was
    too little to split off. ``line`` is the trace's timeline and ``known`` what was learnt from readings before that
    began from the same state, where the caller has them.
    """
    line = line or Timeline(trace)
    known = known or Known(start)
    wants = start.settings.round_sizes(trace.nbytes)
    by_pool = _serve_by_pool(line, wants, start, known)
    if by_pool is not None:
        granted, reserved = by_pool
        reading = _read(trace, line, granted, line.level(granted, start.allocated))
        reading.reserved_bytes = reserved
        return reading
    served = start.copy().replay(line.events.tolist(), trace.nbytes, line.marks[:-1])
    granted = np.asarray(served.granted, dtype=np.int64)
    reading = _read(trace, line, granted, line.level(granted, start.allocated), served.refused_event)
    reading.reserved_bytes = list(served.peak_reserved[: len(reading.peak_allocated_bytes)])
    reading.refused = str(served.refused) if served.refused is not None else None
    return reading


def _serve_by_pool(line: Timeline, wants: Ints, start: CachingAllocator, known: Known) -> tuple[Ints, list[int]] | None:
    """Bytes of the block each slot gets, and the highest reserved bytes of each token.

    Until the driver refuses, the small and the large pool do not know of each other, so each is served alone; None
    where it would refuse, and where the settings make other rules.
    """
    if start.settings != AllocatorSettings():
        return None
    large = line.share(wants > SMALL_LIMIT)
    served = start.unlimited().replay(large.order, wants[large.slots], large.marks[:-1])
    small = _small_growth(line.share((wants <= SMALL_LIMIT) & (wants > 0)), wants, known)
    # Without pressure nothing goes back, so a token's highest is what is reserved at its end.
    reserved = [a + b for a, b in zip(served.reserved, small, strict=True)]
    limit = start.limit_bytes
    if limit is not None and reserved[-1] > limit:
        return None
    granted = wants.copy()
    granted[large.slots] = served.granted
    return granted, reserved


def _small_growth(small: Share, wants: Ints, known: Known) -> list[int]:
    """Bytes by which the small pool has grown at the end of each token.

    The rest of a small block is always split off, so blocks are as large as what was asked for, and only the number
    of segments is in question.
    """
    sizes = wants[small.slots].astype(np.int32).tobytes()
    pool, growth = 0, list[int]()
    for piece in small.pieces:
        pool = known.after(pool, piece.order, sizes[piece.sizes])
        if piece.ends_token:
            growth.append(known.grown(pool))
    return growth


class Piece(NamedTuple):
    """What a small piece of a trace does in one pool, told so that another may do the same.

    Attributes:
        order: Its events as int32: ``k >= 0`` is the birth of number ``k``, ``~k`` its death. Numbers count first the
            blocks held when it begins, then its own births, each by birth.
        sizes: Where the sizes of its births lie, in bytes, among the int32 sizes of all.
        ends_token: Whether a token ends with it.
    """

    order: bytes
    sizes: slice
    ends_token: bool


class Share:
    """The events of one pool, its slots numbered anew by birth.

    Attributes:
        slots: The slots of that pool, by birth.
        marks: For each token, the number of events when it was done.
    """

    def __init__(self, line: Timeline, own: npt.NDArray[np.bool_]) -> None:
        (at,) = np.nonzero(own[line.slots])
        self._born = line.born[at]
        self.slots = line.slots[at[self._born]]
        self._numbers = np.searchsorted(self.slots, line.slots[at])
        self.marks: list[int] = np.searchsorted(at, line.ends).tolist()
        self._joints: list[int] = np.searchsorted(at, line.joints).tolist()
        self._ends_token = np.isin(line.joints, line.ends).tolist()

    @cached_property
    def order(self) -> list[int]:
        """The events as a program of the allocator."""
        return cast("list[int]", np.where(self._born, self._numbers, ~self._numbers).tolist())

    @cached_property
    def pieces(self) -> list[Piece]:
        """The events cut at the joints of the timeline."""
        pieces, held = list[Piece](), list[int]()
        begin = first = 0
        for joint, ends_token in zip(self._joints, self._ends_token, strict=True):
            born, numbers = self._born[begin:joint], self._numbers[begin:joint]
            last = first + int(np.count_nonzero(born))
            local = numbers - first + len(held)
            for event in np.nonzero(numbers < first)[0].tolist():
                local[event] = held.index(numbers[event])
            order = np.where(born, local, ~local).astype(np.int32).tobytes()
            pieces.append(Piece(order, slice(4 * first, 4 * last), ends_token))
            ended = set(numbers[~born].tolist())
            held = [number for number in (*held, *range(first, last)) if number not in ended]
            begin, first = joint, last
        return pieces


def _read(trace: Trace, line: Timeline, sizes: Ints, level: Ints, refused: int | None = None) -> Reading:
    """Levels by token and phase, and the highest instant; up to event number ``refused``, if one was."""
    reading, last = Reading(), len(line.events) if refused is None else refused
    tops = list[int]()
    for begin, stop in pairwise([0, *(mark for mark in line.marks if mark <= last)]):
        tops.append(begin + int(np.argmax(level[begin : stop + 1])))
        reading.peak_allocated_bytes.append(int(level[tops[-1]]))
        reading.allocated_bytes.append(int(level[stop]))
    reading.token_parts = _parts_after(line, sizes, tops)
    reading.device_used_bytes = [None] * len(reading.allocated_bytes)
    reading.vision_peak_bytes = max(
        (int(level[begin : min(stop, last) + 1].max()) for begin, stop in line.vision() if begin < min(stop, last)),
        default=0,
    )
    top = int(np.argmax(level[: last + 1]))
    if top:
        _read_peak(reading, trace, line, sizes, top - 1)
    return reading


def _parts_after(line: Timeline, sizes: Ints, counts: list[int]) -> dict[str, list[int]]:
    """Bytes each part holds after so many events, for every one of ``counts`` (rising); parts that never hold any are
    left out.
    """
    held, rows, begin = np.zeros(len(PARTS), dtype=np.int64), list[Ints](), 0
    for count in counts:
        slots = line.slots[begin:count]
        change = np.where(line.born[begin:count], sizes[slots], -sizes[slots])
        # As float64, exact below 2^53 bytes.
        held = held + np.bincount(line.owner[slots], change, len(PARTS)).astype(np.int64)
        rows.append(held)
        begin = count
    columns = np.array(rows, dtype=np.int64).reshape(-1, len(PARTS)).T.tolist()
    return {part: column for part, column in zip(PARTS, columns, strict=True) if any(column)}


def _read_peak(reading: Reading, trace: Trace, line: Timeline, sizes: Ints, event: int) -> None:
    """Who holds what right after event number ``event``, the highest instant."""
    reading.peak_token = next((i for i, mark in enumerate(line.marks) if event < mark), 0)
    reading.peak_phase = trace.phase_at(event)
    live = line.live_after(event)
    held = sizes[live]
    reading.parts = dict.fromkeys(PARTS, 0)
    for slot, n_bytes in zip(live.tolist(), held.tolist(), strict=True):
        reading.parts[trace.parts[slot]] += n_bytes
    reading.holders = [
        Holder(
            bytes=int(sizes[slot]),
            part=trace.parts[slot],
            module=trace.sites[slot][0],
            op=trace.sites[slot][1],
            shape=list(trace.shapes[slot]),
            dtype=trace.dtypes[slot],
            phase=trace.phase_at(int(line.birth[slot])),
        )
        for slot in live[np.argsort(-held, kind="stable")][:LARGEST].tolist()
    ]
