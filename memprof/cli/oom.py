"""``memprof oom [LOG]``: the text of an out-of-memory error, in words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memprof.cli._options import AsJson, FittingUnit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memprof.snapshots.message import Message


def oom(
    log: Annotated[
        Path, typer.Argument(help="A log with the error, or - for what is piped in.", show_default=True)
    ] = Path("-"),
    json: AsJson = False,
    unit: FittingUnit = None,
) -> None:
    """Explain the numbers of an out-of-memory error, and say which remedy they point to.

    The last such message of the log counts. For who held the memory, line by line, see memprof snapshot.

    Examples:

    memprof oom train.log

    python train.py 2>&1 | memprof oom

    memprof oom <(dmesg)
    """
    from memprof.snapshots.message import read
    from memprof.units import unit_for

    unit_for(0, unit)  # a wrong unit is told before anything is read
    message = read(_lines(log))
    if json:
        import json as encoder

        typer.echo(encoder.dumps(message.to_json(), indent=1))
    else:
        _show(message, unit)


def _lines(log: Path) -> Iterator[str]:
    """The lines of a log, cut where they are absurdly long."""
    import sys

    from memprof.errors import DataError, UsageError
    from memprof.snapshots.message import LONGEST_LINE

    if str(log) == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError("give the log's name, or pipe the error in: python train.py 2>&1 | memprof oom")
        source = sys.stdin.buffer
    else:
        _check_kind(log)
        try:
            source = log.open("rb")
        except OSError as error:
            raise DataError(f"cannot read {log}: {error.strerror or error}") from None
    with source:
        try:
            while line := source.readline(LONGEST_LINE):
                yield line.decode("utf-8", "replace")
        except OSError as error:
            raise DataError(f"cannot read {log}: {error.strerror or error}") from None


def _check_kind(log: Path) -> None:
    """Raise DataError for a device, or a pipe that has a name: nobody may ever write to it, or cease to.

    What the shell has opened already is read: ``memprof oom <(dmesg)`` names ``/dev/fd/63``.
    """
    from memprof.errors import DataError
    from memprof.files import kind_of

    opened = str(log).startswith(("/dev/fd/", "/dev/stdin", "/proc/self/fd/"))
    if not opened and (kind := kind_of(log)) in ("a pipe", "a device", "a socket"):
        raise DataError(f"cannot read {log}: it is {kind}; give a file, or pipe the text in: ... | memprof oom")


def _show(message: Message, asked_unit: str | None) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from memprof.reports._paper import Screen
    from memprof.snapshots.message import explain, hints
    from memprof.units import in_unit, unit_for

    unit = unit_for(max(message.capacity or 0, message.asked), asked_unit)
    console = Screen(highlight=False)
    gpu = "" if message.device is None else f" on GPU {message.device}"
    last = f", the last of {message.count:,}" if message.count > 1 else ""
    console.print(Text(f"Out of memory{gpu}{last}", style="bold red"))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("what", no_wrap=True)
    table.add_column(unit, justify="right", no_wrap=True)
    table.add_column("which is", overflow="fold", ratio=1)
    for name, n_bytes, words in explain(message):
        table.add_row(name, f"{in_unit(n_bytes, unit):.2f}", words)
    console.print(table)
    console.print("What the numbers point to")
    for hint in hints(message, asked_unit):
        mark = Text("  yes  ", style="bold green") if hint.points_to_it else Text("  no   ")
        console.print(mark + Text(hint.remedy, style="bold" if hint.points_to_it else "") + Text(f": {hint.why}"))
