"""Programs are made here: a few prompts are recorded, and the rest follow from them.

A recording is an ordinary profiled ``generate()`` over weights without storage, of few tokens, and of a model with few
decoder layers where the rest are alike. Which shapes are recorded follows from those asked for: the outermost ones, as
many as the lengths have degrees of freedom, and one more that must come out as predicted. Where recordings do not agree
the shapes are told apart by their tiles. A shape that no such program answers for is recorded by itself, where layers
and steps alone are spared, and in the end it is traced directly.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn

from memprof import scopes
from memprof.anatomy import anatomy
from memprof.forecasts.programs import CLASSES, Filling, Forecast, Lengths, Programs, beside
from memprof.forks import shared
from memprof.meters import Meter
from memprof.meters.sim import SimMeter
from memprof.prompts import Shape
from memprof.pruning import Choice, Pruner
from memprof.pruning.signals import signal_kind
from memprof.pruning.view import View, no_projector
from memprof.pruning.vision import projected
from memprof.simulator.folding import FOLDED_TOKENS, STEPS_BEFORE, Recording, Unlike, fold
from memprof.simulator.program import Program
from memprof.simulator.reach import Reach
from memprof.simulator.selection import Passage
from memprof.simulator.sizes import Irregular
from memprof.tracing.ledger import Ledger

#: Makes the model with that many decoder layers, and its meter.
Build = Callable[[int], tuple[nn.Module, Meter]]
#: Profiles one prompt of random text: model, meter, pruner, shape, new tokens.
Profile = Callable[[nn.Module, Meter, Pruner, Shape, int], object]


@dataclasses.dataclass
class Head:
    """How many layers at the start of a model are unlike those behind them, as where a tower adds to the first few.

    Attributes:
        layers: As many as were found to be, whatever the method.
        most: With how many it is no use any more.
        sure: Whether a recording with so many was folded.
    """

    layers: int = 2
    most: int = 8
    sure: bool = False


class Recorder:
    """Makes the programs of one model under one method and stack, and answers from them.

    Args:
        programs: Those there are; what is recorded is added to them.
        meter: The meter of the whole model: the state to begin from.
        build: Makes a model of the same kind with fewer layers.
        profile: Profiles one prompt.
        watch: Told of recordings: how many are done, and of how many.
        head: What is known of the model's first layers; what is found is put there, for all who record it.
        alike: Whether the decoder layers are alike, so that a few of them tell of all.
    """

    def __init__(
        self,
        programs: Programs,
        meter: SimMeter,
        build: Build,
        profile: Profile,
        watch: Callable[[int, int], None],
        head: Head,
        *,
        alike: bool = True,
    ) -> None:
        self.programs, self._meter, self._build, self._profile = programs, meter, build, profile
        self._watch, self._head, self._alike = watch, head, alike
        #: Prompts that were run to record programs.
        self._recorded = [0]  # shared by all that :meth:`under` makes
        self._forms: list[_Form] = []
        self._recordings: dict[Lengths, Recording] = {}  # while shapes are foreseen, what several programs may need

    @property
    def recorded(self) -> int:
        """How many prompts were recorded so far."""
        return self._recorded[0]

    @property
    def _pruner(self) -> Pruner:
        return self.programs.pruner

    @property
    def _depth(self) -> int:
        return self.programs.depth

    def under(self, pruner: Pruner) -> Recorder:
        """This recorder for a like ``pruner`` that keeps another share; programs are shared."""
        twin = copy.copy(self)
        twin.programs = self.programs.under(pruner)
        return twin

    # -- what is asked -------------------------------------------------------------------------------------------------

    def foresee(self, shapes: Iterable[Shape], new_tokens: int) -> bool:
        """Make programs for ``shapes`` where there are none; whether anything was recorded for it."""
        distinct = list(dict.fromkeys(shapes))
        before = self._known
        even, filling = self._told_apart(distinct, new_tokens)
        try:
            self._cover(even, new_tokens, 0)
            answering = self.programs.answering
            self._record_alone([shape for shape in even if answering(shape, new_tokens) is None], new_tokens)
            self._record_filling(filling)
        finally:
            self._recordings.clear()
        return self._known > before

    @property
    def _known(self) -> tuple[int, int]:
        """How much is recorded: prompts, and selections by themselves."""
        return self.recorded, sum(len(one.seen) for one in self.programs.selections.known)

    def forecast(self, shape: Shape, new_tokens: int) -> Forecast | None:
        """What one shape will hold, or None where no program answers for it."""
        if not self._ready_for(shape, new_tokens):
            return None
        return self.programs.forecast(shape, new_tokens, self._meter.loaded, self._meter.known)

    def _ready_for(self, shape: Shape, new_tokens: int) -> bool:
        """Whether a program answers for the shape, now that its selections are recorded."""
        if self.programs.filled(shape, new_tokens):
            return self.programs.answer(shape, new_tokens)
        program = self.programs.of(shape, new_tokens)
        try:
            if program is not None:
                self._fill(program, shape)
        except Irregular:
            return False
        return program is not None

    def _told_apart(self, shapes: Iterable[Shape], new_tokens: int) -> tuple[list[Shape], list[Filling]]:
        """The shapes that few steps tell of, and what tells of those in whose answers a sliding window fills."""
        even, filling = list[Shape](), list[Filling]()
        for shape in shapes:
            filled = self.programs.filled(shape, new_tokens)
            way = self.programs.filling_of(shape, new_tokens)
            if way is not None:
                filling.append(way)
            if not filled or (way is not None and way.recorded == STEPS_BEFORE):
                even.append(shape)
        return even, filling

    # -- recording -----------------------------------------------------------------------------------------------------

    def _record_alone(self, shapes: Sequence[Shape], new_tokens: int) -> None:
        """A program for each shape, recorded at that very shape: only layers and steps are folded."""
        plans = dict[Shape, list[Lengths]]()
        for shape in shapes:
            lengths = self.programs.lengths(shape, new_tokens)
            if lengths in self.programs.alone:
                continue
            self.programs.alone[lengths] = None
            reach = Reach()
            while reach.span.weights(lengths) is None and (point := _to_record(lengths, reach)) is not None:
                reach.add(point)
            plans[shape] = reach.seen
        recordings = iter(self._record([(shape, point[-1]) for shape, points in plans.items() for point in points]))
        for shape, points in plans.items():
            program, own = Program(), list(islice(recordings, len(points)))
            try:
                for point, recording in zip(points, own, strict=True):
                    program.add(point, self._fold(recording))
                self._fill(program, shape)
            except Irregular:
                continue
            self.programs.alone[self.programs.lengths(shape, new_tokens)] = program

    def _record_filling(self, ways: Iterable[Filling]) -> None:
        """A program for each answer in which a window fills."""
        new = {way.key: way for way in ways if way.key not in self.programs.filling}
        recordings = iter(self._record([(way.near, tokens) for way in new.values() for tokens in way.points]))
        for key, way in new.items():
            program, own = Program(), list(islice(recordings, len(way.points)))
            try:
                for tokens, recording in zip(way.points, own, strict=True):
                    program.add(self.programs.lengths(way.near, tokens), self._fold(recording, way.recorded))
            except Irregular:
                self.programs.filling[key] = None
                continue
            self.programs.filling[key] = program

    def _cover(self, shapes: Sequence[Shape], new_tokens: int, level: int) -> None:
        """Record until a program answers for every shape, told apart by class number ``level``."""
        groups: dict[tuple[Any, ...], list[Shape]] = {}
        for shape in shapes:
            groups.setdefault(self.programs.key(shape, new_tokens, level), []).append(shape)
        for key, group in groups.items():
            if self.programs.shared.get(key, ...) is None:
                self._split(group, new_tokens, level)
                continue
            program = self.programs.shared.setdefault(key, Program())
            assert program is not None
            try:
                self._extend(program, group, new_tokens)
            except Irregular as found:
                if isinstance(found, Unlike) and found.head < self._head.most:
                    self._head.layers = found.head + 1
                    self._recordings.clear()
                    del self.programs.shared[key]
                    self._cover(group, new_tokens, level)
                    continue
                self.programs.shared[key] = None
                self._split(group, new_tokens, level)

    def _split(self, group: Sequence[Shape], new_tokens: int, level: int) -> None:
        if level + 1 < len(CLASSES):
            self._cover(group, new_tokens, level + 1)

    def _extend(self, program: Program, group: Sequence[Shape], new_tokens: int) -> None:
        """Record what is missing to answer for all of ``group``."""
        asked = {self.programs.lengths(shape, new_tokens): shape for shape in group}
        plan = _plan(copy.deepcopy(program.reach), list(asked))
        recordings = self._record([(asked[lengths], point[-1]) for lengths, point in plan], self._prove)
        for (_, point), recording in zip(plan, recordings, strict=True):
            program.add(point, self._fold(recording))
        for lengths, shape in asked.items():
            if program.reach.covers(lengths):
                program.sizes.at(lengths)  # no whole numbers: these shapes are no combinations of each other
            self._fill(program, shape)

    def _prove(self, recording: Recording) -> None:
        """Raise Unlike before more is recorded with too short a head."""
        if not self._head.sure:
            self._fold(recording)
            self._head.sure = True

    def _fold(self, recording: Recording, filled: int | None = None) -> Any:
        return fold(recording, fold_layers=self._recorded_depth(recording.head_layers) < self._depth, filled=filled)

    def _recorded_depth(self, head: int) -> int:
        return min(head + 3, self._depth) if self._alike else self._depth

    def _record(
        self, prompts: Sequence[tuple[Shape, int]], prove: Callable[[Recording], None] = lambda _: None
    ) -> list[Recording]:
        """Recordings of prompts of those shapes, and so many new tokens; ``prove`` is shown the first, before the rest
        is recorded.
        """
        points = [self.programs.lengths(*prompt) for prompt in prompts]
        new = {point: prompt for point, prompt in zip(points, prompts, strict=True) if point not in self._recordings}
        order, missing = list(new), list(new.values())
        if missing:
            self._watch(0, len(missing))
        for done, (number, (recording, form)) in enumerate(shared(self._record_one, missing), start=1):
            self._recordings[order[number]] = recording
            if form is not None:
                self._forms[:] = [form]
            self._recorded[0] += 1
            self._watch(done, len(missing))
            if done == 1:
                prove(recording)
        return [self._recordings[point] for point in points]

    def _record_one(self, prompt: tuple[Shape, int]) -> tuple[Recording, _Form | None]:
        """Profile one prompt on a model of few layers, and note where layers and selections begin.

        Returns with it what a selection was shown, if one stands by itself.
        """
        shape, new_tokens = prompt
        stages = self.programs.stages(shape)
        head = max((stages[-1].layer if stages else 0) + 2, self._head.layers)
        model, meter = self._build(self._recorded_depth(head))
        assert isinstance(meter, SimMeter)
        entered: list[int] = []
        gaps: list[tuple[int, int]] = []
        forms: list[_Form] = []

        def note(*_: Any) -> None:
            assert meter.ledger is not None
            entered.append(len(meter.ledger.trace.events))

        layers = anatomy(model).layers
        hooks = [layer.register_forward_pre_hook(note) for _, layer in layers]
        hooks.append(layers[-1][1].register_forward_hook(note))
        try:
            self._profile(model, meter, self._watched(meter, gaps, forms), shape, new_tokens)
        finally:
            for hook in hooks:
                hook.remove()
        assert meter.trace is not None
        every = len(layers) + 1
        recording = Recording(
            trace=meter.trace,
            layers=[entered[i : i + every] for i in range(0, len(entered), every)],
            gaps=gaps if len(gaps) == len(stages) else [],
            head_layers=head,
            prefix=layers[0][0].rpartition(".")[0],
        )
        return recording, forms[-1] if forms else None

    def _watched(self, meter: SimMeter, gaps: list[tuple[int, int]], forms: list[_Form]) -> Pruner:
        """The pruner, cutting as in the whole model, with its selections noted."""
        twin, select = copy.copy(self._pruner), self._pruner.select

        def watched(view: View, kept: int) -> torch.Tensor | Choice:
            assert meter.ledger is not None
            trace = meter.ledger.trace
            start = len(trace.events)
            out = select(view, kept)
            gaps.append((start, len(trace.events)))
            forms.append(_Form.of(view))
            return out

        object.__setattr__(twin, "stages", lambda n_visual, _: self._pruner.stages(n_visual, self._depth))
        object.__setattr__(twin, "select", watched)
        return twin

    # -- selections by themselves --------------------------------------------------------------------------------------

    def _fill(self, program: Program, shape: Shape) -> None:
        """Record the selections that the program's gaps need for a shape."""
        for counts in self.programs.wanted(program, shape):
            if not self._forms:  # the program came from disk: one short prompt shows what a selection looks at
                self._record([(shape, 1)])
            self.programs.selections.add(counts, self._select(counts[0], counts[1], counts[2], shape))

    def _select(self, n_visual: int, kept: int, merged: int, shape: Shape) -> Passage:
        """What keeping ``kept`` of ``n_visual`` tokens and merging ``merged`` does in a prompt of ``shape``."""
        if not self._forms:
            raise Irregular("no selection was seen yet")
        with torch.no_grad():
            view = self._forms[0].view(n_visual, merged, beside(shape), self._meter.weights[0])
            view = dataclasses.replace(view, project=partial(projected, anatomy(self._build(self._depth)[0]).vision))
            kernels = self._meter.kernels()
            ledger = Ledger("cpu", kernels)
            ledger.ignore(view.signals.values())
            with kernels.dispatch(), scopes.scope(*self._forms[0].scope):
                ledger.listen()
                try:
                    chosen = self._pruner.select(view, kept)
                finally:
                    trace = ledger.close()
        del chosen
        return Passage.of(trace, 0, len(trace.events))


def _plan(reach: Reach, asked: Sequence[Lengths]) -> list[tuple[Lengths, Lengths]]:
    """What to record so that everything ``asked`` is answered for and one recording was a test: the shapes that lie
    outermost, each with the lengths to record it at. ``reach`` is used up.

    Too few shapes to test with end the plan.
    """
    plan = list[tuple[Lengths, Lengths]]()
    while unanswered := [lengths for lengths in asked if not reach.covers(lengths)]:
        points = {
            point: lengths
            for lengths in (unanswered if reach.tested else asked)
            if (point := _to_record(lengths, reach)) is not None
        }
        if not points:
            break
        point = max(
            points, key=lambda one: (reach.excess(one), reach.span.weights(one) is None, not reach.met(one), sum(one))
        )
        plan.append((points[point], point))
        reach.add(point)
    return plan


def _to_record(lengths: Lengths, reach: Reach) -> Lengths | None:
    """The next recording to make of a shape: where steps are folded, of few tokens, and of different numbers of them to
    tell what they move. None where there is none to be made.
    """
    tokens = [lengths[-1]]
    if lengths[-1] > FOLDED_TOKENS + 1:
        tokens = [FOLDED_TOKENS + (len(reach.seen) + i) % 2 for i in range(2)]
    return next((point for n in tokens if (point := (*lengths[:-1], n)) not in reach.seen), None)


@dataclasses.dataclass
class _Form:
    """What a selection was shown, without its tensors: enough to show it as many tokens as one likes."""

    rest: View
    rows: dict[str, tuple[tuple[int, ...], torch.dtype]]
    scope: scopes.Scope

    @classmethod
    def of(cls, view: View) -> _Form:
        """The form of ``view``."""
        rows = {name: (tuple(signal.shape), signal.dtype) for name, signal in view.signals.items()}
        return cls(dataclasses.replace(view, signals={}, project=no_projector), rows, scopes.current())

    def view(self, count: int, merged: int, others: Mapping[str, int], like: torch.Tensor) -> View:
        """A view of ``count`` tokens, and of as many ``others``, made of tensors as ``like`` is."""
        numbers = {"visual": count, **others}

        def sizes(name: str, shape: tuple[int, ...]) -> list[int]:
            leads = signal_kind(name).leads
            return [numbers.get(str(lead), n) for lead, n in zip((*leads, *[None] * len(shape)), shape, strict=False)]

        signals = {name: like.new_empty(sizes(name, shape), dtype=dtype) for name, (shape, dtype) in self.rows.items()}
        return dataclasses.replace(self.rest, count=count, merged=merged, signals=signals)
