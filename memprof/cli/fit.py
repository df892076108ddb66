"""``memprof fit``: what fits on a card of a given size, and what would have to give."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from memprof.cli import _options as opt

if TYPE_CHECKING:
    from memprof.analysis.fit import Fit


def fit(
    gpu: Annotated[
        str,
        typer.Option(
            "--gpu", help="The card: h100, a100, 4090, ..., or its memory, as 8GiB.", callback=opt.card_or_size
        ),
    ],
    model: opt.Model = "internvl2-2b",
    method: Annotated[str, typer.Option("--method", help="Pruning method, as topv:keep=0.25.")] = "baseline",
    stack: opt.StackName = "current",
    tiles: Annotated[
        int | None,
        typer.Option("--tiles", min=1, help="Tiles of an image, thumbnail included; default: the most."),
    ] = None,
    images: Annotated[int, typer.Option("--images", min=1, help="Images in the prompt.")] = 1,
    text_tokens: Annotated[int, typer.Option("--text-tokens", min=0, help="Tokens of the question.")] = 53,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens of the answer.")] = 16,
    max_tiles: opt.MaxTiles = None,
    attention: opt.Attention = "sdpa",
    weights: opt.Weights = "random",
    dtype: opt.Dtype = None,
    context: Annotated[
        str | None,
        typer.Option("--context", help="What the CUDA context takes; default 500MiB, which may be 150 MiB off."),
    ] = None,
    unit: opt.FittingUnit = None,
    json: opt.AsJson = False,
) -> None:
    """Say how many tiles, images and new tokens fit on a card, or which share of the visual tokens; all predicted.

    Counted are what the caching allocator reserves (fragmentation included) and the CUDA context. Each thing is
    stretched alone, with the others as asked.

    Examples:
    memprof fit --gpu 8GiB --model internvl2-2b

    memprof fit --gpu 24GiB --model internvl2-8b --method topv:keep=0.25 --tiles 40

    memprof fit --gpu h100 --model internvl2-26b --max-new-tokens 512

    memprof fit --gpu 6GiB --stack paper --method topv --context 600MiB --json
    """
    from memprof import api
    from memprof.errors import DoesNotFit
    from memprof.units import check_unit, unit_for

    if unit is not None:
        check_unit(unit)
    found = api.fits(
        gpu, model, context=context, method=method, stack=stack, dtype=dtype, attention=attention, weights=weights,
        max_new_tokens=max_new_tokens, max_tiles=max_tiles, tiles=tiles if tiles is not None else max_tiles,
        images=images, question_tokens=text_tokens,
    )  # fmt: skip
    if found.refusal:
        raise DoesNotFit(found.refusal)
    if json:
        import json as _json

        sys.stdout.write(_json.dumps({"schema": 1, **found.to_json()}, indent=1, ensure_ascii=False) + "\n")
    else:
        _print(found, unit_for(found.gpu_bytes, unit))


def _print(found: Fit, unit: str) -> None:
    from rich import box
    from rich.table import Table

    from memprof.analysis.fit import as_text
    from memprof.gpus import CARDS
    from memprof.reports._paper import Screen
    from memprof.units import format_bytes

    console = Screen(highlight=False)
    need, named = found.need, found.gpu in CARDS
    card = f"{found.gpu} of {format_bytes(found.gpu_bytes, unit)}" if named else format_bytes(found.gpu_bytes, unit)
    console.print(
        f"[bold]{found.model}[/], {found.method}, {found.stack} stack, {found.dtype}, on "
        f"{card}: {'fits' if found.fits else 'does not fit'}, predicted"
    )
    console.print(
        f"needs {format_bytes(need.device_bytes, unit)}: {format_bytes(found.static_bytes, unit)} of weights and "
        f"workspaces, {format_bytes(need.allocated_bytes - found.static_bytes, unit)} above them (most held by "
        f"{need.held_by}), "
        f"{format_bytes(need.reserved_bytes - need.allocated_bytes, unit)} reserved and unused, "
        f"{format_bytes(found.context_bytes, unit)} of CUDA context (assumed)"
    )
    table = Table(box=box.HORIZONTALS, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for name in ("what", "asked", "largest", "needs", "note"):
        table.add_column(name, justify="right" if name in ("asked", "largest", "needs") else "left")
    for row in as_text(found, unit):
        table.add_row(*row.values())
    console.print(table)
    if found.give:
        console.print("What would make it fit: " + "; ".join(found.give))
