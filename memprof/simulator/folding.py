"""A recording folded up: decode steps and decoder layers that repeat are kept once. Plain data, no torch.

What :mod:`memprof.simulator.unfolding` writes out again, at full depth and length.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from memprof.simulator.sizes import AXES, Ints, Irregular, Slot, row_of, slot_of
from memprof.simulator.trace import Trace

#: Steps at the start that are kept as they are: the prefill, and the first decode step, which still frees its things.
HEAD_TOKENS = 2
#: Fewest tokens of a recording whose steps are folded: the head, two steps to compare, and the last one.
FOLDED_TOKENS = HEAD_TOKENS + 3
#: Fewest tokens before a window fills that are folded. Recordings of fewer than so many tokens know nothing of it.
STEPS_BEFORE = FOLDED_TOKENS + 1


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
        runs, behind = singles(0, min(HEAD_TOKENS, tokens)), HEAD_TOKENS
        folds = tokens >= FOLDED_TOKENS
    else:
        runs, behind = singles(0, min(filled, HEAD_TOKENS)), filled + HEAD_TOKENS
        if filled >= STEPS_BEFORE:
            runs.append(Run(HEAD_TOKENS, filled - HEAD_TOKENS, repeats=True))
        else:
            runs += singles(HEAD_TOKENS, filled)
        runs += singles(filled, min(behind, tokens))
        folds = tokens - filled >= FOLDED_TOKENS
    if not folds:
        return runs + singles(behind, tokens)
    return [*runs, Run(behind, tokens - 1 - behind, repeats=True), Run(tokens - 1)]


def singles(first: int, stop: int) -> list[Run]:
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
        return found._replace(module=rename(found.module, self.recording.prefix, place[1] - 1, 0))


def rename(module: str, prefix: str, layer: int, to: int) -> str:
    """``model.layers.3.mlp`` -> ``model.layers.17.mlp``, if it is of layer ``layer``."""
    old = f"{prefix}.{layer}"
    return f"{prefix}.{to}{module[len(old) :]}" if module == old or module.startswith(old + ".") else module
