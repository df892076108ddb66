"""``memprof diff A B``: which parts, modules and tokens make the difference, and whether it is more than allowed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memprof.cli import _options as opt

if TYPE_CHECKING:
    from collections.abc import Callable

    from memprof.allowance import Allowance
    from memprof.analysis.diff import Delta, Difference, Growth
    from memprof.records import Run

    #: The runs of each side that have no other.
    Alone = tuple[list[Run], list[Run]]

#: How a difference may be written.
FORMATS = ("table", "markdown", "json")


def diff(
    a: Annotated[Path, typer.Argument(help=opt.RUN_HELP, show_default=False)],
    b: Annotated[Path, typer.Argument(help="Another; of two folders of runs, methods are paired.", show_default=False)],
    fail_above: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-above", metavar="LIMIT", show_default=False,
            help="End with 3 where B takes more than A by so much: 2%, 32MiB; of several the larger counts.",
        ),
    ] = None,
    format: Annotated[
        str | None, typer.Option("--format", "-f", help="table, markdown (for a pull request) or json; default: table.")
    ] = None,
    unit: opt.FittingUnit = None,
    json: opt.AsJson = False,
) -> None:
    """Tell which parts, modules and tokens make the difference between two runs, as B minus A.

    Runs of different models, tasks or stacks can be compared; what differs is said. With --fail-above the static bytes
    and the dynamic peak of every sample are held to A's, and the exit code is 3 where one grew by more, or where a
    sample that finished in A does not in B, or is not there.

    Example:
    memprof diff latest/baseline latest/topv

    memprof diff runs/before runs/after --fail-above 2% --format markdown > comment.md
    """
    from memprof.allowance import Allowance
    from memprof.analysis.diff import diff as compare
    from memprof.analysis.diff import growth, missing, worst_first
    from memprof.cli._runs import find
    from memprof.errors import GateFailed, UnknownName, UsageError
    from memprof.units import check_unit, unit_for

    if unit is not None:
        check_unit(unit)
    if format not in (None, *FORMATS):
        raise UnknownName("format", format or "", FORMATS)
    if json and format not in (None, "json"):
        raise UsageError(f"--json and --format {format} disagree; give one")
    allowed = Allowance.of(*fail_above) if fail_above else None
    pairs, alone = _pairs(find([a]), find([b]))
    above = None
    if allowed is not None:
        above = worst_first(one for pair in pairs for one in growth(*pair, allowed))
        above = worst_first([*above, *(one for run in alone[0] for one in missing(run))])
    # A sample that finishes in A alone is told by the gate; without one there are two peaks or nothing to compare.
    found = [compare(*pair) for pair in pairs if allowed is None or pair[1].finished]
    if json or format == "json":
        _write_json(found, alone, allowed, above or [])
    elif format == "markdown":
        sys.stdout.write(_markdown(found, alone, allowed, above or [], unit))
    else:
        for each in found:
            _show(each, unit_for(max(each.dynamic.a, each.dynamic.b), unit))
        if any(alone):
            typer.echo(_alone_text(alone))
        if allowed is not None:
            typer.echo(f"Memory: {_verdict(allowed, above or [])}")
        for one in above or ():
            typer.echo(_grown_text(one, unit))
    if allowed is not None and above:
        more = f"; and {len(above) - 1} more" if len(above) > 1 else ""
        raise GateFailed(f"{_failed(allowed, above[0])}: {_grown_text(above[0], unit)}{more}")


def _write_json(
    found: list[Difference], alone: Alone, allowed: Allowance | None, above: list[Growth]
) -> None:
    import dataclasses
    import json as encoder

    one = {"schema": 1, **found[0].to_json()} if found else {}
    methods = [run.record.spec.method for runs in alone for run in runs]
    many = {"schema": 1, "pairs": [each.to_json() for each in found], "without_another": methods}
    document = one if len(found) == 1 and not methods else many
    if allowed is not None:
        told = [{**dataclasses.asdict(each), "change": each.change} for each in above]
        document |= {"fail_above": allowed.text, "verdict": _verdict(allowed, above), "above": told}
    sys.stdout.write(encoder.dumps(document, indent=1, ensure_ascii=False) + "\n")


def _grown_text(grown: Growth, unit: str | None) -> str:
    """One line of what grew too much, or is gone."""
    from memprof.reports.rows import plain
    from memprof.units import format_bytes, unit_for

    unit = unit_for(max(grown.a, grown.b or 0), unit)
    before = format_bytes(grown.a, unit)
    if grown.what == "run":
        return f"run of {grown.other}: {before} at its highest in A; B has no such run"
    of = "static" if grown.sample is None else f"dynamic peak of {plain(grown.sample, 60)}"
    if grown.other is not None:
        of += f" in A and of {plain(grown.other, 60)} in B"
    if grown.b is None:
        gone = "B has no such sample" if grown.reason is None else f"in B it did not finish: {plain(grown.reason)}"
        return f"{of}: {before} in A; {gone}"
    share = f", {grown.b / grown.a - 1:+.1%}" if grown.a else ""
    change = format_bytes(grown.b - grown.a, unit)
    return f"{of}: {before} in A, {format_bytes(grown.b, unit)} in B (+{change}{share})"


def _verdict(allowed: Allowance, above: list[Growth]) -> str:
    """Whether the gate holds, in words."""
    gone = [one for one in above if one.b is None]
    said = [f"grew by more than {allowed.text}"] * (len(gone) < len(above))
    if gone:
        said.append(f"{len(gone)} that finished in A {'does' if len(gone) == 1 else 'do'} not in B")
    return " and ".join(said) or f"within {allowed.text}"


def _failed(allowed: Allowance, worst: Growth) -> str:
    if worst.b is None:
        return "B does not finish what A did"
    return f"B takes more than A by more than {allowed.text}"


def _alone_text(alone: Alone) -> str:
    """The runs that are in one folder only."""
    from memprof.telling.facts import data_title

    said = [
        f"{run.record.spec.method} on {run.record.spec.model}, {data_title(run.record)} (in {side})"
        for side, runs in zip("AB", alone, strict=True)
        for run in runs
    ]
    return f"in one folder only: {'; '.join(said)}"


def _markdown(
    found: list[Difference], alone: Alone, allowed: Allowance | None, above: list[Growth], unit: str | None
) -> str:
    """For a pull request: whether it holds, and for each pair a sentence and the parts that changed."""
    from memprof.reports.formats.markdown import escape, table
    from memprof.telling.palette import PART_LABELS
    from memprof.units import unit_for

    lines: list[str] = []
    if allowed is not None:
        lines += [f"### Memory: {_verdict(allowed, above)}", ""]
        lines += [*(f"- {escape(_grown_text(one, unit))}" for one in above), *[""] * bool(above)]
    for each in found:
        shown = unit_for(max(each.dynamic.a, each.dynamic.b), unit)
        lines += [f"**{escape(_about(each))}**", "", escape(sentence(each, shown)), ""]
        lines += [*(f"- {escape(line)}" for line in each.said), *[""] * bool(each.said)]

        told = [("static", each.static), ("dynamic peak", each.dynamic)]
        told += [(PART_LABELS[delta.name], delta) for delta in each.parts]
        told += [(delta.name, delta) for delta in each.modules if delta.change][:10]
        rows = [[name, *_cells(delta, shown)] for name, delta in told]
        lines += [*table(["what", f"A, {shown}", f"B, {shown}", "B - A", ""], rows), ""]
    if any(alone):
        lines += [escape(_alone_text(alone)), ""]
    return "\n".join(lines)


def _about(found: Difference) -> str:
    """What is compared, in a line: once what both have, else both."""
    a, b = (f"{x['model']}, {x['method']}, {x['task']}, {x['status']}" for x in (found.a, found.b))
    sample = found.sample_a if found.sample_a == found.sample_b else f"{found.sample_a} and {found.sample_b}"
    return f"{a if a == b else f'{a} → {b}'}; highest sample: {sample}"


def _cells(delta: Delta, unit: str, digits: int = 1) -> list[str]:
    """A, B, the change and its share of A, as text."""
    from memprof.units import in_unit

    numbers = [f"{in_unit(n, unit):.3f}" for n in (delta.a, delta.b)]
    if not delta.change:
        return [*numbers, "0", ""]
    share = f"{delta.change / delta.a:+.{digits}%}" if delta.a else "new"
    return [*numbers, f"{in_unit(delta.change, unit):+.3f}", share]


def _pairs(ones: list[Run], others: list[Run]) -> tuple[list[tuple[Run, Run]], Alone]:
    """The runs to compare: the two there are, or of two folders those of one method, and of one model and task where
    several are there; and those of each side that have no other.

    Raises:
        UsageError: No method is in both.
    """
    from memprof.errors import UsageError
    from memprof.telling.facts import method_of

    if len(ones) == len(others) == 1:
        return [(ones[0], others[0])], ([], [])
    pairs: list[tuple[Run, Run]] = []
    alike: list[Callable[[Run], object]] = [
        lambda run: (run.record.spec.method, run.record.spec.model, run.record.spec.task),
        lambda run: (run.record.spec.method, run.record.spec.model),
        lambda run: run.record.spec.method,
        method_of,
    ]
    left, rest = list(ones), list(others)
    for kind in alike:  # what is the same in more is paired first
        for one in list(left):
            other = next((other for other in rest if kind(other) == kind(one)), None)
            if other is not None:
                pairs.append((one, other))
                left = [run for run in left if run is not one]
                rest = [run for run in rest if run is not other]
    if not pairs:
        raise UsageError("no method is in both folders; name one run of each to compare them")
    order = [id(one) for one in ones]
    return sorted(pairs, key=lambda pair: order.index(id(pair[0]))), (left, rest)


def _show(found: Difference, unit: str) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from memprof.analysis.diff import Delta
    from memprof.reports._paper import Screen
    from memprof.telling.palette import PART_LABELS
    from memprof.units import in_unit

    def row(delta: Delta, name: str) -> None:
        table.add_row(Text(name), *_cells(delta, unit, digits=0))

    console = Screen(highlight=False)
    for name, about, sample in (("A", found.a, found.sample_a), ("B", found.b, found.sample_b)):
        what = f"{about['model']} {about['method']} on {about['task']}, stack {about['stack']}, {about['status']}"
        console.print(Text(f"{name}: {what}; sample {sample}"))
    for line in found.said:
        console.print(Text(f"note: {line}", style="yellow"))
    console.print(Text(sentence(found, unit), style="bold"))
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
    console.print(
        "Modules: among each run's largest tensors then. Tokens: where each curve differs most; above static, but for "
        "the KV cache."
    )
    if found.mean_change is not None and found.common > 1:
        console.print(
            f"Over {found.common} samples in both, B's dynamic peak is lower in {found.lower}; "
            f"mean change {in_unit(found.mean_change, unit):+.3f} {unit}."
        )


def sentence(found: Difference, unit: str) -> str:
    """The difference in one sentence."""
    from memprof.telling.palette import PART_LABELS
    from memprof.units import format_bytes, in_unit

    change = found.dynamic.change
    if not change:
        return f"Both peak at {format_bytes(found.dynamic.a, unit)} above static."
    share = f" ({change / found.dynamic.a:+.1%})" if found.dynamic.a else ""
    made = [d for d in found.parts if abs(d.change) >= abs(change) / 50][:3]
    parts = ", ".join(f"{PART_LABELS[d.name]} {in_unit(d.change, unit):+.3f}" for d in made)
    way = "lower" if change < 0 else "higher"
    return f"B peaks {format_bytes(abs(change), unit)} {way} than A above static{share}: {parts}."
