"""``memprof runs``: what was run, newest first."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memprof.cli import _options as opt

if TYPE_CHECKING:
    from memprof.records import RunRecord


def runs(
    limit: Annotated[int, typer.Option("--limit", min=1, help="The newest N only.")] = 20,
    unit: opt.FittingUnit = None,
    json: opt.AsJson = False,
) -> None:
    """List the runs in runs/ and those saved elsewhere, newest first: when, model, methods, data, status, peak.

    Each may be named to other commands by any part of its name that no other run has; the newest is called latest.

    Examples:
    memprof runs

    memprof report latest

    memprof explain latest/topv
    """
    from memprof.cli._runs import recent
    from memprof.units import check_unit

    if unit is not None:
        check_unit(unit)
    known = recent()
    rows = [_row(folder) for folder in known[:limit]]
    if json:
        import json as encoder

        typer.echo(encoder.dumps({"schema": 1, "runs": rows}, indent=1, ensure_ascii=False))
        return
    if not rows:
        typer.echo("no runs yet; start with: memprof run --method baseline --method topv")
        return
    for row in rows:
        _show(row, unit)
    if len(known) > limit:
        typer.echo(f"and {len(known) - limit} older; --limit shows more")


def _row(folder: Path) -> dict[str, Any]:
    from memprof.cli._runs import _written, members
    from memprof.errors import MemprofError
    from memprof.store import read_record

    row: dict[str, Any] = {"path": str(folder), "when": f"{datetime.fromtimestamp(_written(folder)):%Y-%m-%d %H:%M}"}
    try:
        records = [read_record(one) for one in members(folder)]
    except MemprofError as error:
        return row | {"error": str(error).partition("\n")[0]}
    return row | _told(records)


def _told(records: list[RunRecord]) -> dict[str, Any]:
    from memprof.telling import facts
    from memprof.telling.palette import model_label

    def shared(values: list[str]) -> str:
        return ", ".join(dict.fromkeys(values))

    peaks = [record.totals.get("peak_allocated_bytes") for record in records]
    return {
        "model": shared([model_label(r.spec.model) for r in records]),
        "methods": [r.spec.method for r in records],
        "data": shared([facts.data_text(r) for r in records]),
        "status": shared([*(r.status for r in records), *("unfinished" for r in records if not r.complete)]),
        "peak_allocated_bytes": max((peak for peak in peaks if peak), default=None),
    }


def _show(row: dict[str, Any], unit: str | None) -> None:
    from rich.padding import Padding
    from rich.text import Text

    from memprof.plugins import split_spec
    from memprof.reports._paper import Screen
    from memprof.telling.palette import method_label
    from memprof.units import format_bytes, unit_for

    console = Screen(highlight=False)
    console.print(Text(f"{row['when']}  ").append(row["path"], style="bold"), soft_wrap=True)
    if "error" in row:
        console.print(Padding(Text(f"cannot be read: {row['error']}"), (0, 0, 0, 2)))
        return
    peak = row["peak_allocated_bytes"]
    names = list(dict.fromkeys(method_label(split_spec(method)[0]) for method in row["methods"]))
    methods = ", ".join(names if len(names) < 6 else [*names[:5], f"{len(names) - 5} more"])
    high = f"peak {format_bytes(peak, unit_for(peak, unit))}" if peak else "no peak"
    said = " · ".join((row["model"], methods, row["data"], row["status"], high))
    console.print(Padding(Text(said, style="dim"), (0, 0, 0, 2)))
