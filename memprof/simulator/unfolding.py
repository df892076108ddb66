"""A program written out at full depth and length: the trace of any shape, stretch after stretch. No torch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, Self, cast, overload

import numpy as np
import numpy.typing as npt

from memprof.simulator.folding import HEAD_TOKENS, Place, Ref, Structure, rename, runs_of, singles
from memprof.simulator.replay import Stretch, Timeline
from memprof.simulator.rules import RULES
from memprof.simulator.selection import Course, Passage
from memprof.simulator.sizes import AXES, Ints, Slot, Table
from memprof.simulator.trace import ITEM_BYTES, Trace

#: The step of a tensor that no step repeats.
_APART = -(2**40)
#: Tokens that are written out at once. What a prompt takes of this machine's memory does not grow beyond them.
AT_ONCE = 64


@dataclass
class Segment:
    """A segment as it is written wherever it stands; tensors are numbered from its own first one.

    Attributes:
        events: A birth is a tensor's number, an end ``~`` that; 0 where something ends that was born elsewhere.
        ends: Where those ends stand, and what they name.
        left: Births that do not end here, and the number of each.
        slots: What each tensor is.
        rows: Row of the folded tables that its sizes are in; ``~i`` for number ``i`` of ``fixed``.
        moved: Whether a step moves its sizes; not, if a selection made it.
        fixed: Gap, and number in it, of the tensors that selections keep to themselves.
        phases: Events before each change of phase, and the phase's name.
    """

    events: list[int] = field(default_factory=list)
    ends: list[tuple[int, Ref]] = field(default_factory=list)
    left: list[tuple[int, int]] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    moved: list[bool] = field(default_factory=list)
    fixed: list[tuple[int, int]] = field(default_factory=list)
    phases: list[tuple[int, str]] = field(default_factory=list)

    @classmethod
    def of(cls, structure: Structure, place: Place, courses: Sequence[Course]) -> Self:
        """The segment in ``place``, its gaps filled with ``courses``."""
        self, steps = cls(), structure.steps[place]
        births = list(enumerate(structure.slots[place], start=structure.first_row[place]))
        names: dict[int, list[str]] = {}
        for where, at, name in structure.phases:
            if where == place:
                names.setdefault(at, []).append(name)
        numbers, at, count = dict[int, int](), 0, 0
        while at < len(steps):
            self.phases += [(len(self.events), name) for name in names.get(at, ())]
            step = steps[at]
            at += 1
            if step is None:
                row, kind = births[count]
                numbers[count] = self._born(kind, row, moved=True)
                count += 1
            elif isinstance(step, int):
                outlive = courses[step].survivors
                for number in self._fill(step, courses[step], births[count : count + len(outlive)]):
                    numbers[count] = number
                    count += 1
                at += len(outlive)
            elif structure.own(step, place):
                self.events.append(~numbers.pop(step.birth))
            else:
                self.ends.append((len(self.events), step))
                self.events.append(0)
        self.phases += [(len(self.events), name) for name in names.get(at, ())]
        self.left = list(numbers.items())
        return self

    def _born(self, kind: Slot, row: int, *, moved: bool) -> int:
        number = len(self.slots)
        self.events.append(number)
        self.slots.append(kind)
        self.rows.append(row)
        self.moved.append(moved)
        return number

    def _fill(self, gap: int, course: Course, births: Sequence[tuple[int, Slot]]) -> list[int]:
        """Write a selection into its gap; returns the numbers of what outlives it."""
        numbers, outlived = dict[int, int](), list[int]()
        for event in course.events:
            if event < 0:
                self.events.append(~numbers[~event])
            elif event in course.survivors:
                row, kind = births[len(outlived)]
                numbers[event] = self._born(kind, row, moved=False)
                outlived.append(numbers[event])
            else:
                numbers[event] = self._born(course.slots[event], ~len(self.fixed), moved=False)
                self.fixed.append((gap, event))
        return outlived

    @cached_property
    def parts(self) -> list[str]:
        """The part each tensor belongs to."""
        return [slot.part for slot in self.slots]

    @cached_property
    def dtypes(self) -> list[str]:
        """Each tensor's dtype."""
        return [slot.dtype for slot in self.slots]


class Name(NamedTuple):
    """A tensor of the program, whatever its slot: number ``birth`` of the births in its segment.

    ``token`` counts from the start in the head, and else (``later``) from the first token of a stretch.
    """

    later: bool
    token: int
    layer: int
    birth: int


class Unfolded:
    """A program at its true depth and length, for one course of its gaps: every trace of it differs in sizes only.

    It is written out some tokens at a time. All stretches that neither begin nor end it are alike: they are written
    once, and differ in their sizes as steps do.
    """

    #: How many stretches are kept; they would differ from each other only where something is never freed.
    _MOST = 8

    def __init__(
        self, sizes: Table, structure: Structure, depth: int, tokens: int, courses: Sequence[Course],
        at_once: int | None = None, filled: int | None = None, written: dict[Place, Segment] | None = None,
    ) -> None:
        self.sizes, self.structure, self.courses = sizes, structure, courses
        self.depth, self.tokens, self._at_once = depth, tokens, at_once or AT_ONCE
        self.runs = runs_of(tokens, filled) if structure.folded_tokens else singles(0, tokens)
        self._kept: dict[tuple[int, int, tuple[Name, ...]], _Written] = {}
        self._written = {} if written is None else written  # segments without a gap, which all courses share
        self._with_gaps: dict[Place, Segment] = {}
        self._sites: dict[tuple[Place, int], list[tuple[str, str]]] = {}

    def trace(self, lengths: Sequence[int], passages: Sequence[Passage] = ()) -> Trace:
        """The trace of one shape, of at most :data:`AT_ONCE` tokens, its gaps filled with ``passages`` of its courses.

        Raises:
            Irregular: The shape is no combination of those recorded, or gives no whole lengths.
        """
        [(trace, _)] = self.stretches(lengths, passages)
        return trace

    def stretches(self, lengths: Sequence[int], passages: Sequence[Passage] = ()) -> Iterator[Stretch]:
        """The trace of one shape, stretch after stretch; raises as :meth:`trace` does."""
        dims, growth = self.sizes.at(lengths)
        for begin, written in self._stretches():
            yield written.trace(dims, growth, begin, passages), written.timeline

    def caches(self, lengths: Sequence[int]) -> tuple[list[list[Cached]], list[int]]:
        """Tensors of each layer's KV cache after the first token, and bytes of the whole cache after each token."""
        layers, totals = dict[str, list[Cached]](), list[int]()
        dims, growth = self.sizes.at(lengths)
        for begin, written in self._stretches():
            held, marks = written.caches
            shapes, nbytes = written.of(held, dims, growth, begin)
            for mark in marks:
                totals.append(int(nbytes[mark].sum()))
            if not begin:
                for i in np.nonzero(marks[0])[0].tolist() if len(marks) else []:
                    module = written.order.sites[int(held[i])][0]
                    layers.setdefault(module, []).append(Cached(shapes(i), int(nbytes[i])))
        return list(layers.values()), totals

    def segment(self, place: Place) -> Segment:
        """The segment in ``place``, its gaps filled."""
        found = self._written.get(place) or self._with_gaps.get(place)
        if found is None:
            found = Segment.of(self.structure, place, self.courses)
            gaps = any(isinstance(step, int) for step in self.structure.steps[place])
            (self._with_gaps if gaps else self._written)[place] = found
        return found

    def sites(self, place: Place, layer: int) -> list[tuple[str, str]]:
        """Module path and operator of each tensor of the segment in ``place`` where it stands for ``layer``."""
        if (place, layer) not in self._sites:
            s, segment = self.structure, self.segment(place)
            if s.folded_layers and 1 <= layer <= self.depth:
                traced = place[1] if place[1] == s.depth else place[1] - 1  # one of two that are alike is not kept
                sites = [
                    (rename(slot.module, s.prefix, traced, layer - 1) if row >= 0 else slot.module, slot.op)
                    for slot, row in zip(segment.slots, segment.rows, strict=True)
                ]
            else:
                sites = [(slot.module, slot.op) for slot in segment.slots]
            self._sites[place, layer] = sites
        return self._sites[place, layer]

    def run(self, token: int) -> int:
        """Number of the run that ``token`` is of: the folded token that stands for it."""
        return bisect_right(self.runs, token, key=lambda run: run.first) - 1

    def _stretches(self) -> Iterator[tuple[int, _Written]]:
        """Each stretch with its first token."""
        before: _Written | None = None
        for begin in range(0, self.tokens, self._at_once):
            stop = min(begin + self._at_once, self.tokens)
            run = self.run(begin)
            inside = self.runs[run].repeats and begin > self.runs[run].first and self.run(stop - 1) == run
            key = (~run if inside else begin, stop - begin, before.left if before is not None else ())
            if key not in self._kept:
                if len(self._kept) >= self._MOST:
                    self._kept.clear()
                self._kept[key] = _Written(self, begin, stop, before)
            before = self._kept[key]
            yield begin, before


class Cached(NamedTuple):
    """A tensor of a KV cache: its shape, and the bytes asked for."""

    shape: tuple[int, ...]
    nbytes: int


class _Written:
    """Some tokens of a program, written out.

    Attributes:
        order: Their trace without sizes.
        timeline: Its order of events, shared by all traces.
        left: What is held when they are done, by birth; ``later`` ones counted from the token that comes then.
    """

    def __init__(self, whole: Unfolded, begin: int, stop: int, before: _Written | None) -> None:
        self._whole, self._structure, self._begin = whole, whole.structure, begin
        self.order = Trace()
        self._rows: list[int] = []  # row of the folded tables each slot's shape is in; ~i for number i of _fixed
        # Token, counted from the first one here and as if its run began where the head ends, of a step that repeats;
        # else _APART.
        self._steps: list[int] = []
        self._fixed: list[tuple[int, int]] = []  # gap, and number in it, of the selections' tensors
        self._slots: dict[Name, int] = {}  # what is held, by birth
        if before is not None:
            self._take_over(before)
        self.timeline = Timeline(self.order, self._write(stop))
        self.left = tuple(n._replace(token=n.token - (stop - begin)) if n.later else n for n in self._slots)
        self._live = list(self._slots.values())
        rows, steps = np.array(self._rows, dtype=np.int64), np.array(self._steps, dtype=np.int64)
        self._own = rows >= 0
        pairs = np.stack((rows[self._own], steps[self._own]), axis=1)
        unique, place = np.unique(pairs, axis=0, return_inverse=True)
        self._place = place.reshape(-1)
        self._unique = unique[:, 0], unique[:, 1]
        self._nth = np.cumsum(self._own) - 1
        self._kinds = kinds = [self._structure.all_slots[row] for row in unique[:, 0].tolist()]
        self._item = np.array([ITEM_BYTES.get(kind.dtype, 1) if kind.plain else 0 for kind in kinds], dtype=np.int64)
        self._rank = np.array([kind.rank for kind in kinds], dtype=np.int64)

    # -- sizes ---------------------------------------------------------------------------------------------------------

    def trace(self, dims: Ints, growth: Ints, begin: int, passages: Sequence[Passage]) -> Trace:
        """The trace, given shapes and what a step adds to them, where token ``begin`` is the first."""
        shapes, sizes = self._sizes(dims, growth, begin, np.arange(len(self._kinds)))
        nbytes = np.empty(len(self._own), dtype=np.int64)
        nbytes[self._own] = sizes[self._place]
        nbytes[~self._own] = [passages[gap].nbytes[number] for gap, number in self._fixed]
        lazy = cast("list[tuple[int, ...]]", _Shapes(self, shapes, passages))
        return replace(self.order, nbytes=nbytes.tolist(), shapes=lazy)

    def of(
        self, slots: Ints, dims: Ints, growth: Ints, begin: int
    ) -> tuple[Callable[[int], tuple[int, ...]], Ints]:
        """Shapes, by their place in ``slots``, and bytes of some of the slots alone; none of them a selection's."""
        which = self._place[self._nth[slots]]
        shapes, sizes = self._sizes(dims, growth, begin, which)
        return lambda i: tuple(shapes[i, : self._rank[which[i]]].tolist()), sizes

    def _sizes(self, dims: Ints, growth: Ints, begin: int, which: Ints) -> tuple[Ints, Ints]:
        """Shapes and bytes of numbers ``which`` of the distinct tensors."""
        rows, steps = (one[which] for one in self._unique)
        times: Ints = np.where(steps == _APART, 0, steps + begin - HEAD_TOKENS)
        shapes: Ints = dims[rows] + times[:, None] * growth[rows]
        item = self._item[which]
        beyond = shapes[np.arange(len(which)), np.minimum(self._rank[which], AXES - 1)]
        sizes: Ints = np.where(item > 0, item * np.prod(shapes, axis=1), beyond)
        known = dict[tuple[str, tuple[int, ...]], int]()  # layers are alike: few rules are asked, many times
        for i, number in enumerate(which.tolist()):
            kind = self._kinds[number]
            if kind.plain and kind.op in RULES:
                key = kind.op, tuple(shapes[i, : kind.rank].tolist())
                if key not in known:
                    known[key] = RULES[kind.op](key[1])
                sizes[i] = known[key]
        return shapes, sizes

    @cached_property
    def caches(self) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """Slots of the KV cache, and which of them are held after each token: ``(tokens, slots)``."""
        line = self.timeline
        (own,) = np.nonzero(np.array([part == "kv_cache" for part in self.order.parts], dtype=np.bool_))
        marks = np.array(self.order.marks, dtype=np.int64)[:, None]
        return own, (line.birth[own] < marks) & (line.death[own] >= marks)

    # -- writing out ---------------------------------------------------------------------------------------------------

    def _take_over(self, before: _Written) -> None:
        """Begin with what the stretch before left."""
        order, was = self.order, before.order
        for name, slot in zip(before.left, before._live, strict=True):
            self._slots[name] = order.held
            self._rows.append(before._rows[slot])
            # Shifted as its name is; one that no step repeats stays as it is.
            step = before._steps[slot]
            self._steps.append(_APART if step == _APART else step - len(was.marks))
            order.parts.append(was.parts[slot])
            order.sites.append(was.sites[slot])
            order.dtypes.append(was.dtypes[slot])
            order.held += 1
        order.phases.append((0, was.phases[-1][1] if was.phases else "prefill"))

    def _write(self, stop: int) -> list[int]:
        """Write the trace; returns the number of events at the end of each segment."""
        order, joints = self.order, list[int]()
        for token in range(self._begin, stop):
            folded_token = self._whole.run(token)
            first, _, repeats = self._whole.runs[folded_token]
            step = HEAD_TOKENS + token - first - self._begin if repeats else _APART
            for layer in range(self._whole.depth + 2):
                place = folded_token, self._folded_layer(layer)
                self._segment(place, token, layer, step, phases=not (repeats and token > first))
                joints.append(len(order.events))
            order.mark()
        return joints

    def _name(self, token: int, layer: int, birth: int) -> Name:
        later = token >= HEAD_TOKENS
        return Name(later, token - self._begin if later else token, layer, birth)

    def _segment(self, place: Place, token: int, layer: int, step: int, *, phases: bool) -> None:
        order, depth = self.order, self._whole.depth
        segment, base = self._whole.segment(place), len(order.parts)
        if phases:
            order.phases += [(len(order.events) + at, name) for at, name in segment.phases]
        begin = len(order.events)
        order.events += [event + base if event >= 0 else event - base for event in segment.events]
        order.parts += segment.parts
        order.dtypes += segment.dtypes
        order.sites += self._whole.sites(place, layer)
        if segment.fixed:
            first = len(self._fixed)
            self._rows += [row if row >= 0 else row - first for row in segment.rows]
            self._steps += [step if own else _APART for own in segment.moved]
            self._fixed += segment.fixed
        else:
            self._rows += segment.rows
            self._steps += [step] * len(segment.rows)
        for birth, number in segment.left:
            self._slots[self._name(token, layer, birth)] = base + number
        for at, ref in segment.ends:
            home_token = ref.token + (token if ref.token_by == "+" else 0)
            home_layer = {"+": layer + ref.layer, "-": depth + 1 - ref.layer, "=": ref.layer}[ref.layer_by]
            order.events[begin + at] = ~self._slots.pop(self._name(home_token, home_layer, ref.birth))

    def _folded_layer(self, layer: int) -> int:
        """The folded layer that stands for ``layer`` (0: before the layers, depth + 1: behind them)."""
        s, depth = self._structure, self._whole.depth
        if not s.folded_layers or layer <= s.head_layers:
            return layer
        return s.depth - (depth - layer) if layer >= depth else s.head_layers + 1


class _Shapes(Sequence[tuple[int, ...]]):
    """Shapes of a trace's slots, made when asked for."""

    def __init__(self, written: _Written, shapes: Ints, passages: Sequence[Passage]) -> None:
        self._written, self._shapes, self._passages = written, shapes, passages

    def __len__(self) -> int:
        return len(self._written._rows)

    @overload
    def __getitem__(self, index: int) -> tuple[int, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[int, ...]]: ...
    def __getitem__(self, index: int | slice) -> tuple[int, ...] | list[tuple[int, ...]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        w = self._written
        row = w._rows[index]
        if row < 0:
            gap, number = w._fixed[~row]
            return self._passages[gap].shapes[number]
        place = w._place[w._nth[index]]
        return tuple(self._shapes[place, : w._rank[place]].tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Iterable) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]
