"""What makes up each method's dynamic peak: one stacked bar a method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from memprof.figures.kind import Kind
from memprof.figures.style import HATCH, KeyItem, Look, Sheet, text_width
from memprof.records import PARTS, Run
from memprof.telling import facts, palette
from memprof.units import in_unit


class Breakdown(Kind):
    """One figure a group of runs: the parts at the instant of the highest dynamic peak, which they sum to."""

    def plan(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """One figure for every group."""
        all_groups = facts.groups(runs)
        stems, _ = facts.file_stems(all_groups)
        return [self._data(group, f"{stem}_breakdown") for group, stem in zip(all_groups, stems, strict=True)]

    def _data(self, group: Sequence[Run], name: str) -> dict[str, Any]:
        bars = []
        for run, label in zip(group, facts.labels(group), strict=True):
            top = run.highest
            assert top is not None
            bars.append(
                {
                    "label": label,
                    "method": facts.method_of(run),
                    "dynamic_peak_bytes": top.dynamic_peak_bytes,
                    "saving": facts.saving(run, group),
                    "sample": top.id,
                    "token": top.peak_token,
                    "phase": top.peak_phase,
                    "parts": {part: top.peak_parts.get(part, 0) for part in PARTS},
                }
            )
        task = facts.data_title(group[0].record)
        return facts.header("breakdown", name, group, facts.comparisons(group)) | {
            "title": f"What holds the peak on {task}",
            "bars": bars,
        }

    def paint(self, data: dict[str, Any], look: Look) -> Figure:
        """Bars from the top in the group's order; a value stands in its segment where it fits."""
        pt, bars = look.pt, data["bars"]
        drawn = [part for part in PARTS if any(bar["parts"][part] for bar in bars)]
        key = [
            KeyItem(palette.PART_LABELS[part], palette.PART_COLOURS[part], "hatch" if part == "unexplained" else "area")
            for part in drawn
        ]
        phases = [f"in {bar['phase']}" if bar["phase"] else "" for bar in bars]
        totals = [facts.peak_text(look.labelled(bar["dynamic_peak_bytes"]), bar["saving"]) for bar in bars]
        left = max(
            [text_width(bar["label"], look.base, "bold") for bar in bars] + [text_width(p, look.small) for p in phases]
        )
        right = max(text_width(t, look.base) for t in totals)
        sheet = Sheet(
            look, data, data["title"], body=31 * len(bars) + 2, left=left / look.scale + 10,
            right=right / look.scale + 9, key=key,
        )  # fmt: skip
        axes = sheet.axes()
        most = max(bar["dynamic_peak_bytes"] for bar in bars) or 1
        for row, (bar, phase, total) in enumerate(zip(bars, phases, totals, strict=True)):
            self._bar(axes, row, bar, sheet, most)
            axes.annotate(
                total, (in_unit(bar["dynamic_peak_bytes"], look.unit), row - 0.1), xytext=(pt(4), 0),
                textcoords="offset points", va="center_baseline", fontsize=look.base, annotation_clip=False,
                parse_math=False,
            )  # fmt: skip
            self._name(axes, row - 0.1, bar, phase, look)
        axes.set_ylim(len(bars) - 0.44, -0.44)
        axes.set_xlim(0, in_unit(most, look.unit) * 1.02)
        axes.set_yticks([])
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.set_xlabel(f"dynamic {facts.memory_text(data)} at its highest instant ({look.unit})")
        return sheet.figure

    @staticmethod
    def _bar(axes: Any, row: int, bar: dict[str, Any], sheet: Sheet, most: int) -> None:
        """The segments, the values in those that hold them, and under the bar the values of those that do not."""
        look, at, thin = sheet.look, 0, []
        pt, per_point = look.pt, most * 1.02 / (sheet.x1 - sheet.x0)
        for part, size in bar["parts"].items():
            if not size:
                continue
            hatched = part == "unexplained"
            axes.barh(
                row - 0.1, in_unit(size, look.unit), left=in_unit(at, look.unit), height=0.56,
                facecolor=palette.PART_COLOURS[part], edgecolor=palette.MUTED if hatched else "white",
                hatch=HATCH if hatched else None, linewidth=pt(0.4),
            )  # fmt: skip
            text = look.value(size)
            if not hatched and text_width(text, look.small) + pt(2) < size / per_point:
                axes.text(
                    in_unit(at + size / 2, look.unit), row - 0.1, text, ha="center", va="center_baseline",
                    fontsize=look.small, parse_math=False,
                )  # fmt: skip
            else:
                thin.append((part, size))
            at += size
        note = _small_print(thin, look, look.width - sheet.x0 - sheet.pad - pt(2.5))
        axes.annotate(
            note, (0, row + 0.2), xytext=(pt(2.5), pt(-0.3)),
            textcoords="offset points", va="top", fontsize=look.small, color=palette.MUTED, annotation_clip=False,
            parse_math=False,
        )  # fmt: skip

    @staticmethod
    def _name(axes: Any, row: float, bar: dict[str, Any], phase: str, look: Look) -> None:
        frame, pt = axes.get_yaxis_transform(), look.pt
        colour = palette.method_colour(bar["method"])
        axes.annotate(
            bar["label"], (0, row), xycoords=frame, xytext=(pt(-5), pt(0.6)), textcoords="offset points", ha="right",
            va="bottom" if phase else "center", fontsize=look.base, fontweight="bold", color=colour,
            annotation_clip=False, parse_math=False,
        )  # fmt: skip
        axes.annotate(
            phase, (0, row), xycoords=frame, xytext=(pt(-5), pt(-0.6)), textcoords="offset points", ha="right",
            va="top", fontsize=look.small, color=palette.MUTED, annotation_clip=False, parse_math=False,
        )  # fmt: skip


def _small_print(thin: Sequence[tuple[str, int]], look: Look, room: float) -> str:
    """Parts too thin for a value inside, largest first, as many as fit; ``unexplained`` is always among them."""
    last = [(part, size) for part, size in thin if part == "unexplained"]
    rest = sorted((entry for entry in thin if entry not in last), key=lambda entry: -entry[1])

    def line(count: int) -> str:
        left_out = sum(size for _, size in rest[count:])
        named = [f"{palette.PART_LABELS[part]} {look.value(size)}" for part, size in rest[:count]]
        named += [f"{len(rest) - count} smaller {look.value(left_out)}"] if left_out else []
        named += [f"{palette.PART_LABELS[part]} {look.value(size, 3)}" for part, size in last]
        return "  ".join(named)

    return next((text for n in range(len(rest), -1, -1) if text_width(text := line(n), look.small) <= room), line(0))
