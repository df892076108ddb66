"""``memprof plot``: figures for papers and slides, each with the data it was drawn from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from memprof.cli import _options as opt


def plot(
    runs: Annotated[
        list[Path],
        typer.Argument(help=f"{opt.RUN_HELP} Or data files (.json) of figures to draw again.", metavar="RUN..."),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The folder to write to; default: figures/ beside the run.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="A kind of figure, as overlay; may be given again.")
    ] = None,
    style: Annotated[str, typer.Option(help="print (formerly paper) or slides (16:9).")] = "print",
    width: Annotated[
        str, typer.Option(help="single (3.35 in) or double (6.9 in) column; half or whole slide.")
    ] = "single",
    unit: opt.FittingUnit = None,
    caption: Annotated[
        bool, typer.Option("--caption", help="Draw title and origin too; else they go to a .txt beside each figure.")
    ] = False,
    format: Annotated[
        list[str] | None, typer.Option("--format", "-f", help="pdf, png or svg; may be given again. [pdf and png]")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Do not list the files written.")] = False,
) -> None:
    """Draw memory curves, overlays and breakdowns as PDF and PNG, with the numbers beside each as JSON.

    Drawn again from the same runs, every file has the same bytes. Title and origin stand in a text file beside each
    figure and in the PDF's metadata, for the caption; --caption draws them.

    For example:

      memprof plot latest

      memprof plot latest -o talk/ --style slides --width double --unit GB

      memprof plot latest --only overlay --only breakdown --format pdf

      memprof plot plots/internvl2-2b_ai2d_overlay.json -o again/
    """
    from memprof import figures
    from memprof.cli._runs import find, locate
    from memprof.errors import DataError, UnknownName

    for kind in only or ():
        if kind not in figures.KINDS.names():
            raise UnknownName("figure", kind, figures.KINDS.names())
    folders = [locate(path) for path in runs if path.suffix != ".json"]
    out = _folder(output, folders)
    drawings = [figures.read_data(path) for path in runs if path.suffix == ".json"]
    if folders:
        drawings += figures.plan(find(folders))
    if only:
        drawings = [data for data in drawings if data["kind"] in only]
    if not drawings:
        raise DataError(f"nothing to draw: no {' or '.join(only)}" if only else "nothing to draw: no finished sample")
    chosen = format or ("pdf", "png")
    for path in _told(out, figures.draw_data(drawings, out, style, width, unit, chosen, caption=caption)):
        if not quiet:
            typer.echo(str(path))


def _told(out: Path, drawn: Iterator[Path]) -> Iterator[Path]:
    """The files as they are ``drawn``; that one cannot be written is told with its folder."""
    from memprof.errors import MemprofError

    try:
        yield from drawn
    except OSError as error:
        raise MemprofError(f"cannot write to {out}: {error.strerror or error}") from None


def _folder(output: Path | None, folders: list[Path]) -> Path:
    """Where figures go: as asked, else ``figures`` in the first run's folder.

    Raises:
        UsageError: A file was named, or none and there is no run to stand beside.
    """
    from memprof import figures
    from memprof.errors import UsageError

    if output is not None and output.suffix[1:].lower() in (*figures.FORMATS, "json"):
        kind = output.suffix[1:].lower()
        raise UsageError(f"-o names the folder that all figures go to; for {kind} files say -o FOLDER --format {kind}")
    if output is None and not folders:
        raise UsageError("drawing data files again needs a folder to write to: -o FOLDER")
    return output if output is not None else folders[0] / "figures"
