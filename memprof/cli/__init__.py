"""The command line: one file per command, found by its name, and the one place where errors become exit codes.

A command's file ``memprof/cli/NAME.py`` defines a function ``NAME``. It imports what is heavy inside that function,
so that help loads nothing.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from typing import Any

import typer

from memprof import __version__
from memprof.errors import MemprofError

app = typer.Typer(
    name="memprof",
    help="Where the memory of a vision-language model goes while it generates, token by token.",
    epilog="Start with:  memprof run --method baseline --method topv --task ai2d -o runs/first",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


# Newer typers carry a click of their own, older ones need the package: the base of the errors of whichever it is.
_CLICK_ERROR: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def _version(show: bool) -> None:
    if show:
        typer.echo(f"memprof {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """The options of memprof itself."""


def commands() -> list[str]:
    """Every command's name, in alphabetical order."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def _register() -> None:
    for name in commands():
        app.command(name.replace("_", "-"))(getattr(importlib.import_module(f"{__name__}.{name}"), name))


def main(argv: list[str] | None = None) -> None:
    """Run memprof and exit: 0 ok, 1 failure, 2 usage, 3 gate failed, 4 does not fit, 5 out of memory."""
    if not app.registered_commands:
        _register()
    try:
        code = app(args=argv, prog_name="memprof", standalone_mode=False)
    except MemprofError as error:
        sys.stderr.write(f"memprof: {error}\n")
        code = error.exit_code
    except _CLICK_ERROR as error:
        sys.stderr.write(f"memprof: {error.format_message()}\n")
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("memprof: interrupted; finished samples are kept, --resume goes on\n")
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code if isinstance(code, int) else 0)
