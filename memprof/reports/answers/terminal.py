"""Answers side by side in a terminal, 80 columns or more, each above a small map of the visual tokens it kept."""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest

import numpy as np
import numpy.typing as npt
from rich import box
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from memprof.asked import Asked
from memprof.figures import kept as drawing
from memprof.reports._paper import Paper
from memprof.reports.answers.sheet import HEAD, Column, Sheet, key_text, sheet
from memprof.reports.answers.words import Marked
from memprof.telling.palette import method_colour

#: Narrowest column an answer is set in, and space between two.
_NARROW, _SPACE = 24, 2
#: Widest map, in cells.
_MAP = 48
#: Shares of a cell's tokens that stayed, from none to all.
_SHADES = "·░▒▓█"
_MARK = "bold magenta"

Pixel = npt.NDArray[np.float64]


def render(asked: Asked, unit: str = "GiB", *, width: int | None = None, colour: bool = False) -> str:
    """The question, its answers with differences ``*starred*`` (or in colour, if asked), maps and numbers."""
    console = Paper(width, colour=colour)
    said = sheet(asked, unit)
    console.print(Text(said.heading, style="bold"))
    console.print(Text(f"\nUser: {said.question}\n"))
    if any(one.answer or one.tokens is not None or one.error for one in said.columns):
        _side_by_side(console, asked, said, console.width, colour=colour)
    console.print(_numbers(said))
    for line in said.remarks:
        console.print(Text(line, style="yellow"))
    console.print(Text(said.origin, style="dim"))
    return console.text


def _side_by_side(console: Console, asked: Asked, said: Sheet, columns: int, *, colour: bool) -> None:
    """As many methods beside each other as there is room for."""
    most = max(1, (columns + _SPACE) // (_NARROW + _SPACE))
    each = min(most, len(said.columns))
    room = (columns - _SPACE * (each - 1)) // each
    for start in range(0, len(said.columns), each):
        group = said.columns[start : start + each]
        table = Table(box=None, show_header=False, padding=(0, _SPACE, 0, 0), pad_edge=False)
        for _ in group:
            table.add_column(width=room, overflow="fold")
        table.add_row(*(Text(one.label, style=f"bold {method_colour(one.method)}") for one in group))
        table.add_row(*(_said(one, starred=not colour) for one in group))
        if any(one.compared for one in group):
            table.add_row(*(Text(one.compared, style="dim") for one in group))
        if asked.tiles is not None:
            table.add_row(*(Text("") for _ in group))
            table.add_row(*(_map(asked, one, room, colour=colour) for one in group))
            table.add_row(*(Text(f"keeps {one.kept}" if one.tokens is not None else "", style="dim") for one in group))
        console.print(table)
        console.print()
    if asked.tiles is not None:
        console.print(Text(key_text(asked) if colour else _key(asked, room), style="dim"))


def _key(asked: Asked, room: int) -> str:
    """How a map without colour is to be read."""
    assert asked.grid is not None
    pool = drawing.cells(asked.grid, np.zeros(asked.grid.tokens), min(room, _MAP))[1]
    squares = f"; shades are shares of {pool} × {pool} visual tokens" if pool > 1 else ""
    return f"maps: blocks were kept, dots dropped{squares}"


def _said(one: Column, *, starred: bool) -> Text:
    """What a method answered, its differences marked."""
    if one.error:
        return Text(one.error, style="red")
    return Text("") if one.answer is None else _marked(one.answer, starred=starred)


def _marked(answer: Marked, *, starred: bool) -> Text:
    if not answer.spans:
        return Text("(nothing)", style="dim italic")
    out = Text()
    for text, differs in answer.spans:
        out.append(f"*{text}*" if differs and starred else text, style=_MARK if differs else "")
    return out


def _numbers(said: Sheet) -> Table:
    table = Table(box=box.HORIZONTALS, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for name in HEAD:
        left = name in ("method", "status")
        title = Text(name.replace(" ", "\n"))
        table.add_column(title, justify="left" if left else "right", no_wrap=name != "method", vertical="bottom")
    for one, (name, *row) in zip(said.columns, said.rows, strict=True):
        table.add_row(Text(name, style=method_colour(one.method)), *map(Text, row))
    return table


# -- maps: two cells a character, one above the other ------------------------------------------------------------------


def _map(asked: Asked, one: Column, room: int, *, colour: bool) -> Text:
    """The picture's visual tokens, kept ones solid; in colour the picture itself, dropped ones veiled."""
    if one.tokens is None or asked.tiles is None or asked.grid is None:
        return Text("")
    grid, room = asked.grid, min(room, _MAP)
    stays = drawing.staying(grid, one.tokens).astype(np.float64)
    if colour:
        veil = np.array(drawing.veil_of(asked.tiles), dtype=np.float64)
        pale = 0.15 * drawing.colours(asked.tiles, grid) + 0.85 * veil
        shown = np.where(stays[:, None] > 0, drawing.colours(asked.tiles, grid), pale)
        return _lines(drawing.cells(grid, shown, room)[0], _in_colour)
    values, pool = drawing.cells(grid, stays, room)
    return _lines(values, _halves if pool == 1 else _shaded)


def _lines(cells: Pixel, character: Callable[[Pixel, Pixel], tuple[str, Style]]) -> Text:
    """``cells`` ``(rows, columns, values)``, each pair of rows as one line."""
    nothing = np.full(cells.shape[1:], np.nan)
    out = Text(no_wrap=True)
    for number, (above, below) in enumerate(zip_longest(cells[::2], cells[1::2], fillvalue=nothing)):
        if number:
            out.append("\n")
        for top, bottom in zip(above, below, strict=True):
            out.append(*character(top, bottom))
    return out


def _halves(top: Pixel, bottom: Pixel) -> tuple[str, Style]:
    """Each cell is one token: a solid half where it stayed."""
    solid = (top[0] == 1, bottom[0] == 1)
    blank = np.isnan(top[0]) and np.isnan(bottom[0])
    return {(True, True): "█", (True, False): "▀", (False, True): "▄"}.get(solid, " " if blank else "·"), Style()


def _shaded(top: Pixel, bottom: Pixel) -> tuple[str, Style]:
    """Each cell is several tokens: the darker, the more of them stayed."""
    shares = [cell[0] for cell in (top, bottom) if not np.isnan(cell[0])]
    if not shares:
        return " ", Style()
    share = sum(shares) / len(shares)
    step = 0 if share == 0 else min(len(_SHADES) - 2, int(share * (len(_SHADES) - 2)) + 1)
    return _SHADES[-1 if share == 1 else step], Style()


def _in_colour(top: Pixel, bottom: Pixel) -> tuple[str, Style]:
    """Each half in its cell's own colour; nothing between tiles."""
    above, below = (None if np.isnan(c[0]) else "#{:02x}{:02x}{:02x}".format(*c.astype(int)) for c in (top, bottom))
    if above is None:
        return (" ", Style()) if below is None else ("▄", Style(color=below))
    return "▀", Style(color=above, bgcolor=below)
