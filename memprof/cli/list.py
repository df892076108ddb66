"""``memprof list``: every model, method, task, device and card, with fields and defaults. Loads no torch."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memprof.cli import _options as opt

if TYPE_CHECKING:
    from memprof.families import Model
    from memprof.reports._paper import Screen

#: Where a field's default comes from, in words.
ORIGINS = {
    "paper": "as in the paper", "code": "as in its code", "memprof": "memprof's choice",
    "second-hand": "as others describe it",
}  # fmt: skip
Rows = Sequence[dict[str, Any]]


def list(
    kind: Annotated[str, typer.Argument(help="all, models, methods, tasks, devices or cards.")] = "all",
    json: opt.AsJson = False,
) -> None:
    """Show what memprof knows: models, methods with their papers and fields, tasks, devices, cards to predict for.

    Examples:
    memprof list

    memprof list methods

    memprof list --json
    """
    from memprof.errors import UnknownName

    kinds = {"models": _models, "methods": _methods, "tasks": _tasks, "devices": _devices, "cards": _cards}
    if kind != "all" and kind not in kinds:
        raise UnknownName("kind", kind, ["all", *kinds])
    found = {name: rows() for name, rows in kinds.items() if kind in ("all", name)}
    if json:
        import json as _json

        typer.echo(_json.dumps({"schema": 1, **found}, indent=1, ensure_ascii=False))
        return
    _show(found)


def _models() -> Rows:
    from memprof.models.find import named

    return [
        {
            "name": one.name, "family": one.family.title, "hub": one.hub, "dtype": one.dtype, "layers": one.layers,
            "hidden": one.hidden, "kv_bytes_per_token": _kv_bytes(one), "source": one.source,
        }
        for one in named().values()
    ]  # fmt: skip


def _kv_bytes(model: Model) -> int:
    """What one token takes in the caches of all layers, keys and values, in the model's own dtype."""
    return 2 * model.layers * model.kv_numbers * (4 if model.dtype == "float32" else 2)


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
                rows.append({"name": name, "about": file.readline().strip().strip('"').replace("``", "")})
    return rows


def _cards() -> Rows:
    from memprof.gpus import CARDS, DEFAULT, calibrated

    return [
        {
            "name": card.name, "memory_bytes": card.memory_bytes, "capability": ".".join(map(str, card.capability)),
            "context_bytes": calibrated(card).context_bytes, "measured": bool(calibrated(card).measured),
            "default": card.name == DEFAULT, "source": card.source,
        }
        for card in CARDS.values()
    ]  # fmt: skip


def _show(found: dict[str, Any]) -> None:
    from rich.table import Table

    from memprof.reports._paper import Screen

    console = Screen()
    for kind, rows in found.items():
        console.print(f"[bold]{kind}[/bold]")
        if kind == "methods":
            for row in rows:
                console.print(_method(row))
            continue
        if kind == "cards":
            rows = [_card(row) for row in rows]
        if kind == "models":
            _show_models(console, rows)
            continue
        columns = {
            "tasks": ("name", "title", "metric"),
            "devices": ("name", "about"),
            "cards": ("name", "memory", "context", "note"),
        }[kind]
        table = Table(box=None, pad_edge=False, header_style="dim")
        for column in columns:
            table.add_column(column, no_wrap=column == "name", overflow="fold")
        for row in rows:
            table.add_row(*(str(row[c] if row[c] is not None else "-") for c in columns))
        console.print(table)
        console.print()


def _show_models(console: Screen, rows: Rows) -> None:
    """A table where it has its room, else the hub's id below each name: ids stay whole, to be copied."""
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    columns = ("name", "family", "layers", "hidden", "dtype", "hub")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*(Text(str(row[c] if row[c] is not None else "-")) for c in columns))
    if Measurement.get(console, console.options.update(width=10_000), table).maximum <= console.width:
        console.print(table)
    else:
        for row in rows:
            about = f"  {row['family']}, {row['layers']} layers, hidden {row['hidden']}, {row['dtype']}"
            console.print(Text(row["name"], style="bold").append(about, style="not bold"), highlight=False)
            if row["hub"]:
                console.print(Text(f"  {row['hub']}"), soft_wrap=True, highlight=False)
    console.print()


def _card(row: dict[str, Any]) -> dict[str, Any]:
    from memprof.units import format_bytes

    notes = ["predicted for where no card is named"] * row["default"] + ["context measured" if row["measured"] else ""]
    return {
        "name": row["name"], "memory": format_bytes(row["memory_bytes"], digits=1),
        "context": format_bytes(row["context_bytes"], "MiB", 0), "note": "; ".join(filter(None, notes)),
    }  # fmt: skip


def _method(row: dict[str, Any]) -> Any:
    """A method's name, paper, reference code and departures, then its fields, each on its own lines."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    about = Table.grid(padding=(0, 2))
    about.add_column(style="dim", no_wrap=True)
    about.add_column()
    for name, key in (("paper", "paper"), ("reference", "reference"), ("differs", "departs")):
        if row[key]:
            about.add_row(name, Text(row[key]))
    for f in row["fields"]:
        choices = f" ({'|'.join(map(str, f['choices']))})" if f["choices"] else ""
        line = Text(f"{f['help']}{choices}".replace("second-hand", ORIGINS["second-hand"]))
        line.append(f"  {ORIGINS.get(f['origin'], f['origin'])}", style="dim")
        about.add_row(Text(f"{f['name']}={f['default']}", style="default"), line)
    return Group(Text(row["name"], style="bold cyan"), Padding(about, (0, 0, 1, 2)))
