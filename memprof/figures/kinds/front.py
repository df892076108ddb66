"""Fronts: memory against what it costs, a line a method, controls among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from memprof.figures.kind import Kind
from memprof.figures.style import KeyItem, Look, Sheet
from memprof.plugins import split_spec
from memprof.records import Run, mean_fidelity, summarize
from memprof.telling import facts, palette
from memprof.units import in_unit

#: Names of the measures that a front may be drawn against.
LOSS, LOST_ACCURACY, PRUNED = "1 − agreement with the unpruned model", "accuracy lost", "share of visual tokens pruned"


class Front(Kind):
    """One figure a group of runs in which a method stands with several shares kept.

    A dot is a setting. A method's line joins those that no other of its settings is better than in both.
    """

    def plan(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """One figure for every group with a method at two shares or more."""
        all_groups = facts.groups(runs)
        stems, _ = facts.file_stems(all_groups)
        return [
            data
            for group, stem in zip(all_groups, stems, strict=True)
            if (data := self._data(group, f"{stem}_front")) is not None
        ]

    def _data(self, group: Sequence[Run], name: str) -> dict[str, Any] | None:
        kept = [(facts.method_of(run), facts.keep_of(run)) for run in group]
        known = {method: {keep for other, keep in kept if other == method and keep is not None} for method, _ in kept}
        if all(len(keeps) < 2 for keeps in known.values()):
            return None
        label, losses = _losses(group)
        points = [
            {
                "method": run.record.spec.method, "peak_bytes": summarize(run)["peak_allocated_bytes"], "x": loss,
                "fits": None, "params": {"keep": facts.keep_of(run)},
            }
            for run, loss in zip(group, losses, strict=True)
            if loss is not None
        ]  # fmt: skip
        return front_data(points, group, name, x_label=label) if len(points) > 1 else None

    def paint(self, data: dict[str, Any], look: Look) -> Figure:
        """Dots and lines, the budget as a rule; what does not fit is hollow."""
        pt = look.pt
        hollow = any(point["fits"] is False for one in data["series"] for point in one["points"])
        key = [KeyItem(one["label"], palette.method_colour(one["method"]), "o") for one in data["series"]]
        if hollow:
            key.append(KeyItem("hollow: over the budget", palette.MUTED, "hollow"))
        sheet = Sheet(look, data, data["title"], body=130, key=key)
        axes = sheet.axes()
        for one in data["series"]:
            colour = palette.method_colour(one["method"])
            line = [point for point in one["points"] if point["front"]]
            axes.plot(
                [p["x"] for p in line], look.scaled([p["peak_bytes"] for p in line]), color=colour, linewidth=pt(1.1),
                zorder=2,
            )  # fmt: skip
            for point in one["points"]:
                axes.plot(
                    [point["x"]], [in_unit(point["peak_bytes"], look.unit)], marker="o", markersize=pt(3.4), zorder=3,
                    color=colour, markerfacecolor="white" if point["fits"] is False else colour,
                    markeredgewidth=pt(0.9),
                )  # fmt: skip
        if data["budget_bytes"] is not None:
            budget = in_unit(data["budget_bytes"], look.unit)
            axes.axhline(budget, color=palette.ALARM, linewidth=pt(0.7), linestyle=(0, (4, 2)), zorder=1)
            axes.annotate(
                f"budget {look.labelled(data['budget_bytes'])}", (1, budget), xycoords=axes.get_yaxis_transform(),
                xytext=(0, pt(2)), textcoords="offset points", ha="right", fontsize=look.small, color=palette.ALARM,
                annotation_clip=False, parse_math=False,
            )  # fmt: skip
        axes.margins(0.04, 0.08)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.set_xlabel(data["x_label"])
        axes.set_ylabel(f"peak {facts.memory_text(data)} ({look.unit})")
        return sheet.figure


def front_data(
    points: Sequence[Mapping[str, Any]],
    runs: Sequence[Run],
    name: str,
    *,
    x_label: str,
    budget_bytes: int | None = None,
) -> dict[str, Any]:
    """The data of a front.

    Args:
        points: Settings, each with ``method`` (a spec string), ``peak_bytes``, ``x`` (less is better), ``fits`` (None
            without a budget) and ``params``.
        runs: Where they come from.
        name: The figure's name.
        x_label: What ``x`` is.
        budget_bytes: Drawn as a rule, or None.
    """
    series = []
    for method in dict.fromkeys(split_spec(point["method"])[0] for point in points):
        own = sorted(
            (p for p in points if split_spec(p["method"])[0] == method), key=lambda p: (p["x"], p["peak_bytes"])
        )
        least, rows = float("inf"), []
        for point in own:
            rows.append({**point, "front": point["peak_bytes"] < least})
            least = min(least, point["peak_bytes"])
        series.append({"method": method, "label": palette.method_label(method), "points": rows})
    task = facts.data_title(runs[0].record)
    return facts.header("front", name, runs) | {
        "title": f"Memory against what it costs on {task}",
        "x_label": x_label,
        "budget_bytes": budget_bytes,
        "series": series,
    }


def _losses(group: Sequence[Run]) -> tuple[str, list[float | None]]:
    """What each run loses: against the unpruned answers, else in accuracy, else the share it prunes."""
    compared = [mean_fidelity(run.finished) for run in group]
    if sum(one is not None for one in compared) > 1:
        return LOSS, [1 - one["agreement"] if one else None for one in compared]
    scores = [summarize(run)["accuracy"] for run in group]
    base = next((s for s, r in zip(scores, group, strict=True) if facts.method_of(r) == facts.BASELINE), None)
    if base is not None and all(score is not None for score in scores):
        return LOST_ACCURACY, [base - score for score in scores if score is not None]
    return PRUNED, [None if (keep := facts.keep_of(run)) is None else 1 - keep for run in group]
