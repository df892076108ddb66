"""What transformers cannot run is said in one line, and what it said itself is kept behind it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from memprof.errors import MemprofError
from memprof.files import first_line

#: What to do about a configuration that cannot be run.
CORRECT = "correct its config.json or preprocessor_config.json, or take another version of transformers"
#: Where torch writes whole tracebacks of errors that it raises as well.
_TWICE = "torch._subclasses.fake_tensor"
#: Packages whose calls a model's configuration is to answer for, and those that they stand on.
_THEIRS = {"transformers", "transformers_modules", "huggingface_hub"}
_BELOW = {"torch", "numpy", *sys.stdlib_module_names}
#: Whose calls lie between a model's and torch's, and are neither's doing.
_BETWEEN = "memprof.tracing"


@contextmanager
def runs(what: str, instead: str) -> Iterator[None]:
    """Whatever transformers, or torch below it, raises inside is one line: that ``what`` cannot be run.

    What memprof, or a method of somebody's own, does wrong passes as it is, and so does a card that is full.

    Args:
        what: What is built or run: a model's configuration, say.
        instead: What to do about it.

    Raises:
        MemprofError: Transformers cannot run it; what it raised is the cause.
    """
    log = logging.getLogger(_TWICE)
    before, log.disabled = log.disabled, True
    try:
        yield
    except (MemprofError, MemoryError):
        raise
    except Exception as error:
        if "OutOfMemory" in type(error).__name__ or not _theirs(error.__traceback__):
            raise
        said = first_line(error).rstrip(".;: ")
        plain = isinstance(error, RuntimeError | ValueError)
        kind = "" if plain or said == type(error).__name__ else f"{type(error).__name__}: "
        raise MemprofError(f"{what} cannot be run by transformers: {kind}{said}; {instead}") from error
    finally:
        log.disabled = before


def _theirs(where: TracebackType | None) -> bool:
    """Whether the last call that led to an error, but for torch's and the language's own, is one of transformers'."""
    last = ""
    while where is not None:
        name = str(where.tb_frame.f_globals.get("__name__"))
        if name.partition(".")[0] not in _BELOW and not name.startswith(_BETWEEN):
            last = name.partition(".")[0]
        where = where.tb_next
    return last in _THEIRS
