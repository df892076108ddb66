"""Comparison: a row a method, a panel a measure, a mark a budget: memory, the cache, time, what is lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from memprof.figures.kind import Kind
from memprof.figures.style import KeyItem, Look, Sheet, text_width
from memprof.records import Run
from memprof.telling import palette
from memprof.units import in_unit

#: Marks by budget, the largest first.
_MARKS = "osD^vP"


class Comparison(Kind):
    """Rows of methods, Baseline as a rule through each panel. Drawn from a study (``memprof compare``) alone.

    A hollow mark is the same budget's KV cache as most published tables have it.
    """

    def plan(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """None: what is compared, and with which methods left out, a study knows, and plain runs do not."""
        del runs
        return []

    def paint(self, data: dict[str, Any], look: Look) -> Figure:
        """The panels side by side; in a row the largest budget stands highest."""
        pt, names, panels = look.pt, data["methods"], data["panels"]
        shares = sorted(data["shares"], reverse=True)
        marks = {share: _MARKS[i % len(_MARKS)] for i, share in enumerate(shares)}
        key = [KeyItem(f"{share:g} of the visual tokens kept", palette.INK, mark) for share, mark in marks.items()]
        if any("published" in p for panel in panels for points in panel["series"].values() for p in points):
            key.append(KeyItem("hollow: KV as published, a budget times all layers", palette.MUTED, "hollow"))
        key.append(KeyItem(palette.method_label("baseline"), palette.method_colour("baseline"), "line"))
        label = max(text_width(palette.method_label(name), look.base) for name in names) / look.scale
        body = max(9.0, 4.0 * len(shares) + 2) * len(names) + 12
        sheet = Sheet(look, data, data["title"], body=body, left=label + 8, below=16, key=key)
        gap = pt(12)
        wide = (sheet.x1 - sheet.x0 - gap * (len(panels) - 1)) / len(panels)
        for number, panel in enumerate(panels):
            axes = sheet.axes((number * (wide + gap), 0, wide, sheet.y1 - sheet.y0 - pt(12)))
            self._panel(axes, panel, names, marks, look)
            axes.set_yticks(range(len(names)), [palette.method_label(n) for n in names] if number == 0 else [])
            axes.set_ylim(len(names) - 0.5, -0.5)
        return sheet.figure

    @staticmethod
    def _panel(axes: Axes, panel: dict[str, Any], names: list[str], marks: Mapping[float, str], look: Look) -> None:
        pt, unit = look.pt, _UNITS.get(panel["unit"], look.unit)
        shares = list(marks)
        for row, name in enumerate(names):
            if row % 2:
                axes.axhspan(row - 0.5, row + 0.5, color="#F4F4F4", linewidth=0, zorder=-1)
            colour = palette.method_colour(name)
            for point in panel["series"].get(name, []):
                place = shares.index(point["keep"])
                at = row + 0.62 * ((place + 0.5) / len(shares) - 0.5)
                value, low, high = (_shown(point[end], panel, look) for end in ("value", "low", "high"))
                if panel["spread"]:
                    axes.plot([low, high], [at, at], color=colour, linewidth=pt(0.6), zorder=2)
                mark: dict[str, Any] = {"marker": marks[point["keep"]], "markersize": pt(2.8), "color": colour}
                if "published" in point:
                    there = _shown(point["published"], panel, look)
                    axes.plot([there], [at], markerfacecolor="white", markeredgewidth=pt(0.5), zorder=2, **mark)
                axes.plot([value], [at], markeredgewidth=pt(0.5), zorder=3, **mark)
        if panel["baseline"] is not None:
            level = _shown(panel["baseline"], panel, look)
            axes.axvline(level, color=palette.method_colour("baseline"), linewidth=pt(1.0), zorder=1)
        axes.set_xlim(0, 1.06 * axes.dataLim.x1 if axes.dataLim.x1 > 0 else 1)
        axes.xaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 2.5, 5, 10]))
        axes.tick_params(axis="y", length=0)
        axes.set_title(f"{panel['title']} ({unit})", fontsize=look.base, loc="left", pad=pt(4))


#: What a panel's own unit is called; bytes are shown in the unit of the look.
_UNITS = {"%": "%", "s": "ms"}


def _shown(value: float, panel: dict[str, Any], look: Look) -> float:
    return value * {"%": 100.0, "s": 1000.0}[panel["unit"]] if panel["unit"] in _UNITS else in_unit(value, look.unit)
