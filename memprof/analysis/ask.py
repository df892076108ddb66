"""One question about one picture under several methods: answers, what stayed of the picture, and what it took.

Answers need weights that were trained, and what stayed needs tensors that ran. Where either is missing the result says
so and does not make up for it: a prediction has neither, random weights have no answers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from memprof.asked import Answer, Asked, Cut, Grid
from memprof.environment import environment
from memprof.errors import DataError, MemprofError, UsageError
from memprof.families import Card, PromptShape
from memprof.meters import METERS
from memprof.plugins import split_spec
from memprof.pruning import build_pruner, visual_flops_cut
from memprof.records import Run, RunRecord, RunSpec, SampleRecord
from memprof.runner import SHIPPED, Bench, Prompt, make_prompt, release
from memprof.tasks import Sample

if TYPE_CHECKING:
    from PIL.Image import Image

#: Called before each method with its spec.
Progress = Callable[[str], None]
#: A program is made for several shapes at once; these lie beside the one asked for, in tokens of text.
_BESIDE = range(0, 24, 4)


@dataclass(frozen=True)
class Opened:
    """A picture in memory, as a sample's :class:`~memprof.tasks._pictures.Picture`."""

    picture: Image

    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.picture.size

    def image(self) -> Image:
        """The picture."""
        return self.picture


def open_picture(path: Path) -> Image:
    """The picture in file ``path`` in RGB, turned upright where its camera noted how it was held.

    Raises:
        DataError: No such file, or not a picture.
    """
    from PIL import Image, ImageOps

    if not path.is_file():
        raise DataError(f"{path} is {'a folder' if path.is_dir() else 'not there'}; the picture must be a file")
    try:
        with Image.open(path) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except Exception as error:  # decoders raise almost anything on broken input
        unknown = type(error).__name__ == "UnidentifiedImageError"
        reason = "not a picture Pillow knows" if unknown else " ".join(str(error).split())
        raise DataError(f"{path} cannot be read: {reason}") from None


def ask(
    specs: Sequence[RunSpec], picture: Image, question: str, name: str, *, progress: Progress | None = None
) -> Asked:
    """Ask ``question`` about ``picture`` under each of ``specs``.

    A method that fails leaves its reason in its sample, and the others go on.

    Args:
        specs: Complete (:func:`memprof.runner.complete_spec`), one a method; they differ in nothing else.
        picture: In RGB.
        question: What is asked, without a chat template.
        name: Of the picture's file.
        progress: Told before each method.

    Raises:
        UsageError: The question is empty.
        DeviceUnavailable: The device is not on this machine.
        WeightsError: The checkpoint or its tokenizer cannot be read.
    """
    if not question.strip():
        raise UsageError("the prompt is empty; ask something about the picture")
    specs = sorted(specs, key=lambda spec: split_spec(spec.method)[0] != "baseline")
    bench = Bench(specs[0])
    untrained = bench.weights == "random"
    # A rough count, where only a tokenizer could tell: random weights bring none.
    tokens = math.ceil(len(question.encode()) / 4) if untrained else None
    sample = Sample(name, *picture.size, question, tokens, (), None, Opened(picture))
    prompt = _prompt(bench, specs[0], sample)
    answers = []
    for spec in specs:
        if progress is not None:
            progress(spec.method)
        answers.append(_answer(bench, spec, sample, prompt, untrained=untrained))
    shape = prompt.shape if isinstance(prompt, Prompt) else prompt
    pixels = prompt.pixels if isinstance(prompt, Prompt) else None
    return Asked(
        question=question,
        image=name,
        picture=picture,
        model=bench.card.title,
        weights=_whose(specs[0], bench.card),
        grid=Grid(shape.columns, shape.rows, shape.tiles > shape.columns * shape.rows, bench.family.side(bench.card)),
        tiles=None if pixels is None or isinstance(pixels, tuple) else bench.family.seen(pixels),
        answers=answers,
        notes=_notes(specs, answers, tokens),
    )


def _prompt(bench: Bench, spec: RunSpec, sample: Sample) -> Prompt | PromptShape:
    """What all methods are given: its sizes where nothing runs; random text about the picture for random weights."""
    prompt = bench.prompt(spec, sample)
    if isinstance(prompt, PromptShape) and METERS.load(spec.device).status == "measured":
        return make_prompt(bench.family, bench.card, prompt, image=sample.image(), seed=spec.seed)
    return prompt


def _answer(bench: Bench, spec: RunSpec, sample: Sample, prompt: Prompt | PromptShape, *, untrained: bool) -> Answer:
    """One method's answer."""
    pruner, text = build_pruner(spec.method, spec.stack), bench.card.text
    layers, shape = int(text["num_hidden_layers"]), prompt.shape if isinstance(prompt, Prompt) else prompt
    meter = bench.ready(spec)[1]
    if isinstance(prompt, PromptShape):
        bench.foresee(spec, pruner, [dataclasses.replace(shape, after=shape.after + more) for more in _BESIDE])
    found = SampleRecord(
        sample.id, width=sample.width, height=sample.height, tiles=shape.tiles, visual_tokens=shape.visual_tokens,
        text_tokens=shape.text_tokens,
    )  # fmt: skip
    record = RunRecord(spec, METERS.load(spec.device).status, layers=layers, data_label=sample.id, complete=True)
    kept: list[list[int]] | None = None
    try:
        if spec.device == "cuda":  # so that workspaces that stay count as static, and kernels are loaded
            bench.outcome(dataclasses.replace(spec, max_new_tokens=2), pruner, prompt, spec.seed)
        release(spec.device)
        record.static_bytes = meter.static_bytes
        outcome = bench.outcome(spec, pruner, prompt, spec.seed)
        found, kept = dataclasses.replace(found, **outcome.memory), outcome.kept
        if outcome.tokens is not None and not untrained:
            found.answer = bench.tokenizer.decode(outcome.tokens).strip()
    except torch.cuda.OutOfMemoryError as error:
        found.status, found.error = "oom", str(error).partition("\n")[0]
    except (MemprofError, RuntimeError, ValueError) as error:
        found.status, found.error = "failed", str(error).partition("\n")[0]
    if found.ok:
        record.visual_flops_cut = visual_flops_cut(
            found.kept_visual_tokens, shape.visual_tokens, text["hidden_size"], text["intermediate_size"]
        )
    record.environment = environment() | {"dtype": spec.dtype, **meter.environment()}
    record.notes = meter.notes()
    stages = pruner.stages(shape.visual_tokens, layers)
    cuts = [Cut(stage.layer, stage.kept, kept[i] if kept else None) for i, stage in enumerate(stages)]
    return Answer(Run(record, [found]), cuts, pruner.mask_only)


def _whose(spec: RunSpec, card: Card) -> str:
    """Whose weights answered."""
    if spec.weights == SHIPPED:
        return "the weights that come with memprof"
    return {"random": "random weights", "hub": f"weights of {card.hub}"}.get(spec.weights, f"weights {spec.weights}")


def _notes(specs: Sequence[RunSpec], answers: Sequence[Answer], tokens: int | None) -> list[str]:
    """What is not shown and why, and what is not exact."""
    spec, notes = specs[0], []
    if METERS.load(spec.device).status == "predicted":
        notes.append(
            "predicted, nothing ran: no answers, and which visual tokens would stay is not known; "
            + ("--weights hub or PATH with " if spec.weights == "random" else "")
            + "--device cuda or cpu shows both"
        )
        notes.append(f"predicted for answers of {spec.max_new_tokens} tokens; one that ends earlier takes less")
    elif spec.weights == "random":
        notes.append("random weights: their answers would be noise and are not shown")
        looking = [s.method.partition(":")[0] for s in specs if build_pruner(s.method, s.stack).needs]
        if looking:
            notes.append(f"random weights: what {' and '.join(dict.fromkeys(looking))} kept follows from noise")
    if tokens is not None:
        notes.append(
            f"the prompt is taken to be {tokens} tokens, one for every four bytes: random weights bring no tokenizer"
        )
    return [*notes, *dict.fromkeys(note for one in answers for note in one.run.record.notes)]
