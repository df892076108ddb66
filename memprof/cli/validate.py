"""``memprof validate REFERENCE``: predictions held to what a card measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memprof.cli import _options as opt

if TYPE_CHECKING:
    from memprof.analysis.validate import Case, Gap, Score, Validation

#: What each measure is called on screen.
_CALLED = {
    "dynamic": "dynamic peak of a sample", "token_dynamic": "dynamic peak of a token", "kv_cache": "KV of a token",
    "static": "static of a run", "reserved": "reserved at a token", "allocated": "allocated peak of a token",
}  # fmt: skip


def validate(
    reference: Annotated[
        Path,
        typer.Argument(help="A folder that scripts/record_reference.py wrote, or any run measured on a card."),
    ],
    json: opt.AsJson = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Draw the errors to this .pdf, .png or .svg.")
    ] = None,
    unit: opt.Unit = "GiB",
) -> None:
    """Predict again what a card measured, and show the error of every number: median, worst, and who explains it.

    Exit code 3 where a goal is missed: dynamic peaks within 1 % at the median and 3 % at worst and none more than 1 %
    too low, KV cache exact, static within 0.1 %, reserved within 3 %.

    Examples:
    memprof validate reference/h100

    memprof validate runs/on-the-card --json -o errors.pdf
    """
    from memprof.analysis.validate import GOALS
    from memprof.analysis.validate import validate as check
    from memprof.errors import BadValue, GateFailed
    from memprof.units import check_unit

    check_unit(unit)
    if output is not None and output.suffix not in (".pdf", ".png", ".svg"):
        raise BadValue(f"{output} is no figure; end its name in .pdf, .png or .svg")
    found = check(reference)
    if output is not None:
        _draw(found, output, unit)
    if json:
        import json as encoder

        typer.echo(encoder.dumps(found.to_json(), indent=1, ensure_ascii=False))
    else:
        _show(found, unit)
    missed = [f"{_CALLED[s.measure]} ({GOALS[s.measure]})" for s in found.totals if not s.met]
    if missed:
        raise GateFailed(f"{len(missed)} of {len(found.totals)} goals missed: {'; '.join(missed)}")


def _show(found: Validation, unit: str) -> None:
    from rich.console import Console

    from memprof.analysis.validate import GOALS

    console = Console(highlight=False)
    for line in found.where:
        console.print(f"measured on {line}", markup=False)
    if found.context_bytes is not None:
        low, high = _pair(*found.context_bytes, unit)
        console.print(f"beyond the allocator the process held {low} to {high} {unit} (context, kernels' code)")
    rows = [
        [_CALLED[s.measure], *_numbers(s), str(GOALS[s.measure]), "met" if s.met else "missed"] for s in found.totals
    ]
    titles = ["what", "compared", "median", "worst", "lowest", "goal", ""]
    console.print(_table("Predicted against measured", titles, rows))
    rows = [[name, *_errors(scores)] for name, scores in found.runs.items()]
    console.print(_table("Worst error by run", ["run", *_SHORT.values()], rows))
    rows = [_row(case, unit) for case in found.cases]
    titles = ["sample", "tiles", f"measured {unit}", f"predicted {unit}", "error", "predicted minus measured"]
    console.print(_table("Worst dynamic peaks", titles, rows))
    for history in found.histories:
        measured, predicted = _pair(history.peak_measured, history.peak_predicted, unit)
        console.print(f"{history.file}: peak {measured} measured, {predicted} predicted {unit}", markup=False)
        rows = [
            [
                f"{size.bytes:,}", f"{size.held_measured:,} / {size.held_predicted:,}",
                f"{size.made_measured:,} / {size.made_predicted:,}", size.site,
            ]
            for size in history.sizes
        ]  # fmt: skip
        titles = ["block bytes", "held at the peak", "made", "by"]
        console.print(_table("Blocks that differ, measured / predicted", titles, rows) if rows else "no block differs")


def _row(case: Case, unit: str) -> list[str]:
    at = case.point
    sizes = _pair(at.measured, at.predicted, unit)
    return [f"{at.run} {at.sample}", f"{at.tiles}", *sizes, _percent(at.error), _who(case.parts, unit)]


#: Columns of the table of runs.
_SHORT = {"dynamic": "dynamic", "kv_cache": "KV", "static": "static", "reserved": "reserved"}


def _errors(scores: Sequence[Score]) -> list[str]:
    by_name = {score.measure: score for score in scores}
    return [_percent(by_name[name].worst) if name in by_name else "-" for name in _SHORT]


def _numbers(score: Score) -> list[str]:
    return [f"{score.points:,}", f"{100 * score.median:.2f} %", _percent(score.worst), _percent(score.lowest)]


def _percent(share: float) -> str:
    """``'−1.24 %'``; nothing but zero is called zero."""
    if not share:
        return "exact"
    sign = "−" if share < 0 else "+"
    return f"{sign}{abs(100 * share):.2f} %" if abs(share) >= 5e-5 else f"{sign}<0.01 %"


def _pair(measured: int, predicted: int, unit: str) -> list[str]:
    from memprof.units import in_unit

    return [f"{in_unit(n_bytes, unit):.4f}" for n_bytes in (measured, predicted)]


def _who(parts: Sequence[Gap], unit: str) -> str:
    """``'unexplained −0.0310, logits +0.0012'``: the parts that make the difference."""
    from memprof.units import in_unit

    said = [f"{gap.name} {in_unit(gap.change, unit):+.4f}".replace("-", "−") for gap in parts[:3]]
    return ", ".join(said) or "nothing differs"


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _draw(found: Validation, path: Path, unit: str) -> None:
    """The error of every sample's dynamic peak over its tiles, a panel a model and stack, between the goal's lines."""
    from matplotlib.ticker import MaxNLocator

    from memprof.analysis.validate import GOALS
    from memprof.errors import MemprofError
    from memprof.figures import palette
    from memprof.figures.facts import provenance
    from memprof.figures.style import KeyItem, Look, Sheet, save

    panels: dict[str, list[tuple[str, int, float]]] = {}
    for point in found.points:
        if point.measure == "dynamic":
            model, method, stack = point.run.split(" ")
            name = f"{palette.model_label(model)}, {stack} stack"
            kind = method.partition(":")[0] + (" map" if "scores=map" in method else "")
            panels.setdefault(name, []).append((kind, point.tiles, 100 * point.error))
    methods = sorted({method for dots in panels.values() for method, _, _ in dots})

    def wears(method: str) -> tuple[str, str, str]:
        """Label, colour and marker."""
        plain, _, form = method.partition(" ")
        return f"{palette.method_label(plain)} {form}".strip(), palette.method_colour(plain), "x" if form else "o"

    look = Look.of("paper", "double", unit)
    goal = GOALS["dynamic"]
    assert goal.worst is not None
    assert goal.median is not None
    data = {"provenance": provenance(found.measured) | {"status": "predicted against measured"}}
    with look.settings():
        key = [KeyItem(*wears(method)) for method in methods]
        sheet = Sheet(look, data, "Error of the predicted dynamic peak", body=124, right=6, key=key)
        gap = look.pt(12)
        wide = (sheet.x1 - sheet.x0 - gap * (len(panels) - 1)) / len(panels)
        reach = 1.1 * max([abs(e) for dots in panels.values() for _, _, e in dots] + [100 * goal.worst])
        for number, (name, dots) in enumerate(panels.items()):
            axes = sheet.axes((number * (wide + gap), 0, wide, look.pt(110)))
            for bound in (goal.median, goal.worst):
                axes.axhspan(-100 * bound, 100 * bound, color=palette.STATIC, alpha=0.5, linewidth=0)
            axes.axhline(0, color=palette.INK, linewidth=look.pt(0.5))
            for method in methods:
                own = [(tiles, error) for m, tiles, error in dots if m == method]
                _, colour, mark = wears(method)
                if own:
                    axes.plot(*zip(*own, strict=True), mark, color=colour, markersize=look.pt(3))
            axes.set_ylim(-reach, reach)
            tiles = [count for _, count, _ in dots]
            axes.set_xlim(min(tiles) - 0.8, max(tiles) + 0.8)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
            axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
            axes.set_xlabel("tiles")
            axes.set_title(name, fontsize=look.base, pad=look.pt(3))
            if number:
                axes.tick_params(labelleft=False)
            else:
                axes.set_ylabel("predicted over measured (%)")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save(sheet.figure, path, look)
        except OSError as error:
            raise MemprofError(f"cannot write {path}: {error.strerror or error}") from None
