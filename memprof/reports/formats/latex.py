"""LaTeX for a paper: a booktabs table of each task, its origin as a comment above it."""

from __future__ import annotations

from collections.abc import Sequence

from memprof.lines import visible
from memprof.records import Run
from memprof.reports.rows import Sheet, sheets

_SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}", "−": "$-$", "≥": r"$\geq$", "×": r"$\times$", "·": r"$\cdot$",
}  # fmt: skip


def render(runs: Sequence[Run], unit: str = "GiB") -> str:
    """A ``table`` for each group of ``runs``; it needs the package booktabs."""
    return "\n".join(_table(sheet) for sheet in sheets(runs, unit))


def _table(sheet: Sheet) -> str:
    blocks = [_tabular(sheet.head, sheet.rows)]
    if sheet.quality:
        blocks.append(_tabular(sheet.quality_head, sheet.quality))
    said = [sheet.origin, *sheet.legend, *sheet.remarks]
    return "\n".join(
        [
            *(f"% {visible(line)}" for line in said), r"\begin{table}", r"\centering", "\n\n".join(blocks),
            rf"\caption{{{escape(sheet.heading)}. {escape('; '.join(sheet.legend))}.}}", r"\end{table}", "",
        ]
    )  # fmt: skip


def _tabular(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" & ".join(map(escape, row)) + r" \\" for row in (head, *rows)]
    columns = "l" + "r" * (len(head) - 1)
    body = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    return "\n".join([*body, r"\end{tabular}"])


def escape(text: str) -> str:
    """Text that LaTeX prints as it stands."""
    return "".join(_SPECIAL.get(character, character) for character in visible(text))
