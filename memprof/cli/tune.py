"""``memprof tune``: from a budget of bytes, or a loss that is allowed, to a pruning ratio."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memprof.cli import _options as opt

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from memprof.tuning import Question, Trial

_CONTROLS = ("random", "uniform")


def tune(
    model: opt.Model = "internvl2-2b",
    method: opt.Methods = ["topv"],  # noqa: B006 - typer copies it
    task: opt.TaskName = "ai2d",
    budget: Annotated[
        str | None, typer.Option("--budget", help="Highest allocated memory, weights included, as 5.2GiB.")
    ] = None,
    max_loss: Annotated[
        float | None, typer.Option("--max-loss", help="Most that may be lost, as 0.02; where weights are trained.")
    ] = None,
    objective: Annotated[
        str, typer.Option("--objective", help="What is made small beside the loss: memory, flops or time.")
    ] = "memory",
    search: Annotated[
        str | None,
        typer.Option("--search", help="Fields to search, as keep,layer; default: what the trials can judge."),
    ] = None,
    trials: Annotated[int, typer.Option("--trials", min=1, help="Trials in all, of all workers together.")] = 40,
    controls: Annotated[
        bool, typer.Option("--controls", help="Tune random and uniform selection beside them.")
    ] = False,
    device: opt.Device = "auto",
    stack: opt.StackName = "current",
    limit: opt.Limit = None,
    max_new_tokens: opt.NewTokens = None,
    max_tiles: opt.MaxTiles = None,
    data: opt.Data = "bundled",
    weights: opt.Weights = "random",
    dtype: opt.Dtype = None,
    seed: opt.Seed = 0,
    storage: Annotated[
        str | None,
        typer.Option(
            "--storage", help="Where workers share trials: journal:///FILE or a database URL, as Optuna has it."
        ),
    ] = None,
    study: Annotated[str | None, typer.Option("--study", help="Name in the storage; default: by the question.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The session's folder; one that was cut goes on there.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the front into this folder.")] = None,
    unit: opt.FittingUnit = None,
    json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Find the setting that loses least within a budget, or costs least within a loss, and show the front.

    One number per method against a budget is closed in on with at most ten evaluations; several fields are sampled by
    Optuna. What is predicted not to fit is never launched on a card, and each measured trial is a process of its own.

    Examples:
    memprof tune --method topv --task ai2d --budget 5.2GiB --stack paper --device sim

    memprof tune --method topv --method fastv --controls --budget 5GiB --search keep,layer --plot plots/

    memprof tune --model proving --method topv --max-loss 0.02 --device cpu --trials 30

    memprof tune --budget 20GiB --device cuda --storage postgresql://me@host/tuning    (once per GPU or SLURM task)
    """
    from memprof import api
    from memprof.runner import complete_spec
    from memprof.telling.facts import slug
    from memprof.tuning import Question
    from memprof.units import check_unit, parse_size

    if unit is not None:
        check_unit(unit)
    _need_optuna()
    spec = api.spec(
        model, "baseline", task, device, stack=stack, dtype=dtype, weights=weights, data=data,
        max_new_tokens=max_new_tokens, max_tiles=max_tiles, limit=limit, seed=seed,
    )  # fmt: skip
    question = Question(
        spec=complete_spec(spec)[0],
        methods=(*method, *(name for name in _CONTROLS if controls and name not in method)),
        budget_bytes=parse_size(budget) if budget is not None else None,
        max_loss=max_loss,
        objective=objective,
        search=tuple(name.strip() for name in search.split(",")) if search is not None else None,
    )
    folder = output or Path("runs") / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_tune_{slug(spec.model)}_{task}"
    _session(question, folder, storage, study, trials, plot, unit, as_json=json, quiet=quiet)


def _need_optuna() -> None:
    import importlib.util

    from memprof.errors import MemprofError

    if importlib.util.find_spec("optuna") is None:
        raise MemprofError("memprof tune needs Optuna: pip install 'memprof-vlm[tune]'")


def _session(
    question: Question, folder: Path, storage: str | None, study: str | None, trials: int, plot: Path | None,
    unit: str | None, *, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Work on the study until it is done, then say what it found."""
    from memprof.lines import masked
    from memprof.meters import METERS
    from memprof.stopping import kept
    from memprof.tuning import Evaluate, answer
    from memprof.tuning.preset import preset_of, write_preset
    from memprof.tuning.study import Session, open_storage, study_name
    from memprof.tuning.trials import Measurer, Predictor, card_bytes
    from memprof.units import GIB, unit_for

    METERS.load(question.spec.device).check()
    url = storage or f"journal://{(folder / 'study.journal').absolute()}"
    evaluate: Evaluate
    predictor = Predictor(question.spec) if question.spec.device in ("sim", "cuda") else None
    if question.measured:
        evaluate = Measurer(question, folder / "trials", predictor, card_bytes() if predictor else None)
    else:
        assert predictor is not None
        evaluate = predictor
    session = Session(question, open_storage(url), study or study_name(question))
    words = f"finished trials are kept; the same command with -o {folder} goes on"
    shown = _watch(question, unit_for(question.budget_bytes or GIB, unit), quiet=quiet or as_json)
    with kept(lambda: words), shown as tell:
        rows = session.work(evaluate, trials, tell)
    unit = unit_for(max((row.result.peak_allocated_bytes for row in rows if row.result), default=GIB), unit)
    best = answer.best_of(question, rows)
    document: dict[str, Any] = {
        "schema": 1,
        "question": question.to_json(),
        "study": session.study.study_name,
        "storage": masked(url),
        "path": str(folder),
        "best": best.to_json() if best else None,
        "methods": {m: t.to_json() if t else None for m, t in answer.best_by_method(question, rows).items()},
        "front": [trial.to_json() for trial in answer.front_of(question, rows)],
        "floor": floor.to_json() if (floor := answer.floor_of(rows)) else None,
        "trials": len(rows),
        "all_trials": [trial.to_json() for trial in rows],
        "sensitivity": {"how": answer.SENSITIVITY, "fields": answer.sensitivity(question, rows)},
        "preset": None,
        "figures": [],
    }
    if best is not None:
        preset = folder / "preset.json"
        write_preset(preset, preset_of(question.spec, best.method), {"question": question.to_json(), **best.to_json()})
        document["preset"] = str(preset)
    if plot is not None and document["front"]:
        document["figures"] = _draw(question, rows, plot, unit)
    if as_json:
        import json as _json

        sys.stdout.write(_json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    else:
        _print(question, rows, document, unit)
    if best is None:
        static = predictor.static_bytes if predictor is not None else None
        raise answer.nothing_found(question, rows, static, unit)


def _draw(question: Question, rows: Sequence[Trial], out: Path, unit: str) -> list[str]:
    """The front as a figure, with the data it was drawn from."""
    import dataclasses

    from memprof import figures
    from memprof.environment import environment
    from memprof.figures.kinds.front import front_data
    from memprof.records import Run, RunRecord

    status = "measured" if question.measured else "predicted"
    runs = [
        Run(RunRecord(dataclasses.replace(question.spec, method=m), status, environment(), data_label=""), [])  # type: ignore[arg-type]
        for m in question.methods
    ]
    points = [
        {
            "method": row.method, "peak_bytes": row.result.peak_allocated_bytes, "x": row.result.forgone,
            "fits": row.fits, "params": row.params,
        }
        for row in rows if row.whole and row.result
    ]  # fmt: skip
    label = "loss" if question.quality else "share of visual tokens pruned, mean over layers"
    name = f"{question.spec.model}_{question.spec.task}_tuned"
    data = front_data(points, runs, name, x_label=label, budget_bytes=question.budget_bytes)
    data["provenance"]["samples"] = str(question.spec.limit or "all")
    return [str(path) for path in figures.draw_data([data], out, unit=unit)]


class _watch:
    """A live table of trials on stderr, and only on a terminal."""

    def __init__(self, question: Question, unit: str, *, quiet: bool) -> None:
        from rich.live import Live

        from memprof.reports._paper import Screen

        console = Screen(stderr=True)
        self.question, self.unit = question, unit
        self.live = None if quiet or not console.is_terminal else Live(console=console, auto_refresh=False)

    def __enter__(self) -> Callable[[list[Trial]], None]:
        if self.live is not None:
            self.live.__enter__()
        return self._update

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.live.__exit__(None, None, None)

    def _update(self, rows: list[Trial]) -> None:
        if self.live is not None:
            shown = rows[-max(5, self.live.console.height - 6) :]
            self.live.update(_table(self.live.console, self.question, shown, self.unit), refresh=True)


def _table(console: Console, question: Question, rows: Sequence[Trial], unit: str) -> RenderableType:
    """Trials, one a row."""
    from memprof.plugins import split_spec
    from memprof.reports._fitting import fitting
    from memprof.telling.palette import method_colour
    from memprof.units import in_unit

    fields = list(dict.fromkeys(f.name for own in question.fields.values() for f in own))
    lost = "loss" if question.quality else "pruned"
    sizes = [f"peak ({unit})"] + [f"total ({unit})"] * any(row.result and row.result.device_bytes for row in rows)
    styles, cells = list[str](), list[list[str]]()
    for row in rows:
        name, values = split_spec(row.method)
        found = row.result
        known = found is not None and found.status != "failed"
        held = (found.peak_allocated_bytes, found.device_bytes) if found else (0, 0)
        styles.append(method_colour(name))
        cells.append([
            name, str(row.number), *(str(row.params.get(field, values.get(field, "-"))) for field in fields),
            *(f"{in_unit(n_bytes, unit):.3f}" if n_bytes else "-" for n_bytes in held[: len(sizes)]),
            {True: "yes", False: "no", None: "-"}[row.fits],
            f"{found.forgone:.3f}" if found and known else "-",
            f"{100 * found.visual_flops_cut:.1f} %" if found and known else "-",
            found.status if found else "running",
        ])  # fmt: skip
    return fitting(console, styles, ["method", "trial", *fields, *sizes, "fits", lost, "FLOPs cut", "status"], cells)


def _print(question: Question, rows: Sequence[Trial], document: dict[str, Any], unit: str) -> None:
    """The front, the answer, and what each field does."""
    from memprof.reports._paper import Screen
    from memprof.tuning import answer
    from memprof.units import format_bytes

    console = Screen(highlight=False, soft_wrap=True)
    status = "measured" if question.measured else "predicted"
    console.print(
        f"[bold]front: {question.spec.model} on {question.spec.task}, {question.spec.stack} stack, {status}[/]"
    )
    console.print(_table(console, question, answer.front_of(question, rows), unit))
    if any(row.result and row.result.device_bytes for row in rows):
        console.print("total: peak, cached and the CUDA context, as nvidia-smi shows it", style="dim")
    if not question.quality:
        console.print("pruned: share of visual tokens that are not held, mean over all layers", style="dim")
    for method, best in answer.best_by_method(question, rows).items():
        if best is None or best.result is None:
            console.print(f"{method}: nothing fits")
            continue
        peak = format_bytes(best.result.peak_allocated_bytes, unit)
        console.print(f"{method}: [bold]{best.method}[/] needs {peak}")
    for row in document["sensitivity"]["fields"]:
        span = format_bytes(row["span_bytes"], unit)
        console.print(
            f"{row['method']} {row['field']}: {100 * row['share']:.0f} % of how peaks vary, {span}", style="dim"
        )
    if document["sensitivity"]["fields"]:
        console.print(f"({answer.SENSITIVITY})", style="dim")
    if document["preset"]:
        console.print(f"{len(rows)} trial{'s' * (len(rows) != 1)}; memprof run --preset {document['preset']}")
    for path in document["figures"]:
        console.print(path)
