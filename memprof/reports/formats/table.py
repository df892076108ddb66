"""Tables for a terminal: the runs of a task together, and below them where they come from. Too narrow, they stack."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from memprof.records import Run
from memprof.reports._fitting import fitting
from memprof.reports._paper import Paper
from memprof.reports.rows import CALLERS_HEAD, CALLERS_TITLE, KV_CACHE, Sheet, sheets
from memprof.telling import facts
from memprof.telling.palette import method_colour

MOST_REMARKS = 5


def render(runs: Sequence[Run], unit: str = "GiB", *, width: int | None = None, colour: bool = False) -> str:
    """A table for each group of ``runs``, ``width`` columns wide (None: the terminal's), with ANSI colours if asked."""
    console = Paper(width, colour=colour)
    for number, sheet in enumerate(sheets(runs, unit)):
        if number:
            console.print()
        _print(console, sheet)
    return console.text


def _print(console: Console, sheet: Sheet) -> None:
    console.print(Text(sheet.heading, style="bold"))
    of_methods = [method_colour(facts.method_of(run)) for run in sheet.runs]
    console.print(fitting(console, of_methods, sheet.head, sheet.rows))
    if sheet.callers:
        console.print(Text(CALLERS_TITLE, style="bold"))
        console.print(fitting(console, [""] * len(sheet.callers), CALLERS_HEAD, sheet.callers))
    if sheet.quality:
        console.print(Text("What it costs, mean [95 % bootstrap interval over samples]", style="bold"))
        console.print(fitting(console, of_methods, sheet.quality_head, sheet.quality))
    for line in sheet.remarks[:MOST_REMARKS]:
        console.print(Text(line, style="yellow"))
    if len(sheet.remarks) > MOST_REMARKS:
        console.print(Text(f"... and {len(sheet.remarks) - MOST_REMARKS} more", style="yellow"))
    console.print(Text(" · ".join([KV_CACHE, sheet.legend[-1], sheet.origin]), style="dim"))
