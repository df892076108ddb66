"""``memprof exec SCRIPT.py``: somebody's script, unchanged, every ``generate()`` of it a sample."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from memprof.cli import _options as opt

if TYPE_CHECKING:
    from memprof.execution import Execution

#: What follows the script is the script's.
CONTEXT = {"ignore_unknown_options": True, "allow_interspersed_args": False}


def exec(
    words: Annotated[
        list[str], typer.Argument(metavar="SCRIPT.py [ARGS]...", help="A script and its arguments.", show_default=False)
    ],
    module: Annotated[bool, typer.Option("--module", "-m", help="MODULE [ARGS]..., as python -m runs it.")] = False,
    predict: Annotated[
        bool, typer.Option("--predict", help="Over models without weights: what from_pretrained loads has sizes alone.")
    ] = False,
    gpu: opt.Gpu = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run folder; with several models, one in it each.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the run that is in the folder.")] = False,
    unit: opt.FittingUnit = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No table at the end.")] = False,
) -> NoReturn:
    """Run a Python script as python runs it, and profile every generate() in it: who called it, and what it took.

    Its output, its errors and its exit code are the script's own; the table goes to stderr when it is done. Options of
    memprof stand before the script. With --predict nothing of a model runs: a script that needs an answer is refused.

    For example:

      memprof exec demo.py --image cat.jpg

      memprof exec -o runs/mine -m mypackage.demo

      memprof exec --predict --gpu l4 demo.py
    """
    from memprof import script
    from memprof.cli import STREAM_ERRORS
    from memprof.errors import UsageError
    from memprof.execution import Execution
    from memprof.gpus import calibrated, find_card
    from memprof.models.instead import Instead
    from memprof.units import check_unit

    if unit is not None:
        check_unit(unit)
    if gpu is not None and not predict:
        raise UsageError(f"--gpu {gpu} names a card to predict for; it goes with --predict")
    instead = Instead(calibrated(find_card(gpu))) if predict else None
    program = script.module(words[0], words[1:]) if module else script.script(words[0], words[1:])
    label = f"{words[0] if module else Path(words[0]).name}, its calls of generate()"
    folder = output or _new_folder(words[0], module=module)
    execution = Execution(label, folder, force=force, instead=instead)
    execution.check()
    script.on_import(execution.waiting())
    script.at_the_very_end(partial(_end, execution, folder, unit, quiet=quiet))
    script.undisturbed(STREAM_ERRORS)
    raise SystemExit(script.run(program, _told(execution, program.name)))


def _told(execution: Execution, name: str) -> Callable[[BaseException], int | None]:
    """What is said, and the exit code, where an error of a predicted script is memprof's to explain."""

    def told(error: BaseException) -> int | None:
        from memprof.errors import DoesNotFit, UsageError
        from memprof.models.instead import refusal

        if execution.instead is None:
            return None
        if isinstance(error, DoesNotFit) or type(error).__name__ == "OutOfMemoryError":
            _say(f"predicted not to fit on {execution.instead.card.name}: {error}")
            return DoesNotFit.exit_code
        line = refusal(error, name)
        if line is None:
            return None
        _say(line)
        return UsageError.exit_code

    return told


def _end(execution: Execution, folder: Path, unit: str | None, *, quiet: bool) -> None:
    """The script is done: write the totals, and say on stderr what it took; ``folder`` is as the user has it."""
    from memprof import reports
    from memprof.cli._runs import remember

    execution.close()
    runs, output = execution.runs, execution.output
    assert output is not None
    if execution.kept:
        remember(output)
    if not quiet:
        if runs:
            with suppress(OSError, ValueError, AttributeError):  # a script may close stderr, or leave none
                sys.stderr.write(reports.render("table", runs, unit, colour=False))
        else:
            _say("the script called no generate() of transformers, so nothing was profiled")
    for line in execution.said:
        _say(line)
    if execution.kept and not quiet:
        _say(f"saved in {folder}; next: memprof report latest, memprof explain latest")


def _say(line: str) -> None:
    from memprof.cli import complain

    if sys.stderr is not None:  # as a script may leave it
        complain(line)


def _new_folder(what: str, *, module: bool) -> Path:
    """A folder of its own for a script that was given none: nothing finished is lost."""
    from memprof.telling.facts import slug

    stem = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{slug(what if module else Path(what).stem)}"
    path, number = Path("runs") / stem, 2
    while path.exists():
        path, number = Path("runs") / f"{stem}_{number}", number + 1
    return path
