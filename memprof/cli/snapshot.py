"""``memprof snapshot FILE``: a torch CUDA snapshot, read safely."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from memprof.analysis.snapshot import SnapshotReport


def snapshot(
    file: Annotated[
        Path,
        typer.Argument(help="What torch.cuda.memory._dump_snapshot() or memprof report wrote.", show_default=False),
    ],
    what_if: Annotated[
        list[str] | None,
        typer.Option(
            "--what-if",
            metavar="OPTION=VALUE",
            help="Reserved under another allocator setting, such as expandable_segments=True; repeatable.",
            show_default=False,
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=0, help="How many call sites to name.")] = 10,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
    unit: Annotated[str, typer.Option(help="GiB, GB, MiB or MB.")] = "GiB",
) -> None:
    """Tell who held the peak of a CUDA memory snapshot, how fragmented it was, and what other settings would save.

    The file is read without running anything in it: whatever is not plain data is refused.

    Examples:

    memprof snapshot memory.pickle

    memprof snapshot memory.pickle --what-if expandable_segments=True --json
    """
    from memprof.analysis.snapshot import analyse
    from memprof.units import check_unit

    check_unit(unit)
    report = analyse(file, what_if or [], top)
    if json:
        import json as encoder

        typer.echo(encoder.dumps(report.to_json(), indent=1, ensure_ascii=False))
    else:
        _show(report, unit)


def _show(report: SnapshotReport, unit: str) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    where = f"{report.status}, GPU {report.device}, {report.events:,} events, settings {report.settings}"
    console.print(f"{report.file}: {where}")
    console.print(_summary(report, unit))
    if report.holders:
        console.print(_holders(report, unit))
    if report.what_if:
        console.print(_what_if(report, unit))
    console.print(_verdict(report))


def _table(title: str, *numbers: str, first: str) -> Table:
    """A table whose first column may fold, and whose numbers never do."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="fold", ratio=1)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _summary(report: SnapshotReport, unit: str) -> Table:
    from memprof.units import in_unit

    at_peak = report.fragmentation
    rows = [
        ("peak allocated", report.peak_allocated_bytes),
        ("peak reserved", report.peak_reserved_bytes),
        ("reserved at the allocated peak", at_peak.reserved_bytes),
        ("  of it cached, not allocated", at_peak.cached_bytes),
        ("  of that stuck in segments in use", at_peak.stuck_bytes),
        ("  largest free block", at_peak.largest_free_block_bytes),
    ]
    table = _table("Memory", unit, "of reserved", first="what")
    for name, n_bytes in rows:
        share = f"{n_bytes / at_peak.reserved_bytes:.1%}" if at_peak.reserved_bytes else "-"
        table.add_row(name, f"{in_unit(n_bytes, unit):.3f}", share)
    return table


def _holders(report: SnapshotReport, unit: str) -> Table:
    from rich.text import Text

    from memprof.units import in_unit

    table = _table("Largest holders at the peak", unit, "share", "blocks", first="call site")
    for holder in report.holders:
        amount = f"{in_unit(holder.bytes, unit):.3f}"
        table.add_row(Text(holder.site), amount, f"{holder.share:.1%}", f"{holder.blocks:,}")
    return table


def _what_if(report: SnapshotReport, unit: str) -> Table:
    from rich.text import Text

    from memprof.units import in_unit

    table = _table("What if (predicted)", f"reserved {unit}", f"saved {unit}", first="settings")
    table.add_row(
        Text(f"{report.settings} (as recorded)"), f"{in_unit(report.what_if[0].baseline_reserved_bytes, unit):.3f}", ""
    )
    for answer in report.what_if:
        reserved, saved = in_unit(answer.peak_reserved_bytes, unit), in_unit(answer.saved_bytes, unit)
        table.add_row(Text(answer.settings), f"{reserved:.3f}", f"{saved:+.3f}")
    return table


def _verdict(report: SnapshotReport) -> str:
    check = report.replay
    counts = (
        f"{check.addresses_matched:,} of {check.addresses_total:,} addresses and "
        f"{check.segments_matched:,} of {check.segments_total:,} segments"
    )
    trust = "exact" if check.exact else "not exact: trust the what-if answers less"
    return f"Replay: the model of the allocator met {counts} ({trust})."
