"""``memprof report``: runs as a table, a page, or another program's food."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Run folders, or folders that hold run folders.", metavar="RUN...")
    ],
    format: Annotated[
        str, typer.Option("--format", "-f", help="table, markdown, csv, json, html or chrome (Perfetto).")
    ] = "table",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write to this file instead of standard output.")
    ] = None,
    unit: Annotated[str, typer.Option(help="GiB, GB, MiB or MB; csv, json and chrome hold bytes.")] = "GiB",
) -> None:
    """Show what runs measured or predicted; runs of one model, task and stack are set side by side.

    For example:

      memprof report runs/first

      memprof report runs/a runs/b --format markdown > comment.md

      memprof report runs/first --format html -o report.html

      memprof report runs/first --format chrome -o trace.json
    """
    import os
    import sys

    from memprof import reports
    from memprof.errors import MemprofError
    from memprof.store import find_runs

    reports.check(format)
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
