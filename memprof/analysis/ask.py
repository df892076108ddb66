"""One question about one picture under several methods: answers, what stayed of the picture, and what it took.

Answers need weights that were trained, and what stayed needs tensors that ran. Where either is missing the result says
so and does not make up for it: a prediction has neither, random weights have no answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from memprof import files
from memprof.asked import Answer, Asked, Cut, Grid
from memprof.bench import Bench
from memprof.bench.outcome import release
from memprof.environment import environment
from memprof.errors import DataError, UsageError
from memprof.families import Model
from memprof.forecasts import BESIDE
from memprof.meters import METERS
from memprof.models.find import SHIPPED
from memprof.plugins import split_spec
from memprof.prompts import Image as Shown
from memprof.prompts import Prompt
from memprof.pruning import build_pruner, visual_flops_cut
from memprof.records import Run, RunRecord, RunSpec, SampleRecord
from memprof.runner import Complete, ran_out
from memprof.tasks import Sample
from memprof.tasks._pictures import in_rgb, opened, reason

if TYPE_CHECKING:
    from PIL.Image import Image

#: Called before each method with its spec.
Progress = Callable[[str], None]


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
    from PIL import ImageOps

    if not path.is_file():
        raise DataError(f"{path} is {files.kind_of(path)}; the picture must be a file")
    try:
        return in_rgb(ImageOps.exif_transpose(opened(files.read_bytes(path))))
    except DataError:
        raise
    except Exception as error:  # decoders raise almost anything on broken input
        raise DataError(f"{path} cannot be read: {reason(error)}") from None


def ask(
    asked: Sequence[Complete], picture: Image, question: str, name: str, *, progress: Progress | None = None
) -> Asked:
    """Ask ``question`` about ``picture`` under each of ``asked``.

    A method that fails leaves its reason in its sample, and the others go on.

    Args:
        asked: Specs as :func:`memprof.runner.complete_spec` gives them, one a method; they differ in nothing else.
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
    asked = sorted(asked, key=lambda one: split_spec(one.spec.method)[0] != "baseline")
    specs, bench = [one.spec for one in asked], Bench(asked[0].setup)
    model, untrained = bench.model, bench.setup.weights == "random"
    # A rough count, where only a tokenizer could tell: random weights bring none.
    tokens = math.ceil(len(question.encode()) / 4) if untrained else None
    sample = Sample(name, *picture.size, question, tokens, (), None, Opened(picture))
    prompt = _prompt(bench, specs[0], sample)
    answers = []
    for one in asked:
        if progress is not None:
            progress(one.spec.method)
        answers.append(_answer(bench.set_up(one.setup), one, sample, prompt, untrained=untrained))
    (image,), pixels = prompt.shape.images, prompt.inputs.get("pixel_values")
    grid = _grid(image)
    if grid is None or pixels is None or pixels.values is None:
        tiles = None
    else:
        tiles = model.family.seen(model, image, pixels.values)
    return Asked(
        question=question,
        image=name,
        picture=picture,
        model=model.title,
        weights=_whose(specs[0], model),
        grid=grid,
        tiles=tiles,
        answers=answers,
        notes=_notes(specs, answers, tokens),
    )


def _grid(image: Shown) -> Grid | None:
    """How the visual tokens of ``image`` lie, where that is a grid: one view, or views that are alike."""
    if len(set(image.grids)) > 1 or image.tiles != len(image.grids):
        return None
    return Grid(image.columns, image.rows, image.thumbnail, *image.grids[0])


def _prompt(bench: Bench, spec: RunSpec, sample: Sample) -> Prompt:
    """What all methods are given: its sizes where nothing runs; random text about the picture for random weights."""
    prompt = bench.prompt(sample, spec.max_tiles)
    if prompt.ids is None and not bench.predicts:
        return bench.model.family.drawn(bench.model, prompt.shape, spec.seed, [sample.image()])
    return prompt


def _answer(bench: Bench, asked: Complete, sample: Sample, prompt: Prompt, *, untrained: bool) -> Answer:
    """One method's answer."""
    spec, pruner, _, _ = asked
    model, shape, device = bench.model, prompt.shape, bench.standing(pruner, spec.stack).device
    if prompt.ids is None:
        bench.foresee(asked.ask(shape.longer(more)) for more in BESIDE)
    found = SampleRecord(sample.id, width=sample.width, height=sample.height).of_prompt(shape)
    record = RunRecord(spec, METERS.load(spec.device).status, layers=model.layers, data_label=sample.id, complete=True)
    kept: list[list[int]] | None = None
    try:
        if spec.device == "cuda":  # so that workspaces that stay count as static, and kernels are loaded
            bench.outcome(asked.ask(prompt, new_tokens=2))
        release(spec.device)
        record.static_bytes = bench.standing(pruner, spec.stack).static_bytes
        outcome = bench.outcome(asked.ask(prompt))
        found, kept = found.with_memory(outcome.memory), outcome.kept
        if outcome.refused is not None:
            found.status, found.error = "oom", outcome.refused
        if outcome.tokens is not None and not untrained:
            found.answer = bench.tokenizer.decode(outcome.tokens).strip()
    except Exception as error:
        found.status, found.error = "oom" if ran_out(error) else "failed", str(error).partition("\n")[0]
    if found.ok:
        record.visual_flops_cut = visual_flops_cut(
            found.kept_visual_tokens, shape.visual_tokens, model.hidden, model.ffn
        )
    record.environment = environment() | {"dtype": spec.dtype, **device}
    record.notes = bench.notes()
    stages = pruner.stages(shape.visual_tokens, model.layers)
    cuts = [Cut(stage.layer, stage.tokens, kept[i] if kept else None) for i, stage in enumerate(stages)]
    return Answer(Run(record, [found]), cuts, pruner.mask_only)


def _whose(spec: RunSpec, model: Model) -> str:
    """Whose weights answered."""
    if spec.weights == SHIPPED:
        return "the weights that come with memprof"
    return {"random": "random weights", "hub": f"weights of {model.hub}"}.get(spec.weights, f"weights {spec.weights}")


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
            f"the prompt is taken to be {tokens} token{'s' * (tokens != 1)}, one for every four bytes: "
            "random weights bring no tokenizer"
        )
    return [*notes, *dict.fromkeys(note for one in answers for note in one.run.record.notes)]
