"""Each method's highest sample, token by token: what tensors hold, what the cache holds, and the peak between."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from memprof.figures.kind import Kind
from memprof.figures.style import KeyItem, Look, Sheet, text_width
from memprof.records import Run
from memprof.telling import facts, palette
from memprof.units import in_unit


class OverTokens(Kind):
    """One figure a group of runs, a panel a run, all on one scale; zero is static, token 0 is prefill."""

    def plan(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """One figure for every group."""
        all_groups = facts.groups(runs)
        stems, _ = facts.file_stems(all_groups)
        return [self._data(group, f"{stem}_tokens") for group, stem in zip(all_groups, stems, strict=True)]

    def _data(self, group: Sequence[Run], name: str) -> dict[str, Any]:
        panels = []
        for run, label in zip(group, facts.labels(group), strict=True):
            top, static = run.highest, run.record.static_bytes
            assert top is not None
            panels.append(
                {
                    "label": label,
                    "method": facts.method_of(run),
                    "sample": top.id,
                    "static_bytes": static,
                    "dynamic_peak_bytes": top.dynamic_peak_bytes,
                    "peak_bytes": [b - static for b in top.tokens.peak_allocated_bytes],
                    "held_bytes": [b - static for b in top.tokens.allocated_bytes],
                    "kv_bytes": top.tokens.kv_bytes,
                }
            )
        task = facts.data_title(group[0].record)
        return facts.header("over-tokens", name, group) | {"title": f"The highest sample on {task}", "panels": panels}

    def paint(self, data: dict[str, Any], look: Look) -> Figure:
        """Panels side by side; only the first carries the scale."""
        pt, panels = look.pt, data["panels"]
        kv_colour = palette.PART_COLOURS["kv_cache"]
        key = [
            KeyItem("peak of the token", palette.INK, "line"),
            KeyItem("allocated after it", palette.STATIC),
            KeyItem("of which KV cache", kv_colour),
        ]
        gap, widest = pt(8), max(text_width(p["label"], look.base, "bold") for p in panels)
        room = look.width - pt(46)
        columns = min(len(panels), max(1, int((room + gap) // (max(widest + pt(6), pt(52)) + gap))))
        rows = ceil(len(panels) / columns)
        columns = ceil(len(panels) / rows)  # four are two and two, not three and one
        sheet = Sheet(look, data, data["title"], body=96 * rows + 20 * (rows - 1), right=6, key=key)
        wide = (sheet.x1 - sheet.x0 - gap * (columns - 1)) / columns
        tall = (sheet.y1 - sheet.y0 - pt(20) * (rows - 1)) / rows
        high = in_unit(max(max(p["peak_bytes"]) for p in panels), look.unit) * 1.36
        for number, panel in enumerate(panels):
            row, column = divmod(number, columns)
            axes = sheet.axes((column * (wide + gap), (rows - 1 - row) * (tall + pt(20)), wide, tall))
            edges = [i - 0.5 for i in range(len(panel["peak_bytes"]) + 1)]
            held, kv, peak = (look.scaled(panel[k]) for k in ("held_bytes", "kv_bytes", "peak_bytes"))
            colour = palette.method_colour(panel["method"])
            axes.stairs(held, edges, fill=True, color=palette.STATIC, linewidth=0)
            axes.stairs(kv, edges, fill=True, color=kv_colour, linewidth=0)
            axes.stairs(peak, edges, baseline=None, color=colour, linewidth=pt(1.0))
            axes.set_xlim(-0.5, len(peak) - 0.5)
            axes.set_ylim(0, high)
            axes.xaxis.set_major_locator(MaxNLocator(max(1, min(8, int(wide / pt(20)))), integer=True, min_n_ticks=1))
            axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
            axes.text(
                1, 0.995, panel["label"], transform=axes.transAxes, ha="right", va="top", color=colour,
                fontweight="bold", fontsize=look.base, parse_math=False,
            )  # fmt: skip
            axes.annotate(
                look.labelled(panel["dynamic_peak_bytes"]), (1, 0.995), xycoords="axes fraction", xytext=(0, pt(-9.5)),
                textcoords="offset points", ha="right", va="top", fontsize=look.small, parse_math=False,
            )  # fmt: skip
            if column:
                axes.tick_params(labelleft=False)
            else:
                axes.set_ylabel(f"dynamic memory ({look.unit})")
            last = len(panels) - (rows - 1) * columns
            if row == rows - 1 and column == (last - 1) // 2:
                axes.set_xlabel("token (0 is prefill)", x=0.5 if last % 2 else 1 + gap / (2 * wide))
        return sheet.figure
