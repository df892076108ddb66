"""model x method x task -> run folder: the one way a run is made, whichever device and command asks for it."""

from __future__ import annotations

import dataclasses
import sys
import zlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from memprof import limits
from memprof.bench import Bench, shape_of
from memprof.bench.outcome import Standing, release
from memprof.environment import environment
from memprof.errors import BadRow, BadValue, MemprofError, UnknownName, UsageError
from memprof.families import Model
from memprof.forecasts import Ask, Setup
from memprof.meters import METERS
from memprof.models import find
from memprof.prompts import Prompt, Shape
from memprof.pruning import Pruner, build_pruner, method_spec, visual_flops_cut
from memprof.records import ATTENTIONS, STACKS, Run, RunRecord, RunSpec, SampleRecord, summarize
from memprof.store import RunFolder
from memprof.tasks import TASKS, Sample, Task
from memprof.tasks._sources import Lazy

if TYPE_CHECKING:
    from torch import nn

#: Called after each sample with the run so far and how many samples it is to have.
Progress = Callable[[Run, int], None]

#: The note of a run that could not be warmed up.
COLD = "no sample finished to warm up with: workspaces that last are counted as dynamic"


class Judge(Protocol):
    """Compares a pruned prompt with the unpruned one (:class:`memprof.analysis.fidelity.Judge`)."""

    def __call__(
        self, model: nn.Module, prompt: Prompt, pruner: Pruner, stack: str, *, sample: str, new_tokens: int, seed: int
    ) -> dict[str, float]:
        """What goes under :attr:`SampleRecord.fidelity`."""


class Complete(NamedTuple):
    """A spec that was checked, and what it means."""

    spec: RunSpec
    pruner: Pruner
    task: Task
    setup: Setup

    def ask(self, prompt: Prompt | Shape, *, seed: int | None = None, new_tokens: int | None = None) -> Ask:
        """What the spec asks about ``prompt``; its own seed and number of tokens unless told otherwise.

        Raises:
            BadValue: Prompts side by side are too long in all.
        """
        prompt = prompt if isinstance(prompt, Prompt) else Prompt(prompt)
        limits.check_whole(prompt.shape.length, prompt.shape.batch)
        return Ask(
            self.pruner, self.spec.stack, prompt,
            self.spec.max_new_tokens if new_tokens is None else new_tokens, self.spec.seed if seed is None else seed,
        )  # fmt: skip


def complete_spec(spec: RunSpec) -> Complete:
    """Check ``spec`` before any model is built, find its model, and write its method as a canonical spec string.

    Raises:
        UsageError: An unknown name, or a value outside its range.
    """
    model = find.find(spec.model, spec.weights)
    pruner = build_pruner(spec.method, spec.stack)
    pruner.stages(1_000, model.layers)
    if spec.stack not in STACKS:
        raise UnknownName("stack", spec.stack, STACKS)
    if spec.attention not in ATTENTIONS:
        raise UnknownName("attention", spec.attention, ATTENTIONS)
    METERS.load(spec.device)
    if not -(2**63) <= spec.seed < 2**62:
        raise BadValue(f"seed={spec.seed} is no seed: write one of at most 62 bits")
    for name in ("max_new_tokens", "max_tiles", "images", "batch", "text_tokens", "limit"):
        limits.check(name, getattr(spec, name))
    _check_cuts(spec, model, pruner)
    attention = "eager" if pruner.eager else spec.attention
    shipped = model.family.shipped(model) is not None and spec.weights == "random"
    spec = dataclasses.replace(
        spec, model=model.name, method=method_spec(pruner), attention=attention,
        weights=find.SHIPPED if shipped else spec.weights,
    )  # fmt: skip
    return Complete(spec, pruner, TASKS.build(spec.task), Setup.of(spec, model))


def check_distinct(specs: Sequence[RunSpec]) -> None:
    """Raise UsageError where two of several completed specs are of one method, equal in full."""
    methods = [spec.method for spec in specs]
    for method in methods:
        if methods.count(method) > 1:
            raise UsageError(f"method {method} is given twice; name each once")


def _check_cuts(spec: RunSpec, model: Model, pruner: Pruner) -> None:
    """Raise UsageError where a method is asked to cut what cannot be cut."""
    if not pruner.stages(1_000, model.layers):
        return
    if not model.family.sees:
        raise UsageError(
            f"{model.title} is a language model: {pruner.title} has no visual tokens to prune; use --method baseline"
        )
    if (spec.batch or 1) > 1:
        raise UsageError(f"{pruner.title} cuts one prompt at a time: --batch {spec.batch} goes with --method baseline")


def samples_of(model: Model, task: Task, spec: RunSpec) -> tuple[Sequence[Sample], str]:
    """The samples of a run and how they are to be named: the task's, or a self-contained model's own."""
    family = model.family
    if spec.data != "bundled" or family.shipped(model) is None:
        return _as_asked(task.samples(spec.data, spec.limit, spec.text_tokens), task, spec), task.label(spec.data)
    found = []
    for own in family.own_questions(task.name, spec.limit):
        asked, (width, height) = own.question(), own.size()
        found.append(Sample(own.id, width, height, asked.text, len(asked.text.split()), (asked.answer,), None, own))
    return found, family.own_label(task.name)


def _as_asked(samples: Sequence[Sample], task: Task, spec: RunSpec) -> Sequence[Sample]:
    """``samples`` with so many pictures, prompts side by side and text tokens as asked for.

    Where nobody counted and nothing is answered, they are the task's usual ones: a model's tokenizer is asked only
    where its answers are.
    """
    predicts = METERS.load(spec.device).status == "predicted" or spec.weights == "random"

    def asked(index: int) -> Sample:
        sample = samples[index]
        if spec.images is not None:
            shown = sample.pictures * spec.images
            sample = dataclasses.replace(sample, others=shown[1 : spec.images])
        if spec.batch is not None:
            sample = dataclasses.replace(sample, batch=spec.batch)
        if spec.text_tokens is not None:
            return dataclasses.replace(sample, text_tokens=spec.text_tokens)
        if sample.text_tokens is None and (predicts or not sample.question):
            return dataclasses.replace(sample, text_tokens=task.usual_text_tokens())
        return sample

    return Lazy(len(samples), asked)


def shard_of(count: int, shard: str | None) -> range:
    """Numbers of every n-th of ``count`` samples from the i-th on, for a shard written ``i/n`` with i from 1."""
    if shard is None:
        return range(count)
    try:
        i, n = (int(part) for part in shard.split("/"))
        if not 1 <= i <= n:
            raise ValueError
    except ValueError:
        raise BadValue(f"shard={shard!r}; write i/n with 1 <= i <= n, for example 2/4") from None
    return range(i - 1, count, n)


def run(
    spec: RunSpec,
    path: Path,
    *,
    bench: Bench | None = None,
    resume: bool = False,
    force: bool = False,
    retry_failed: bool = False,
    progress: Progress | None = None,
    judge: Judge | None = None,
) -> Run:
    """Make the run ``spec`` describes in folder ``path``, sample by sample.

    Args:
        spec: What is asked for; its ``fidelity`` follows from ``judge``.
        path: The run folder. It is made, or the run in it replaced, once there is a model.
        bench: One to share between runs; made if None.
        resume: Go on with the run in ``path``.
        force: Replace the run in ``path``.
        retry_failed: When going on, run again the samples that did not finish.
        progress: Told of each sample that is done.
        judge: Compares samples with the unpruned run, where they were answered.

    Raises:
        UsageError: The spec is wrong, or the folder holds another run.
        DataError: The task's data cannot be read.
        DeviceUnavailable: The device is not on this machine.
    """
    asked = complete_spec(dataclasses.replace(spec, fidelity=judge is not None))
    spec, _, task, setup = asked
    bench = bench.set_up(setup) if bench is not None else Bench(setup)
    every, label = samples_of(setup.model, task, spec)
    samples = [_read(every, number) for number in shard_of(len(every), spec.shard)]
    record = RunRecord(
        spec=spec,
        status=METERS.load(spec.device).status,
        layers=setup.model.layers,
        data_label=label,
        environment=environment(),
        samples_asked=len(samples),
    )
    folder = RunFolder.open(path, record, resume=resume, force=force, retry_failed=retry_failed)
    todo = [sample for sample in samples if sample.id not in folder.done]
    # Before the folder is touched: a model that cannot be built, or run, costs no run and leaves none.
    standing = bench.standing(asked.pruner, spec.stack) if todo else None
    with bench.ahead(_asks(asked, todo)) if todo else nullcontext(), folder:
        folder.record.samples_asked = len(samples)
        if standing is not None:
            _begin(folder, bench, asked, samples, standing)
        for sample in todo:
            if isinstance(sample, Sample):
                folder.append(_profile_sample(bench, asked, sample, judge))
            else:
                folder.append(sample)
            if progress is not None:
                progress(folder.run(), len(samples))
        folder.arrange(sample.id for sample in samples)
        if todo:
            _note(folder, bench.notes())
        _finish(folder, setup.model, task, len(samples))
        return folder.run()


def _begin(
    folder: RunFolder, bench: Bench, asked: Complete, samples: Sequence[Sample | SampleRecord], standing: Standing
) -> None:
    """Warm up, and write what is known before the first sample."""
    record, spec = folder.record, folder.record.spec
    warm = True
    if not bench.predicts and spec.warmup:
        warm = _warm_up(bench, asked, samples)
        standing = bench.standing(asked.pruner, spec.stack)  # once more: workspaces that last count as static
    record.static_bytes, record.static_parts = standing.static_bytes, standing.static_parts
    attention = {"asked": spec.attention, "got": standing.attention}
    record.environment |= {"dtype": spec.dtype, "attention": attention, **standing.device}
    record.environment["positions"] = asked.pruner.positions  # of tokens behind a cut
    record.notes = [note for note in record.notes if note != COLD] + [COLD] * (not warm)
    _note(folder, bench.notes())
    folder.save()


def _note(folder: RunFolder, notes: Sequence[str]) -> None:
    """Add what a reader must know by now; what an earlier process noted of its samples stays."""
    notes = [*folder.record.notes, *notes]
    alone = next((sample for sample in folder.samples if sample.ok and sample.error), None)
    if alone is not None:
        notes.append(f"not all samples could be compared with the unpruned run; the first is {alone.id}: {alone.error}")
    folder.record.notes = list(dict.fromkeys(notes))


def _read(samples: Sequence[Sample], number: int) -> Sample | SampleRecord:
    """Sample ``number``, or the line that says why its row cannot be read."""
    try:
        return samples[number]
    except Exception as error:
        name = error.id if isinstance(error, BadRow) else f"row-{number}"
        return SampleRecord(id=name, status="failed", error=_why(error))


def _profile_sample(
    bench: Bench, asked: Complete, sample: Sample, judge: Judge | None = None
) -> SampleRecord:
    """One line of the run. What goes wrong with one sample is written down, and the run goes on."""
    spec, pruner, task, _ = asked
    record = SampleRecord(id=sample.id, width=sample.width, height=sample.height, category=sample.category)
    try:
        for picture, size in zip(sample.pictures, sample.sizes(), strict=True):
            if min(size) < 1:
                picture.image()  # says what is broken
        prompt, seed = bench.prompt(sample, spec.max_tiles), _seed(spec, sample)
        record = record.of_prompt(prompt.shape)
        release(spec.device)
        outcome = bench.outcome(asked.ask(prompt, seed=seed))
        record = record.with_memory(outcome.memory)
        if outcome.refused is not None:
            record.status, record.error = "oom", outcome.refused
        if prompt.ids is not None and outcome.tokens is not None:
            record.answer = bench.tokenizer.decode(outcome.tokens).strip()
            record.score = task.score(record.answer, sample) if sample.answers else None
        record.check()
    except Exception as error:  # a row may hold anything, and one bad row is one failed sample
        record.status, record.error = "oom" if ran_out(error) else "failed", _why(error)
    if judge is not None and record.ok and record.answer is not None:
        try:  # of its own: what was measured stands, also where the unpruned model needs more than there is
            record.fidelity = judge(
                bench.ready()[0], prompt, pruner, spec.stack, sample=sample.id, new_tokens=spec.max_new_tokens,
                seed=seed,
            )  # fmt: skip
            record.check()
        except Exception as error:
            record.error = _why(error)
    return record


def ran_out(error: Exception) -> bool:
    """Whether a card had no memory left; where torch was not loaded none was asked."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.cuda.OutOfMemoryError)


def _why(error: Exception) -> str:
    """What went wrong with a sample, on one line; an error that nobody thought of says what it is."""
    text = str(error).partition("\n")[0]
    return text if isinstance(error, MemprofError | RuntimeError | ValueError) else f"{type(error).__name__}: {text}"


def _asks(asked: Complete, samples: Sequence[Sample | SampleRecord]) -> list[Ask]:
    """What will be asked, as far as its sizes are known without a tokenizer."""
    model, most, found = asked.setup.model, asked.spec.max_tiles, []
    for sample in samples:
        if isinstance(sample, Sample) and sample.text_tokens is not None and min(sample.width, sample.height) > 0:
            with suppress(MemprofError, RuntimeError, ValueError):  # said when its turn comes
                found.append(asked.ask(shape_of(model, sample, sample.text_tokens, most)))
    return found


def _seed(spec: RunSpec, sample: Sample) -> int:
    """A seed of the sample's own, the same on every machine."""
    return spec.seed + zlib.crc32(sample.id.encode(errors="backslashreplace"))


def _warm_up(bench: Bench, asked: Complete, samples: Sequence[Sample | SampleRecord]) -> bool:
    """Run the first sample that finishes unrecorded where things are measured: lasting workspaces count as static.

    Of all samples, not of those still to do: a run that goes on is then as warm as an unbroken one. False where none
    finishes.
    """
    for sample in samples:
        if isinstance(sample, Sample) and _profile_sample(bench, asked, sample).ok:
            for _ in range(asked.spec.warmup - 1):
                _profile_sample(bench, asked, sample)
            release(asked.spec.device)
            return True
    return False


def _finish(folder: RunFolder, model: Model, task: Task, expected: int) -> None:
    """Write the totals."""
    done = folder.run().finished
    cuts = [
        visual_flops_cut(s.kept_visual_tokens, s.visual_tokens, model.hidden, model.ffn) for s in done
    ]
    folder.record.visual_flops_cut = sum(cuts) / len(cuts) if cuts else None
    folder.record.complete = len(folder.samples) == expected
    folder.record.totals = summarize(folder.run())
    scored = [(s.category, s.score) for s in done if s.score is not None]
    if scored:
        folder.record.totals["scores"] = task.aggregate(scored)
    folder.save()
