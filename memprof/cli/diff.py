"""``memprof diff A B``: which parts, modules and tokens make the difference."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memprof.cli import _options as opt

if TYPE_CHECKING:
    from memprof.analysis.diff import Difference


def diff(
    a: Annotated[Path, typer.Argument(help="A run folder.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="Another.", show_default=False)],
    unit: opt.Unit = "GiB",
    json: opt.AsJson = False,
) -> None:
    """Tell which parts, modules and tokens make the difference between two runs, as B minus A.

    Runs of different models, tasks or stacks can be compared; what differs is said.

    Example:
    memprof diff runs/first/baseline runs/first/topv
    """
    from memprof.analysis.diff import diff as compare
    from memprof.store import read_run
    from memprof.units import check_unit

    check_unit(unit)
    found = compare(read_run(a), read_run(b))
    if json:
        import json as encoder

        sys.stdout.write(encoder.dumps({"schema": 1, **found.to_json()}, indent=1, ensure_ascii=False) + "\n")
    else:
        _show(found, unit)


def _show(found: Difference, unit: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from memprof.analysis.diff import Delta
    from memprof.figures.palette import PART_LABELS
    from memprof.units import in_unit

    def number(n_bytes: float) -> str:
        return f"{in_unit(n_bytes, unit):.3f}"

    def row(delta: Delta, name: str) -> None:
        share = f"{delta.change / delta.a:+.0%}" if delta.a else "new"
        change = f"{in_unit(delta.change, unit):+.3f}" if delta.change else "0"
        table.add_row(Text(name), number(delta.a), number(delta.b), change, share if delta.change else "")

    console = Console(highlight=False)
    for name, about, sample in (("A", found.a, found.sample_a), ("B", found.b, found.sample_b)):
        what = f"{about['model']} {about['method']} on {about['task']}, stack {about['stack']}, {about['status']}"
        console.print(Text(f"{name}: {what}; sample {sample}"), soft_wrap=True)
    for line in found.said:
        console.print(Text(f"note: {line}", style="yellow"), soft_wrap=True)
    console.print(Text(sentence(found, unit), style="bold"), soft_wrap=True)
    table = Table(title=f"At the highest instant ({unit})", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("what", overflow="fold")
    for column in ("A", "B", "B - A", ""):
        table.add_column(column, justify="right", no_wrap=True)
    row(found.static, "static")
    row(found.dynamic, "dynamic")
    for delta in found.parts:
        row(delta, f"  {PART_LABELS[delta.name]}")
    table.add_section()
    for delta in [d for d in found.modules if d.change][:8]:
        row(delta, delta.name)
    table.add_section()
    for curve in found.tokens:
        name = curve.name.removesuffix("_bytes").replace("_", " ")
        row(Delta(name, curve.a, curve.b), f"{name}, token {curve.token}")
    console.print(table)
    console.print("Modules: among each run's largest tensors then. Tokens: where each curve differs most.")
    if found.mean_change is not None and found.common > 1:
        console.print(
            f"Over {found.common} samples in both, B's dynamic peak is lower in {found.lower}; "
            f"mean change {in_unit(found.mean_change, unit):+.3f} {unit}."
        )


def sentence(found: Difference, unit: str) -> str:
    """The difference in one sentence."""
    from memprof.figures.palette import PART_LABELS
    from memprof.units import format_bytes, in_unit

    change = found.dynamic.change
    if not change:
        return f"Both peak at {format_bytes(found.dynamic.a, unit)} above static."
    share = f" ({change / found.dynamic.a:+.1%})" if found.dynamic.a else ""
    made = [d for d in found.parts if abs(d.change) >= abs(change) / 50][:3]
    parts = ", ".join(f"{PART_LABELS[d.name]} {in_unit(d.change, unit):+.3f}" for d in made)
    way = "lower" if change < 0 else "higher"
    return f"B peaks {format_bytes(abs(change), unit)} {way} than A above static{share}: {parts}."
