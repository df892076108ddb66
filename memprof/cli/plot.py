"""``memprof plot``: figures for papers and slides, each with the data it was drawn from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plot(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Run folders, folders that hold run folders, or data files (.json) of figures to draw again.",
            metavar="RUN...",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write to.")] = Path("plots"),
    style: Annotated[str, typer.Option(help="paper or slides.")] = "paper",
    width: Annotated[str, typer.Option(help="single (3.35 in) or double (6.9 in) column.")] = "single",
    unit: Annotated[str, typer.Option(help="GiB, GB, MiB or MB; data files hold bytes.")] = "GiB",
    format: Annotated[
        list[str] | None, typer.Option("--format", "-f", help="pdf, png or svg; may be given again. [pdf and png]")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Do not list the files written.")] = False,
) -> None:
    """Draw memory curves, overlays and breakdowns as PDF and PNG, with the numbers beside each as JSON.

    Drawn again from the same runs, every file has the same bytes.

    For example:

      memprof plot runs/first -o plots/

      memprof plot runs/first -o talk/ --style slides --width double --unit GB

      memprof plot plots/internvl2-2b_ai2d_overlay.json -o again/
    """
    from memprof import figures
    from memprof.errors import DataError, MemprofError
    from memprof.store import find_runs

    drawings = [figures.read_data(path) for path in runs if path.suffix == ".json"]
    folders = [path for path in runs if path.suffix != ".json"]
    if folders:
        drawings += figures.plan(find_runs(folders))
    if not drawings:
        raise DataError("nothing to draw: no run has a finished sample")
    try:
        for path in figures.draw_data(drawings, output, style, width, unit, format or ("pdf", "png")):
            if not quiet:
                typer.echo(str(path))
    except OSError as error:
        raise MemprofError(f"cannot write to {output}: {error.strerror or error}") from None
