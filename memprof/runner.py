"""model x method x task -> run folder: the one way a run is made, whichever device and command asks for it."""

from __future__ import annotations

import dataclasses
import gc
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from memprof import scopes
from memprof.anatomy import anatomy
from memprof.environment import environment
from memprof.errors import BadValue, MemprofError, UnknownName
from memprof.families import Card, Family, PromptShape, find_model
from memprof.families._build import build_model
from memprof.meters import METERS, Meter, weights_of
from memprof.profiler import Profiler
from memprof.pruning import Pruner, build_pruner, method_spec, visual_flops_cut
from memprof.pruning.surgery import Layout, Surgery
from memprof.records import STACKS, Run, RunRecord, RunSpec, SampleRecord, summarize
from memprof.stacks import Stack
from memprof.store import RunFolder
from memprof.tasks import TASKS, Sample, Task

#: Called after each sample with the run so far and how many samples it is to have.
Progress = Callable[[Run, int], None]


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
        ids = torch.tensor([prompt.ids]).to(weight.device, copy=True)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if prompt.shape.tiles:
            if isinstance(prompt.pixels, tuple):
                inputs["pixel_values"] = weight.new_empty(prompt.pixels).normal_()
            else:
                inputs["pixel_values"] = torch.from_numpy(prompt.pixels).to(weight.dtype).to(weight.device, copy=True)
    return inputs


@dataclass
class Outcome:
    """What one profiled prompt left: the memory half of a sample's record, and the tokens it made."""

    memory: dict[str, Any]
    tokens: list[int] | None


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
    reading = profiler.reading
    tokens = None if meter.status == "predicted" else [int(t) for t in out[0, len(prompt.ids) :]]
    return Outcome(
        {
            "kept_visual_tokens": surgery.visual_tokens,
            "kv_tokens_planned": surgery.kv_tokens,
            "kv_tokens_found": profiler.kv_tokens,
            "kv_bytes_per_layer": profiler.kv_bytes_per_layer,
            "tokens": profiler.tokens,
            "peak_token": reading.peak_token,
            "peak_phase": reading.peak_phase,
            "vision_peak_bytes": reading.vision_peak_bytes,
            "peak_parts": reading.parts,
            "peak_holders": reading.holders,
            "dynamic_peak_bytes": max(reading.peak_allocated_bytes) - meter.static_bytes,
        },
        tokens,
    )


class Bench:
    """A model on a device, kept from one method to the next and rebuilt only when its bytes would change."""

    def __init__(self, spec: RunSpec) -> None:
        METERS.load(spec.device).check()
        self.family, self.card = find_model(spec.model)
        self._built: tuple[Any, ...] | None = None
        self._model: nn.Module | None = None
        self._meter: Meter | None = None
        self._predicted: dict[Any, Outcome] = {}

    def ready(self, spec: RunSpec) -> tuple[nn.Module, Meter]:
        """The model and its meter for ``spec``."""
        wanted = (spec.model, spec.device, spec.dtype, spec.weights, spec.attention, spec.seed)
        if self._model is None or self._meter is None or wanted != self._built:
            self._model = self._meter = None
            release(spec.device)
            self._model = build_model(
                self.family, self.card, device=spec.device, dtype=spec.dtype, weights=spec.weights,
                attention=spec.attention, seed=spec.seed,
            )  # fmt: skip
            self._meter = METERS.load(spec.device)(self._model)
            self._built = wanted
            self._predicted.clear()
        return self._model, self._meter

    def outcome(self, spec: RunSpec, pruner: Pruner, shape: PromptShape, seed: int) -> Outcome:
        """Profile a prompt of random text and no picture: on a predicting meter, once for each distinct shape."""
        model, meter = self.ready(spec)
        key = (pruner, spec.stack, spec.max_new_tokens, shape)
        if meter.status == "predicted" and key in self._predicted:
            return self._predicted[key]
        prompt = make_prompt(self.family, self.card, shape, seed=seed)
        outcome = profile_prompt(model, meter, pruner, spec.stack, prompt, new_tokens=spec.max_new_tokens, seed=seed)
        if meter.status == "predicted":
            self._predicted[key] = outcome
        return outcome


def release(device: str) -> None:
    """Give unused memory back, so that a sample's reserved bytes do not depend on the samples before it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def complete_spec(spec: RunSpec) -> tuple[RunSpec, Pruner, Task]:
    """Check ``spec`` before any model is built, and write its method as a canonical spec string.

    Raises:
        UsageError: An unknown name, or a value outside its range.
    """
    _, card = find_model(spec.model)
    pruner = build_pruner(spec.method, spec.stack)
    layers = int(card.text["num_hidden_layers"])
    pruner.stages(1_000, layers)
    if spec.stack not in STACKS:
        raise UnknownName("stack", spec.stack, STACKS)
    METERS.load(spec.device)
    if spec.max_new_tokens < 1:
        raise BadValue(f"max_new_tokens={spec.max_new_tokens} is below 1")
    if spec.max_tiles is not None and spec.max_tiles < 1:
        raise BadValue(f"max_tiles={spec.max_tiles} is below 1")
    attention = "eager" if pruner.eager else spec.attention
    return dataclasses.replace(spec, method=method_spec(pruner), attention=attention), pruner, TASKS.build(spec.task)


def shard_of(samples: Sequence[Sample], shard: str | None) -> list[Sample]:
    """Every n-th sample from the i-th on, for a shard written ``i/n`` with i from 1."""
    if shard is None:
        return list(samples)
    try:
        i, n = (int(part) for part in shard.split("/"))
        if not 1 <= i <= n:
            raise ValueError
    except ValueError:
        raise BadValue(f"shard={shard!r}; write i/n with 1 <= i <= n, for example 2/4") from None
    return list(samples)[i - 1 :: n]


def run(
    spec: RunSpec,
    path: Path,
    *,
    bench: Bench | None = None,
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Make the run ``spec`` describes in folder ``path``, sample by sample.

    Raises:
        UsageError: The spec is wrong, or the folder holds another run.
        DataError: The task's data cannot be read.
        DeviceUnavailable: The device is not on this machine.
    """
    spec, pruner, task = complete_spec(spec)
    samples = shard_of(task.samples(spec.data, spec.limit), spec.shard)
    bench = bench or Bench(spec)
    record = RunRecord(
        spec=spec,
        status=METERS.load(spec.device).status,
        layers=int(bench.card.text["num_hidden_layers"]),
        data_label=task.label(spec.data),
        environment=environment(),
    )
    with RunFolder.open(path, record, resume=resume, force=force) as folder:
        todo = [sample for sample in samples if sample.id not in folder.done]
        if todo:
            model, meter = bench.ready(spec)
            _warm_up(bench, spec, pruner, todo[0])
            record = folder.record
            record.static_bytes = meter.static_bytes
            record.static_parts = _static_parts(model)
            record.environment |= {"dtype": spec.dtype, "attention": _attention(model, spec), **meter.environment()}
            record.notes = meter.notes()
            folder.save()
        for sample in todo:
            folder.append(_profile_sample(bench, spec, pruner, task, sample))
            if progress is not None:
                progress(folder.run(), len(samples))
        _finish(folder, bench.card, task, len(samples))
        return folder.run()


def _profile_sample(bench: Bench, spec: RunSpec, pruner: Pruner, task: Task, sample: Sample) -> SampleRecord:
    """One line of the run. What goes wrong with one sample is written down, and the run goes on."""
    record = SampleRecord(id=sample.id, width=sample.width, height=sample.height, category=sample.category)
    try:
        if sample.width < 1 or sample.height < 1:
            sample.image()  # says what is broken
        tokens = sample.text_tokens
        if tokens is None:
            raise BadValue(
                "its question has no token count, and random weights bring no tokenizer; use --data FILE.csv"
            )
        shape = bench.family.shape(bench.card, sample.width, sample.height, tokens, spec.max_tiles)
        record.tiles, record.visual_tokens, record.text_tokens = shape.tiles, shape.visual_tokens, shape.text_tokens
        release(spec.device)
        outcome = bench.outcome(spec, pruner, shape, _seed(spec, sample))
        return dataclasses.replace(record, **outcome.memory)
    except torch.cuda.OutOfMemoryError as error:
        record.status, record.error = "oom", str(error).partition("\n")[0]
    except (MemprofError, RuntimeError, ValueError) as error:
        record.status, record.error = "failed", str(error).partition("\n")[0]
    return record


def _seed(spec: RunSpec, sample: Sample) -> int:
    """A seed of the sample's own, the same on every machine."""
    return spec.seed + zlib.crc32(sample.id.encode())


def _warm_up(bench: Bench, spec: RunSpec, pruner: Pruner, sample: Sample) -> None:
    """Run the first sample unrecorded where things are measured, so that lasting workspaces count as static."""
    if METERS.load(spec.device).status == "measured":
        for _ in range(spec.warmup):
            _profile_sample(bench, spec, pruner, TASKS.build(spec.task), sample)
        release(spec.device)


def _static_parts(model: nn.Module) -> dict[str, int]:
    """Bytes of the weights, by what they are for."""
    where, parts = anatomy(model), dict.fromkeys(("vision", "language", "embeddings", "head"), 0)
    for name, tensor in weights_of(model):
        parts[where.weight_group(name)] += tensor.untyped_storage().nbytes()
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
