"""``memprof diff A B``: which parts, modules and tokens make the difference, and whether it is more than allowed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memprof.cli import _options as opt

if TYPE_CHECKING:
    from memprof.allowance import Allowance
    from memprof.analysis.diff import Delta, Difference, Growth
    from memprof.records import Run

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
    and the dynamic peak of every sample are held to A's, and the exit code is 3 where one grew by more.

    Example:
    memprof diff latest/baseline latest/topv

    memprof diff runs/before runs/after --fail-above 2% --format markdown > comment.md
    """
    from memprof.allowance import Allowance
    from memprof.analysis.diff import diff as compare
    from memprof.analysis.diff import growth
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
    grown = [growth(*pair, allowed) for pair in pairs] if allowed is not None else []
    # A sample that finishes in A alone is told by the gate; without one there are two peaks or nothing to compare.
    found = [compare(*pair) for pair in pairs if allowed is None or pair[1].finished]
    if json or format == "json":
        _write_json(found, alone, allowed, grown)
    elif format == "markdown":
        sys.stdout.write(_markdown(found, alone, allowed, grown, unit))
    else:
        for each in found:
            _show(each, unit_for(max(each.dynamic.a, each.dynamic.b), unit))
        if alone:
            typer.echo(f"in one folder only: {', '.join(alone)}")
        for one in (one for some in grown for one in some):
            typer.echo(_grown_text(one, unit))
    if allowed is not None and any(grown):
        raise GateFailed(f"B takes more than A by more than {allowed.text}: {_worst(grown, unit)}")


def _write_json(
    found: list[Difference], alone: list[str], allowed: Allowance | None, grown: list[list[Growth]]
) -> None:
    import dataclasses
    import json as encoder

    one = {"schema": 1, **found[0].to_json()} if found else {}
    many = {"schema": 1, "pairs": [each.to_json() for each in found], "without_another": alone}
    document = one if len(found) == 1 and not alone else many
    if allowed is not None:
        above = [{**dataclasses.asdict(each), "change": each.change} for some in grown for each in some]
        document |= {"fail_above": allowed.text, "above": above}
    sys.stdout.write(encoder.dumps(document, indent=1, ensure_ascii=False) + "\n")


def _grown_text(grown: Growth, unit: str | None) -> str:
    """One line of what grew too much."""
    from memprof.reports.rows import plain
    from memprof.units import format_bytes, unit_for

    unit = unit_for(max(grown.a, grown.b or 0), unit)
    of = "static" if grown.sample is None else f"dynamic peak of {plain(grown.sample, 60)}"
    before = format_bytes(grown.a, unit)
    if grown.b is None:
        return f"{of}: {before} in A; in B it did not finish: {plain(grown.reason or 'no reason recorded')}"
    share = f", {grown.b / grown.a - 1:+.1%}" if grown.a else ""
    change = format_bytes(grown.b - grown.a, unit)
    return f"{of}: {before} in A, {format_bytes(grown.b, unit)} in B (+{change}{share})"


def _worst(grown: list[list[Growth]], unit: str | None) -> str:
    """The largest growth, and how many more there are."""
    every = [one for some in grown for one in some]
    worst = min(every, key=lambda one: (one.b is not None, -(one.change or 0)))
    more = f"; and {len(every) - 1} more" if len(every) > 1 else ""
    return _grown_text(worst, unit) + more


def _markdown(
    found: list[Difference], alone: list[str], allowed: Allowance | None, grown: list[list[Growth]], unit: str | None
) -> str:
    """For a pull request: whether it holds, and for each pair a sentence and the parts that changed."""
    from memprof.reports.formats.markdown import escape, table
    from memprof.telling.palette import PART_LABELS
    from memprof.units import unit_for

    above = [one for some in grown for one in some]
    lines: list[str] = []
    if allowed is not None:
        verdict = f"grew by more than {allowed.text}" if above else f"within {allowed.text}"
        lines += [f"### Memory: {verdict}", "", *(f"- {escape(_grown_text(one, unit))}" for one in above)]
        lines += [""] * bool(above)
    for each in found:
        shown = unit_for(max(each.dynamic.a, each.dynamic.b), unit)
        lines += [f"**{escape(_about(each))}**", "", escape(sentence(each, shown)), ""]
        lines += [*(f"- {escape(line)}" for line in each.said), *[""] * bool(each.said)]

        told = [("static", each.static), ("dynamic peak", each.dynamic)]
        told += [(PART_LABELS[delta.name], delta) for delta in each.parts]
        told += [(delta.name, delta) for delta in each.modules if delta.change][:10]
        rows = [[name, *_cells(delta, shown)] for name, delta in told]
        lines += [*table(["what", f"A, {shown}", f"B, {shown}", "B - A", ""], rows), ""]
    if alone:
        lines += [f"In one folder only: {escape(', '.join(alone))}", ""]
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


def _pairs(ones: list[Run], others: list[Run]) -> tuple[list[tuple[Run, Run]], list[str]]:
    """The runs to compare: the two there are, or of two folders those of one method, and of one model where several are
    there; and methods that have no other.

    Raises:
        UsageError: No method is in both.
    """
    from memprof.errors import UsageError
    from memprof.telling.facts import method_of

    if len(ones) == len(others) == 1:
        return [(ones[0], others[0])], []
    pairs: list[tuple[Run, Run]] = []
    left = list(others)
    for one in ones:
        same = [o for o in left if o.record.spec.method == one.record.spec.method]
        same = [o for o in same if o.record.spec.model == one.record.spec.model] or same
        near = same or [o for o in left if method_of(o) == method_of(one)]
        if near:
            pairs.append((one, near[0]))
            left.remove(near[0])
    if not pairs:
        raise UsageError("no method is in both folders; name one run of each to compare them")
    paired = [id(one) for one, _ in pairs]
    return pairs, [one.record.spec.method for one in [*(o for o in ones if id(o) not in paired), *left]]


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
    console.print("Modules: among each run's largest tensors then. Tokens: where each curve differs most.")
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
