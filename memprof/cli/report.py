"""``memprof report``: runs as a table, a page, or another program's food."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

#: What PyTorch's memory viewer opens. No format in ``memprof.reports``: it is predicted anew, and takes torch.
SNAPSHOT = "snapshot"


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Run folders, or folders that hold run folders.", metavar="RUN...")
    ],
    format: Annotated[
        str,
        typer.Option(
            "--format", "-f", help="table, markdown, csv, json, html, chrome (Perfetto) or snapshot (PyTorch's viewer)."
        ),
    ] = "table",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write to this file instead of standard output.")
    ] = None,
    unit: Annotated[
        str | None,
        typer.Option(help="GiB, GB, MiB or MB (default: what fits); csv, json and chrome hold bytes."),
    ] = None,
    sample: Annotated[
        str | None,
        typer.Option("--sample", help="For a snapshot: a sample's id; default: the one with the highest peak."),
    ] = None,
) -> None:
    """Show what runs measured or predicted; runs of one model, task and stack are set side by side.

    For example:

      memprof report runs/first

      memprof report runs/a runs/b --format markdown > comment.md

      memprof report runs/first --format html -o report.html

      memprof report runs/first --format chrome -o trace.json

      memprof report runs/first --format snapshot -o memory.pickle
    """
    import os
    import sys

    from memprof import reports
    from memprof.errors import MemprofError, UnknownName, UsageError
    from memprof.store import find_runs

    if format not in (names := [*reports.names(), SNAPSHOT]):
        raise UnknownName("format", format, names)
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
    text = reports.render(format, find_runs(runs), unit, **how)
    if output is None:
        sys.stdout.write(text)
        return
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise MemprofError(f"cannot write {output}: {error.strerror or error}") from None
    typer.echo(str(output))


def _snapshot(folders: list[Path], sample: str | None, output: Path | None) -> None:
    """Predict a sample of one run again and write its every allocation: the one format that records do not hold."""
    from memprof.errors import UsageError
    from memprof.store import find_runs

    if output is None:
        raise UsageError("a snapshot is a binary file: say where with -o memory.pickle")
    found = find_runs(folders)
    if len(found) > 1:
        raise UsageError(f"a snapshot holds one run and {len(found)} were found; name one, such as {found[0].path}")

    from rich.console import Console

    from memprof.analysis.memory_viewer import export

    errors = Console(stderr=True)
    with errors.status("predicting every allocation") as status:
        if not errors.is_terminal:
            status.stop()
        written = export(found[0], output, sample)
    for note in written.notes:
        errors.print(note, soft_wrap=True, markup=False, highlight=False)
    typer.echo(str(output))
