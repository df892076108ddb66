"""From a trace to numbers: allocated and reserved bytes token by token, the highest instant, and who held what then."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from memprof.records import PARTS, CardMemory, Holder, TokenColumns
from memprof.simulator.allocator import SMALL_LIMIT, AllocatorSettings, CachingAllocator, Refusal
from memprof.simulator.small_pool import Known
from memprof.simulator.trace import Trace
from memprof.units import say_bytes

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

    def memory(self, tokens: TokenColumns) -> CardMemory:
        """What the card's record says, with what else is known of each token."""
        return CardMemory(
            tokens=tokens,
            peak_token=self.peak_token,
            peak_phase=self.peak_phase,
            vision_peak_bytes=self.vision_peak_bytes,
            peak_parts=self.parts,
            token_parts=self.token_parts,
            peak_holders=self.holders,
            dynamic_peak_bytes=sum(self.parts.values()),
        )


class Timeline:
    """A trace's order of events as arrays: what many traces of one program share, made once for all of them.

    Attributes:
        held: How many slots were born before the first event; the first so many.
        events: Up to the last mark (all of them where there is none), as the trace has them.
        slots: The slot each is about, ``(events,)``.
        born: Whether it is a birth, ``(events,)``.
        birth, death: Event number of each slot's birth and death, ``(slots,)``; -1 for a birth before the first event,
            past the end where there was none.
        owner: Number of each slot's part in :data:`PARTS`, ``(slots,)``.
        ends: For each token, the number of events when it was done; where there is no token, that of all.
        joints: The number of events at the end of each piece that may come again: of tokens, and of what they are made
            of where that is known. The last is that of all events.
    """

    #: How many ways to part the events are kept: which tensors are small changes little from prompt to prompt.
    _MOST_SHARES = 32

    def __init__(self, trace: Trace, joints: Sequence[int] = ()) -> None:
        self.marks, self.phases, self.held = trace.marks, trace.phases, trace.held
        self.events = np.asarray(trace.events[: trace.marks[-1]] if trace.marks else trace.events, dtype=np.int64)
        self.born = self.events >= 0
        self.slots = np.where(self.born, self.events, ~self.events)
        self.birth = np.full(len(trace.parts), len(self.events))
        self.death = self.birth.copy()
        self.birth[: self.held] = -1
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


#: Some tokens of a trace, and their order of events. What stands before them is held: those slots come first, by birth.
Stretch: TypeAlias = tuple[Trace, Timeline]


def read_plain(trace: Trace, static_bytes: int, rounding: int = 1) -> Reading:
    """Read ``trace`` with every storage rounded up to ``rounding`` bytes and no allocator behind it."""
    reader = _Reader(static_bytes)
    reader.take(trace, Timeline(trace), _Served(_rounded(trace, rounding)))
    reading = reader.done()
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
    reading = Reading(token_parts=_columns([_parts_after(line, sizes, tops)]))
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
    return read_stretches(lambda: [(trace, line or Timeline(trace))], start, known)


def read_stretches(
    stretches: Callable[[], Iterable[Stretch]], start: CachingAllocator, known: Known | None = None
) -> Reading:
    """:func:`read_cuda` of a trace that comes stretch by stretch, so that no more than one of them need be there.

    Until the driver refuses, the small and the large pool do not know of each other, so each is served alone. Where it
    would refuse, and where the settings make other rules, all of it is served by one allocator, from the start again.
    """
    if start.settings == AllocatorSettings():
        reading = _read_served(stretches(), start, _ByPool(start, known or Known(start)))
        if reading is not None:
            return reading
    reading = _read_served(stretches(), start, _Whole(start))
    assert reading is not None
    return reading


def _read_served(stretches: Iterable[Stretch], start: CachingAllocator, server: _ByPool | _Whole) -> Reading | None:
    """What ``server`` makes of the stretches; None where it cannot serve one of them."""
    reader = _Reader(start.allocated)
    for trace, line in stretches:
        served = server.serve(trace, line, start.settings.round_sizes(trace.nbytes))
        if served is None:
            return None
        reader.take(trace, line, served)
        if served.refused is not None:
            break
    return reader.done()


class _Served(NamedTuple):
    """What an allocator made of one stretch.

    Attributes:
        granted: Bytes of the block each slot got, ``(slots,)``; those of slots that are held are not looked at.
        reserved: The highest reserved bytes of each token.
        refused, refused_event: What was refused, and the number of that event, if anything was.
    """

    granted: Ints
    reserved: Sequence[int] = ()
    refused: Refusal | None = None
    refused_event: int | None = None


class _ByPool:
    """Each pool served alone, beginning from ``start``, as long as nothing is refused."""

    def __init__(self, start: CachingAllocator, known: Known) -> None:
        self._large, self._limit, self._known = start.unlimited(), start.limit_bytes, known
        self._rows = list[int]()  # of the large blocks that the stretch before left
        self._pool = 0  # the small pool as it left it

    def serve(self, trace: Trace, line: Timeline, wants: Ints) -> _Served | None:
        """The next stretch, given the rounded bytes of each slot; None where the driver would refuse."""
        large = line.share(wants > SMALL_LIMIT)
        rows = self._rows + [0] * (len(large.slots) - len(self._rows))
        served = self._large.replay(large.order, wants[large.slots], large.marks[:-1], live=rows)
        self._rows = [row for row in rows if row]
        small = self._small_growth(line.share((wants <= SMALL_LIMIT) & (wants > 0)), wants)
        # Without pressure nothing goes back, so a token's highest is what is reserved at its end.
        reserved = [a + b for a, b in zip(served.reserved, small, strict=True)]
        if self._limit is not None and reserved[-1] > self._limit:
            return None
        granted = wants.copy()
        granted[large.slots] = served.granted
        return _Served(granted, reserved)

    def _small_growth(self, small: Share, wants: Ints) -> list[int]:
        """Bytes by which the small pool has grown at the end of each token.

        The rest of a small block is always split off, so blocks are as large as what was asked for, and only the number
        of segments is in question.
        """
        sizes = wants[small.slots].astype(np.int32).tobytes()
        growth = list[int]()
        for piece in small.pieces:
            self._pool = self._known.after(self._pool, piece.order, sizes[piece.sizes])
            if piece.ends_token:
                growth.append(self._known.grown(self._pool))
        return growth


class _Whole:
    """One allocator for everything, beginning from ``start``, up to what is refused."""

    def __init__(self, start: CachingAllocator) -> None:
        self._allocator = start.copy()
        self._rows = list[int]()  # of the slots that are held

    def serve(self, trace: Trace, line: Timeline, wants: Ints) -> _Served:
        """The next stretch."""
        rows = self._rows + [0] * (len(wants) - len(self._rows))
        served = self._allocator.replay(line.events.tolist(), trace.nbytes, line.marks[:-1], live=rows)
        self._rows = [rows[slot] for slot in line.live_after(len(line.events) - 1).tolist()]
        granted = np.asarray(served.granted, dtype=np.int64)
        return _Served(granted, served.peak_reserved, served.refused, served.refused_event)


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
        slots: The slots of that pool, by birth; first those that are held when it begins.
        marks: For each token, the number of events when it was done.
    """

    def __init__(self, line: Timeline, own: npt.NDArray[np.bool_]) -> None:
        (at,) = np.nonzero(own[line.slots])
        self._born = line.born[at]
        (held,) = np.nonzero(own[: line.held])
        self.slots, self._held = np.concatenate((held, line.slots[at[self._born]])), len(held)
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
        pieces, held = list[Piece](), list(range(self._held))
        begin, first = 0, self._held
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


def death(token: int, phase: str, part: str, where: str, static: int, held: Mapping[str, int]) -> str:
    """In words: where memory ran out, and what was held then (bytes by part, beside ``static``), largest first."""
    parts = sorted((n_bytes, name) for name, n_bytes in {"static": static, **held}.items() if n_bytes)
    told = ", ".join(f"{name} {say_bytes(n_bytes)}" for n_bytes, name in reversed(parts))
    place = f" ({where})" if where else ""
    return f"it ended in {phase} of token {token}, asking for {part}{place}; held then: {told or 'nothing'}"


class _Reader:
    """Levels by token and phase, and the highest instant, stretch by stretch; the first begins at ``level`` bytes."""

    def __init__(self, level: int) -> None:
        self._reading = Reading()
        self._static = self._level = self._highest = level
        self._granted, self._born_in = np.zeros(0, dtype=np.int64), list[str]()  # of the slots that are held
        self._parts = list[Ints]()

    def take(self, trace: Trace, line: Timeline, served: _Served) -> None:
        """The next stretch, up to what was refused, if anything was."""
        reading, sizes = self._reading, served.granted.copy()
        sizes[: line.held] = self._granted
        level = line.level(sizes, self._level)
        last = len(line.events) if served.refused_event is None else served.refused_event
        before, tops = len(reading.allocated_bytes), list[int]()
        for begin, stop in pairwise([0, *(mark for mark in line.marks if mark <= last)]):
            tops.append(begin + int(np.argmax(level[begin : stop + 1])))
            reading.peak_allocated_bytes.append(int(level[tops[-1]]))
            reading.allocated_bytes.append(int(level[stop]))
        reading.reserved_bytes.extend(served.reserved[: len(tops)])
        self._parts.append(_parts_after(line, sizes, tops))
        for begin, stop in line.vision():
            if begin < min(stop, last):
                highest = int(level[begin : min(stop, last) + 1].max())
                reading.vision_peak_bytes = max(reading.vision_peak_bytes, highest)
        top = int(np.argmax(level[: last + 1]))
        if level[top] > self._highest:
            self._highest = int(level[top])
            _read_peak(reading, trace, line, sizes, top - 1, before, self._born_in)
        if served.refused is not None:
            reading.refused = f"{served.refused}; {self._death(trace, line, sizes, last)}"
        live = line.live_after(len(line.events) - 1)
        self._born_in = [_born_in(trace, line, slot, self._born_in) for slot in live.tolist()]
        self._level, self._granted = int(level[-1]), sizes[live]

    def _death(self, trace: Trace, line: Timeline, sizes: Ints, event: int) -> str:
        """Where the birth that is event number ``event`` was refused, and who held the rest then."""
        slot, token = int(line.slots[event]), len(self._reading.allocated_bytes)
        held = dict.fromkeys(PARTS, 0)
        for other in line.live_after(event - 1).tolist():
            held[trace.parts[other]] += int(sizes[other])
        module, op = trace.sites[slot]
        return death(token, trace.phase_at(event), trace.parts[slot], f"{module} {op}".strip(), self._static, held)

    def done(self) -> Reading:
        """What was read."""
        self._reading.token_parts = _columns(self._parts)
        self._reading.device_used_bytes = [None] * len(self._reading.allocated_bytes)
        return self._reading


def _born_in(trace: Trace, line: Timeline, slot: int, before: Sequence[str]) -> str:
    """The phase in which a slot was born; ``before`` has those of the slots that are held."""
    return before[slot] if slot < line.held else trace.phase_at(int(line.birth[slot]))


def _parts_after(line: Timeline, sizes: Ints, counts: list[int]) -> Ints:
    """Bytes each part holds after so many events, for every one of ``counts`` (rising): ``(counts, parts)``."""

    def by_part(slots: Ints, change: Ints) -> Ints:
        # As float64, exact below 2^53 bytes.
        return np.bincount(line.owner[slots], change, len(PARTS)).astype(np.int64)

    held, rows, begin = by_part(np.arange(line.held), sizes[: line.held]), list[Ints](), 0
    for count in counts:
        slots = line.slots[begin:count]
        held = held + by_part(slots, np.where(line.born[begin:count], sizes[slots], -sizes[slots]))
        rows.append(held)
        begin = count
    return np.array(rows, dtype=np.int64).reshape(-1, len(PARTS))


def _columns(rows: Sequence[Ints]) -> dict[str, list[int]]:
    """Bytes by part, one entry a token; parts that never hold any are left out."""
    columns = np.concatenate(rows).T.tolist()
    return {part: column for part, column in zip(PARTS, columns, strict=True) if any(column)}


def _read_peak(
    reading: Reading,
    trace: Trace,
    line: Timeline,
    sizes: Ints,
    event: int,
    before: int = 0,
    born_in: Sequence[str] = (),
) -> None:
    """Who holds what right after event number ``event``, the highest instant.

    ``before`` tokens were done before this stretch, and ``born_in`` are the phases of the slots held from there.
    """
    reading.peak_token = before + next((i for i, mark in enumerate(line.marks) if event < mark), 0)
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
            phase=_born_in(trace, line, slot, born_in),
            line=trace.lines.get(slot, ""),
        )
        for slot in live[np.argsort(-held, kind="stable")][:LARGEST].tolist()
    ]
