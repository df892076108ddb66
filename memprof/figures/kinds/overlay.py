"""The methods of a task in one drawing: what each holds above static, sample by sample."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from math import ceil
from typing import Any

from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from memprof.figures.bands import MANY, band, draw
from memprof.figures.kind import Kind
from memprof.figures.style import KeyItem, Look, Sheet, text_width
from memprof.records import Run
from memprof.telling import facts, palette
from memprof.units import in_unit

DASHES: tuple[Any, ...] = ("-", (0, (3.5, 1.2)), (0, (1.2, 1)), (0, (5, 1, 1, 1)))
MOST_POINTS = 6000


class Overlay(Kind):
    """One figure a group of runs: what each token took at its highest instant, zero is static.

    Many samples are a band, median, quartiles, extremes, in the order of their peaks. Methods that coincide share one
    line, which carries both names. Names stand at the right, each at its method's maximum, with the value and the
    change against Baseline.
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
        task = facts.data_title(group[0].record)
        return facts.header("overlay", name, group, facts.comparisons(group)) | {
            "title": f"Dynamic memory on {task}",
            "samples": samples,
            "series": series,
        }

    def paint(self, data: dict[str, Any], look: Look) -> Figure:
        """Highest first, so that the lower ones lie in front; of single lines, sample by sample."""
        many, count = len(data["samples"]) >= MANY, len(data["samples"])
        drawn = "sample_peak_bytes" if many else "token_peak_bytes"
        order = _merged(sorted(data["series"], key=lambda s: -s["dynamic_peak_bytes"]), drawn)
        ranks = _ranks(data["series"][0]["sample_peak_bytes"]) if many else list(range(count))
        notes = [facts.peak_text(look.labelled(s["dynamic_peak_bytes"]), s["saving"]) for s in order]
        names = [line for s in order for line in s["label"].split("\n")]
        widest = max([text_width(n, look.base, "bold") for n in names] + [text_width(n, look.small) for n in notes])
        key = [KeyItem("peak of each token", palette.INK, "line")]
        if many:
            key = [
                KeyItem("median of neighbouring samples", palette.INK, "line"),
                KeyItem("half of them", palette.tint(palette.INK, 0.6)),
                KeyItem("all", palette.tint(palette.INK, 0.82)),
            ]  # fmt: skip
        body = max(118, len(order) * _room(order))
        top = max(s["dynamic_peak_bytes"] for s in order)
        sheet = Sheet(
            look, data, data["title"], body=body, left=look.left(top), right=widest / look.scale + 18, key=key
        )
        axes = sheet.axes()
        total = count if many else sum(s["tokens"] for s in data["samples"])
        if many:
            for series in order:
                colour = palette.method_colour(series["method"])
                tints = palette.tint(colour, 0.82), palette.tint(colour, 0.6)
                draw(axes, band([series["sample_peak_bytes"][i] for i in ranks]), colour, tints, look)
        else:
            axes.add_collection(_lines(order, data["samples"], total, look), autolim=False)
        axes.set_xlim(0, total)
        axes.set_ylim(0, in_unit(top, look.unit) * 1.06)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_ylabel(f"dynamic {facts.memory_text(data)} ({look.unit})")
        first = data["series"][0]["label"]
        axes.set_xlabel(
            f"samples by rising peak under {first} ({count:,})" if many
            else f"generated token over the run ({count} sample{'s' * (count != 1)})"
        )  # fmt: skip
        starts = range(count) if many else [data["samples"][i]["start"] for i in ranks]
        middle = {data["samples"][i]["id"]: start + 0.5 for i, start in zip(ranks, starts, strict=True)}
        self._names(sheet, axes, order, notes, middle, total)
        return sheet.figure

    @staticmethod
    def _names(
        sheet: Sheet, axes: Any, order: list[dict[str, Any]], notes: list[str], middle: dict[str, float], total: int
    ) -> None:
        """A dot at each maximum, and level with it at the right the name, moved apart where names would touch."""
        look, pt = sheet.look, sheet.look.pt
        low, high = axes.get_ylim()
        per_point = (high - low) / (sheet.y1 - sheet.y0)
        wanted = [in_unit(s["dynamic_peak_bytes"], look.unit) for s in order]
        placed = _apart(wanted, pt(_room(order)) * per_point, low + pt(9) * per_point, high)
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


def _lines(
    order: Sequence[dict[str, Any]], samples: Sequence[dict[str, Any]], total: int, look: Look
) -> LineCollection:
    """A line a method and sample, steps from token to token; in each sample the lower ones lie in front."""
    step, worn = max(1, ceil(total / MOST_POINTS)), Counter[str]()
    eye = max(s["dynamic_peak_bytes"] for s in order) / 100  # closer than that, the order of methods decides
    pieces = []
    for series in order:
        colour, dash = palette.method_colour(series["method"]), DASHES[worn[series["method"]] % len(DASHES)]
        worn[series["method"]] += 1
        before: float | None = None
        for sample, peak in zip(samples, series["sample_peak_bytes"], strict=True):
            start, stop = sample["start"], sample["start"] + sample["tokens"]
            held = [b for b in series["token_peak_bytes"][start:stop] if b is not None]
            stop = start + len(held)
            heights = look.scaled([max(held[a : a + step]) for a in range(0, len(held), step)])
            if heights:
                edges = [*range(start, stop, step), stop]
                ends = [x for x in edges for _ in range(2)][1:-1]
                path = [*zip(ends, [y for y in heights for _ in range(2)], strict=True)]
                pieces.append((-round(peak / eye), colour, dash, path if before is None else [(start, before), *path]))
            before = heights[-1] if heights else None
    pieces.sort(key=lambda piece: piece[0])
    _, colours, dashes, paths = zip(*pieces, strict=True)
    return LineCollection(
        paths, colors=colours, linestyles=dashes, linewidths=look.pt(0.8), zorder=3, capstyle="butt", joinstyle="miter"
    )


def _ranks(peaks: Sequence[int | None]) -> list[int]:
    """Indices of samples by rising peak; those without one come last."""
    known = [(math.inf if peak is None else peak, i) for i, peak in enumerate(peaks)]
    return [i for _, i in sorted(known)]


def _room(order: Sequence[dict[str, Any]]) -> float:
    """Points that the names of a line and its value need, one below the other."""
    return 9.5 + 9.0 * max(1 + int(s["label"].count("\n")) for s in order)


def _merged(series: list[dict[str, Any]], drawn: str) -> list[dict[str, Any]]:
    """``series`` with those whose points, ``drawn``, coincide as one, under all their names."""
    kept: list[dict[str, Any]] = []
    for one in series:
        twin = next((other for other in kept if _coincide(other, one, drawn)), None)
        if twin is None:
            kept.append(dict(one))
        else:
            twin["label"] = f"{twin['label']},\n{one['label']}"
    return kept


def _coincide(one: dict[str, Any], other: dict[str, Any], drawn: str) -> bool:
    """Whether two methods' lines lie on each other, to the eye: every point of ``drawn``, and their highest too."""
    pairs = [
        *zip(one[drawn], other[drawn], strict=True), (one["dynamic_peak_bytes"], other["dynamic_peak_bytes"]),
    ]  # fmt: skip
    eye = 0.01 * max(b for pair in pairs for b in pair if b is not None)
    return all(a == b if a is None or b is None else abs(a - b) <= eye for a, b in pairs)


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
