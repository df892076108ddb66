"""Markdown for a pull request: the table of each task, and what its peaks are made of."""

from __future__ import annotations

import re
from collections.abc import Sequence

from memprof.lines import visible
from memprof.records import Run
from memprof.reports.rows import CALLERS_HEAD, CALLERS_TITLE, PARTS_TITLE, sheets


def render(runs: Sequence[Run], unit: str = "GiB") -> str:
    """A heading, the tables and a line of origin for each group of ``runs``."""
    blocks = []
    for sheet in sheets(runs, unit):
        lines = [f"### {escape(sheet.heading)}", "", *table(sheet.head, sheet.rows), ""]
        lines += [f"{PARTS_TITLE}:", "", *table(sheet.parts_head, sheet.parts), ""]
        if sheet.callers:
            lines += [f"{escape(CALLERS_TITLE)}:", "", *table(CALLERS_HEAD, sheet.callers), ""]
        if sheet.quality:
            lines += ["What it costs, mean \\[95 % bootstrap interval over samples\\]:", ""]
            lines += [*table(sheet.quality_head, sheet.quality), ""]
        lines += [f"- {escape(line)}" for line in sheet.remarks] + [""] * bool(sheet.remarks)
        lines += [f"<sub>{escape(' · '.join([*sheet.legend, sheet.origin]))}</sub>"]
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table: words to the left, numbers to the right, one width a column so that it reads as plain text too."""
    cells = [[escape(cell) for cell in row] for row in (head, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    left = [name in ("method", "status", "what", "called from") for name in head]
    rule = ["-" * width if first else "-" * (width - 1) + ":" for width, first in zip(widths, left, strict=True)]

    def line(row: Sequence[str]) -> str:
        padded = (c.ljust(w) if first else c.rjust(w) for c, w, first in zip(row, widths, left, strict=True))
        return f"| {' | '.join(padded)} |"

    return [line(cells[0]), line(rule), *map(line, cells[1:])]


def escape(text: str) -> str:
    """Text that Markdown, the HTML in it and a terminal that shows it leave alone."""
    safe = visible(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#!~@])", r"\\\1", safe)
