"""``memprof list``: every model, method, task and device, with fields and defaults. Loads no torch."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from memprof.cli import _options as opt

Rows = Sequence[dict[str, Any]]


def list(
    kind: Annotated[str, typer.Argument(help="all, models, methods, tasks or devices.")] = "all",
    json: opt.AsJson = False,
) -> None:
    """Show what memprof knows: models, methods with their papers and fields, tasks, devices.

    Examples:
    memprof list

    memprof list methods

    memprof list --json
    """
    from memprof.errors import UnknownName

    kinds = {"models": _models, "methods": _methods, "tasks": _tasks, "devices": _devices}
    if kind != "all" and kind not in kinds:
        raise UnknownName("kind", kind, ["all", *kinds])
    found = {name: rows() for name, rows in kinds.items() if kind in ("all", name)}
    if json:
        import json as _json

        typer.echo(_json.dumps({"schema": 1, **found}, indent=1, ensure_ascii=False))
        return
    _show(found)


def _models() -> Rows:
    from memprof.families import all_cards

    return [
        {
            "name": card.name, "family": family.title, "hub": card.hub, "dtype": card.dtype,
            "layers": card.text["num_hidden_layers"], "source": card.source,
        }
        for family, card in all_cards().values()
    ]  # fmt: skip


def _methods() -> Rows:
    from memprof.pruning import METHODS

    return [
        {
            "name": name, "title": cls.title, "paper": cls.paper, "reference": cls.reference, "departs": cls.departs,
            "fields": [
                {"name": f.name, "default": f.default, "help": f.metadata["help"], "origin": f.metadata["origin"],
                 "choices": f.metadata["choices"]}
                for f in dataclasses.fields(cls)
            ],
        }
        for name, cls in METHODS
    ]  # fmt: skip


def _tasks() -> Rows:
    from memprof.tasks import TASKS

    return [{"name": n, "title": c.title, "paper": c.paper, "metric": c.metric, "hub": c.hub} for n, c in TASKS]


def _devices() -> Rows:
    # Read off the files' first lines: importing a meter would load torch.
    rows = []
    for name in ("cuda", "sim", "cpu"):
        spec = importlib.util.find_spec(f"memprof.meters.{name}")
        if spec is not None and spec.origin is not None:
            with open(spec.origin, encoding="utf-8") as file:
                rows.append({"name": name, "about": file.readline().strip().strip('"')})
    return rows


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for kind, rows in found.items():
        console.print(f"[bold]{kind}[/bold]")
        if kind == "methods":
            for row in rows:
                console.print(_method(row))
            continue
        columns = {
            "models": ("name", "layers", "dtype", "hub"),
            "tasks": ("name", "title", "metric"),
            "devices": ("name", "about"),
        }[kind]
        table = Table(*columns, box=None, pad_edge=False, header_style="dim")
        for row in rows:
            table.add_row(*(str(row[c] if row[c] is not None else "-") for c in columns))
        console.print(table)
        console.print()


def _method(row: dict[str, Any]) -> Any:
    """A method's name, paper, reference code and departures, then its fields, each on its own lines."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    about = Table.grid(padding=(0, 2))
    about.add_column(style="dim", no_wrap=True)
    about.add_column()
    for name in ("paper", "reference", "departs"):
        if row[name]:
            about.add_row(name, Text(row[name]))
    for f in row["fields"]:
        choices = f" ({'|'.join(map(str, f['choices']))})" if f["choices"] else ""
        line = Text(f"{f['help']}{choices}")
        line.append(f"  {f['origin']}", style="dim")
        about.add_row(Text(f"{f['name']}={f['default']}", style="default"), line)
    return Group(Text(row["name"], style="bold cyan"), Padding(about, (0, 0, 1, 2)))
