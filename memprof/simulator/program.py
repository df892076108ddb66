"""Allocation programs: traced a few times, evaluated at any shape, to the byte. Plain data and arithmetic, no torch.

Three facts make a trace short to write down.

* **Sizes are products of lengths.** A tensor's bytes are its dtype's times its shape, and every entry of a shape is an
  affine function of the prompt's lengths (tiles, visual tokens, text tokens before and after, kept tokens of each cut)
  and of the number of new tokens. So where a shape is an affine combination of shapes that were traced, each entry is
  the same combination of theirs: whole numbers, exact, nothing fitted in the sense of approximated. Bytes come out as
  polynomials without anybody writing one.
* **Decode steps repeat.** From the second step on, each step's events are those of the step before, about the tensors
  of one step later, and every entry of a shape grows by a constant.
* **Layers repeat.** So do decoder layers behind the last cut, which is why a few of them are traced, not eighty.

A reference from one event to a tensor born elsewhere is therefore kept relative to the step and layer it is made in
(:class:`Ref`); :func:`fold` finds the repetition in a recording and refuses what does not repeat, and
:meth:`Program.unfold` writes it out again at full depth and length.

What a pruner's selection does may depend on the number of tokens in any way (loops over blocks, or over what is kept).
Where it sees nothing but the visual tokens themselves, it is recorded by itself
(:mod:`memprof.simulator.selection`), and the program has a gap there.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, Self, cast, overload

import numpy as np
import numpy.typing as npt

from memprof.simulator.reach import Reach
from memprof.simulator.replay import Stretch, Timeline
from memprof.simulator.rules import RULES
from memprof.simulator.selection import Course, Passage
from memprof.simulator.sizes import AXES, Ints, Irregular, Sizes, Slot, Table, packed, row_of, slot_of, unpacked
from memprof.simulator.trace import ITEM_BYTES, Trace

#: Steps at the start that are kept as they are: the prefill, and the first decode step, which still frees its things.
HEAD_TOKENS = 2
#: Fewest tokens of a recording whose steps are folded: the head, two steps to compare, and the last one.
FOLDED_TOKENS = HEAD_TOKENS + 3
#: Fewest tokens before a window fills that are folded. Recordings of fewer than so many tokens know nothing of it.
STEPS_BEFORE = FOLDED_TOKENS + 1
#: The step of a tensor that no step repeats.
_APART = -(2**40)
#: Tokens that are written out at once. What a prompt takes of this machine's memory does not grow beyond them.
AT_ONCE = 64


class Run(NamedTuple):
    """Tokens that one folded token stands for: ``tokens`` of them from ``first``, alike where it ``repeats``."""

    first: int
    tokens: int = 1
    repeats: bool = False


def runs_of(tokens: int, filled: int | None = None) -> list[Run]:
    """How an answer of ``tokens`` folds: the head, the steps that repeat, and the last.

    ``filled`` is the step in which a sliding window fills, and layers cease to grow: the steps before it repeat (where
    there are :data:`STEPS_BEFORE` tokens or more), it and the next stand for themselves, and those behind repeat again.
    """
    if filled is None:
        runs, behind = _singles(0, min(HEAD_TOKENS, tokens)), HEAD_TOKENS
        folds = tokens >= FOLDED_TOKENS
    else:
        runs, behind = _singles(0, min(filled, HEAD_TOKENS)), filled + HEAD_TOKENS
        if filled >= STEPS_BEFORE:
            runs.append(Run(HEAD_TOKENS, filled - HEAD_TOKENS, repeats=True))
        else:
            runs += _singles(HEAD_TOKENS, filled)
        runs += _singles(filled, min(behind, tokens))
        folds = tokens - filled >= FOLDED_TOKENS
    if not folds:
        return runs + _singles(behind, tokens)
    return [*runs, Run(behind, tokens - 1 - behind, repeats=True), Run(tokens - 1)]


def _singles(first: int, stop: int) -> list[Run]:
    return [Run(token) for token in range(first, stop)]


class Ref(NamedTuple):
    """A tensor as one segment names it: number ``birth`` of the births in the segment of that token and layer.

    ``token_by`` and ``layer_by`` say how the numbers count: from the start (``=``), from the segment itself (``+``), or
    from the end (``-``, layers only).
    """

    token_by: str
    token: int
    layer_by: str
    layer: int
    birth: int


@dataclass
class Recording:
    """A direct trace, and where in it things begin.

    Attributes:
        trace: What happened.
        layers: For each token, the number of events when each decoder layer was entered, and when the last was left:
            ``depth + 1`` entries.
        gaps: First event, and the one after the last, of each selection that stands by itself.
        head_layers: Layers at the start that are not alike: all up to the one behind the last cut.
        prefix: Module path of the decoder layers, to name them anew.
    """

    trace: Trace
    layers: list[list[int]]
    gaps: list[tuple[int, int]] = field(default_factory=list)
    head_layers: int = 2
    prefix: str = ""


#: A segment's events: None for a birth, the ordinal of a gap, or what ends.
Step = None | int | Ref
#: A segment is found by its folded token and its folded layer (0: before the layers; depth + 1: behind them).
Place = tuple[int, int]


@dataclass
class Structure:
    """All of a program that no length moves.

    Attributes:
        tokens: Tokens of the folded recording, one for each of its runs (:func:`runs_of`): ``HEAD_TOKENS + 2`` where
            steps are folded (head, a step, the last), more where a window fills.
        folded_tokens, folded_layers: Whether steps and layers repeat.
        depth: Layers of the folded recording.
        head_layers: See :class:`Recording`.
        steps: Each segment's events.
        slots: Each segment's tensors, by birth.
        phases: ``(place, events before it in the segment, name)``.
        prefix: Module path of the decoder layers.
    """

    tokens: int
    folded_tokens: bool
    folded_layers: bool
    depth: int
    head_layers: int
    steps: dict[Place, tuple[Step, ...]]
    slots: dict[Place, tuple[Slot, ...]]
    phases: tuple[tuple[Place, int, str], ...]
    prefix: str
    #: Segments without a gap, once they were written.
    written: dict[Place, Segment] = field(default_factory=dict, compare=False, repr=False)

    def own(self, ref: Ref, place: Place) -> bool:
        """Whether a tensor is sure to be of the segment in ``place`` that names it."""
        token, layer = place
        at = ref.token == (0 if ref.token_by == "+" else token) and (ref.token_by == "+" or token < HEAD_TOKENS)
        if ref.layer_by == "=":
            return at and ref.layer == layer and (layer <= self.head_layers or not self.folded_layers)
        return at and not ref.layer and (ref.layer_by == "+" or layer == self.depth + 1)

    @cached_property
    def first_row(self) -> dict[Place, int]:
        """Number of the first tensor of each segment, all segments one after another."""
        rows, row = {}, 0
        for place, slots in self.slots.items():
            rows[place] = row
            row += len(slots)
        return rows

    @cached_property
    def gaps(self) -> int:
        """How many selections stand by themselves."""
        return sum(isinstance(step, int) for steps in self.steps.values() for step in steps)

    @cached_property
    def all_slots(self) -> list[Slot]:
        """Every tensor, segment after segment."""
        return [slot for slots in self.slots.values() for slot in slots]


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


class Unlike(Irregular):
    """Decoder layers behind ``head`` of them are not alike."""

    def __init__(self, head: int, what: str) -> None:
        super().__init__(what)
        self.head = head


class Folded(NamedTuple):
    """A recording folded up: its structure, its shapes ``(tensors, axes)``, and what a further step adds to each."""

    structure: Structure
    dims: Ints
    growth: Ints


# -- folding -----------------------------------------------------------------------------------------------------------


def fold(recording: Recording, *, fold_layers: bool, filled: int | None = None) -> Folded:
    """Find the repetition in a recording.

    Args:
        recording: A direct trace. With :data:`FOLDED_TOKENS` tokens or more its steps are folded.
        filled: The step in which a sliding window fills (:func:`runs_of`), or None.
        fold_layers: Whether it is of a model with fewer layers, to be unfolded to a deeper one: then its layers are
            ``head_layers``, two that must be alike, and the last.

    Raises:
        Unlike: Layers behind the head are not alike; with a longer one they may be.
        Irregular: Something else does not repeat.
    """
    flat = _Flat(recording, fold_layers)
    tokens, depth, head = len(recording.trace.marks), flat.depth, recording.head_layers
    runs = runs_of(tokens, filled)
    repeated = [(number, run) for number, run in enumerate(runs) if run.repeats]
    if fold_layers and depth != head + 3:
        raise Irregular(f"{depth} layers do not fold with {head} at the head")
    kept_layers = [*range(head + 2), depth, depth + 1] if fold_layers else list(range(depth + 2))
    for token in range(tokens):
        if fold_layers:
            try:
                flat.same((token, head + 1), (token, head + 2), growth=False)
            except Irregular as found:
                raise Unlike(head, str(found)) from None
    for _, run in repeated:
        for token in range(run.first + 1, run.first + run.tokens):
            for layer in range(depth + 2):
                flat.same((token - 1, layer), (token, layer), growth=True, even=token - 1 > run.first)
    places = {
        (t, layer): (run.first, source) for t, run in enumerate(runs) for layer, source in enumerate(kept_layers)
    }
    structure = Structure(
        tokens=len(runs), folded_tokens=bool(repeated), folded_layers=fold_layers,
        depth=len(kept_layers) - 2, head_layers=head,
        steps={place: tuple(flat.steps[source]) for place, source in places.items()},
        slots={place: tuple(flat.slot(s) for s in flat.births[source]) for place, source in places.items()},
        phases=tuple(
            (next(place for place, source in places.items() if source == at), offset, name)
            for at, offset, name in flat.phases if at in places.values()
        ),
        prefix=recording.prefix,
    )  # fmt: skip
    if len(structure.phases) != len(flat.phases):
        raise Irregular("a phase begins in a step that repeats")
    rows = [s for source in places.values() for s in flat.births[source]]
    dims = np.array([flat.dims(s) for s in rows], dtype=np.int64).reshape(-1, AXES)
    growth = np.zeros_like(dims)
    for number, run in repeated:
        for layer, source in enumerate(kept_layers):
            row = structure.first_row[number, layer]
            now, then = (flat.births[token, source] for token in (run.first, run.first + 1))
            for i, (a, b) in enumerate(zip(now, then, strict=True)):
                growth[row + i] = flat.dims(b) - flat.dims(a)
    return Folded(structure, dims, growth)


class _Flat:
    """A recording cut into segments, with every reference relative."""

    def __init__(self, recording: Recording, fold_layers: bool) -> None:
        self.recording, self.trace = recording, recording.trace
        self.depth = len(recording.layers[0]) - 1
        self.steps: dict[Place, list[Step]] = {}
        self.births: dict[Place, list[int]] = {}
        self.phases: list[tuple[Place, int, str]] = []
        self._fold_layers = fold_layers
        self._fold_tokens = len(self.trace.marks) >= FOLDED_TOKENS
        self._home: dict[int, tuple[Place, int]] = {}
        gaps = {start: (number, stop) for number, (start, stop) in enumerate(recording.gaps)}
        phases, begin = list(self.trace.phases), 0
        for token, mark in enumerate(self.trace.marks):
            for layer, stop in enumerate([*recording.layers[token], mark]):
                place = token, layer
                self._segment(place, begin, stop, gaps)
                while phases and begin <= phases[0][0] < max(stop, begin + 1):
                    at, name = phases.pop(0)
                    if any(begin <= start < at for start, _ in recording.gaps):
                        raise Irregular("a phase begins behind a selection")
                    self.phases.append((place, at - begin, name))
                begin = stop

    def _segment(self, place: Place, begin: int, stop: int, gaps: dict[int, tuple[int, int]]) -> None:
        steps, events = self.steps.setdefault(place, []), self.trace.events
        self.births[place] = []
        at = begin
        while at < stop:
            if at in gaps:
                number, end = gaps.pop(at)
                if end > stop:
                    raise Irregular("a selection runs beyond its layer")
                ended = {~event for event in events[at:end] if event < 0}
                steps.append(number)
                for slot in (event for event in events[at:end] if event >= 0 and event not in ended):
                    self._born(place, slot)
                at = end
                continue
            if events[at] >= 0:
                self._born(place, events[at])
            else:
                steps.append(self._refer(place, ~events[at]))
            at += 1

    def _born(self, place: Place, slot: int) -> None:
        self._home[slot] = place, len(self.births[place])
        self.births[place].append(slot)
        self.steps[place].append(None)

    def _refer(self, place: Place, slot: int) -> Ref:
        (token, layer), ((home_token, home_layer), index) = place, self._home[slot]
        token_by, token_number = "=", home_token
        if self._fold_tokens and token >= HEAD_TOKENS:
            if token - home_token <= 1:
                token_by, token_number = "+", home_token - token
            elif home_token >= HEAD_TOKENS:
                raise Irregular("a tensor outlives two steps")
        layer_by, layer_number = "=", home_layer
        if self._fold_layers:
            head, depth = self.recording.head_layers, self.depth
            if 1 <= layer <= depth and 1 <= home_layer <= depth and abs(home_layer - layer) <= 1:
                layer_by, layer_number = "+", home_layer - layer
            elif home_layer >= depth - 1:
                layer_by, layer_number = "-", depth + 1 - home_layer
            elif home_layer > head:
                raise Unlike(head, f"a tensor of layer {home_layer} is freed in segment {place}")
        return Ref(token_by, token_number, layer_by, layer_number, index)

    def dims(self, slot: int) -> Ints:
        """A tensor's shape, ``(axes,)``."""
        return row_of(self.trace, slot)

    def slot(self, slot: int) -> Slot:
        """What a tensor is, whatever its size."""
        return slot_of(self.trace, slot)

    def same(self, one: Place, other: Place, *, growth: bool, even: bool = False) -> None:
        """Whether two segments are alike; raises Irregular if not.

        With ``growth`` shapes may differ; where ``even``, as much as from the step before.
        """
        if self.steps[one] != self.steps[other]:
            raise Irregular(f"segments {one} and {other} differ")
        for a, b in zip(self.births[one], self.births[other], strict=True):
            if not growth:
                mine, theirs = (self._renamed(s, place) for s, place in ((a, one), (b, other)))
                if mine != theirs or (self.dims(a) != self.dims(b)).any():
                    raise Irregular(f"tensors of {one} and {other} differ")
            elif self.slot(a) != self.slot(b):
                raise Irregular(f"tensors of {one} and {other} differ")
        before = (one[0] - 1, one[1])
        if even:
            for z, a, b in zip(self.births[before], self.births[one], self.births[other], strict=True):
                if (self.dims(b) - self.dims(a) != self.dims(a) - self.dims(z)).any():
                    raise Irregular(f"shapes do not grow evenly up to {other}")

    def _renamed(self, slot: int, place: Place) -> Slot:
        found = self.slot(slot)
        return found._replace(module=_rename(found.module, self.recording.prefix, place[1] - 1, 0))


def _rename(module: str, prefix: str, layer: int, to: int) -> str:
    """``model.layers.3.mlp`` -> ``model.layers.17.mlp``, if it is of layer ``layer``."""
    old = f"{prefix}.{layer}"
    return f"{prefix}.{to}{module[len(old) :]}" if module == old or module.startswith(old + ".") else module


# -- programs ----------------------------------------------------------------------------------------------------------


class Program:
    """One structure, and its sizes at every shape within reach of the recordings it was seen in."""

    def __init__(self) -> None:
        self._structure: Structure | None = None
        self._sizes = Sizes()
        self._told: Mapping[str, Any] | None = None  # plain data that nobody has looked into yet

    @property
    def structure(self) -> Structure | None:
        """None before the first recording."""
        self._look()
        return self._structure

    @property
    def sizes(self) -> Sizes:
        """Shapes and what a further step adds to them: tables ``(2, tensors, axes)``."""
        self._look()
        return self._sizes

    @property
    def reach(self) -> Reach:
        """Which shapes it answers for."""
        return self.sizes.reach

    def covers(self, lengths: Sequence[int]) -> bool:
        """Whether it answers for a shape: one within reach, whose sizes come out as whole numbers."""
        return self.reach.covers(lengths) and self.sizes.whole(lengths)

    @property
    def recordings(self) -> int:
        """How many it was seen in."""
        return len(self._sizes.reach.seen if self._told is None else self._told["seen"])

    def add(self, lengths: Sequence[int], folded: Folded) -> None:
        """Take a recording in: as one more point to combine from, or as a test of what the others say.

        Raises:
            Irregular: It has another structure, or other sizes than the program says.
        """
        if self.structure is None:
            self._structure = folded.structure
        elif self.structure != folded.structure:
            raise Irregular("two recordings have different events")
        self.sizes.add(lengths, np.stack((folded.dims, folded.growth)))

    def unfold(
        self, depth: int, tokens: int, courses: Sequence[Course] = (), at_once: int | None = None,
        filled: int | None = None,
    ) -> Unfolded:
        """The program written out for ``depth`` layers and ``tokens`` new tokens.

        ``courses``: what happens in each gap; ``at_once`` tokens make a stretch (:data:`AT_ONCE`); ``filled``: the step
        in which a sliding window fills.
        """
        assert self.structure is not None
        return Unfolded(self.sizes, self.structure, depth, tokens, courses, at_once, filled)

    # -- on disk -------------------------------------------------------------------------------------------------------

    def to_json(self) -> Mapping[str, Any]:
        """As plain lists and numbers."""
        if self._told is not None:
            return self._told
        s = self._structure
        assert s is not None
        kinds = list(dict.fromkeys(s.all_slots))
        number = {kind: i for i, kind in enumerate(kinds)}
        return {
            "tokens": s.tokens, "folded_tokens": s.folded_tokens, "folded_layers": s.folded_layers, "depth": s.depth,
            "head_layers": s.head_layers, "prefix": s.prefix,
            "phases": [[*place, at, name] for place, at, name in s.phases],
            "kinds": kinds,
            "segments": [
                [*place, s.steps[place], [number[slot] for slot in s.slots[place]]] for place in s.steps
            ],
            "points": self.reach.span.vectors, "seen": self.reach.seen, **packed(self._sizes.tables),
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The program in ``data``, which is looked into when it is asked for something: an entry has many programs,
        and one prompt needs one of them.
        """
        program = cls()
        program._told = data
        return program

    def _look(self) -> None:
        """Look into plain data; raises ValueError, KeyError, TypeError or IndexError where it is no program."""
        if self._told is None:
            return
        data, self._told = self._told, None
        kinds = [Slot(*kind) for kind in data["kinds"]]
        self._structure = Structure(
            tokens=data["tokens"], folded_tokens=data["folded_tokens"], folded_layers=data["folded_layers"],
            depth=data["depth"], head_layers=data["head_layers"], prefix=data["prefix"],
            phases=tuple(((t, layer), at, name) for t, layer, at, name in data["phases"]),
            steps={
                (t, layer): tuple(Ref(*step) if isinstance(step, list) else step for step in steps)
                for t, layer, steps, _ in data["segments"]
            },
            slots={(t, layer): tuple(kinds[i] for i in numbers) for t, layer, _, numbers in data["segments"]},
        )  # fmt: skip
        self._sizes.reach = Reach.of(data["points"], data["seen"])
        shape = (2, len(self._structure.all_slots), AXES)
        self._sizes.tables = unpacked(data, len(self._sizes.reach.span.vectors), shape)


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
        at_once: int | None = None, filled: int | None = None,
    ) -> None:
        self.sizes, self.structure, self.courses = sizes, structure, courses
        self.depth, self.tokens, self._at_once = depth, tokens, at_once or AT_ONCE
        self.runs = runs_of(tokens, filled) if structure.folded_tokens else _singles(0, tokens)
        self._kept: dict[tuple[int, int, tuple[Name, ...]], _Written] = {}
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
        found = self.structure.written.get(place) or self._with_gaps.get(place)
        if found is None:
            found = Segment.of(self.structure, place, self.courses)
            gaps = any(isinstance(step, int) for step in self.structure.steps[place])
            (self._with_gaps if gaps else self.structure.written)[place] = found
        return found

    def sites(self, place: Place, layer: int) -> list[tuple[str, str]]:
        """Module path and operator of each tensor of the segment in ``place`` where it stands for ``layer``."""
        if (place, layer) not in self._sites:
            s, segment = self.structure, self.segment(place)
            if s.folded_layers and 1 <= layer <= self.depth:
                traced = place[1] if place[1] == s.depth else place[1] - 1  # one of two that are alike is not kept
                sites = [
                    (_rename(slot.module, s.prefix, traced, layer - 1) if row >= 0 else slot.module, slot.op)
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
