"""``memprof run``: model x method x task, measured or predicted, into a run folder."""

from __future__ import annotations

import shlex
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
    attention: opt.Attention = "sdpa",
    text_tokens: opt.TextTokens = None,
    images: opt.Images = None,
    batch: opt.Batch = None,
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
    listed: Annotated[
        bool, typer.Option("--listed/--unlisted", hidden=True, help="Whether `memprof runs` is to know it.")
    ] = True,
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
    from memprof import api
    from memprof.bench import Bench
    from memprof.cli._runs import remember
    from memprof.errors import DataError, DoesNotFit, OutOfMemory, UsageError
    from memprof.gpus import find_card
    from memprof.runner import check_distinct, complete_spec
    from memprof.runner import run as make
    from memprof.stopping import kept
    from memprof.store import SAMPLES_FILE
    from memprof.units import check_unit

    if unit is not None:
        check_unit(unit)
    if gpu is not None:
        if device not in ("auto", "sim"):
            raise UsageError(f"--gpu {gpu} names a card to predict for; it goes with --device sim")
        gpu = find_card(gpu).name
    if retry_failed and not resume:
        raise UsageError("--retry-failed goes with --resume")
    if resume and output is None:
        raise UsageError("--resume finishes the run in a folder, which -o names (memprof runs lists them)")
    if shard is None:
        shard = _inferred_shard()
    elif shard == "1/1":
        shard = None
    asked = [
        api.spec(
            model, one, task, device, stack=stack, dtype=dtype, attention=attention, weights=weights, data=data,
            max_new_tokens=max_new_tokens, max_tiles=max_tiles, limit=limit, shard=shard, warmup=warmup, seed=seed,
            gpu=gpu, text_tokens=text_tokens, images=images, batch=batch,
        )
        for one in method
    ]  # fmt: skip
    done = [complete_spec(one) for one in asked]  # every mistake shows before a model is built
    specs = [one.spec for one in done]
    check_distinct(specs)
    output = output or _new_folder(specs[0])
    paths = folders(output, specs)
    judge = _judge(specs[0], fidelity)
    bench = Bench(done[0].setup)
    runs: list[Run] = []
    with kept(partial(_kept, output, paths)), _watch(specs, quiet=quiet or json, verbose=verbose, unit=unit) as watch:
        for spec, path in zip(specs, paths, strict=True):
            bench.on_recording = partial(watch.recording, spec.method)
            runs.append(
                make(
                    spec, path, bench=bench, resume=resume, force=force, retry_failed=retry_failed,
                    progress=watch.sample, judge=judge,
                )
            )  # fmt: skip
    folder = paths[0] if len(paths) == 1 else paths[0].parent
    if listed:
        remember(folder)
    _print(runs, unit, as_json=json)
    if not quiet and not json:
        typer.echo(f"saved in {folder}; next: memprof explain latest, memprof plot latest", err=True)
    failed = [s for one in runs for s in one.samples if not s.ok]
    if failed and resume and not retry_failed:
        every = sum(len(one.samples) for one in runs)
        typer.echo(f"memprof: {len(failed)} of {every} samples failed; --retry-failed runs them again", err=True)
    refused = sum(s.status == "oom" for s in failed)
    count = f"{refused} sample{'s' * (refused != 1)}"
    if refused and runs[0].record.status == "predicted":
        for line in [_what_it_needs(one, unit or "GiB") for one in runs] if not quiet and not json else ():
            if line is not None:
                typer.echo(line, err=True)
        raise DoesNotFit(f"{count} predicted not to fit on {gpu}; {SAMPLES_FILE} says where")
    if gpu is not None and not failed and not quiet and not json:
        _say_room(runs, gpu, unit or "GiB")
    if refused:
        if any(not one.finished and any(s.status == "oom" for s in one.samples) for one in runs):
            raise OutOfMemory(f"{count} ran out of memory; {SAMPLES_FILE} says where")
        typer.echo(f"memprof: {count} of {sum(len(one.samples) for one in runs)} ran out of memory; the others are "
                   f"done, and {SAMPLES_FILE} says where", err=True)  # fmt: skip
    lost = [one for one in runs if one.samples and not one.finished]
    if lost:
        names = ", ".join(one.record.spec.method for one in lost)
        raise DataError(f"no sample finished under {names}; the first failed with: {lost[0].samples[0].error}")


def _kept(output: Path, paths: list[Path]) -> str:
    """What a run that was stopped leaves, and the command that goes on."""
    from memprof.cli._runs import remember
    from memprof.store import SAMPLES_FILE

    files = [path / SAMPLES_FILE for path in paths]
    lines = sum(file.read_bytes().count(b"\n") for file in files if file.exists())
    if not lines:
        return "no sample was finished yet"
    remember(output)
    words = shlex.join(["memprof", *_without_folder(sys.argv[1:]), "-o", str(output), "--resume"])
    return f"{lines} sample{'s' * (lines != 1)} kept in {output}; go on with: {words}"


def _without_folder(words: list[str]) -> list[str]:
    """The words of a command without those that say where it writes and what of it."""
    kept: list[str] = []
    skip = False
    for word in words:
        if skip or word in ("--resume", "--force"):
            skip = False
        elif word in ("-o", "--output"):
            skip = True
        elif not word.startswith(("--output=", "-o")):
            kept.append(word)
    return kept


def _what_it_needs(run: Run, unit: str) -> str | None:
    """What the largest sample that a card refused would need, and who holds it; None where none was refused."""
    from memprof.analysis.fit import need_of
    from memprof.telling import facts
    from memprof.units import format_bytes

    refused = [s for s in run.samples if s.status == "oom" and s.shape is not None]
    if not refused:
        return None
    largest = max(refused, key=lambda s: s.shape.length if s.shape else 0)
    need = need_of(run, largest)
    return (
        f"{facts.labels([run])[0]} needs {format_bytes(need.device_bytes, unit)} for sample {largest.id}, most above "
        f"the weights held by {need.held_by}"
    )


def _say_room(runs: list[Run], gpu: str, unit: str) -> None:
    """That everything fits, and how much is to spare."""
    from memprof.gpus import find_card
    from memprof.records import summarize
    from memprof.units import format_bytes

    memory, most = find_card(gpu).memory_bytes, max(summarize(one)["device_bytes"] or 0 for one in runs)
    if memory is not None and most:
        needed, spare = (format_bytes(n_bytes, unit, 1) for n_bytes in (most, max(0, memory - most)))
        typer.echo(f"fits on {gpu}, predicted: {needed} needed, {spare} to spare", err=True)


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
    from memprof.errors import UsageError

    runs = spec.device != "sim"
    if not asked and (asked is False or not runs or spec.weights == "random"):
        return None
    from memprof.analysis.fidelity import Judge, check_weights

    if asked:
        check_weights(spec.weights)
        if not runs:
            raise UsageError("fidelity compares what a model writes, and --device sim writes nothing; take cuda or cpu")
    return Judge()


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
    from memprof.telling.facts import slug

    data = spec.task if spec.data in ("bundled", "hub") else slug(Path(spec.data).stem)
    stem = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{slug(spec.model)}_{data}"
    path, number = Path("runs") / stem, 2
    while path.exists():
        path, number = Path("runs") / f"{stem}_{number}", number + 1
    return path


class _watch:
    """Live progress on stderr, and only on a terminal: samples, tokens, present and highest memory."""

    def __init__(self, specs: list[RunSpec], *, quiet: bool, verbose: bool, unit: str | None) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        from memprof.reports._paper import Screen

        self.console = Screen(stderr=True)
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
            self.console.print(f"{run.record.spec.method} {last.id}: {said}", highlight=False, markup=False)


def _print(runs: list[Run], unit: str | None, *, as_json: bool) -> None:
    """The result on stdout: a table, or one JSON document."""
    from memprof.reports import render

    sys.stdout.write(render("json" if as_json else "table", runs, unit))
