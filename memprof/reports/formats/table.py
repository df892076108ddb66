"""Tables for a terminal, 80 columns or more: the runs of a task together, and below them where they come from."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from memprof.figures import facts
from memprof.figures.palette import method_colour
from memprof.records import Run
from memprof.reports._paper import Paper
from memprof.reports.rows import Sheet, sheets

MOST_REMARKS = 5
NARROW = {"keep/pruned": "keep/\npruned", "reserved": "re-\nserved"}
#: From this width on, headings stand in one line.
ROOMY = 112


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
    roomy = console.width >= ROOMY
    console.print(_table(sheet, sheet.head, sheet.rows, roomy=roomy))
    if sheet.quality:
        console.print(Text("What it costs, mean [95 % bootstrap interval over samples]", style="bold"))
        console.print(_table(sheet, sheet.quality_head, sheet.quality, roomy=roomy))
    for line in sheet.remarks[:MOST_REMARKS]:
        console.print(Text(line, style="yellow"))
    if len(sheet.remarks) > MOST_REMARKS:
        console.print(Text(f"... and {len(sheet.remarks) - MOST_REMARKS} more", style="yellow"))
    console.print(Text(sheet.origin, style="dim"))


def _table(sheet: Sheet, head: Sequence[str], rows: Sequence[Sequence[str]], *, roomy: bool) -> Table:
    table = Table(box=box.HORIZONTALS, padding=(0, 2 if roomy else 1, 0, 0), pad_edge=False, header_style="bold")
    for name in head:
        left = name in ("method", "status")
        title = Text(name if roomy else NARROW.get(name, name.replace(" ", "\n")))
        table.add_column(title, justify="left" if left else "right", no_wrap=name != "method", vertical="bottom")
    for run, (name, *cells) in zip(sheet.runs, rows, strict=True):
        shown = cells if roomy else [cell.replace(" / ", "/").replace(" [", "\n[") for cell in cells]
        table.add_row(Text(name, style=method_colour(facts.method_of(run))), *map(Text, shown))
    return table
