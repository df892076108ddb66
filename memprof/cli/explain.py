"""``memprof explain RUN``: who holds the peak, and what would lower it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memprof.cli import _options as opt

if TYPE_CHECKING:
    from rich.console import Console

    from memprof.analysis.explain import Explanation

Row = tuple[str, ...]


def explain(
    run: Annotated[Path, typer.Argument(help="A run folder, or a folder that holds run folders.", show_default=False)],
    sample: Annotated[
        str | None, typer.Option("--sample", help="A sample's id; default: the one with the highest peak.")
    ] = None,
    what_if: Annotated[
        bool, typer.Option("--what-if/--no-what-if", help="Predict what would lower the peak (seconds to a minute).")
    ] = True,
    top: Annotated[int, typer.Option("--top", min=0, help="How many of the largest tensors to name.")] = 6,
    unit: opt.Unit = "GiB",
    json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Tell who holds the highest instant of a run, and predict what would lower it, best first.

    Examples:
    memprof explain runs/first

    memprof explain runs/first --sample ai2d-17 --json
    """
    from rich.console import Console

    from memprof.analysis.explain import explain as explain_run
    from memprof.analysis.whatif import Benches
    from memprof.store import find_runs
    from memprof.units import check_unit

    check_unit(unit)
    benches, found = Benches(), []
    errors = Console(stderr=True)
    with errors.status("reading the run") as status:
        if quiet or json or not errors.is_terminal:
            status.stop()
        for one in find_runs([run]):
            found.append(
                explain_run(
                    one, sample, what_if=what_if, benches=benches,
                    progress=lambda name: status.update(f"predicting: {name}"),
                )
            )  # fmt: skip
    if json:
        import json as encoder

        document = {"schema": 1, "explanations": [one.to_json() for one in found]}
        sys.stdout.write(encoder.dumps(document, indent=1, ensure_ascii=False) + "\n")
        return
    for explanation in found:
        _show(explanation, unit, top)


def _show(found: Explanation, unit: str, top: int) -> None:
    from rich.console import Console
    from rich.text import Text

    from memprof.analysis.explain import floor_sentence, sentence
    from memprof.units import format_bytes

    def size(n_bytes: int) -> str:
        return format_bytes(n_bytes, unit, 2)

    console = Console(highlight=False)
    console.print(Text(sentence(found, size), style="bold"), soft_wrap=True)
    _where(console, found, unit)
    _holders(console, found, unit, top)
    if found.predicted_peak_bytes is None:
        return
    _answers(console, found, unit)
    for line in (floor_sentence(found, size), *found.notes):
        if line:
            console.print(Text(line), soft_wrap=True)
    console.print()


def _where(console: Console, found: Explanation, unit: str) -> None:
    from memprof.figures.palette import PART_LABELS

    def share(n_bytes: int) -> str:
        return f"{n_bytes / found.dynamic_peak_bytes:.1%}"

    parts = sorted(found.parts.items(), key=lambda item: -item[1])
    rows: list[Row] = [
        ("static: weights and buffers", _number(found.static_bytes, unit), ""),
        ("dynamic", _number(found.dynamic_peak_bytes, unit), "100.0%"),
        *((f"  {PART_LABELS[name]}", _number(n, unit), share(n)) for name, n in parts if n),
        ("reserved beyond allocated: rounding, fragmentation", _number(found.rounding_bytes, unit), ""),
    ]
    if found.context_bytes is not None:
        rows.append(("CUDA context and libraries: device beyond reserved", _number(found.context_bytes, unit), ""))
    _print(console, f"Who holds it ({found.status})", "what", [unit, "of dynamic"], rows)


def _holders(console: Console, found: Explanation, unit: str, top: int) -> None:
    from memprof.analysis.holders import line

    rows: list[Row] = [(line(holder), _number(holder.bytes, unit)) for holder in found.holders[:top]]
    if rows:
        _print(console, "Largest tensors then", "module: operator, shape, dtype", [unit], rows)


def _answers(console: Console, found: Explanation, unit: str) -> None:
    """The changes that change something, then in one line those that do not."""
    assert found.predicted_peak_bytes is not None
    base = found.predicted_peak_bytes
    rows: list[Row] = [("as it is", _number(base, unit), "", "", found.words)]
    idle, failed = [], []
    for answer in found.answers:
        if answer.refused:
            failed.append(f"{answer.name}: could not be predicted ({answer.refused})")
        elif abs(answer.saved_bytes) < base / 1000:
            idle.append(answer.name)
        else:
            name, saved = answer.name if answer.exact else f"{answer.name} *", answer.saved_bytes
            numbers = (_number(answer.dynamic_peak_bytes, unit), _number(saved, unit), f"{saved / base:.0%}")
            rows.append((name, *numbers, answer.words))
    title = "What would lower it (predicted; * may change answers)"
    _print(console, title, "change", [f"peak {unit}", "saves", ""], rows, last="then held by")
    for line in ([f"No difference: {'; '.join(idle)}."] if idle else []) + failed:
        console.print(line, soft_wrap=True, markup=False)


def _number(n_bytes: int, unit: str) -> str:
    from memprof.units import in_unit

    text = f"{in_unit(n_bytes, unit):.3f}"
    return "<0.001" if n_bytes > 0 and float(text) == 0 else text


def _print(
    console: Console, title: str, first: str, numbers: list[str], rows: list[Row], last: str | None = None
) -> None:
    """A table: text, numbers, and maybe text again."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    if last is not None:
        table.add_column(last, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
