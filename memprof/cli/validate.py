"""``memprof validate REFERENCE``: predictions held to what a card measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

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
    against: Annotated[
        Path | None,
        typer.Option(help="Measured runs to compare with instead of predictions: how far do two cards agree?"),
    ] = None,
    json: opt.AsJson = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Draw predicted over measured to this .pdf, .png or .svg, with its data."),
    ] = None,
    unit: opt.Unit = "GiB",
) -> None:
    """Predict again what a card measured, and show how far off every number is, and who explains it.

    Exit code 3 where a goal is missed: KV cache equal, static equal up to one block of 512 B, 80 % of dynamic peaks
    equal and none off by more than 0.8 %. What follows from addresses cannot be told better than two cards agree: see
    --against.

    Examples:
    memprof validate reference/h100

    memprof validate reference/h200 --against reference/h100

    memprof validate runs/on-the-card --json -o errors.pdf
    """
    from memprof.analysis.validate import GOALS
    from memprof.analysis.validate import validate as check
    from memprof.errors import BadValue, GateFailed
    from memprof.units import check_unit

    check_unit(unit)
    if output is not None and against is not None:
        raise BadValue("--output draws predictions; leave out --against")
    if output is not None and output.suffix not in (".pdf", ".png", ".svg"):
        raise BadValue(f"{output} is no figure; end its name in .pdf, .png or .svg")
    found = _checked(check, reference, against)
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


def _checked(check: Any, reference: Path, against: Path | None) -> Validation:
    """Compare, with a line on a terminal's stderr that says how far it is."""
    from memprof.reports._paper import Screen

    console = Screen(stderr=True)
    if not console.is_terminal:
        return cast("Validation", check(reference, against))
    with console.status("reading") as status:
        return cast("Validation", check(reference, against, lambda what: status.update(f"comparing {what}")))


def _show(found: Validation, unit: str) -> None:
    from memprof.analysis.validate import GOALS
    from memprof.reports._paper import Screen

    console = Screen(highlight=False)
    for line in found.where:
        console.print(f"measured on {line}", markup=False)
    for line in found.against:
        console.print(f"and, to compare with, on {line}", markup=False)
    for line in found.notes:
        console.print(f"note: {line}", markup=False)
    if found.context_bytes is not None:
        low, high = _pair(*found.context_bytes, unit)
        console.print(f"beyond the allocator the process held {low} to {high} {unit} (context, kernels' code)")
    rows = [[_CALLED[s.measure], *_numbers(s), "met" if s.met else "missed"] for s in found.totals]
    titles = ["what", "compared", "equal", "median", "worst", "lowest", "goal"]
    title = "The other card against the first, both measured" if found.against else "Predicted against measured"
    console.print(_table(title, titles, rows))
    for score in found.totals:
        if not score.met:
            console.print(f"missed: {_CALLED[score.measure]}: {GOALS[score.measure]}", markup=False)
    rows = [[name, *_errors(scores)] for name, scores in found.runs.items()]
    console.print(_table("Worst error by run", ["run", *_SHORT.values()], rows))
    rows = [_row(case, unit) for case in found.cases]
    one, other = ("first", "other") if found.against else ("measured", "predicted")
    titles = ["sample", "tiles", f"{one} {unit}", f"{other} {unit}", "error", f"{other} minus {one}"]
    console.print(_table("Worst dynamic peaks", titles, rows))
    for history in found.histories:
        measured, predicted = _pair(history.peak_measured, history.peak_predicted, unit)
        alike = "every request and every end alike" if history.alike else "not alike"
        console.print(f"{history.file}: peak {measured} measured, {predicted} predicted {unit}; {alike}", markup=False)
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
    equal = "all" if score.equal == 1 else f"{100 * score.equal:.1f} %"
    return [f"{score.points:,}", equal, f"{100 * score.median:.2f} %", _percent(score.worst), _percent(score.lowest)]


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
    """Predicted over measured, and beside the picture the data that it is drawn from."""
    from memprof import figures
    from memprof.analysis.validate import figure
    from memprof.errors import MemprofError

    try:
        list(figures.draw_data([figure(found, path.stem)], path.parent, width="double", unit=unit,
                               formats=[path.suffix[1:]]))  # fmt: skip
    except OSError as error:
        raise MemprofError(f"cannot write {path}: {error.strerror or error}") from None
