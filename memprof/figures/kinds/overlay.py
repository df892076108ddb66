"""The methods of a task in one drawing: what each holds above static, sample by sample."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from memprof.figures import facts, palette
from memprof.figures.kind import Kind
from memprof.figures.style import KeyItem, Look, Sheet, text_width
from memprof.records import Run
from memprof.units import in_unit

DASHES: tuple[Any, ...] = ("-", (0, (3.5, 1.2)), (0, (1.2, 1)), (0, (5, 1, 1, 1)))
MOST_POINTS = 6000


class Overlay(Kind):
    """One figure a group of runs: each sample's peak as a firm line, each token's as a pale one, zero is static.

    A line that another covers is drawn wider, so that both are seen.
    Names stand at the right, each at its method's maximum, with the value and the change against Baseline.
    """

    def plan(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """One figure for every group of at least two runs."""
        all_groups = facts.groups(runs)
        stems, _ = facts.file_stems(all_groups)
        return [
            self._data(group, f"{stem}_overlay")
            for group, stem in zip(all_groups, stems, strict=True)
            if len(group) > 1
        ]

    def _data(self, group: Sequence[Run], name: str) -> dict[str, Any]:
        by_id = [{sample.id: sample for sample in run.finished} for run in group]
        order = list(dict.fromkeys(sample.id for run in group for sample in run.finished))
        samples: list[dict[str, Any]] = []
        at = 0
        for sample_id in order:
            count = max(len(there[sample_id].tokens) for there in by_id if sample_id in there)
            samples.append({"id": sample_id, "start": at, "tokens": count})
            at += count
        series = []
        for run, there, label in zip(group, by_id, facts.labels(group), strict=True):
            static = run.record.static_bytes
            tokens: list[int | None] = []
            for entry in samples:
                sample = there.get(entry["id"])
                row = [b - static for b in sample.tokens.peak_allocated_bytes] if sample else []
                tokens += row + [None] * (entry["tokens"] - len(row))
            top = run.highest
            assert top is not None
            series.append(
                {
                    "label": label,
                    "method": facts.method_of(run),
                    "static_bytes": static,
                    "dynamic_peak_bytes": top.dynamic_peak_bytes,
                    "saving": facts.saving(run, group),
                    "maximum_sample": top.id,
                    "sample_peak_bytes": [s.dynamic_peak_bytes if (s := there.get(i)) else None for i in order],
                    "token_peak_bytes": tokens,
                }
            )
        task = palette.task_label(group[0].record.spec.task)
        return facts.header("overlay", name, group, facts.comparisons(group)) | {
            "title": f"Dynamic memory on {task}",
            "samples": samples,
            "series": series,
        }

    def paint(self, data: dict[str, Any], look: Look) -> Figure:
        """Highest first, so that the lower ones lie in front."""
        pt = look.pt
        order = sorted(data["series"], key=lambda s: -s["dynamic_peak_bytes"])
        notes = [facts.peak_text(look.labelled(s["dynamic_peak_bytes"]), s["saving"]) for s in order]
        widest = max(
            [text_width(s["label"], look.base, "bold") for s in order] + [text_width(n, look.small) for n in notes]
        )
        key = [KeyItem("peak of each sample", palette.INK, "line"), KeyItem("of each token", palette.RULE, "line")]
        body = max(118, 20 * len(order))
        sheet = Sheet(look, data, data["title"], body=body, right=widest / look.scale + 18, key=key)
        axes = sheet.axes()
        total = sum(s["tokens"] for s in data["samples"])
        top = max(s["dynamic_peak_bytes"] for s in order)
        edges = [s["start"] for s in data["samples"]] + [total]
        step = max(1, ceil(total / MOST_POINTS))
        token_edges = [*range(0, total, step), total]
        worn: dict[str, int] = {}
        for number, series in enumerate(order):
            under = sum(_coincide(series, later) for later in order[number + 1 :])
            colour = palette.method_colour(series["method"])
            dash = DASHES[worn.setdefault(series["method"], 0) % len(DASHES)]
            worn[series["method"]] += 1
            tokens = [
                max((v for v in series["token_peak_bytes"][a : a + step] if v is not None), default=None)
                for a in range(0, total, step)
            ]
            pale = palette.tint(colour, 0.62)
            axes.stairs(look.scaled(tokens), token_edges, baseline=None, color=pale, linewidth=pt(0.5))
            axes.stairs(
                look.scaled(series["sample_peak_bytes"]), edges, baseline=None, color=colour, linestyle=dash, zorder=3,
                linewidth=pt(1.1 + 1.5 * min(under, 3)),
            )  # fmt: skip
        axes.set_xlim(0, total)
        axes.set_ylim(0, in_unit(top, look.unit) * 1.06)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_ylabel(f"dynamic GPU memory ({look.unit})")
        count = len(data["samples"])
        axes.set_xlabel(f"generated token over the run ({count} sample{'s' * (count != 1)})")
        self._names(sheet, axes, order, notes, data["samples"], total)
        return sheet.figure

    @staticmethod
    def _names(
        sheet: Sheet, axes: Any, order: list[dict[str, Any]], notes: list[str], samples: list[dict[str, Any]],
        total: int,
    ) -> None:  # fmt: skip
        """A dot at each maximum, and level with it at the right the name, moved apart where names would touch."""
        look, pt = sheet.look, sheet.look.pt
        low, high = axes.get_ylim()
        per_point = (high - low) / (sheet.y1 - sheet.y0)
        wanted = [in_unit(s["dynamic_peak_bytes"], look.unit) for s in order]
        placed = _apart(wanted, pt(18.5) * per_point, low + pt(9) * per_point, high)
        middle = {s["id"]: s["start"] + 0.5 for s in samples}
        frame = axes.get_yaxis_transform()
        wide = axes.get_position().width * look.width
        for series, note, value, y in zip(order, notes, wanted, placed, strict=True):
            colour, x = palette.method_colour(series["method"]), middle[series["maximum_sample"]]
            axes.plot([x], [value], marker="o", markersize=pt(3), color=colour, clip_on=False, zorder=4)
            axes.plot([x, total], [value, value], color=colour, linewidth=pt(0.4), linestyle=(0, (4, 3)), clip_on=False)
            axes.plot(
                [1, 1 + pt(8) / wide], [value, y], color=colour, linewidth=pt(0.4), transform=frame, clip_on=False,
            )  # fmt: skip
            at = 1 + pt(10) / wide
            axes.annotate(
                series["label"], (at, y), xycoords=frame, xytext=(0, pt(0.8)), textcoords="offset points", color=colour,
                fontsize=look.base, fontweight="bold", va="bottom", annotation_clip=False, parse_math=False,
            )  # fmt: skip
            axes.annotate(
                note, (at, y), xycoords=frame, xytext=(0, pt(-0.8)), textcoords="offset points", fontsize=look.small,
                va="top", annotation_clip=False, parse_math=False,
            )  # fmt: skip


def _coincide(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two methods' peaks are the same, to the eye, on most samples."""
    pairs = zip(one["sample_peak_bytes"], other["sample_peak_bytes"], strict=True)
    close: list[bool] = [abs(a - b) <= 0.01 * max(a, b) for a, b in pairs if a is not None and b is not None]
    return 2 * sum(close) > len(close)


def _apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Heights (falling) as near to ``wanted`` (falling) as leaves ``gap`` between neighbours and none below ``low``."""
    placed: list[float] = []
    for value in wanted:
        placed.append(min(value, placed[-1] - gap) if placed else min(value, high))
    floor = low
    for i in range(len(placed) - 1, -1, -1):
        placed[i] = max(placed[i], floor)
        floor = placed[i] + gap
    return placed
