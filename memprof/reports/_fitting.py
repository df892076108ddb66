"""Tables that are never cut: where a terminal is too narrow for the cells, rows stand one below the other."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console, JustifyMethod, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

#: Titles that are broken elsewhere than between words.
_NARROW = {"keep/pruned": "keep/\npruned", "reserved": "re-\nserved"}
#: From this width on, headings stand in one line.
_ROOMY = 112
#: No table is wider: so its least width can be told from the width of what it is printed on.
_WIDEST = 10_000


def fitting(
    console: Console, styles: Sequence[str], head: Sequence[str], rows: Sequence[Sequence[str]]
) -> RenderableType:
    """A table where every cell has its room, else the rows one below the other.

    Args:
        console: What it is to be printed on.
        styles: The style of each row's name.
        head: What the columns are called.
        rows: A name, which may break between words, and numbers, which may not.
    """
    for roomy in (True, False)[console.width < _ROOMY :]:
        table = _table(styles, head, rows, roomy=roomy)
        if Measurement.get(console, console.options.update(width=_WIDEST), table).minimum <= console.width:
            return table
    return _stacked(styles, head, rows)


def _narrow(cell: str) -> str:
    return cell.replace(" / ", "/").replace("≥ ", "≥").replace(" [", "\n[")


def _table(styles: Sequence[str], head: Sequence[str], rows: Sequence[Sequence[str]], *, roomy: bool) -> Table:
    table = Table(box=box.HORIZONTALS, padding=(0, 2 if roomy else 1, 0, 0), pad_edge=False, header_style="bold")
    shown = [[name, *(cells if roomy else map(_narrow, cells))] for name, *cells in rows]
    for number, name in enumerate(head):
        title = name if roomy else _NARROW.get(name, name.replace(" ", "\n"))
        # A number is never broken; rich takes one for as wide as its longest word.
        lines = [line for text in (title, *(row[number] for row in shown)) for line in text.splitlines()]
        least = max(map(cell_len, lines)) if number else None
        justify: JustifyMethod = "right" if number else "left"
        table.add_column(Text(title), justify=justify, no_wrap=number > 0, min_width=least, vertical="bottom")
    for style, (name, *cells) in zip(styles, shown, strict=True):
        table.add_row(Text(name, style=style), *map(Text, cells))
    return table


def _stacked(styles: Sequence[str], head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A row after the other, a line a number."""
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right", no_wrap=True)
    for style, (name, *cells) in zip(styles, rows, strict=True):
        table.add_row(Text(name, style=f"bold {style}"), "")
        for title, cell in zip(head[1:], cells, strict=True):
            table.add_row(f"  {title}", Text(cell))
    return table
