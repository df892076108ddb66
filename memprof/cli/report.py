"""``memprof report``: runs as a table, a page, or another program's food."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memprof.cli import _options as opt

#: What PyTorch's memory viewer opens. No format in ``memprof.reports``: it is predicted anew, and takes torch.
SNAPSHOT = "snapshot"


def report(
    runs: Annotated[
        list[Path], typer.Argument(help=f"{opt.RUN_HELP} Several are set side by side.", metavar="RUN...")
    ],
    format: Annotated[
        str | None,
        typer.Option(
            "--format", "-f",
            help="table, markdown, latex, csv, json, html, chrome (Perfetto) or snapshot (PyTorch's viewer); "
            "default: by the suffix of -o, else table.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write to this file instead of standard output.")
    ] = None,
    unit: Annotated[
        str | None,
        typer.Option(help="GiB, GB, MiB, MB or KiB (default: what fits); csv, json and chrome hold bytes."),
    ] = None,
    sample: Annotated[
        str | None,
        typer.Option("--sample", help="For a snapshot: a sample's id; default: the one with the highest peak."),
    ] = None,
) -> None:
    """Show what runs measured or predicted; runs of one model, task and stack are set side by side.

    For example:

      memprof report latest

      memprof report runs/a runs/b --format markdown > comment.md

      memprof report latest -o report.html

      memprof report latest --format chrome -o trace.json

      memprof report latest/topv -o memory.pickle
    """
    import os
    import sys

    from memprof import reports
    from memprof.cli._runs import find
    from memprof.errors import MemprofError, UnknownName, UsageError
    from memprof.files import replace

    if format not in (None, *(names := [*reports.names(), SNAPSHOT])):
        raise UnknownName("format", str(format), names)
    format = _format(format, output)
    if format == SNAPSHOT:
        if unit is not None:
            raise UsageError(f"--unit {unit} is for what is shown; a {SNAPSHOT} holds bytes, as PyTorch's do")
        _snapshot(runs, sample, output)
        return
    if sample is not None:
        raise UsageError(f"--sample chooses what a {SNAPSHOT} holds; the format {format} holds every sample")
    how = {}
    if format == "table":
        how = {"colour": output is None and sys.stdout.isatty() and not os.environ.get("NO_COLOR")}
    text = reports.render(format, find(runs), unit, **how)
    if output is None:
        sys.stdout.write(text)
        return
    try:
        replace(output, text)
    except OSError as error:
        raise MemprofError(f"cannot write {output}: {error.strerror or error}") from None
    typer.echo(str(output))


#: What a file's suffix asks for; the first is what is written where no format is named.
SUFFIXES = {
    ".html": ("html",), ".htm": ("html",), ".md": ("markdown",), ".csv": ("csv",), ".json": ("json", "chrome"),
    ".txt": ("table",), ".tex": ("latex",), ".pickle": (SNAPSHOT,), ".pkl": (SNAPSHOT,), "": ("table",),
}  # fmt: skip


def _format(asked: str | None, output: Path | None) -> str:
    """The format asked for, or the one that the file's suffix says.

    Raises:
        UsageError: They disagree, or the suffix is of no format.
    """
    from memprof.errors import UsageError

    if output is None:
        return asked or "table"
    suffix = output.suffix.lower()
    says = SUFFIXES.get(suffix)
    if asked is None:
        if says is None:
            valid = ", ".join(filter(None, SUFFIXES))
            raise UsageError(f"{output.name}: {suffix} is no format of a report; valid: {valid}")
        return says[0]
    if says is not None and suffix and asked not in says:
        raise UsageError(f"--format {asked} and {output.name} disagree: {suffix} is {' or '.join(says)}")
    return asked


def _snapshot(folders: list[Path], sample: str | None, output: Path | None) -> None:
    """Predict a sample of one run again and write its every allocation: the one format that records do not hold."""
    from memprof.cli._runs import find
    from memprof.errors import UsageError

    if output is None:
        raise UsageError("a snapshot is a binary file: say where with -o memory.pickle")
    found = find(folders)
    if len(found) > 1:
        raise UsageError(f"a snapshot holds one run and {len(found)} were found; name one, such as {found[0].path}")

    from memprof.analysis.memory_viewer import export
    from memprof.reports._paper import Screen

    errors = Screen(stderr=True)
    with errors.status("predicting every allocation") as status:
        if not errors.is_terminal:
            status.stop()
        written = export(found[0], output, sample)
    for note in written.notes:
        errors.print(note, soft_wrap=True, markup=False, highlight=False)
    typer.echo(str(output))
