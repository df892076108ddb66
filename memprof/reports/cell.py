"""A run as a notebook's cell shows it: one line, a table, the curve as SVG. No script, and no request.

Text and lines are of the page's own colour, and areas wear colours that stand on white and on near-black, so that it
is read in a light notebook and in a dark one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

from memprof.records import PARTS, Run, SampleRecord
from memprof.reports.pages import escape
from memprof.reports.rows import sheets, unit_of
from memprof.telling import facts
from memprof.telling.palette import PART_COLOURS, PART_LABELS
from memprof.units import format_bytes, in_unit

#: Width and height of the drawing, and the room beside it: for its scale, its count of tokens, its unit; in pixels.
_WIDE, _HIGH, _LEFT, _FOOT, _TOP = 640, 180, 56, 22, 18
#: Tokens that are drawn one by one; of more, so many columns of neighbours.
_MOST = 320


def render(run: Run) -> str:
    """``run`` as a piece of HTML that stands by itself."""
    unit = unit_of([run])
    found = "".join(
        f"<p style='margin:.3em 0'><b>{escape(sheet.heading)}</b></p>{_table(sheet.head, sheet.rows)}"
        + "".join(f"<p style='margin:.3em 0'>{escape(line)}</p>" for line in sheet.remarks)
        for sheet in sheets([run], unit)
    )
    return f"<div style='overflow-x:auto'>{found}{_curve(run, unit)}</div>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"

    body = "".join(row(one, "td") for one in rows)
    return f"<table style='color:inherit'><thead>{row(head, 'th')}</thead><tbody>{body}</tbody></table>"


def _curve(run: Run, unit: str) -> str:
    """The parts of every token's highest instant above static, stacked; sample after sample."""
    tokens = [token for sample in run.samples for token in _stacks(sample)]
    step = max(1, -(-len(tokens) // _MOST))
    columns = [max(tokens[at : at + step], key=_total) for at in range(0, len(tokens), step)]
    high = max(map(_total, columns), default=0)
    if not high:
        return ""
    shown = [part for part in PARTS if any(held.get(part) for held in columns)]
    label = f"{escape(facts.where_text(run.record))}: bytes above static, token by token"
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' role='img' aria-label='{label}' viewBox='0 0 {_WIDE} {_HIGH}' "
        f"style='width:100%;max-width:{_WIDE}px;color:inherit;font:11px sans-serif'><title>{label}</title>"
        f"{_areas(columns, shown, high)}{_bounds(run, len(tokens))}{_axes(high, unit, len(tokens))}</svg>"
        f"<p style='margin:.3em 0'>{_key(columns, shown)} "
        "<span style='opacity:.7'>above static, at each token's highest instant</span></p>"
    )


def _total(held: Mapping[str, int]) -> int:
    return sum(held.values())


def _areas(columns: Sequence[Mapping[str, int]], shown: Sequence[str], high: int) -> str:
    """A polygon a part, each on those before it."""
    found, foot = [], [0] * len(columns)
    for part in shown:
        top = [below + held.get(part, 0) for below, held in zip(foot, columns, strict=True)]
        edge = [*_steps(top, high), *reversed(_steps(foot, high))]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in edge)
        fill = f"fill='{_colour(part)}'" + " stroke='currentColor' stroke-dasharray='2 2'" * (part == "unexplained")
        found.append(f"<polygon points='{points}' {fill}><title>{PART_LABELS[part]}</title></polygon>")
        foot = top
    return "".join(found)


def _colour(part: str) -> str:
    """A part's colour; what no part claims has none, and an outline."""
    return "none" if part == "unexplained" else PART_COLOURS[part]


def _bounds(run: Run, tokens: int) -> str:
    """A line where one sample ends and the next begins, unless there are too many."""
    starts = list(accumulate((len(sample.tokens) for sample in run.samples), initial=0))[1:-1]
    found = []
    for x in (_LEFT + (_WIDE - _LEFT) * start / tokens for start in (starts if len(starts) < _MOST // 4 else ())):
        line = f"x1='{x:.1f}' x2='{x:.1f}' y1='0' y2='{_HIGH - _FOOT}'"
        found.append(f"<line {line} stroke='currentColor' stroke-opacity='.35' stroke-dasharray='3 3'/>")
    return "".join(found)


def _key(columns: Sequence[Mapping[str, int]], shown: Sequence[str]) -> str:
    """What each colour is, the largest part first."""
    box = "display:inline-block;width:.8em;height:.8em;border:1px solid currentColor;background:"
    return " ".join(
        f"<span style='white-space:nowrap'><span style='{box}{_colour(part)}'></span> {PART_LABELS[part]}</span>"
        for part in sorted(shown, key=lambda part: -max(held.get(part, 0) for held in columns))
    )


def _stacks(sample: SampleRecord) -> list[dict[str, int]]:
    """What each part held at each token's highest instant; of a record without, all of it as ``unexplained``."""
    if sample.token_parts:
        return [row.parts for row in sample.rows()]
    static = sample.peak_allocated_bytes - sample.dynamic_peak_bytes
    return [{"unexplained": max(0, peak - static)} for peak in sample.tokens.peak_allocated_bytes]


def _height(n_bytes: int, high: int) -> float:
    """Where so many bytes lie above the foot, from the top of the drawing."""
    tall = _HIGH - _FOOT
    return tall - (tall - _TOP) * n_bytes / high


def _steps(edge: Sequence[int], high: int) -> list[tuple[float, float]]:
    """A line of stairs, a step a column."""
    each = (_WIDE - _LEFT) / len(edge)
    return [(_LEFT + each * at, _height(n, high)) for number, n in enumerate(edge) for at in (number, number + 1)]


def _axes(high: int, unit: str, tokens: int) -> str:
    """The scale: nothing, half and all of the highest, and how many tokens there are."""
    foot = _HIGH - _FOOT
    found = [
        f"<line x1='{_LEFT}' x2='{_LEFT}' y1='0' y2='{foot}' stroke='currentColor'/>"
        f"<line x1='{_LEFT}' x2='{_WIDE}' y1='{foot}' y2='{foot}' stroke='currentColor'/>"
    ]
    for n_bytes in (0, high // 2, high):
        at = f"x='{_LEFT - 6}' y='{_height(n_bytes, high) + 4:.1f}'"
        found.append(f"<text {at} text-anchor='end' fill='currentColor'>{in_unit(n_bytes, unit):.3g}</text>")
    found.append(f"<text x='{_LEFT - 6}' y='10' text-anchor='end' fill='currentColor'>{unit}</text>")
    count = f"{tokens} token{'s' * (tokens != 1)}; {format_bytes(high, unit)} above static at the peak"
    found.append(f"<text x='{_LEFT}' y='{_HIGH - 6}' fill='currentColor'>{count}</text>")
    return "".join(found)
