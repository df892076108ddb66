"""model x method x task -> run folder: the one way a run is made, whichever device and command asks for it."""

from __future__ import annotations

import dataclasses
import gc
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import repeat
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from memprof import scopes
from memprof.anatomy import anatomy
from memprof.environment import environment, own_card
from memprof.errors import BadValue, MemprofError, UnknownName
from memprof.families import Card, Family, PromptShape, find_model
from memprof.families._build import build_model
from memprof.families._checkpoint import card_from_checkpoint
from memprof.families._proving import SelfContained
from memprof.families._text import Tokenizer, load_tokenizer
from memprof.forks import forked
from memprof.meters import METERS, Meter, weights_of
from memprof.meters.sim import SimMeter
from memprof.predict import Predictor, source_hash
from memprof.profiler import Profiler
from memprof.pruning import Pruner, build_pruner, method_spec, visual_flops_cut, visual_tokens_per_layer
from memprof.pruning.surgery import Layout, Surgery
from memprof.records import ATTENTIONS, STACKS, Run, RunRecord, RunSpec, SampleRecord, TokenColumns, summarize
from memprof.simulator.replay import Reading
from memprof.stacks import Stack
from memprof.store import RunFolder
from memprof.tasks import TASKS, Sample, Task

#: Called after each sample with the run so far and how many samples it is to have.
Progress = Callable[[Run, int], None]


#: What ``weights`` says in a spec where they come with memprof.
SHIPPED = "shipped"
#: From so many distinct shapes on, copies of the process predict them side by side.
MANY = 16
#: The note of a run that could not be warmed up.
COLD = "no sample finished to warm up with: workspaces that last are counted as dynamic"


@dataclass(frozen=True)
class Prompt:
    """One prompt on the host: what ``generate()`` will be given, and where its visual tokens are."""

    shape: PromptShape
    ids: list[int]
    pixels: npt.NDArray[np.float32] | tuple[int, ...]
    layout: Layout


def make_prompt(
    family: Family, card: Card, shape: PromptShape, *, ids: list[int] | None = None, image: Any = None, seed: int = 0
) -> Prompt:
    """A prompt of the sizes in ``shape``.

    Without ``ids`` its text is random: bytes follow from lengths alone. Without ``image`` only the shape of its
    pixels is known.
    """
    token = family.image_token(card)
    if ids is None:
        draw = np.random.default_rng(seed)
        text = [int(t) for t in draw.integers(10, min(token, int(card.text["vocab_size"])) - 10, shape.text_tokens)]
        ids = [*text[: shape.before], *[token] * shape.visual_tokens, *text[shape.before :]]
    index = np.flatnonzero(np.asarray(ids) == token).astype(np.int64)
    layout = Layout(len(ids), index, family.visual_positions(card, shape), np.zeros(len(index), dtype=np.int64))
    return Prompt(shape, ids, family.pixels(card, shape, image), layout)


def place(prompt: Prompt, model: nn.Module) -> dict[str, torch.Tensor]:
    """The prompt as tensors where ``model`` is; each is one allocation there, as when a user moves them."""
    weight = next(model.parameters())
    with scopes.scope("inputs"):
        ids = torch.tensor([prompt.ids] * prompt.shape.batch).to(weight.device, copy=True)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if prompt.shape.tiles:
            if isinstance(prompt.pixels, tuple):
                tiles, *rest = prompt.pixels
                inputs["pixel_values"] = weight.new_empty((tiles * prompt.shape.batch, *rest)).normal_()
            else:
                pixels = np.tile(prompt.pixels, (prompt.shape.batch, 1, 1, 1))
                inputs["pixel_values"] = torch.from_numpy(pixels).to(weight.dtype).to(weight.device, copy=True)
    return inputs


@dataclass
class Outcome:
    """What one profiled prompt left: the memory half of a sample's record, and the tokens it made.

    ``refused`` is the allocation a card of the size asked for would have refused, in words, or None. ``kept`` has the
    visual tokens each cut left (:meth:`~memprof.pruning.surgery.Surgery.kept`); None in a prediction.
    """

    memory: dict[str, Any]
    tokens: list[int] | None
    refused: str | None = None
    kept: list[list[int]] | None = None


def profile_prompt(
    model: nn.Module, meter: Meter, pruner: Pruner, stack: str, prompt: Prompt, *, new_tokens: int, seed: int = 0
) -> Outcome:
    """Generate from one prompt under ``pruner`` and ``stack``, with ``meter`` watching."""
    with (
        Stack(model, stack),
        Surgery(model, pruner, prompt.layout, seed) as surgery,
        Profiler(model, meter) as profiler,
    ):
        inputs = place(prompt, model)
        out = model.generate(  # type: ignore[operator]
            **inputs, max_new_tokens=new_tokens, do_sample=False, logits_processor=meter.logits_processors()
        )
    tokens = None if meter.status == "predicted" else [int(t) for t in out[0, len(prompt.ids) :]]
    done = len(profiler.reading.peak_allocated_bytes)  # fewer than were made where a card would have refused one
    columns = {name: column[:done] for name, column in vars(profiler.tokens).items()}
    memory = {
        "kept_visual_tokens": surgery.visual_tokens,
        "kv_tokens_planned": surgery.kv_tokens,
        "kv_tokens_found": profiler.kv_tokens,
        "kv_bytes_per_layer": profiler.kv_bytes_per_layer,
        "tokens": TokenColumns(**columns),
        **_peak(profiler.reading),
    }
    return Outcome(memory, tokens, profiler.reading.refused, None if tokens is None else surgery.kept())


def _peak(reading: Reading) -> dict[str, Any]:
    """What a sample's record says of its highest instant."""
    return {
        "peak_token": reading.peak_token,
        "peak_phase": reading.peak_phase,
        "vision_peak_bytes": reading.vision_peak_bytes,
        "peak_parts": reading.parts,
        "token_parts": reading.token_parts,
        "peak_holders": reading.holders,
        "dynamic_peak_bytes": sum(reading.parts.values()),
    }


class Judge(Protocol):
    """Compares a pruned prompt with the unpruned one (:class:`memprof.analysis.fidelity.Judge`)."""

    def __call__(
        self, model: nn.Module, prompt: Prompt, pruner: Pruner, stack: str, *, sample: str, new_tokens: int, seed: int
    ) -> dict[str, float]:
        """What goes under :attr:`SampleRecord.fidelity`."""


class Bench:
    """A model on a device, kept from one method to the next and rebuilt only when its bytes would change.

    Attributes:
        on_recording: Told of the prompts that predictions are made from: how many are recorded, and of how many.
    """

    def __init__(self, spec: RunSpec) -> None:
        self.on_recording: Callable[[int, int], None] = lambda done, total: None
        METERS.load(spec.device).check()
        if spec.device == "cuda" and (card := own_card(torch.cuda.device_count())) is not None:
            torch.cuda.set_device(card)
        self.family, self.card = model_of(spec)
        self.weights = weights_of_spec(self.family, self.card, spec)
        self._built: tuple[Any, ...] | None = None
        self._models: dict[int, tuple[nn.Module, Meter]] = {}
        self._predictors: dict[Any, Predictor] = {}
        self._predicted: dict[Any, Outcome] = {}
        self._coming: dict[Any, Iterator[Outcome | None]] = {}  # what copies of this process are predicting, in order

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's own; random weights bring none, so theirs is the one on the hub."""
        return load_tokenizer(self.card, "hub" if self.weights == "random" else self.weights)

    def prompt(self, spec: RunSpec, sample: Sample) -> Prompt | PromptShape:
        """What ``sample`` asks: its question about its picture where weights are real and run, else its sizes alone."""
        tokens = sample.text_tokens
        asked = bool(sample.question) and self.weights != "random" and METERS.load(spec.device).status == "measured"
        if tokens is None or asked:
            tokens = len(self.tokenizer.encode(sample.question))
        shape = self.family.shape(self.card, sample.width, sample.height, tokens, spec.max_tiles)
        if not asked:
            return shape
        # Tokens can merge across the template's edges: the ids, not the counts, say how long the text is.
        ids = self.family.prompt(self.card, sample.question, shape, self.tokenizer)
        before = ids.index(self.family.image_token(self.card))
        shape = dataclasses.replace(shape, before=before, after=len(ids) - before - shape.visual_tokens)
        return make_prompt(self.family, self.card, shape, ids=ids, image=sample.image())

    def ready(self, spec: RunSpec) -> tuple[nn.Module, Meter]:
        """The model and its meter for ``spec``."""
        wanted = (spec.model, spec.device, spec.dtype, spec.weights, spec.attention, spec.seed, spec.gpu)
        if wanted != self._built:
            for kept in (self._models, self._predictors, self._predicted):
                kept.clear()
            gc.unfreeze()
            release(spec.device)
            self._built = wanted
        depth = int(self.card.text["num_hidden_layers"])
        if depth not in self._models:
            self._of_depth(spec, depth)
            gc.freeze()  # garbage is collected before every sample: it need not walk through all of transformers
        return self._models[depth]

    def _of_depth(self, spec: RunSpec, depth: int) -> tuple[nn.Module, Meter]:
        """The model with ``depth`` decoder layers, and its meter."""
        if depth not in self._models:
            card = dataclasses.replace(self.card, text={**self.card.text, "num_hidden_layers": depth})
            model = build_model(
                self.family, card, device=spec.device, dtype=spec.dtype, weights=self.weights,
                attention=spec.attention, seed=spec.seed,
            )  # fmt: skip
            self._models[depth] = model, METERS.load(spec.device).on(model, spec.gpu)
        return self._models[depth]

    def foresee(self, spec: RunSpec, pruner: Pruner, shapes: Iterable[PromptShape]) -> None:
        """Be told which shapes will be asked for: where predicting, a few recordings then answer for all of them."""
        predictor = self._predictor(spec, pruner)
        if predictor is not None:
            predictor.foresee(shapes, spec.max_new_tokens)

    @contextmanager
    def ahead(self, spec: RunSpec, pruner: Pruner, shapes: Iterable[PromptShape]) -> Iterator[None]:
        """:meth:`foresee`, and, inside, copies of this process predict what will be asked for, in that order."""
        shapes = list(shapes)
        self.foresee(spec, pruner, shapes)
        keys = {_key(spec, pruner, shape): shape for shape in shapes}
        missing = {key: shape for key, shape in keys.items() if key not in self._predicted}
        if len(missing) < MANY or self._predictor(spec, pruner) is None:
            yield
            return
        with closing(forked(partial(self._predict, spec, pruner), list(missing.values()), chunk=4)) as predictions:
            self._coming = dict(zip(missing, repeat(predictions)))
            try:
                yield
            finally:
                self._coming.clear()

    def _await(self, key: Any) -> None:
        """Take in what the copies predicted, up to ``key``."""
        try:
            while key in self._coming:
                first = next(iter(self._coming))
                prediction = next(self._coming.pop(first))
                if prediction is not None:
                    self._predicted[first] = prediction
        except Exception:  # whatever it is about, that sample will meet it here, and say so
            self._coming.clear()

    def outcome(self, spec: RunSpec, pruner: Pruner, prompt: Prompt | PromptShape, seed: int) -> Outcome:
        """Profile a prompt, or random text of a prompt's sizes: on a predicting meter once for each distinct shape."""
        model, meter = self.ready(spec)
        if meter.status == "measured":
            return self._profile(model, meter, pruner, spec.stack, prompt, spec.max_new_tokens, seed)
        shape = prompt if isinstance(prompt, PromptShape) else prompt.shape
        key = _key(spec, pruner, shape)
        self._await(key)
        if key not in self._predicted:
            self._predicted[key] = self._predict(spec, pruner, shape) or self._profile(
                model, meter, pruner, spec.stack, shape, spec.max_new_tokens, seed
            )
        return self._predicted[key]

    def _profile(
        self,
        model: nn.Module,
        meter: Meter,
        pruner: Pruner,
        stack: str,
        prompt: Prompt | PromptShape,
        new_tokens: int,
        seed: int,
    ) -> Outcome:
        if isinstance(prompt, PromptShape):
            prompt = make_prompt(self.family, self.card, prompt, seed=seed)
        return profile_prompt(model, meter, pruner, stack, prompt, new_tokens=new_tokens, seed=seed)

    def _predict(self, spec: RunSpec, pruner: Pruner, shape: PromptShape) -> Outcome | None:
        """What a program says of a shape, or None where none answers for it."""
        predictor = self._predictor(spec, pruner)
        forecast = predictor.forecast(shape, spec.max_new_tokens) if predictor is not None else None
        if forecast is None:
            return None
        reading = forecast.reading
        columns = TokenColumns(
            reading.peak_allocated_bytes, reading.allocated_bytes, reading.reserved_bytes, forecast.kv_bytes,
            reading.device_used_bytes, [None] * len(reading.allocated_bytes),
        )  # fmt: skip
        layers = self.card.text["num_hidden_layers"]
        visual = visual_tokens_per_layer(pruner.stages(shape.visual_tokens, layers), shape.visual_tokens, layers)
        if pruner.mask_only:
            visual = [shape.visual_tokens] * layers
        memory = {
            "kept_visual_tokens": visual,
            "kv_tokens_planned": [shape.text_tokens + each for each in visual],
            "kv_tokens_found": forecast.kv_tokens,
            "kv_bytes_per_layer": forecast.kv_bytes_per_layer,
            "tokens": columns,
            **_peak(reading),
        }
        return Outcome(memory, None, reading.refused)

    def _predictor(self, spec: RunSpec, pruner: Pruner) -> Predictor | None:
        """What makes and keeps the programs of a method, where the meter predicts."""
        _, meter = self.ready(spec)
        if not isinstance(meter, SimMeter):
            return None
        like = pruner.like  # what is kept is a length, not another program
        key = (like, spec.stack)
        if key not in self._predictors:
            kinds = getattr(self.family.config(self.card).get_text_config(), "layer_types", None)
            depends = {
                "card": dataclasses.asdict(self.card), "method": method_spec(like), "stack": spec.stack,
                "dtype": spec.dtype, "attention": spec.attention, "kernels": meter.kernels().name,
                "source": source_hash(),
            }  # fmt: skip
            self._predictors[key] = Predictor(
                self.card.text["num_hidden_layers"], meter, like,
                partial(self._of_depth, spec),
                lambda model, meter, pruner, shape, new_tokens: self._profile(
                    model, meter, pruner, spec.stack, shape, new_tokens, spec.seed
                ),
                depends,
                lambda done, total: self.on_recording(done, total),
                alike=len(set(kinds or [""])) == 1,
            )  # fmt: skip
        return self._predictors[key].under(pruner)


def _key(spec: RunSpec, pruner: Pruner, shape: PromptShape) -> Any:
    """All that a prediction depends on: bytes do not, on how a grid of so many tiles lies."""
    return pruner, spec.stack, spec.max_new_tokens, dataclasses.replace(shape, columns=shape.tiles, rows=1)


def release(device: str) -> None:
    """Give unused memory back, so that a sample's reserved bytes do not depend on the samples before it.

    Predictions begin from the same state in any case, and hold much that a collection would go through.
    """
    if device == "sim":
        return
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def model_of(spec: RunSpec) -> tuple[Family, Card]:
    """The family and card of ``spec``'s model; a checkpoint's own configuration decides its sizes."""
    family, card = find_model(spec.model)
    return family, card_from_checkpoint(family, card, weights_of_spec(family, card, spec))


def weights_of_spec(family: Family, card: Card, spec: RunSpec) -> str:
    """Where ``spec``'s weights are: ``random``, ``hub`` or a path, which may lie inside memprof."""
    if isinstance(family, SelfContained) and spec.weights in ("random", SHIPPED):
        return str(family.shipped(card))
    return spec.weights


def complete_spec(spec: RunSpec) -> tuple[RunSpec, Pruner, Task]:
    """Check ``spec`` before any model is built, and write its method as a canonical spec string.

    Raises:
        UsageError: An unknown name, or a value outside its range.
    """
    family, card = model_of(spec)
    pruner = build_pruner(spec.method, spec.stack)
    layers = int(card.text["num_hidden_layers"])
    pruner.stages(1_000, layers)
    if spec.stack not in STACKS:
        raise UnknownName("stack", spec.stack, STACKS)
    if spec.attention not in ATTENTIONS:
        raise UnknownName("attention", spec.attention, ATTENTIONS)
    METERS.load(spec.device)
    if spec.max_new_tokens < 1:
        raise BadValue(f"max_new_tokens={spec.max_new_tokens} is below 1")
    if spec.max_tiles is not None and spec.max_tiles < 1:
        raise BadValue(f"max_tiles={spec.max_tiles} is below 1")
    attention = "eager" if pruner.eager else spec.attention
    weights = SHIPPED if isinstance(family, SelfContained) and spec.weights == "random" else spec.weights
    spec = dataclasses.replace(spec, method=method_spec(pruner), attention=attention, weights=weights)
    return spec, pruner, TASKS.build(spec.task)


def samples_of(family: Family, task: Task, spec: RunSpec) -> tuple[Sequence[Sample], str]:
    """The samples of a run and how they are to be named: the task's, or a self-contained model's own."""
    if spec.data != "bundled" or not isinstance(family, SelfContained):
        return task.samples(spec.data, spec.limit), task.label(spec.data)
    found = []
    for own in family.own_questions(task.name, spec.limit):
        asked = own.question()
        found.append(Sample(own.id, *own.size(), asked.text, len(asked.text.split()), (asked.answer,), None, own))
    return found, family.own_label(task.name)


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
    spec, pruner, task = complete_spec(dataclasses.replace(spec, fidelity=judge is not None))
    bench = bench or Bench(spec)
    every, label = samples_of(bench.family, task, spec)
    samples = [_read(every, number) for number in shard_of(len(every), spec.shard)]
    record = RunRecord(
        spec=spec,
        status=METERS.load(spec.device).status,
        layers=int(bench.card.text["num_hidden_layers"]),
        data_label=label,
        environment=environment(),
    )
    folder = RunFolder.open(path, record, resume=resume, force=force, retry_failed=retry_failed)
    todo = [sample for sample in samples if sample.id not in folder.done]
    if todo:
        bench.ready(spec)  # before the folder is touched: a model that cannot be built costs no run and leaves none
    with folder:
        if todo:
            _begin(folder, bench, pruner, task, samples)
        with bench.ahead(spec, pruner, _shapes(bench, spec, todo)) if todo else nullcontext():
            for sample in todo:
                if isinstance(sample, Sample):
                    folder.append(_profile_sample(bench, spec, pruner, task, sample, judge))
                else:
                    folder.append(sample)
                if progress is not None:
                    progress(folder.run(), len(samples))
        folder.arrange(sample.id for sample in samples)
        if todo:
            _note(folder, bench.ready(spec)[1])
        _finish(folder, bench.card, task, len(samples))
        return folder.run()


def _begin(
    folder: RunFolder, bench: Bench, pruner: Pruner, task: Task, samples: Sequence[Sample | SampleRecord]
) -> None:
    """Warm up, and write what is known before the first sample."""
    record, spec = folder.record, folder.record.spec
    model, meter = bench.ready(spec)
    warm = _warm_up(bench, spec, pruner, task, samples)
    record.static_bytes = meter.static_bytes
    record.static_parts = _static_parts(model, meter)
    record.environment |= {"dtype": spec.dtype, "attention": _attention(model, spec), **meter.environment()}
    record.notes = [note for note in record.notes if note != COLD] + [COLD] * (not warm)
    _note(folder, meter)
    folder.save()


def _note(folder: RunFolder, meter: Meter) -> None:
    """Add what a reader must know by now; what an earlier process noted of its samples stays."""
    notes = [*folder.record.notes, *meter.notes()]
    alone = next((sample for sample in folder.samples if sample.ok and sample.error), None)
    if alone is not None:
        notes.append(f"not all samples could be compared with the unpruned run; the first is {alone.id}: {alone.error}")
    folder.record.notes = list(dict.fromkeys(notes))


def _read(samples: Sequence[Sample], number: int) -> Sample | SampleRecord:
    """Sample ``number``, or the line that says why its row cannot be read."""
    try:
        return samples[number]
    except MemprofError as error:
        return SampleRecord(id=f"row-{number}", status="failed", error=str(error).partition("\n")[0])


def _profile_sample(
    bench: Bench, spec: RunSpec, pruner: Pruner, task: Task, sample: Sample, judge: Judge | None = None
) -> SampleRecord:
    """One line of the run. What goes wrong with one sample is written down, and the run goes on."""
    record = SampleRecord(id=sample.id, width=sample.width, height=sample.height, category=sample.category)
    try:
        if sample.width < 1 or sample.height < 1:
            sample.image()  # says what is broken
        prompt, seed = bench.prompt(spec, sample), _seed(spec, sample)
        shape = prompt.shape if isinstance(prompt, Prompt) else prompt
        record.tiles, record.visual_tokens, record.text_tokens = shape.tiles, shape.visual_tokens, shape.text_tokens
        release(spec.device)
        outcome = bench.outcome(spec, pruner, prompt, seed)
        record = dataclasses.replace(record, **outcome.memory)
        if outcome.refused is not None:
            record.status, record.error = "oom", outcome.refused
        if isinstance(prompt, Prompt) and outcome.tokens is not None:
            record.answer = bench.tokenizer.decode(outcome.tokens).strip()
            record.score = task.score(record.answer, sample) if sample.answers else None
    except torch.cuda.OutOfMemoryError as error:
        record.status, record.error = "oom", str(error).partition("\n")[0]
    except (MemprofError, RuntimeError, ValueError) as error:
        record.status, record.error = "failed", str(error).partition("\n")[0]
    if judge is not None and record.ok and record.answer is not None and isinstance(prompt, Prompt):
        try:  # of its own: what was measured stands, also where the unpruned model needs more than there is
            record.fidelity = judge(
                bench.ready(spec)[0], prompt, pruner, spec.stack, sample=sample.id, new_tokens=spec.max_new_tokens,
                seed=seed,
            )  # fmt: skip
        except (MemprofError, RuntimeError, ValueError) as error:
            record.error = str(error).partition("\n")[0]
    return record


def _shapes(bench: Bench, spec: RunSpec, samples: Sequence[Sample | SampleRecord]) -> list[PromptShape]:
    """The shapes that are known without a tokenizer."""
    return [
        bench.family.shape(bench.card, sample.width, sample.height, sample.text_tokens, spec.max_tiles)
        for sample in samples
        if isinstance(sample, Sample) and sample.text_tokens is not None and min(sample.width, sample.height) > 0
    ]


def _seed(spec: RunSpec, sample: Sample) -> int:
    """A seed of the sample's own, the same on every machine."""
    return spec.seed + zlib.crc32(sample.id.encode())


def _warm_up(bench: Bench, spec: RunSpec, pruner: Pruner, task: Task, samples: Sequence[Sample | SampleRecord]) -> bool:
    """Run the first sample that finishes unrecorded where things are measured: lasting workspaces count as static.

    Of all samples, not of those still to do: a run that goes on is then as warm as an unbroken one. False where none
    finishes.
    """
    if METERS.load(spec.device).status != "measured" or not spec.warmup:
        return True
    for sample in samples:
        if isinstance(sample, Sample) and _profile_sample(bench, spec, pruner, task, sample).ok:
            for _ in range(spec.warmup - 1):
                _profile_sample(bench, spec, pruner, task, sample)
            release(spec.device)
            return True
    return False


def _static_parts(model: nn.Module, meter: Meter) -> dict[str, int]:
    """Bytes of the weights, by what they are for, and of the workspaces a predicting meter knows of."""
    where, parts = anatomy(model), dict.fromkeys(("vision", "language", "embeddings", "head"), 0)
    for name, tensor in weights_of(model):
        parts[where.weight_group(name)] += tensor.untyped_storage().nbytes()
    if isinstance(meter, SimMeter) and meter.workspace_bytes:
        parts["workspaces"] = meter.workspace_bytes
    # What stays when weights are counted as asked for: rounding, and on a card workspaces, which cannot be told apart.
    if rest := meter.static_bytes - sum(parts.values()):
        parts["rounding" if meter.status == "predicted" else "workspaces and rounding"] = rest
    return parts


def _attention(model: nn.Module, spec: RunSpec) -> dict[str, str]:
    """Attention asked for, and got."""
    layer: Any = anatomy(model).layers[0][1]
    return {"asked": spec.attention, "got": str(layer.self_attn.config._attn_implementation)}


def _finish(folder: RunFolder, card: Card, task: Task, expected: int) -> None:
    """Write the totals."""
    done = folder.run().finished
    cuts = [
        visual_flops_cut(
            s.kept_visual_tokens, s.visual_tokens, card.text["hidden_size"], card.text["intermediate_size"]
        )
        for s in done
    ]
    folder.record.visual_flops_cut = sum(cuts) / len(cuts) if cuts else None
    folder.record.complete = len(folder.samples) == expected
    folder.record.totals = summarize(folder.run())
    scored = [(s.category, s.score) for s in done if s.score is not None]
    if scored:
        folder.record.totals["scores"] = task.aggregate(scored)
    folder.save()
