"""The programs of one model under one method and stack: which of them answers for a prompt, and what it says.

A prompt's sizes are lengths, and a program's sizes are polynomials in them (:mod:`memprof.simulator.program`). Programs
are made by :mod:`memprof.bench.recorder`; here they are only read.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from memprof.forecasts.windows import cached_by_first, capped
from memprof.prompts import Shape
from memprof.pruning import Pruner, Stage
from memprof.pruning.signals import signal_kind
from memprof.simulator.allocator import CachingAllocator
from memprof.simulator.filling import Told, joined
from memprof.simulator.folding import FOLDED_TOKENS, STEPS_BEFORE
from memprof.simulator.program import Program
from memprof.simulator.replay import Reading, read_stretches
from memprof.simulator.selection import Counts, Passage, Selections
from memprof.simulator.sizes import Irregular
from memprof.simulator.small_pool import Known
from memprof.simulator.unfolding import Unfolded

#: What a prompt's shape is told apart by, coarse first: where recordings disagree, the next is tried.
CLASSES: tuple[Callable[[Shape], int], ...] = (
    lambda shape: min(shape.tiles, 1),
    lambda shape: min(shape.tiles, 2),
    lambda shape: shape.tiles,
)

#: A prompt's lengths, then the number of new tokens (see :class:`~memprof.simulator.reach.Reach`).
Lengths: TypeAlias = "tuple[int, ...]"


@dataclasses.dataclass
class Forecast:
    """What a predicted prompt holds.

    Attributes:
        reading: As a meter would have read it.
        kv_tokens, kv_bytes_per_layer: Of each layer after prefill.
        kv_bytes: Of the whole cache when each token was done.
    """

    reading: Reading
    kv_tokens: list[int]
    kv_bytes_per_layer: list[int]
    kv_bytes: list[int]


@dataclasses.dataclass(frozen=True)
class Filling:
    """How to tell of an answer in which a window fills.

    Attributes:
        near: The prompt to record: as the one asked about, with text until the window is near.
        step: The step of the answer in which it fills.
        recorded: The step of the recording.
        tokens: The new tokens of ``near`` that are as many in all as those asked about.
        points: New tokens of each recording.
        key: What finds the program.
    """

    near: Shape
    step: int
    recorded: int
    tokens: int
    points: tuple[int, ...]
    key: Lengths

    @property
    def ahead(self) -> int:
        """How many tokens longer the recorded prompt is."""
        return self.step - self.recorded


class Programs:
    """What was recorded of one model under one method and stack.

    Args:
        depth: Decoder layers of the model.
        pruner: The method.
        windows: Of each decoder layer the sliding window, or None (:func:`~memprof.forecasts.windows.windows_of`).

    Attributes:
        shared: Programs of many shapes, by :meth:`key`; None where recordings did not agree.
        alone: Programs of one shape each, by its lengths.
        filling: Programs in which a window fills, by :attr:`Filling.key` (:mod:`memprof.simulator.filling`).
        selections: What fills the gaps of all of them.
    """

    def __init__(self, depth: int, pruner: Pruner, windows: Sequence[int | None] = ()) -> None:
        self.depth, self.pruner = depth, pruner
        self._slides = tuple(windows)
        self.windows = tuple(sorted({window for window in windows if window is not None}))
        self.shared: dict[tuple[Any, ...], Program | None] = {}
        self.alone: dict[Lengths, Program | None] = {}
        self.filling: dict[Lengths, Program | None] = {}
        self.selections = Selections()
        self._unfolded: dict[tuple[Any, ...], Unfolded] = {}

    def under(self, pruner: Pruner) -> Programs:
        """These programs for a like ``pruner`` that keeps another share."""
        twin = copy.copy(self)
        twin.pruner = pruner
        return twin

    # -- what is asked -------------------------------------------------------------------------------------------------

    def of(self, shape: Shape, new_tokens: int) -> Program | None:
        """The program that answers for a shape, if its selections are known (:meth:`wanted`)."""
        return self.answering(shape, new_tokens) or self.alone.get(self.lengths(shape, new_tokens))

    def wanted(self, program: Program, shape: Shape) -> list[Counts]:
        """The selections that ``program`` needs for a shape, and that no recording answers for."""
        return [counts for counts in self.counts(program, shape) if self.selections.at(counts) is None]

    def answer(self, shape: Shape, new_tokens: int) -> bool:
        """Whether all is there to answer for a shape."""
        if self.filled(shape, new_tokens):
            return self._joined(shape, new_tokens) is not None
        program = self.of(shape, new_tokens)
        return program is not None and not self.wanted(program, shape)

    def unfolded(self, shape: Shape, new_tokens: int) -> tuple[Unfolded, list[Passage]] | None:
        """The program of one shape, written out, and what fills its gaps; None where none answers for it."""
        if self.filled(shape, new_tokens):
            joined = self._joined(shape, new_tokens)
            return None if joined is None else (joined, [])
        program = self.of(shape, new_tokens)
        if program is None:
            return None
        passages = [found for c in self.counts(program, shape) if (found := self.selections.at(c)) is not None]
        if len(passages) < len(self.counts(program, shape)):
            return None
        courses = [passage.course for passage in passages]
        key = (id(program), new_tokens, *courses)
        if key not in self._unfolded:
            self._unfolded[key] = program.unfold(self.depth, new_tokens, courses)
        return self._unfolded[key], passages

    def forecast(self, shape: Shape, new_tokens: int, start: CachingAllocator, known: Known) -> Forecast | None:
        """What one shape will hold on a card in the state ``start``, or None where no program answers for it."""
        found, lengths = self.unfolded(shape, new_tokens), self.lengths(shape, new_tokens)
        if found is None:
            return None
        unfolded, passages = found
        try:
            layers, kv_bytes = unfolded.caches(lengths)
            reading = read_stretches(lambda: unfolded.stretches(lengths, passages), start, known)
        except Irregular:
            return None
        own = [layer for layer in layers if any(len(cached.shape) > 1 for cached in layer)]
        held = [sum(cached.nbytes for cached in layer) for layer in own]
        found_tokens = [max(cached.shape[-2] for cached in layer if len(cached.shape) > 1) for layer in own]
        # A sliding layer also holds the size of its window, in a tensor of one number made before the layers run.
        sizes = [cached.nbytes for layer in layers if layer not in own for cached in layer]
        sliding = [number for number, window in enumerate(self._slides) if window is not None]
        if (len(held), len(sizes)) == (self.depth, len(sliding)):
            for number, nbytes in zip(sliding, sizes, strict=True):
                held[number] += nbytes
        return Forecast(
            reading,
            # Of a prompt longer than its window a layer holds all storage, and looks at the end of it.
            capped(found_tokens, self._of(own)),
            held,
            kv_bytes[: len(reading.allocated_bytes)],
        )

    def _of(self, layers: Sequence[object]) -> Sequence[int | None]:
        """The window of each layer that has a cache, where all have one."""
        return self._slides if len(self._slides) == len(layers) else [None] * len(layers)

    def answering(self, shape: Shape, new_tokens: int) -> Program | None:
        """The program of many shapes that answers for this one, too."""
        lengths = self.lengths(shape, new_tokens)
        keys = (self.key(shape, new_tokens, level) for level in range(len(CLASSES)))
        programs = filter(None, map(self.shared.get, keys))
        return next((program for program in programs if program.covers(lengths)), None)

    def counts(self, program: Program, shape: Shape) -> list[Counts]:
        """What the selections that fill the program's gaps are shown of a shape."""
        assert program.structure is not None
        gaps = program.structure.gaps
        leads = {lead for name in self.pruner.needs for lead in signal_kind(name).leads}
        others = tuple(number for lead, number in beside(shape).items() if lead in leads)
        found, left = list[Counts](), shape.visual_tokens
        for stage in self.stages(shape)[:gaps]:
            found.append((left, stage.kept, stage.merged, *others))
            left = stage.tokens
        return found

    # -- windows -------------------------------------------------------------------------------------------------------

    def filled(self, shape: Shape, new_tokens: int) -> list[int]:
        """The steps of an answer in which sliding windows fill; none where all are full before, or are never.

        Behind a cut each layer's window fills in a step of its own, and may do so after the prompt has filled others.
        """
        begin = cached_by_first(self.pruner, shape, self.depth)
        if self.stages(shape):
            return [max(0, window - begin) for window in self.windows if window < shape.length + new_tokens]
        return [window - begin for window in self.windows if 1 <= window - begin < new_tokens]

    def filling_of(self, shape: Shape, new_tokens: int) -> Filling | None:
        """How to tell of an answer in which one window fills; None where nothing tells: it is to be traced."""
        steps = self.filled(shape, new_tokens)
        if len(steps) != 1 or self.stages(shape):
            return None
        step, behind = min(steps[0], STEPS_BEFORE), new_tokens - steps[0]
        near, folds = shape.longer(steps[0] - step), behind > FOLDED_TOKENS + 1
        points = [step + FOLDED_TOKENS + i for i in range(2)] if folds else [step + behind]
        key = *self.lengths(near, step)[:-1], step, 0 if folds else behind
        return Filling(near, steps[0], step, step + behind, tuple(points), key)

    def _joined(self, shape: Shape, new_tokens: int) -> Unfolded | None:
        """The program of a shape whose answer fills a window, written out; None where there is none."""
        way = self.filling_of(shape, new_tokens)
        near = None if way is None else self.filling.get(way.key)
        if way is None or near is None:
            return None
        if way.ahead == 0 and way.recorded < STEPS_BEFORE:
            told = Told(near.sizes.at(self.lengths(shape, new_tokens)))
            assert near.structure is not None
            return Unfolded(told, near.structure, self.depth, new_tokens, (), filled=way.step)
        own = self.of(shape, new_tokens)
        try:
            return None if own is None else joined(
                own, self.lengths(shape, new_tokens), near, self.lengths(way.near, way.tokens),
                ahead=way.ahead, depth=self.depth, tokens=new_tokens, filled=way.step,
            )  # fmt: skip
        except Irregular:
            return None

    # -- names ---------------------------------------------------------------------------------------------------------

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        return tuple(self.pruner.stages(shape.visual_tokens, self.depth))

    def lengths(self, shape: Shape, new_tokens: int) -> tuple[int, ...]:
        """A shape as the lengths its sizes are affine in; what is kept by a selection in a gap is one of them, too.

        Of several prompts side by side, the tensors that run through all of them grow with batch times length.
        """
        kept = (n for stage in self.stages(shape) for n in [stage.kept] + [stage.merged] * bool(stage.merged))
        one = shape.visual_tokens, *shape.text, *kept
        if shape.batch == 1:
            return *shape.lengths, *one, new_tokens
        side_by_side = (shape.batch * n for n in (*shape.lengths, shape.visual_tokens, shape.length))
        return *side_by_side, shape.batch, *one, new_tokens

    def key(self, shape: Shape, new_tokens: int, level: int) -> tuple[Any, ...]:
        """The program a shape belongs to, told apart by class number ``level``."""
        steps = 0 if new_tokens > FOLDED_TOKENS + 1 else new_tokens
        cuts = (number for stage in self.stages(shape) for number in (stage.layer, bool(stage.merged)))
        kinds = tuple(image.kind for image in shape.images)
        full = tuple(f"beyond {window}" for window in self.windows if window <= shape.length)
        return level, CLASSES[level](shape), shape.batch > 1, kinds, steps, *cuts, *full


def beside(shape: Shape) -> dict[str, int]:
    """How many rows a signal has, by what leads it, beside visual tokens (:mod:`memprof.pruning.signals`)."""
    return {"text": shape.text[-1], "tiles": shape.tiles}
