"""Memory after each generated token over a whole run, in the manner of the TopV supplement's Fig. 6 to 11."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from memprof.figures.bands import MANY, band, draw
from memprof.figures.kind import Kind
from memprof.figures.style import KeyItem, Look, Sheet
from memprof.records import Run
from memprof.telling import facts, palette
from memprof.units import in_unit

MOST_POINTS = 6000


class MemoryCurve(Kind):
    """One figure a run: the static band, the KV cache on it, the peak of each token, and the data set's maximum.

    Runs that are compared share one scale. Where static would leave no room for the rest, its band is cut, and torn at
    the foot to show it.
    """

    def plan(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """One figure a run."""
        all_groups = facts.groups(runs)
        _, stems = facts.file_stems(all_groups)
        return [
            self._data(run, f"{stem}_curve", label, *_limits(group))
            for group, names in zip(all_groups, stems, strict=True)
            for run, stem, label in zip(group, names, facts.labels(group), strict=True)
        ]

    def _data(self, run: Run, name: str, label: str, low: int, high: int) -> dict[str, Any]:
        top = run.highest
        assert top is not None
        most = {"sample": top.id, "token": top.peak_token, "phase": top.peak_phase}
        samples, peak, allocated, kv = [], list[int](), list[int](), list[int]()
        at = 0
        for sample in run.samples:
            count = len(sample.tokens) if sample.ok else 0
            samples.append({"id": sample.id, "status": sample.status, "start": len(peak), "tokens": count})
            if sample is top:
                at = len(peak) + sample.tokens.peak_allocated_bytes.index(sample.peak_allocated_bytes)
            if sample.ok:
                peak += sample.tokens.peak_allocated_bytes
                allocated += sample.tokens.allocated_bytes
                kv += sample.tokens.kv_bytes
        return facts.header("memory-curve", name, [run]) | {
            "method": facts.method_of(run),
            "title": f"{label} on {facts.data_title(run.record)}",
            "static_bytes": run.record.static_bytes,
            "dynamic_peak_bytes": top.dynamic_peak_bytes,
            "kv_cache_bytes": max(kv),
            "maximum": {"bytes": peak[at], "index": at, **most},
            "axis_bytes": [low, high],
            "samples": samples,
            "peak_allocated_bytes": peak,
            "allocated_bytes": allocated,
            "kv_bytes": kv,
        }

    def paint(self, data: dict[str, Any], look: Look) -> Figure:
        """Bands from the foot up, the peak line over them, values where they can be read off."""
        colour, failed = palette.method_colour(data["method"]), [s for s in data["samples"] if s["status"] != "ok"]
        kv_colour = palette.PART_COLOURS["kv_cache"]
        fill = palette.tint(colour, 0.78)
        many = len(data["samples"]) >= MANY
        every, half = palette.tint(colour, 0.6), palette.tint(colour, 0.35)
        key = [
            KeyItem("median peak of neighbouring samples" if many else "peak of each token", colour, "line"),
            *([KeyItem("half of them", half), KeyItem("all", every)] if many else []),
            KeyItem("activations and the rest", fill),
            KeyItem(f"KV cache ≤ {look.labelled(data['kv_cache_bytes'])}", kv_colour),
            *([KeyItem("failed", palette.ALARM, "x")] if failed else []),
        ]
        sheet = Sheet(look, data, data["title"], body=112, left=look.left(data["axis_bytes"][1]), right=26, key=key)
        axes, pt = sheet.axes(), look.pt
        step, peak, kv = _thinned(data["peak_allocated_bytes"], data["kv_bytes"])
        total = len(data["peak_allocated_bytes"])
        edges = [min(i * step, total) for i in range(len(peak) + 1)]
        static, low, high = (in_unit(b, look.unit) for b in (data["static_bytes"], *data["axis_bytes"]))
        peaks, cache = look.scaled(peak), [static + v for v in look.scaled(kv)]

        axes.fill_between([0, total], [low, low], [static, static], color=palette.STATIC, linewidth=0)
        if many:
            self._band(axes, data, look, colour, (fill, every, half))
        else:
            axes.stairs(peaks, edges, baseline=static, fill=True, color=fill, linewidth=0)
            held = [min(c, p) for c, p in zip(cache, peaks, strict=True)]
            axes.stairs(held, edges, baseline=static, fill=True, color=kv_colour, linewidth=0)
            axes.stairs(peaks, edges, baseline=None, color=colour, linewidth=pt(0.6))
        axes.axhline(static, color=palette.MUTED, linewidth=pt(0.5))
        self._failures(axes, data, sheet, low, static)

        axes.set_xlim(0, total)
        axes.set_ylim(low, high)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_ylabel(f"{facts.memory_text(data)} ({look.unit})")
        done = len(data["samples"]) - len(failed)
        axes.set_xlabel(f"generated token over the run ({done} sample{'s' * (done != 1)})")
        if low > 0:
            self._torn_foot(axes, total, low, high, sheet)
        axes.text(
            pt(4) / (sheet.x1 - sheet.x0), (low + static) / 2, f"static {look.labelled(data['static_bytes'])}",
            transform=axes.get_yaxis_transform(), va="center", fontsize=look.base, parse_math=False,
            bbox={"facecolor": palette.STATIC, "edgecolor": "none", "pad": pt(1.2)},
        )  # fmt: skip
        self._maximum(axes, data, look, static, total)
        return sheet.figure

    @staticmethod
    def _band(axes: Any, data: dict[str, Any], look: Look, colour: str, tints: tuple[str, str, str]) -> None:
        """Each sample's peak as a spread over its neighbours, and the median of what their caches held."""
        total, static = len(data["peak_allocated_bytes"]), data["static_bytes"]
        first = [s["start"] for s in data["samples"] if s["status"] == "ok"]
        spans = [*zip(first, [*first[1:], total], strict=True)]
        tops = band([max(data["peak_allocated_bytes"][a:b]) for a, b in spans])
        cache = band([static + max(data["kv_bytes"][a:b]) for a, b in spans])
        edges = [x * total / len(spans) for x in tops.edges]
        foot = in_unit(static, look.unit)
        axes.stairs(look.scaled(tops.low), edges, baseline=foot, fill=True, color=tints[0], linewidth=0)
        held = look.scaled([min(pair) for pair in zip(cache.median, tops.low, strict=True)])
        axes.stairs(held, edges, baseline=foot, fill=True, color=palette.PART_COLOURS["kv_cache"], linewidth=0)
        draw(axes, tops, colour, tints[1:], look, scale=total / len(spans))

    @staticmethod
    def _failures(axes: Any, data: dict[str, Any], sheet: Sheet, low: float, static: float) -> None:
        """A cross in the static band where a sample failed."""
        failed = [s["start"] for s in data["samples"] if s["status"] != "ok"]
        if failed:
            height = [static - 0.16 * (static - low)] * len(failed)
            axes.plot(
                failed, height, linestyle="none", marker="x", color=palette.ALARM, markersize=sheet.look.pt(4),
                markeredgewidth=sheet.look.pt(0.9), clip_on=False,
            )  # fmt: skip

    @staticmethod
    def _torn_foot(axes: Any, total: int, low: float, high: float, sheet: Sheet) -> None:
        """A white saw edge along the foot of the band, and a gap in the axis: the scale does not start at zero.

        No value is written below the gap, where there is no scale.
        """
        tooth, tall = sheet.look.pt(4), sheet.look.pt(3)
        width, height = sheet.x1 - sheet.x0, sheet.y1 - sheet.y0
        count = max(2, round(width / tooth / 2) * 2)
        xs = [total * i / count for i in range(count + 1)]
        ys = [low + (high - low) * tall / height * (i % 2) for i in range(count + 1)]
        axes.fill_between(xs, [low] * len(xs), ys, color="white", linewidth=0, zorder=2.2)
        foot = low + (high - low) * tall * 1.6 / height
        axes.spines["left"].set_bounds(foot, high)
        label = (high - low) * sheet.look.pt(6) / height
        axes.set_yticks([at for at in axes.get_yticks() if foot + label <= at <= high])
        slant, frame = sheet.look.pt(2.5), axes.get_yaxis_transform()
        for lift in (0.0, sheet.look.pt(2.2)):  # the two strokes of a broken axis
            at = foot + (high - low) * (lift - slant / 2) / height
            axes.plot(
                [-slant / width, slant / width], [at, at + (high - low) * slant / height], transform=frame,
                color=palette.INK, linewidth=sheet.look.pt(0.6), clip_on=False,
            )  # fmt: skip

    @staticmethod
    def _maximum(axes: Any, data: dict[str, Any], look: Look, static: float, total: int) -> None:
        """The data set's maximum: a dot, its value above, and the dynamic peak measured at the right."""
        pt, most = look.pt, data["maximum"]
        top, x = in_unit(most["bytes"], look.unit), most["index"] + 0.5
        axes.plot([x, total], [top, top], color=palette.INK, linewidth=pt(0.4), linestyle=(0, (4, 3)), clip_on=False)
        axes.plot([x], [top], marker="o", markersize=pt(3), color=palette.INK, clip_on=False)
        share = x / total
        align = "left" if share < 0.35 else "right" if share > 0.65 else "center"
        axes.annotate(
            f"maximum {look.labelled(most['bytes'])}", (x, top), xytext=(0, pt(4)), textcoords="offset points",
            ha=align, va="bottom", fontsize=look.base, parse_math=False, annotation_clip=False,
        )  # fmt: skip
        frame = axes.get_yaxis_transform()
        gap = 1 + pt(6) / (axes.get_position().width * look.width)
        arrow = {
            "arrowstyle": "<|-|>,head_width=0.14,head_length=0.3", "color": palette.INK, "linewidth": pt(0.5),
            "shrinkA": 0, "shrinkB": 0, "mutation_scale": pt(9),
        }  # fmt: skip
        axes.annotate(
            "", (gap, top), (gap, static), xycoords=frame, textcoords=frame, annotation_clip=False, arrowprops=arrow
        )
        axes.annotate(
            f"dynamic peak\n{look.labelled(data['dynamic_peak_bytes'])}", (gap, (static + top) / 2), xycoords=frame,
            xytext=(pt(3), 0), textcoords="offset points", rotation=90, ha="left", va="center", fontsize=look.small,
            linespacing=1.15, annotation_clip=False, multialignment="center", parse_math=False,
        )  # fmt: skip


def _limits(group: Sequence[Run]) -> tuple[int, int]:
    """One scale for runs that are compared: room above the highest maximum, and static cut if it dwarfs the rest."""
    static = min(run.record.static_bytes for run in group)
    top = max(sample.peak_allocated_bytes for run in group for sample in run.finished)
    rest = max(top - static, 1)
    low = max(0, static - rest * 2 // 5) if static > rest else 0
    return low, top + (top - low) * 3 // 20


def _thinned(peak: list[int], kv: list[int]) -> tuple[int, list[int], list[int]]:
    """At most :data:`MOST_POINTS` points: of ``step`` neighbours the highest is drawn, so that no peak is lost."""
    step = max(1, ceil(len(peak) / MOST_POINTS))
    pick = [slice(i, i + step) for i in range(0, len(peak), step)]
    return step, [max(peak[s]) for s in pick], [max(kv[s]) for s in pick]
