"""``memprof run``: model x method x task, measured or predicted, into a run folder."""

from __future__ import annotations

import sys
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

import typer

from memprof.cli import _options as opt

if TYPE_CHECKING:
    from memprof.analysis.fidelity import Judge
    from memprof.records import Run, RunSpec


def _use_preset(context: typer.Context, preset: Path | None) -> Path | None:
    """Take what the file says as defaults, so that options beside it still count."""
    if preset is not None:
        from memprof.tuning.preset import read_preset

        context.default_map = {**(context.default_map or {}), **read_preset(preset)}
    return preset


def run(
    model: opt.Model = "internvl2-2b",
    method: opt.Methods = ["baseline"],  # noqa: B006 - typer copies it
    task: opt.TaskName = "ai2d",
    device: opt.Device = "auto",
    stack: opt.StackName = "current",
    limit: opt.Limit = None,
    max_new_tokens: opt.NewTokens = None,
    max_tiles: opt.MaxTiles = None,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Unrecorded samples first, where measuring.")] = 1,
    data: opt.Data = "bundled",
    weights: opt.Weights = "random",
    dtype: opt.Dtype = None,
    gpu: opt.Gpu = None,
    attention: Annotated[
        str, typer.Option("--attention", help="Attention of the language model: sdpa or eager.")
    ] = "sdpa",
    shard: Annotated[
        str | None, typer.Option("--shard", help="i/n: every n-th sample; default: torchrun's or SLURM's, 1/1: all.")
    ] = None,
    seed: opt.Seed = 0,
    fidelity: opt.Fidelity = None,
    preset: Annotated[
        Path | None,
        typer.Option("--preset", callback=_use_preset, is_eager=True, help="Options in a file, as tune writes them."),
    ] = None,
    output: opt.Folder = None,
    resume: Annotated[bool, typer.Option("--resume", help="Finish the run that is in the folder.")] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="With --resume: run the samples again that did not finish.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the run that is in the folder.")] = False,
    unit: opt.FittingUnit = None,
    json: opt.AsJson = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Measure or predict where the memory goes, token by token.

    Examples:
    memprof run --method topv --task ai2d

    memprof run --method baseline --method fastv --method topv:keep=0.25 --stack paper -o runs/paper

    memprof run --model llava-1.5-7b --data my_shapes.csv --json

    memprof run --model proving --method baseline --method topv

    memprof run --preset runs/tuned/preset.json --device sim
    """
    del preset  # its callback has made it the defaults of the others
    from memprof.errors import DataError, DoesNotFit, OutOfMemory, UsageError
    from memprof.families import find_model
    from memprof.records import RunSpec
    from memprof.runner import Bench, complete_spec
    from memprof.runner import run as make_run
    from memprof.simulator.cards import find_card
    from memprof.store import SAMPLES_FILE
    from memprof.tasks import TASKS
    from memprof.units import check_unit

    if unit is not None:
        check_unit(unit)
    card = find_model(model)[1]
    device = opt.resolve_device(device, model, gpu)
    if gpu is not None:
        if device != "sim":
            raise UsageError(f"--gpu {gpu} names a card to predict for; it goes with --device sim")
        find_card(gpu)
    if retry_failed and not resume:
        raise UsageError("--retry-failed goes with --resume")
    if shard is None:
        shard = _inferred_shard()
    elif shard == "1/1":
        shard = None
    asked = [
        RunSpec(
            model=card.name, method=one, task=task, device=device, stack=stack,
            dtype=dtype or card.dtype, attention=attention, weights=weights, data=data,
            max_new_tokens=TASKS.load(task).max_new_tokens if max_new_tokens is None else max_new_tokens,
            max_tiles=max_tiles, limit=limit, shard=shard, warmup=warmup, seed=seed, gpu=gpu,
        )
        for one in method
    ]  # fmt: skip
    specs = [complete_spec(one)[0] for one in asked]  # every mistake shows before a model is built
    paths = folders(output or _new_folder(specs[0]), specs)
    judge = _judge(specs[0], fidelity)
    bench = Bench(specs[0])
    runs: list[Run] = []
    with _watch(specs, quiet=quiet or json, verbose=verbose, unit=unit) as watch:
        for spec, path in zip(specs, paths, strict=True):
            bench.on_recording = partial(watch.recording, spec.method)
            runs.append(
                make_run(
                    spec, path, bench=bench, resume=resume, force=force, retry_failed=retry_failed,
                    progress=watch.sample, judge=judge,
                )
            )  # fmt: skip
    _print(runs, unit, as_json=json)
    failed = [s for one in runs for s in one.samples if not s.ok]
    if failed and resume and not retry_failed:
        every = sum(len(one.samples) for one in runs)
        typer.echo(f"memprof: {len(failed)} of {every} samples failed; --retry-failed runs them again", err=True)
    refused = sum(s.status == "oom" for s in failed)
    count = f"{refused} sample{'s' * (refused != 1)}"
    if refused and runs[0].record.status == "predicted":
        raise DoesNotFit(f"{count} predicted not to fit on {gpu}; {SAMPLES_FILE} says where")
    if refused:
        raise OutOfMemory(f"{count} ran out of memory; {SAMPLES_FILE} says where")
    lost = [one for one in runs if one.samples and not one.finished]
    if lost:
        names = ", ".join(one.record.spec.method for one in lost)
        raise DataError(f"no sample finished under {names}; the first failed with: {lost[0].samples[0].error}")


def _inferred_shard() -> str | None:
    """The share of this process where a launcher started several, which it says on stderr."""
    from memprof.environment import rank_shard

    found = rank_shard()
    if found is None:
        return None
    shard, variable = found
    one, of = shard.split("/")
    typer.echo(
        f"memprof: this process takes sample {one} of every {of} (from {variable}); --shard 1/1 takes all", err=True
    )
    return shard


def _judge(spec: RunSpec, asked: bool | None) -> Judge | None:
    """What compares answers with the unpruned ones, where that is asked for, or not refused and possible."""
    from memprof.analysis.fidelity import Judge, check_weights
    from memprof.errors import UsageError

    runs = spec.device != "sim"
    if asked:
        check_weights(spec.weights)
        if not runs:
            raise UsageError("fidelity compares what a model writes, and --device sim writes nothing; take cuda or cpu")
    return Judge() if asked or (asked is None and runs and spec.weights != "random") else None


def folders(output: Path, specs: list[RunSpec]) -> list[Path]:
    """Where each run goes: ``output`` itself for one method, else a folder in it named after the method."""
    if len(specs) == 1:
        paths = [output]
    else:
        plain = [spec.method.partition(":")[0] for spec in specs]
        safe = [spec.method.replace(":", "_").replace(",", "_") for spec in specs]
        paths = [output / (p if plain.count(p) == 1 else s) for p, s in zip(plain, safe, strict=True)]
    shard = specs[0].shard
    if not shard:
        return paths
    # Resolved, as . and .. have no name to add to.
    return [whole.parent / f"{whole.name}.{shard.replace('/', 'of')}" for whole in map(Path.resolve, paths)]


def _new_folder(spec: RunSpec) -> Path:
    """A folder of its own for a run that was given none: nothing finished is lost."""
    stem = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{spec.model}_{spec.task}"
    path, number = Path("runs") / stem, 2
    while path.exists():
        path, number = Path("runs") / f"{stem}_{number}", number + 1
    return path


class _watch:
    """Live progress on stderr, and only on a terminal: samples, tokens, present and highest memory."""

    def __init__(self, specs: list[RunSpec], *, quiet: bool, verbose: bool, unit: str | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.console = Console(stderr=True)
        self.verbose, self.unit, self.names = verbose, unit, [spec.method for spec in specs]
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(),
            TextColumn("{task.fields[now]}"), TimeElapsedColumn(), console=self.console, disable=quiet or not
            self.console.is_terminal,
        )  # fmt: skip

    def __enter__(self) -> Self:
        self.bar.__enter__()
        self.rows = {name: self.bar.add_task(name.partition(":")[0], total=None, now="") for name in self.names}
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.__exit__(None, None, None)

    def recording(self, method: str, done: int, total: int) -> None:
        """So many prompts were recorded of those that a method is predicted from."""
        self.bar.update(self.rows[method], now=f"recording prompt {min(done + 1, total)} of {total}")

    def sample(self, run: Run, total: int) -> None:
        """A sample is done."""
        from memprof.units import format_bytes, unit_for

        last = run.samples[-1]
        top = run.highest
        unit = unit_for(top.peak_allocated_bytes if top else 0, self.unit)
        tokens = sum(len(s.tokens) for s in run.finished)
        present = f"{format_bytes(last.peak_allocated_bytes, unit, 2)}" if last.ok else last.status
        highest = format_bytes(top.peak_allocated_bytes, unit, 2) if top else "-"
        self.bar.update(
            self.rows[run.record.spec.method], total=total, completed=len(run.samples),
            now=f"{tokens} tokens, {present}, highest {highest}",
        )  # fmt: skip
        if self.verbose:
            said = ", ".join(filter(None, (present, last.error)))
            self.console.print(f"{run.record.spec.method} {last.id}: {said}", highlight=False)


def _print(runs: list[Run], unit: str | None, *, as_json: bool) -> None:
    """The result on stdout: a table, or one JSON document."""
    from memprof.reports import render

    sys.stdout.write(render("json" if as_json else "table", runs, unit))
