"""Predictions without running every prompt: programs recorded on a few, kept on disk, and evaluated at the rest.

A recording is an ordinary profiled ``generate()`` over weights without storage, of few tokens, and of a model with few
decoder layers where the rest are alike. Which shapes are recorded follows from those asked for: the outermost ones, as
many as the lengths have degrees of freedom, and one more that must come out as predicted. Where recordings do not agree
the shapes are told apart by their tiles. A shape that no such program answers for is recorded by itself, where layers
and steps alone are spared, and in the end it is traced directly.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from memprof import scopes
from memprof.anatomy import anatomy
from memprof.environment import package_version
from memprof.families import PromptShape
from memprof.forks import shared
from memprof.meters import Meter
from memprof.meters.sim import SimMeter
from memprof.pruning import Pruner, Stage
from memprof.pruning.view import View
from memprof.simulator.ledger import Ledger
from memprof.simulator.program import FOLDED_TOKENS, Irregular, Passage, Program, Recording, Unfolded, fold
from memprof.simulator.reach import Reach
from memprof.simulator.replay import Reading, read_cuda
from memprof.simulator.trace import Trace

#: Layout of a file of programs; others are made anew.
SCHEMA = 1
#: What a prompt's shape is told apart by, coarse first: where recordings disagree, the next is tried.
_CLASSES: tuple[Callable[[PromptShape], int], ...] = (
    lambda shape: min(shape.tiles, 1),
    lambda shape: min(shape.tiles, 2),
    lambda shape: shape.tiles,
)

#: A prompt's lengths, then the number of new tokens (see :class:`~memprof.simulator.reach.Reach`).
Lengths: TypeAlias = "tuple[int, ...]"
#: Makes the model with that many decoder layers, and its meter.
Build = Callable[[int], tuple[nn.Module, Meter]]
#: Profiles one prompt of random text: model, meter, pruner, shape, new tokens.
Profile = Callable[[nn.Module, Meter, Pruner, PromptShape, int], object]


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


class Predictor:
    """Forecasts for one model under one method and stack.

    Args:
        depth: Decoder layers of the model.
        meter: The meter of the whole model: the state to begin from.
        pruner: The method.
        build: Makes a model of the same kind with fewer layers.
        profile: Profiles one prompt.
        depends: Everything else the programs depend on, as plain data; see :func:`source_hash`.
        watch: Told of recordings: how many are done, and of how many.
        alike: Whether the decoder layers are alike, so that a few of them tell of all.
    """

    def __init__(
        self,
        depth: int,
        meter: SimMeter,
        pruner: Pruner,
        build: Build,
        profile: Profile,
        depends: dict[str, Any],
        watch: Callable[[int, int], None],
        *,
        alike: bool = True,
    ) -> None:
        self._depth, self._meter, self._pruner, self._build, self._profile = depth, meter, pruner, build, profile
        self._depends, self._watch, self._alike = depends, watch, alike
        #: Prompts that were run to record programs.
        self._recorded = [0]  # shared by all that :meth:`under` makes
        self._programs: dict[tuple[Any, ...], Program | None] = {}
        self._alone: dict[Lengths, Program | None] = {}  # by lengths: each answers for those alone
        self._unfolded: dict[tuple[Any, ...], Unfolded] = {}
        self._forms: list[_Form] = []
        self._recordings: dict[Lengths, Recording] = {}  # while shapes are foreseen, what several programs may need

    @property
    def recorded(self) -> int:
        """How many prompts were recorded so far."""
        return self._recorded[0]

    def under(self, pruner: Pruner) -> Predictor:
        """This predictor for a like ``pruner`` that keeps another share; programs are shared."""
        twin = copy.copy(self)
        twin._pruner = pruner
        return twin

    # -- what is asked -------------------------------------------------------------------------------------------------

    def foresee(self, shapes: Iterable[PromptShape], new_tokens: int) -> None:
        """Make programs for ``shapes``: from disk where they are, else by recording."""
        distinct = list(dict.fromkeys(shapes))
        self._load()
        before = self.recorded
        try:
            self._cover(distinct, new_tokens, 0)
            self._record_alone([shape for shape in distinct if self._shared(shape, new_tokens) is None], new_tokens)
        finally:
            self._recordings.clear()
        if self.recorded > before:
            self._save()

    def trace(self, shape: PromptShape, new_tokens: int) -> tuple[Trace, Unfolded] | None:
        """The trace of one shape, or None where no program answers for it."""
        lengths = self._lengths(shape, new_tokens)
        program = self._shared(shape, new_tokens) or self._alone.get(lengths)
        if program is None:
            return None
        passages = self._passages(program, shape)
        key = (id(program), new_tokens, *passages)
        try:
            self._fill(program, shape)
            if key not in self._unfolded:
                self._unfolded[key] = program.unfold(self._depth, new_tokens, passages)
            return self._unfolded[key].trace(lengths), self._unfolded[key]
        except Irregular:
            return None

    def forecast(self, shape: PromptShape, new_tokens: int) -> Forecast | None:
        """What one shape will hold, or None where no program answers for it."""
        found = self.trace(shape, new_tokens)
        if found is None:
            return None
        trace, unfolded = found
        reading = read_cuda(trace, self._meter.loaded, unfolded.timeline, self._meter.known)
        layers, marks = unfolded.caches
        nbytes = trace.nbytes
        return Forecast(
            reading,
            [max(trace.shapes[slot][-2] for slot in slots) for slots in layers],
            [sum(nbytes[slot] for slot in slots) for slots in layers],
            [sum(nbytes[slot] for slot in slots) for slots in marks][: len(reading.allocated_bytes)],
        )

    def _shared(self, shape: PromptShape, new_tokens: int) -> Program | None:
        """The program of many shapes that answers for this one, too."""
        lengths = self._lengths(shape, new_tokens)
        keys = (self._key(shape, new_tokens, level) for level in range(len(_CLASSES)))
        program = next((found for key in keys if (found := self._programs.get(key))), None)
        return program if program is not None and program.reach.covers(lengths) else None

    # -- recording -----------------------------------------------------------------------------------------------------

    def _record_alone(self, shapes: Sequence[PromptShape], new_tokens: int) -> None:
        """A program for each shape, recorded at that very shape: only layers and steps are folded."""
        plans = dict[PromptShape, list[Lengths]]()
        for shape in shapes:
            lengths = self._lengths(shape, new_tokens)
            if lengths in self._alone:
                continue
            self._alone[lengths] = None
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
            self._alone[self._lengths(shape, new_tokens)] = program

    def _cover(self, shapes: Sequence[PromptShape], new_tokens: int, level: int) -> None:
        """Record until a program answers for every shape, told apart by class number ``level``."""
        groups: dict[tuple[Any, ...], list[PromptShape]] = {}
        for shape in shapes:
            groups.setdefault(self._key(shape, new_tokens, level), []).append(shape)
        for key, group in groups.items():
            if self._programs.get(key, ...) is None:
                self._split(group, new_tokens, level)
                continue
            program = self._programs.setdefault(key, Program())
            assert program is not None
            try:
                self._extend(program, group, new_tokens)
            except Irregular:
                self._programs[key] = None
                self._split(group, new_tokens, level)

    def _split(self, group: Sequence[PromptShape], new_tokens: int, level: int) -> None:
        if level + 1 < len(_CLASSES):
            self._cover(group, new_tokens, level + 1)

    def _extend(self, program: Program, group: Sequence[PromptShape], new_tokens: int) -> None:
        """Record what is missing to answer for all of ``group``."""
        asked = {self._lengths(shape, new_tokens): shape for shape in group}
        plan = _plan(copy.deepcopy(program.reach), list(asked))
        recordings = self._record([(asked[lengths], point[-1]) for lengths, point in plan])
        for (_, point), recording in zip(plan, recordings, strict=True):
            program.add(point, self._fold(recording))
        for shape in group:
            self._fill(program, shape)

    def _fold(self, recording: Recording) -> Any:
        return fold(recording, fold_layers=self._recorded_depth(recording.head_layers) < self._depth)

    def _recorded_depth(self, head: int) -> int:
        return min(head + 3, self._depth) if self._alike else self._depth

    def _record(self, prompts: Sequence[tuple[PromptShape, int]]) -> list[Recording]:
        """Recordings of prompts of those shapes, and so many new tokens."""
        points = [self._lengths(*prompt) for prompt in prompts]
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
        return [self._recordings[point] for point in points]

    def _record_one(self, prompt: tuple[PromptShape, int]) -> tuple[Recording, _Form | None]:
        """Profile one prompt on a model of few layers, and note where layers and selections begin.

        Returns with it what a selection was shown, if one stands by itself.
        """
        shape, new_tokens = prompt
        stages = self._stages(shape)
        head = (stages[-1].layer if stages else 0) + 2
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
        """The pruner, cutting as in the whole model, with its selections noted that see visual tokens alone."""
        twin, select = copy.copy(self._pruner), self._pruner.select

        def watched(view: View, kept: int) -> torch.Tensor:
            assert meter.ledger is not None
            trace, asked = meter.ledger.trace, list[str]()
            start = len(trace.events)
            out = select(_asking(view, asked), kept)
            if not asked:
                gaps.append((start, len(trace.events)))
                forms.append(_Form.of(view))
            return out

        object.__setattr__(twin, "stages", lambda n_visual, _: self._pruner.stages(n_visual, self._depth))
        object.__setattr__(twin, "select", watched)
        return twin

    # -- selections by themselves --------------------------------------------------------------------------------------

    def _passages(self, program: Program, shape: PromptShape) -> list[tuple[int, ...]]:
        """The keys of the selections that fill the program's gaps for a shape; recorded where they were not."""
        assert program.structure is not None
        gaps = program.structure.gaps
        keys, left = list[tuple[int, ...]](), shape.visual_tokens
        for stage in self._stages(shape)[:gaps]:
            keys.append((left, stage.kept))
            left = stage.kept
        return keys

    def _fill(self, program: Program, shape: PromptShape) -> None:
        """Record the selections that the program's gaps need for a shape."""
        for n_visual, kept in self._passages(program, shape):
            if (n_visual, kept) not in program.passages:
                if not self._forms:  # the program came from disk: one short prompt shows what a selection looks at
                    self._record([(shape, 1)])
                program.passages[n_visual, kept] = self._select(n_visual, kept)

    def _select(self, n_visual: int, kept: int) -> Passage:
        """What selecting ``kept`` of ``n_visual`` tokens does, run by itself."""
        if not self._forms:
            raise Irregular("no selection was seen yet")
        with torch.no_grad():
            view = self._forms[0].view(n_visual, self._meter.weights[0])
            ledger = Ledger("cpu", self._meter.kernels())
            ledger.ignore(value for value in vars(view).values() if isinstance(value, torch.Tensor))
            with scopes.scope(*self._forms[0].scope):
                ledger.listen()
                try:
                    chosen = self._pruner.select(view, kept)
                finally:
                    trace = ledger.close()
        del chosen
        return Passage.of(trace, 0, len(trace.events))

    # -- names ---------------------------------------------------------------------------------------------------------

    def _stages(self, shape: PromptShape) -> tuple[Stage, ...]:
        return tuple(self._pruner.stages(shape.visual_tokens, self._depth))

    def _lengths(self, shape: PromptShape, new_tokens: int) -> tuple[int, ...]:
        """A shape as the lengths its sizes are affine in; what is kept by a selection in a gap is one of them, too.

        Of several prompts side by side, the tensors that run through all of them grow with batch times length.
        """
        kept = (stage.kept for stage in self._stages(shape))
        one = shape.visual_tokens, shape.before, shape.after, *kept
        if shape.batch == 1:
            return shape.tiles, *one, new_tokens
        side_by_side = (shape.batch * n for n in (shape.tiles, shape.visual_tokens, shape.length))
        return *side_by_side, shape.batch, *one, new_tokens

    def _key(self, shape: PromptShape, new_tokens: int, level: int) -> tuple[Any, ...]:
        """The program a shape belongs to, told apart by class number ``level``."""
        steps = 0 if new_tokens > FOLDED_TOKENS + 1 else new_tokens
        cuts = (stage.layer for stage in self._stages(shape))
        return level, _CLASSES[level](shape), shape.batch > 1, steps, *cuts

    # -- on disk -------------------------------------------------------------------------------------------------------

    def _file(self) -> Path | None:
        folder = cache_folder()
        if folder is None:
            return None
        text = json.dumps([SCHEMA, self._depends], sort_keys=True, default=str)
        return folder / "programs" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"

    def _load(self) -> None:
        """Take in what is on disk; a file that cannot be read as programs is as good as none."""
        file = self._file()
        if file is None or self._programs or not file.exists():
            return
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            if data["schema"] == SCHEMA:
                self._programs |= {
                    tuple(key): None if program is None else Program.from_json(program)
                    for key, program in data["programs"]
                }
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
            self._programs.clear()

    def _save(self) -> None:
        """Write the programs; a cache that cannot be written is no error."""
        file = self._file()
        if file is None:
            return
        data = {
            "schema": SCHEMA,
            "depends": self._depends,
            "programs": [
                [key, None if program is None else program.to_json()] for key, program in self._programs.items()
            ],
        }
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
            temporary.write_text(json.dumps(data, default=str), encoding="utf-8")
            os.replace(temporary, file)
        except OSError:
            return


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


def _asking(view: View, asked: list[str]) -> View:
    """``view``, noting in ``asked`` when it is asked for more than the tokens themselves."""

    def noting(name: str, answer: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            asked.append(name)
            return answer()

        return call

    noted: Any = {k: noting(k, v) for k, v in vars(view).items() if callable(v)}
    return dataclasses.replace(view, **noted)


@dataclasses.dataclass
class _Form:
    """What a selection was shown, without its tensors: enough to show it as many tokens as one likes."""

    rest: View
    rows: dict[str, tuple[tuple[int, ...], torch.dtype]]
    scope: scopes.Scope

    @classmethod
    def of(cls, view: View) -> _Form:
        """The form of ``view``."""
        rows = {k: (tuple(v.shape[1:]), v.dtype) for k, v in vars(view).items() if isinstance(v, torch.Tensor)}
        nothing: Any = dict.fromkeys([*rows, *(k for k, v in vars(view).items() if callable(v))])
        return cls(dataclasses.replace(view, **nothing), rows, scopes.current())

    def view(self, count: int, like: torch.Tensor) -> View:
        """A view of ``count`` tokens, made of tensors as ``like`` is."""
        rows: Any = {k: like.new_empty((count, *shape), dtype=dtype) for k, (shape, dtype) in self.rows.items()}
        return dataclasses.replace(self.rest, count=count, **rows)


def cache_folder() -> Path | None:
    """Where programs are kept: ``MEMPROF_CACHE``, or ``memprof`` in ``XDG_CACHE_HOME`` or ``~/.cache``.

    None where ``MEMPROF_CACHE`` is empty: then nothing is kept.
    """
    asked = os.environ.get("MEMPROF_CACHE")
    if asked is not None:
        return Path(asked) if asked else None
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memprof"


@cache
def source_hash() -> str:
    """A hash of memprof's own code and of the versions of what it runs: a program is as good as these are the same."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for room in ("simulator", "pruning", "meters", "families"):
        for file in sorted((root / room).rglob("*.py")):
            digest.update(file.read_bytes())
    for name in ("predict", "profiler", "stacks", "anatomy", "scopes", "runner"):
        digest.update((root / f"{name}.py").read_bytes())
    for name in ("torch", "transformers"):
        digest.update(f"{name} {package_version(name)}".encode())
    return digest.hexdigest()
