"""The command line: one file per command, found by its name, and the one place where errors become exit codes.

A command's file ``memprof/cli/NAME.py`` defines a function ``NAME``. It imports what is heavy inside that function,
so that help loads nothing.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import pkgutil
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any

import typer

from memprof import stopping
from memprof.errors import MemprofError
from memprof.lines import PLAIN_LETTERS, masked, visible
from memprof.version import VERSION

app = typer.Typer(
    name="memprof",
    help=(
        "Where the memory of a vision-language model goes while it generates, token by token.\n\n"
        "Start with:  memprof run --method baseline --method topv --task ai2d"
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


# Newer typers carry a click of their own, older ones need the package: the base of the errors of whichever it is.
_CLICK_ERROR: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def _version(show: bool) -> None:
    if show:
        typer.echo(f"memprof {VERSION}")
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
        file = importlib.import_module(f"{__name__}.{name}")
        how = getattr(file, "CONTEXT", None)  # how the command reads its words, where not as the others do
        app.command(name.replace("_", "-"), context_settings=how)(_past_typer(getattr(file, name)))


class _Past(BaseException):
    """An error on its way past typer, which would make exit codes of its own of it, and say nothing."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


def _past_typer(command: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(command)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (OSError, KeyboardInterrupt) as error:
            raise _Past(error) from error
        except SystemExit as leaving:  # what rich makes of a pipe that closed
            if isinstance(leaving.__context__, BrokenPipeError):
                raise _Past(leaving.__context__) from None
            raise

    return call


def main(argv: list[str] | None = None) -> None:
    """Run memprof and exit: 0 ok, 1 failure, 2 usage, 3 gate failed, 4 does not fit, 5 out of memory."""
    if not app.registered_commands:
        _register()
    _streams()
    try:
        code = app(args=argv, prog_name="memprof", standalone_mode=False)
        if stopping.asked():  # before a command began, typer keeps it to itself
            code = stopping.finish(KeyboardInterrupt())
    except MemprofError as error:
        complain(error)
        code = error.exit_code
    except _CLICK_ERROR as error:
        if said := error.format_message():  # none with the help that is shown where no command is given
            complain(said)
        code = error.exit_code
    except (_Past, OSError, KeyboardInterrupt, typer.Abort) as past:
        reason = past.error if isinstance(past, _Past) else past
        code = _os_error(reason) if isinstance(reason, OSError) and not stopping.asked() else stopping.finish(reason)
    except Exception as error:
        if not stopping.asked():
            raise
        code = stopping.finish(error)  # what a library made of the interruption
    sys.exit(_flushed(code if isinstance(code, int) else 0))


def _os_error(error: OSError) -> int:
    """A reader that went away is no failure; anything else the system refused is one line."""
    if isinstance(error, BrokenPipeError):
        return 0
    where = f": {error.filename}" if error.filename is not None else ""
    complain(f"{_in_words(error)}{where}")
    return MemprofError.exit_code


def _in_words(error: OSError | ValueError) -> str:
    closed = isinstance(error, OSError) and error.errno == errno.EBADF
    return "stdout is closed" if closed else str(getattr(error, "strerror", None) or error)


def complain(what: object) -> None:
    """One line on stderr, if that is there: no control characters of a file's, no password of a URL's."""
    with suppress(OSError, ValueError):
        sys.stderr.write(f"memprof: {visible(masked(str(what)))}\n")


#: What each stream did with a letter that its encoding lacks, before memprof took it: for a script that is run.
STREAM_ERRORS: dict[str, str] = {}


def _streams() -> None:
    """Whatever the terminal's encoding lacks is written in plain letters, and never ends the program."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            STREAM_ERRORS[name] = stream.errors or "strict"
            stream.reconfigure(errors=PLAIN_LETTERS)


def _flushed(code: int) -> int:
    """Write out what Python still holds of stdout, so that a full disk is told, and Python has nothing to add."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _to_nowhere(sys.stdout)
    except (OSError, ValueError) as error:
        if code != MemprofError.exit_code:  # else there was a line already, of this most likely
            complain(f"cannot write the result: {_in_words(error)}")
        _to_nowhere(sys.stdout)
        code = code or MemprofError.exit_code
    try:
        sys.stderr.flush()
    except (OSError, ValueError):
        _to_nowhere(sys.stderr)
    return code


def _to_nowhere(stream: Any) -> None:
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
