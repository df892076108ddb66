"""``memprof snapshot FILE``: a torch CUDA snapshot, read safely, replayed and explained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memprof.cli._options import FittingUnit

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from rich.console import RenderableType
    from rich.table import Table

    from memprof.snapshots.report import SnapshotReport, Studied


def snapshot(
    file: Annotated[
        Path,
        typer.Argument(
            help="What torch.cuda.memory._dump_snapshot() or memprof report wrote; also .gz, .zst or JSON of it.",
            show_default=False,
        ),
    ],
    what_if: Annotated[
        list[str] | None,
        typer.Option(
            "--what-if",
            metavar="OPTION=VALUE",
            help="The smallest card under another allocator setting, such as expandable_segments=True; repeatable.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        int | None, typer.Option("--device", help="Which GPU; default: the one that ran out, else the fullest.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="The limit for --what-if: a card, or what PyTorch may have, as 24GiB.")
    ] = None,
    by: Annotated[str, typer.Option("--by", help="Add blocks up by line, module or op.")] = "line",
    top: Annotated[int, typer.Option(min=0, help="How many holders to name.")] = 10,
    flame: Annotated[bool, typer.Option("--flame", help="Who called whom, as a table.")] = False,
    html: Annotated[bool, typer.Option("--html", help="Write a page to hover; to -o, or beside you.")] = False,
    form: Annotated[str, typer.Option("--format", "-f", help="table, html, json, or chrome for Perfetto.")] = "table",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; default: the screen.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
    unit: FittingUnit = None,
) -> None:
    """Tell why a run died, or who held its peak, from a CUDA memory snapshot; and what would have helped.

    The file is read without running anything in it: whatever is not plain data is refused.

    Examples:

    memprof snapshot memory.pickle

    memprof snapshot memory.pickle --what-if expandable_segments=True --json

    memprof snapshot memory.pickle --by module --html -o memory.html
    """
    from memprof.errors import UnknownName
    from memprof.snapshots.report import asked_for, study
    from memprof.units import unit_for

    if form not in (forms := ("table", "html", "json", "chrome")):
        raise UnknownName("format", form, forms)
    unit_for(0, unit)
    room = None if gpu is None else asked_for(gpu)
    with _busy(f"reading and replaying {file.name}"):
        studied = study(file, what_if or [], top, device=device, by=by, room_bytes=room)
    report = studied.report
    unit = unit_for(max(report.reserved_bytes, report.peak_reserved_bytes or 0), unit)
    if html and form == "table":
        _write(output or Path(f"{file.name.split('.')[0]}.html"), _text(studied, "html", unit, flame), say=not json)
    elif not json or form != "table":
        text = _text(studied, "json" if json else form, unit, flame)
        _print(text) if output is None else _write(output, text)
    if json and form == "table":
        _print(_text(studied, "json", unit, flame))


def _busy(what: str) -> AbstractContextManager[object]:
    """Says on stderr, on a terminal alone, that something long is under way."""
    from contextlib import nullcontext

    from rich.text import Text

    from memprof.reports._paper import Screen

    console = Screen(stderr=True)
    return console.status(Text(what)) if console.is_terminal else nullcontext()


def _text(studied: Studied, form: str, unit: str, flame: bool) -> str:
    """The report in one of its forms."""
    if form == "html":
        from memprof.snapshots.html import render

        return render(studied, unit)
    if form == "chrome":
        from memprof.snapshots.chrome import render as trace

        return trace(studied)
    if form == "json":
        import json

        return json.dumps(studied.report.to_json(), indent=1, ensure_ascii=False) + "\n"
    from memprof.reports._paper import Screen

    console = Screen(highlight=False)
    with console.capture() as caught:
        for piece in _pieces(studied, unit, flame):
            console.print(piece)
    return caught.get()


def _print(text: str) -> None:
    typer.echo(text, nl=False)


def _write(path: Path, text: str, *, say: bool = True) -> None:
    from memprof import files
    from memprof.errors import MemprofError

    try:
        files.replace(path, text)
    except OSError as error:
        raise MemprofError(f"cannot write {path}: {error.strerror or error}") from None
    if say:
        typer.echo(str(path), err=True)


# ----------------------------------------------------------------------------------------------------------- the screen


def _pieces(studied: Studied, unit: str, flame: bool) -> Iterator[RenderableType]:
    from rich.text import Text

    from memprof.snapshots import words

    report = studied.report
    yield Text(words.about(report))
    if report.out_of_memory:
        yield Text(f"GPU {report.device} ran out of memory", style="bold red")
    yield from map(Text, words.others(report, unit))
    yield from (Text(f"Note: {note}") for note in report.notes)
    if report.out_of_memory:
        yield from (Text(f"\n{line}") for line in words.death(report.out_of_memory, unit))
        yield Text()
        yield _remedies(report)
    yield _summary(report, unit)
    title, held = words.holders(report)
    if held:
        yield _holders(title, held, report.by, unit)
    if flame:
        yield _flames(studied, unit)
    if report.what_if:
        yield _what_if(report, unit)
        yield Text(words.room(report, unit))
    yield Text(words.verdict(report))


def _table(title: str, *numbers: str, first: str) -> Table:
    """A table whose first column may fold, and whose numbers never do."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="fold", ratio=1)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _remedies(report: SnapshotReport) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title="What would have let it through (each replayed; predicted)",
        title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False,
    )  # fmt: skip
    table.add_column("")
    table.add_column("remedy", overflow="fold", ratio=5)
    table.add_column("why", overflow="fold", ratio=4)
    assert report.out_of_memory is not None
    for remedy in report.out_of_memory.remedies:
        answer = Text("yes", style="bold green") if remedy.helps else Text("no")
        table.add_row(answer, Text(remedy.name), Text(remedy.detail))
    return table


def _summary(report: SnapshotReport, unit: str) -> Table:
    from memprof.snapshots import words
    from memprof.units import in_unit

    table = _table("Memory", unit, "of reserved", first="what")
    for name, n_bytes, share in words.memory(report):
        table.add_row(name, f"{in_unit(n_bytes, unit):.3f}", share)
    return table


def _holders(title: str, held: tuple[object, ...], by: str, unit: str) -> Table:
    from rich.text import Text

    from memprof.snapshots.holding import SiteHolder
    from memprof.units import in_unit

    first = {"line": "call site", "module": "module", "op": "operator"}[by]
    table = _table(title, unit, "share", "blocks", first=first)
    for holder in held:
        assert isinstance(holder, SiteHolder)
        amount = f"{in_unit(holder.bytes, unit):.3f}"
        table.add_row(Text(holder.site), amount, f"{holder.share:.1%}", f"{holder.blocks:,}")
    return table


def _flames(studied: Studied, unit: str) -> Table:
    from rich.text import Text

    from memprof.snapshots.flames import flames
    from memprof.snapshots.holding import Instant
    from memprof.units import in_unit

    report = studied.report
    if studied.replay is None:
        instant, when = Instant.at_end(studied.recording), "when the snapshot was taken"
    else:
        event = report.out_of_memory.event if report.out_of_memory else report.peak_event
        instant = Instant.of(studied.replay, -1 if event is None else event)
        when = "when memory ran out" if report.out_of_memory else "at the peak"
    table = _table(f"Flames: who called whom to hold what was held {when}", unit, "share", first="lines")
    for row in flames(instant):
        deep = "  " * min(row.depth, 10)
        lines = Text(f"\n{deep}").join(Text(line) for line in row.lines)
        table.add_row(Text(deep) + lines, f"{in_unit(row.bytes, unit):.3f}", f"{row.share:.1%}")
    return table


def _what_if(report: SnapshotReport, unit: str) -> Table:
    from rich.text import Text

    from memprof.units import in_unit

    table = _table("What if (predicted)", f"smallest\ncard, {unit}", f"reserved,\n{unit}", "fits", first="settings")
    first = report.what_if[0]
    rows = [(f"{report.settings} (as recorded)", first.baseline_smallest_card_bytes, first.baseline_reserved_bytes, "")]
    rows += [
        (each.settings, each.smallest_card_bytes, each.peak_reserved_bytes,
         "?" if each.fits is None else "yes" if each.fits else "no")
        for each in report.what_if
    ]  # fmt: skip
    for name, card, reserved, fits in rows:
        table.add_row(Text(name), f"{in_unit(card, unit):.3f}", f"{in_unit(reserved, unit):.3f}", fits)
    return table
