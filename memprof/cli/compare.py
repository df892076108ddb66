"""``memprof compare``: every method at several budgets, in one table and one figure."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memprof.cli import _options as opt

if TYPE_CHECKING:
    from collections.abc import Callable

    from memprof.records import Run


def compare(
    model: opt.Model = "internvl2-2b",
    task: opt.TaskName = "ai2d",
    keep: Annotated[str, typer.Option("--keep", help="Budgets: shares of visual tokens kept.")] = "0.5,0.25,0.125",
    methods: Annotated[
        str | None, typer.Option("--methods", help="Names, with commas; default: all, unless --method names some.")
    ] = None,
    method: opt.Methods = [],  # noqa: B006 - typer copies it
    device: opt.Device = "auto",
    stack: opt.StackName = "current",
    limit: opt.Limit = None,
    max_new_tokens: opt.NewTokens = None,
    max_tiles: opt.MaxTiles = None,
    data: opt.Data = "bundled",
    weights: opt.Weights = "random",
    dtype: opt.Dtype = None,
    gpu: opt.Gpu = None,
    seed: opt.Seed = 0,
    fidelity: opt.Fidelity = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of runs, table and figure; default: one in runs/.")
    ] = None,
    unit: opt.FittingUnit = None,
    json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Compare methods at several budgets: memory, KV held and as published, time and quality where there are any.

    Runs are kept in the folder and taken up again, so that a comparison that was cut short goes on where it was. A
    method that the model cannot run is left out, and the table says why.

    Examples:
    memprof compare --model internvl2-2b --task ai2d --keep 0.5,0.25,0.125

    memprof compare --model proving --methods topv,fastv,random --limit 64

    memprof compare --model proving --method topv:sigma=0.1 --method topv:score=cost --keep 0.5
    """
    from memprof import api, figures
    from memprof.analysis import compare as study
    from memprof.cli.run import _judge
    from memprof.runner import complete_spec
    from memprof.stopping import kept
    from memprof.telling import facts
    from memprof.units import check_unit, unit_for

    if unit is not None:
        check_unit(unit)
    named = methods.split(",") if methods else [] if method else ["all"]
    specs = study.method_specs([*(name.strip() for name in named), *method], _shares(keep))
    asked = complete_spec(
        api.spec(
            model, "baseline", task, device, stack=stack, dtype=dtype, weights=weights, data=data,
            max_new_tokens=max_new_tokens, max_tiles=max_tiles, limit=limit, seed=seed, gpu=gpu,
        )
    ).spec  # fmt: skip
    folder = output or Path("runs") / f"compare_{facts.slug(asked.model)}_{asked.task}"
    judge = _judge(asked, fidelity)
    words = f"finished samples are kept; the same command with -o {folder} goes on"
    with kept(lambda: words), _progress(len(specs), quiet=quiet or json) as (begin, sample):
        found = study.make(asked, specs, folder, judge=judge, begin=begin, progress=sample)
    document = study.document(found)
    unit = unit_for(max(row["dynamic_peak_bytes"] for row in document["rows"]), unit)
    text = study.told(document, unit)
    files = study.write(document, text, folder)
    if len(document["rows"]) > 1:  # beside Baseline there may be none that the model can run
        files += list(figures.draw_data([study.figure(document)], folder, width="double", unit=unit))
    if json:
        import json as encoder

        sys.stdout.write(encoder.dumps(document, indent=1, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write(text + "".join(f"{path}\n" for path in files))


def _shares(text: str) -> list[float]:
    """``'0.5,0.25'`` as numbers; raises BadValue."""
    from memprof.errors import BadValue

    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        raise BadValue(f"--keep {text!r} is no list of shares; write for example 0.5,0.25,0.125") from None
    if not all(0 < share <= 1 for share in shares):
        raise BadValue(f"--keep {text!r}: a share kept lies above 0 and is at most 1")
    return shares


class _progress:
    """One bar on stderr, and only on a terminal: methods done, and the sample under way."""

    def __init__(self, total: int, *, quiet: bool) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        from memprof.reports._paper import Screen

        console = Screen(stderr=True)
        self.bar = Progress(
            BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn(),
            console=console, disable=quiet or not console.is_terminal,
        )  # fmt: skip
        self.total, self.done, self.method = total, -1, ""

    def __enter__(self) -> tuple[Callable[[str], None], Callable[[Run, int], None]]:
        self.bar.__enter__()
        self.row = self.bar.add_task("", total=self.total)
        return self._begin, self._sample

    def __exit__(self, *error: Any) -> None:
        self.bar.__exit__(None, None, None)

    def _begin(self, method: str) -> None:
        self.done, self.method = self.done + 1, method
        self.bar.update(self.row, completed=self.done, description=method)

    def _sample(self, run: Run, total: int) -> None:
        self.bar.update(self.row, description=f"{self.method}: sample {len(run.samples)} of {total}")
