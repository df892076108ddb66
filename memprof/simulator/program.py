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
Where it sees nothing but the visual tokens themselves, it is recorded by itself for each count (:class:`Passage`), and
the program has a gap there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import lcm
from typing import Any, NamedTuple, Self, cast, overload

import numpy as np
import numpy.typing as npt

from memprof.simulator.cards import RULES
from memprof.simulator.reach import Reach
from memprof.simulator.replay import Timeline
from memprof.simulator.trace import ITEM_BYTES, Trace, bytes_of

Ints = npt.NDArray[np.int64]

#: Steps at the start that are kept as they are: the prefill, and the first decode step, which still frees its things.
HEAD_TOKENS = 2
#: Fewest tokens of a recording whose steps are folded: the head, two steps to compare, and the last one.
FOLDED_TOKENS = HEAD_TOKENS + 3
#: Most entries of a shape.
_AXES = 8


class Irregular(Exception):
    """A recording that does not repeat, or not as another of its kind: trace directly."""


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


@dataclass(frozen=True)
class Passage:
    """What one selection did, by itself.

    Attributes:
        events: Births and deaths; tensors numbered by birth inside.
        survivors: The numbers of those that outlive it.
        nbytes, parts, sites, shapes, dtypes: As in a trace.
    """

    events: tuple[int, ...]
    survivors: tuple[int, ...]
    nbytes: tuple[int, ...]
    parts: tuple[str, ...]
    sites: tuple[tuple[str, str], ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]

    @classmethod
    def of(cls, trace: Trace, start: int, stop: int) -> Passage:
        """The events from ``start`` to ``stop``; raises Irregular if they end a tensor born before."""
        born = [event for event in trace.events[start:stop] if event >= 0]
        number = {slot: i for i, slot in enumerate(born)}
        ended = [~event for event in trace.events[start:stop] if event < 0]
        if any(slot not in number for slot in ended):
            raise Irregular("a selection frees what it was given")
        return cls(
            tuple(number[e] if e >= 0 else ~number[~e] for e in trace.events[start:stop]),
            tuple(number[slot] for slot in born if slot not in set(ended)),
            tuple(trace.nbytes[slot] for slot in born),
            tuple(trace.parts[slot] for slot in born),
            tuple(trace.sites[slot] for slot in born),
            tuple(trace.shapes[slot] for slot in born),
            tuple(trace.dtypes[slot] for slot in born),
        )


class Slot(NamedTuple):
    """What a tensor of the program is, whatever its size. ``plain``: its bytes follow from its shape."""

    part: str
    module: str
    op: str
    dtype: str
    rank: int
    plain: bool


#: A segment's events: None for a birth, the ordinal of a gap, or what ends.
Step = None | int | Ref
#: A segment is found by its folded token and its folded layer (0: before the layers; depth + 1: behind them).
Place = tuple[int, int]


@dataclass
class Structure:
    """All of a program that no length moves.

    Attributes:
        tokens: Tokens of the folded recording: ``HEAD_TOKENS + 2`` where steps are folded (head, a step, the last).
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


class Folded(NamedTuple):
    """A recording folded up: its structure, its shapes ``(tensors, axes)``, and what a further step adds to each."""

    structure: Structure
    dims: Ints
    growth: Ints


# -- folding -----------------------------------------------------------------------------------------------------------


def fold(recording: Recording, *, fold_layers: bool) -> Folded:
    """Find the repetition in a recording.

    Args:
        recording: A direct trace. With :data:`FOLDED_TOKENS` tokens or more its steps are folded.
        fold_layers: Whether it is of a model with fewer layers, to be unfolded to a deeper one: then its layers are
            ``head_layers``, two that must be alike, and the last.

    Raises:
        Irregular: Something does not repeat.
    """
    flat = _Flat(recording, fold_layers)
    tokens, depth, head = len(recording.trace.marks), flat.depth, recording.head_layers
    fold_tokens = tokens >= FOLDED_TOKENS
    kept_tokens = [*range(HEAD_TOKENS + 1), tokens - 1] if fold_tokens else list(range(tokens))
    if fold_layers and depth != head + 3:
        raise Irregular(f"{depth} layers do not fold with {head} at the head")
    kept_layers = [*range(head + 2), depth, depth + 1] if fold_layers else list(range(depth + 2))
    for token in range(tokens):
        if fold_layers:
            flat.same((token, head + 1), (token, head + 2), growth=False)
        if fold_tokens and HEAD_TOKENS < token < tokens - 1:
            for layer in range(depth + 2):
                flat.same((token - 1, layer), (token, layer), growth=True)
    places = {
        (t, layer): (token, source) for t, token in enumerate(kept_tokens) for layer, source in enumerate(kept_layers)
    }
    structure = Structure(
        tokens=len(kept_tokens), folded_tokens=fold_tokens, folded_layers=fold_layers,
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
    dims = np.array([flat.dims(s) for s in rows], dtype=np.int64).reshape(-1, _AXES)
    growth = np.zeros_like(dims)
    if fold_tokens:
        for layer, source in enumerate(kept_layers):
            row = structure.first_row[HEAD_TOKENS, layer]
            now, then = (flat.births[token, source] for token in (HEAD_TOKENS, HEAD_TOKENS + 1))
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
                raise Irregular(f"a tensor of layer {home_layer} is freed in segment {place}")
        return Ref(token_by, token_number, layer_by, layer_number, index)

    def dims(self, slot: int) -> Ints:
        """A tensor's shape, ``(axes,)``; the first entry behind it is its bytes where they do not follow from it."""
        shape = self.trace.shapes[slot]
        if len(shape) >= _AXES:
            raise Irregular(f"a tensor has {len(shape)} axes")
        plain = self.slot(slot).plain
        return np.array([*shape, *([] if plain else [self.trace.nbytes[slot]])] + [1] * _AXES, dtype=np.int64)[:_AXES]

    def slot(self, slot: int) -> Slot:
        """What a tensor is, whatever its size."""
        t = self.trace
        plain = bytes_of(t.sites[slot][1], t.shapes[slot], t.dtypes[slot]) == t.nbytes[slot]
        return Slot(t.parts[slot], *t.sites[slot], t.dtypes[slot], len(t.shapes[slot]), plain)

    def same(self, one: Place, other: Place, *, growth: bool) -> None:
        """Whether two segments are alike; raises Irregular if not. With ``growth``, shapes grow as a step before."""
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
        if growth and one[0] > HEAD_TOKENS:
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
    """One structure, and its sizes at every shape within reach of the recordings it was seen in.

    Attributes:
        structure: None before the first recording.
        reach: Which shapes it answers for.
        passages: What fills its gaps, by visual tokens before and after the selection.
    """

    def __init__(self) -> None:
        self.structure: Structure | None = None
        self.reach = Reach()
        self.passages: dict[tuple[int, ...], Passage] = {}
        self._dims: list[Ints] = []
        self._growth: list[Ints] = []

    def add(self, lengths: Sequence[int], folded: Folded) -> None:
        """Take a recording in: as one more point to combine from, or as a test of what the others say.

        Raises:
            Irregular: It has another structure, or other sizes than the program says.
        """
        if self.structure is None:
            self.structure = folded.structure
        elif self.structure != folded.structure:
            raise Irregular("two recordings have different events")
        if self.reach.add(lengths):
            self._dims.append(folded.dims)
            self._growth.append(folded.growth)
        else:
            dims, growth = self._combine(lengths)
            if (dims != folded.dims).any() or (growth != folded.growth).any():
                raise Irregular(f"the program is wrong about {tuple(lengths)}")

    def _combine(self, lengths: Sequence[int]) -> tuple[Ints, Ints]:
        weights = self.reach.span.weights(lengths)
        if weights is None:
            raise Irregular(f"{tuple(lengths)} is no combination of what was recorded")
        scale = lcm(*(w.denominator for w in weights))
        whole = np.array([int(w * scale) for w in weights], dtype=np.int64)
        both = []
        for stack in (self._dims, self._growth):
            total = np.tensordot(whole, np.stack(stack), axes=1)
            if (total % scale).any():
                raise Irregular(f"{tuple(lengths)} gives lengths that are no whole numbers")
            both.append(total // scale)
        return both[0], both[1]

    def unfold(self, depth: int, tokens: int, passages: Sequence[tuple[int, ...]] = ()) -> Unfolded:
        """The program written out for ``depth`` layers and ``tokens`` new tokens.

        ``passages`` name the selection that fills each gap.
        """
        assert self.structure is not None
        return Unfolded(self, self.structure, depth, tokens, [self.passages[key] for key in passages])

    # -- on disk -------------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """As plain lists and numbers."""
        s = self.structure
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
            "points": self.reach.span.vectors, "seen": self.reach.seen,
            "dims": [one.tolist() for one in self._dims], "growth": [one.tolist() for one in self._growth],
            "passages": [[key, *vars(p).values()] for key, p in self.passages.items()],
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The program in ``data``; raises ValueError, KeyError, TypeError or IndexError where it is none."""
        program = cls()
        kinds = [Slot(*kind) for kind in data["kinds"]]
        program.structure = Structure(
            tokens=data["tokens"], folded_tokens=data["folded_tokens"], folded_layers=data["folded_layers"],
            depth=data["depth"], head_layers=data["head_layers"], prefix=data["prefix"],
            phases=tuple(((t, layer), at, name) for t, layer, at, name in data["phases"]),
            steps={
                (t, layer): tuple(Ref(*step) if isinstance(step, list) else step for step in steps)
                for t, layer, steps, _ in data["segments"]
            },
            slots={(t, layer): tuple(kinds[i] for i in numbers) for t, layer, _, numbers in data["segments"]},
        )  # fmt: skip
        program.reach = Reach.of(data["points"], data["seen"])
        shape = (len(program.structure.all_slots), _AXES)
        program._dims = [np.array(one, dtype=np.int64).reshape(shape) for one in data["dims"]]
        program._growth = [np.array(one, dtype=np.int64).reshape(shape) for one in data["growth"]]
        if not len(program._dims) == len(program._growth) == len(program.reach.span.vectors):
            raise ValueError("points and shapes do not match")
        for key, events, survivors, nbytes, parts, sites, shapes, dtypes in data["passages"]:
            program.passages[tuple(key)] = Passage(
                tuple(events), tuple(survivors), tuple(nbytes), tuple(parts), tuple((m, op) for m, op in sites),
                tuple(tuple(shape) for shape in shapes), tuple(dtypes),
            )  # fmt: skip
        return program


class Unfolded:
    """A program at its true depth and length, for one way of filling its gaps: every trace of it differs in sizes only.

    Attributes:
        timeline: The order of events, shared by all its traces.
    """

    def __init__(
        self, program: Program, structure: Structure, depth: int, tokens: int, passages: Sequence[Passage]
    ) -> None:
        self.program, self._structure, self._passages = program, structure, passages
        self._depth, self._tokens = depth, tokens
        self._trace = Trace()
        self._rows: list[int] = []  # row of the folded tables each slot's shape is in; ~i for number i of _fixed
        self._times: list[int] = []  # steps since the one that row stands for
        self._fixed: list[tuple[int, tuple[int, ...]]] = []  # bytes and shapes of the selections' tensors
        self.timeline = Timeline(self._trace, self._write())
        rows, times = np.array(self._rows), np.array(self._times)
        self._own = rows >= 0
        pairs = rows[self._own] * (tokens + 1) + times[self._own]
        unique, self._place = np.unique(pairs, return_inverse=True)
        self._unique = unique // (tokens + 1), unique % (tokens + 1)
        kinds = [structure.all_slots[row] for row in self._unique[0].tolist()]
        self._item = np.array([ITEM_BYTES.get(kind.dtype, 1) if kind.plain else 0 for kind in kinds], dtype=np.int64)
        self._ruled = [(i, kind) for i, kind in enumerate(kinds) if kind.plain and kind.op in RULES]
        self._rank = np.array([kind.rank for kind in kinds], dtype=np.int64)
        self._base = np.array([0 if row >= 0 else self._fixed[~row][0] for row in self._rows], dtype=np.int64)

    def trace(self, lengths: Sequence[int]) -> Trace:
        """The trace of one shape.

        Raises:
            Irregular: The shape is no combination of those recorded, or gives no whole lengths.
        """
        dims, growth = self.program._combine(lengths)
        rows, times = self._unique
        shapes = dims[rows] + times[:, None] * growth[rows]
        plain = self._item * np.prod(shapes, axis=1)
        sizes = np.where(self._item > 0, plain, shapes[np.arange(len(rows)), np.minimum(self._rank, _AXES - 1)])
        for i, kind in self._ruled:
            sizes[i] = RULES[kind.op](shapes[i, : kind.rank].tolist())
        nbytes = self._base.copy()
        nbytes[self._own] = sizes[self._place]
        own = np.cumsum(self._own) - 1
        t = self._trace
        return Trace(
            t.events,
            nbytes.tolist(),
            t.parts,
            t.sites,
            cast("list[tuple[int, ...]]", _Shapes(self, shapes, own)),
            t.dtypes,
            t.marks,
            t.phases,
        )

    @cached_property
    def caches(self) -> tuple[list[list[int]], list[list[int]]]:
        """Slots of the KV cache: each layer's after the first token, and all of them after each token."""
        trace, line = self._trace, self.timeline
        own = np.array([part == "kv_cache" for part in trace.parts])
        marks = [np.nonzero(own & (line.birth < mark) & (line.death >= mark))[0].tolist() for mark in trace.marks]
        layers: dict[str, list[int]] = {}
        for slot in marks[0] if marks else []:
            layers.setdefault(trace.sites[slot][0], []).append(slot)
        return list(layers.values()), marks

    # -- writing out ---------------------------------------------------------------------------------------------------

    def _write(self) -> list[int]:
        """Write the trace; returns the number of events at the end of each segment."""
        trace, joints = self._trace, list[int]()
        numbers: dict[tuple[int, int], list[int]] = {}  # slots of each segment, by its true token and layer
        phases: dict[tuple[Place, int], list[str]] = {}
        for folded, at, name in self._structure.phases:
            phases.setdefault((folded, at), []).append(name)
        for token in range(self._tokens):
            folded_token, times = self._folded_token(token)
            for layer in range(self._depth + 2):
                place = folded_token, self._folded_layer(layer)
                slots = numbers[token, layer] = []
                self._segment(place, token, layer, times, slots, numbers, phases if not times else {})
                joints.append(len(trace.events))
            trace.mark()
        return joints

    def _segment(
        self,
        place: Place,
        token: int,
        layer: int,
        times: int,
        slots: list[int],
        numbers: Mapping[tuple[int, int], list[int]],
        phases: Mapping[tuple[Place, int], list[str]],
    ) -> None:
        trace, structure = self._trace, self._structure
        kinds, row, steps = structure.slots[place], structure.first_row[place], structure.steps[place]
        at = 0
        while at < len(steps):
            for name in phases.get((place, at), ()):
                trace.phase(name)
            step = steps[at]
            at += 1
            if step is None:
                slots.append(self._birth(kinds[len(slots)], row + len(slots), layer, place, times))
            elif isinstance(step, int):
                at += self._fill(self._passages[step], kinds, row, layer, place, slots)
            else:
                home_token = step.token + (token if step.token_by == "+" else 0)
                home_layer = (
                    step.layer + layer if step.layer_by == "+"
                    else self._depth + 1 - step.layer if step.layer_by == "-" else step.layer
                )  # fmt: skip
                trace.death(numbers[home_token, home_layer][step.birth])
        for name in phases.get((place, at), ()):
            trace.phase(name)

    def _birth(self, kind: Slot, row: int, layer: int, place: Place, times: int) -> int:
        module = kind.module
        if self._structure.folded_layers and 1 <= layer <= self._depth:
            module = _rename(module, self._structure.prefix, self._traced_layer(place[1]), layer - 1)
        self._rows.append(row)
        self._times.append(times)
        return self._trace.birth(0, kind.part, (module, kind.op), (), kind.dtype)

    def _fill(
        self, passage: Passage, kinds: Sequence[Slot], row: int, layer: int, place: Place, slots: list[int]
    ) -> int:
        """Write a selection into its gap; returns how many births of the program it stands for."""
        numbers: dict[int, int] = {}
        for event in passage.events:
            if event < 0:
                self._trace.death(numbers[~event])
            elif event in passage.survivors:
                numbers[event] = self._birth(kinds[len(slots)], row + len(slots), layer, place, 0)
                slots.append(numbers[event])
            else:
                numbers[event] = self._trace.birth(
                    0, passage.parts[event], passage.sites[event], (), passage.dtypes[event]
                )
                self._rows.append(~len(self._fixed))
                self._times.append(0)
                self._fixed.append((passage.nbytes[event], passage.shapes[event]))
        return len(passage.survivors)

    def _folded_token(self, token: int) -> tuple[int, int]:
        """The folded token that stands for ``token``, and the steps between the two."""
        s = self._structure
        if not s.folded_tokens or token < HEAD_TOKENS:
            return token, 0
        return (s.tokens - 1, 0) if token == self._tokens - 1 else (HEAD_TOKENS, token - HEAD_TOKENS)

    def _folded_layer(self, layer: int) -> int:
        """The folded layer that stands for ``layer`` (0: before the layers, depth + 1: behind them)."""
        s = self._structure
        if not s.folded_layers or layer <= s.head_layers:
            return layer
        return s.depth - (self._depth - layer) if layer >= self._depth else s.head_layers + 1

    def _traced_layer(self, folded: int) -> int:
        """Number, in the recording, of the layer in place ``folded`` (from 1)."""
        s = self._structure
        return folded if s.folded_layers and folded == s.depth else folded - 1


class _Shapes(Sequence[tuple[int, ...]]):
    """Shapes of a trace's slots, made when asked for."""

    def __init__(self, unfolded: Unfolded, shapes: Ints, own: Ints) -> None:
        self._unfolded, self._shapes, self._own = unfolded, shapes, own

    def __len__(self) -> int:
        return len(self._unfolded._rows)

    @overload
    def __getitem__(self, index: int) -> tuple[int, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[int, ...]]: ...
    def __getitem__(self, index: int | slice) -> tuple[int, ...] | list[tuple[int, ...]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        u = self._unfolded
        row = u._rows[index]
        if row < 0:
            return u._fixed[~row][1]
        place = u._place[self._own[index]]
        return tuple(self._shapes[place, : u._rank[place]].tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Iterable) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]
