"""Agreement: what a card measured, and what is predicted for it, point by point; and below it the difference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from memprof.figures.kind import Kind
from memprof.figures.style import KeyItem, Look, Sheet
from memprof.records import Run
from memprof.telling import palette
from memprof.units import in_unit

#: Colour and mark of each reference, in their order; marks of later ones leave those under them to be seen.
_WEARS = tuple(
    (palette.method_colour(method), mark)
    for method, mark in (("topv", "o"), ("fastv", "+"), ("uniform", "x"), ("random", "1"))
)
#: From this width on, in points of the print style, measures stand side by side.
_WIDE = 400
#: Heights of a measure's name and of its two drawings, and of what lies below each, in points of the print style.
_NAME, _TALL, _BETWEEN, _LOW, _BELOW = 11, 104, 8, 52, 30


class Agreement(Kind):
    """A column a measure; a colour a reference. Drawn from what ``memprof validate`` compared, and from no runs.

    Every distinct pair is a mark; how many points are equal to the byte is said beside them.
    """

    def plan(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """None: a run folder holds one side only."""
        del runs
        return []

    def paint(self, data: dict[str, Any], look: Look) -> Figure:
        """Predicted over measured with the line of equality, and predicted minus measured on the same scale."""
        pt, references = look.pt, data["references"]
        measures = list(dict.fromkeys(name for one in references for name in one["measures"]))
        columns = len(measures) if look.width >= pt(_WIDE) else 1
        rows = len(measures) // columns
        key = [KeyItem(one["label"], *_wears(number)) for number, one in enumerate(references)]
        block = _NAME + _TALL + _BETWEEN + _LOW + _BELOW
        sheet = Sheet(look, data, data["title"], body=block * rows - _BELOW, left=35, right=6, key=key)
        gap = pt(36)
        wide = (sheet.x1 - sheet.x0 - gap * (columns - 1)) / columns
        room = (sheet.y1 - sheet.y0 + pt(_BELOW)) / rows - pt(block - _TALL - _LOW)  # a slide has more
        tall, low = (room * share / (_TALL + _LOW) for share in (_TALL, _LOW))
        for number, measure in enumerate(measures):
            row, column = divmod(number, columns)
            x, foot = column * (wide + gap), (rows - 1 - row) * (room + pt(block - _TALL - _LOW))
            upper = sheet.axes((x, foot + low + pt(_BETWEEN), wide, tall))
            lower = sheet.axes((x, foot, wide, low))
            self._pairs(upper, references, measure, look)
            self._differences(lower, references, measure, look)
            lower.set_xlim(upper.get_xlim())
            upper.tick_params(labelbottom=False)
            upper.set_title(measure, fontsize=look.base, loc="left", pad=pt(3))
            lower.set_xlabel(f"measured ({look.unit})")
            if not column:
                upper.set_ylabel(f"predicted ({look.unit})")
                lower.set_ylabel(f"off by ({_small(look)})")
                for axes in (upper, lower):
                    axes.yaxis.set_label_coords(-pt(23) / wide, 0.5)
        return sheet.figure

    @staticmethod
    def _pairs(axes: Any, references: list[dict[str, Any]], measure: str, look: Look) -> None:
        """Marks, the line of equality, and the share of each reference's points on it."""
        pairs = [pair for one in references for pair in one["measures"].get(measure, {}).get("pairs", [])]
        ends = [end for measured, predicted, _ in pairs for end in (measured, predicted)]
        low, high = (in_unit(end, look.unit) for end in (min(ends, default=0), max(ends, default=1)))
        margin = 0.05 * (high - low or high)
        low, high = max(0.0, low - margin), high + margin
        axes.plot([low, high], [low, high], color=palette.RULE, linewidth=look.pt(0.6), zorder=1)
        for number, one in enumerate(references):
            found = one["measures"].get(measure)
            if found is None:
                continue
            colour, mark = _wears(number)
            axes.plot(
                look.scaled([a for a, _, _ in found["pairs"]]), look.scaled([p for _, p, _ in found["pairs"]]),
                mark, color=colour, **_size(mark, look),
            )  # fmt: skip
            points = sum(count for _, _, count in found["pairs"])
            equal = sum(count for a, p, count in found["pairs"] if a == p)
            axes.annotate(
                f"{100 * equal / points:.0f} % of {points:,} equal", (0, 1), xycoords="axes fraction",
                xytext=(look.pt(4), -look.pt(9 + 8.5 * number)), textcoords="offset points", color=colour,
                fontsize=look.small, parse_math=False,
            )  # fmt: skip
        axes.set_xlim(low, high)
        axes.set_ylim(low, high)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))

    @staticmethod
    def _differences(axes: Any, references: list[dict[str, Any]], measure: str, look: Look) -> None:
        """Predicted minus measured, zero in the middle."""
        unit, furthest = _small(look), 0.0
        axes.axhline(0, color=palette.RULE, linewidth=look.pt(0.6), zorder=1)
        for number, one in enumerate(references):
            pairs = one["measures"].get(measure, {}).get("pairs", [])
            colour, mark = _wears(number)
            off = [in_unit(p - a, unit) for a, p, _ in pairs]
            axes.plot(look.scaled([a for a, _, _ in pairs]), off, mark, color=colour, **_size(mark, look))
            furthest = max([furthest, *map(abs, off)])
        axes.set_ylim(-1.15 * furthest or -1, 1.15 * furthest or 1)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))


def _wears(number: int) -> tuple[str, str]:
    return _WEARS[number % len(_WEARS)]


def _size(mark: str, look: Look) -> dict[str, float]:
    return {"markersize": look.pt(2.4 if mark == "o" else 3.4), "markeredgewidth": look.pt(0.5), "zorder": 2}


def _small(look: Look) -> str:
    """The unit of differences: the small one of the display unit's kind."""
    return {"GB": "MB", "MB": "MB", "KiB": "KiB"}.get(look.unit, "MiB")
