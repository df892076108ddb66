"""``memprof ask IMAGE PROMPT``: one question under several methods, answers and kept tokens side by side."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memprof.cli import _options as opt

if TYPE_CHECKING:
    from memprof.asked import Asked


def ask(
    image: Annotated[Path, typer.Argument(help="The picture's file.", metavar="IMAGE", show_default=False)],
    prompt: Annotated[str, typer.Argument(help="What to ask about it.", metavar="PROMPT", show_default=False)],
    model: opt.Model = "internvl2-2b",
    method: opt.Methods = ["baseline", "fastv", "topv"],  # noqa: B006 - typer copies it
    device: opt.Device = "auto",
    stack: opt.StackName = "current",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Most tokens of an answer.")] = 64,
    max_tiles: opt.MaxTiles = None,
    weights: opt.Weights = "random",
    dtype: opt.Dtype = None,
    seed: opt.Seed = 0,
    format: Annotated[
        str | None,
        typer.Option("--format", "-f", help="terminal, markdown, html or json; default: by the suffix of -o."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A file (.html, .md, .json, .txt), or a folder for all of it."),
    ] = None,
    unit: opt.FittingUnit = None,
    json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Ask one question about one picture under several methods, and set the answers side by side.

    Shown are the answers with their differences marked, the picture with the visual tokens that each method kept, and
    what each took. Answers need trained weights, kept tokens need a device that runs them (cuda or cpu).

    Examples:
    memprof ask cat.jpg "What is this?" --model llava-1.5-7b --weights hub -o cat.html

    memprof ask scene.png "read red" --model proving --method baseline --method topv:keep=0.25

    memprof ask cat.jpg "What is this?" -o answers
    """
    from memprof import api
    from memprof.analysis.ask import ask as ask_model
    from memprof.analysis.ask import open_picture
    from memprof.reports import answers
    from memprof.runner import check_distinct, complete_spec
    from memprof.units import check_unit, unit_for

    if unit is not None:
        check_unit(unit)
    if format is not None:
        answers.check(format)
    if output is not None:
        answers.check_target(output, format)
    picture = open_picture(image)
    specs = [
        complete_spec(
            api.spec(
                model, one, "folder", device, stack=stack, dtype=dtype, weights=weights, data=str(image),
                max_new_tokens=max_new_tokens, max_tiles=max_tiles, seed=seed,
            )
        )
        for one in method
    ]  # fmt: skip
    check_distinct([one.spec for one in specs])
    with _watch(quiet=quiet or json) as progress:
        asked = ask_model(specs, picture, prompt, image.name, progress=progress)
    unit = unit_for(max(one.sample.peak_allocated_bytes for one in asked.answers), unit)
    written = [] if output is None else answers.save(asked, output, format, unit)
    if json:
        sys.stdout.write(answers.render("json", asked, unit))
    elif output is None:
        sys.stdout.write(answers.render(format or "terminal", asked, unit, colour=_colour()))
    elif answers.is_folder(output):
        sys.stdout.write(answers.render("terminal", asked, unit, colour=_colour()))
    if not json:
        for file in written:
            typer.echo(str(file))
    _raise_failures(asked)


def _colour() -> bool:
    """Whether standard output takes colours."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _raise_failures(asked: Asked) -> None:
    """End with the error of the first method that failed, now that the others are shown."""
    from memprof.errors import MemprofError, OutOfMemory

    for one in asked.answers:
        if not one.sample.ok:
            kind = OutOfMemory if one.sample.status == "oom" else MemprofError
            raise kind(f"{one.run.record.spec.method}: {one.sample.error}")


@contextmanager
def _watch(*, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Which method is at work, on stderr, and only on a terminal."""
    from rich.markup import escape

    from memprof.reports._paper import Screen

    errors = Screen(stderr=True)
    with errors.status("loading the model") as status:
        if quiet or not errors.is_terminal:
            status.stop()
        yield lambda method: status.update(escape(method))
