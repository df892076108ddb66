"""Ctrl-C and SIGTERM: the process says what is kept and ends with 130 or 143, soon and in every case.

Both raise where the program stands, so that files are closed and copies end. An exception that is raised inside a
destructor or a library's callback is lost, though, and cleaning up may wait for something that never comes: a process
that was asked to end and is still there :data:`GRACE_SECONDS` later ends without cleaning up. Nothing is lost by that:
every finished sample is on disk. Only the command line asks for this (:func:`listen`).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

GRACE_SECONDS = 5
#: What is said where no command said more: most write what they found when all of it is there.
NOTHING = "nothing was kept; run the same command again"

_asked: int | None = None
#: What commands have to say of what they keep, the innermost last.
_words: list[Callable[[], str]] = []


class Terminated(KeyboardInterrupt):
    """SIGTERM came; a KeyboardInterrupt, so that whoever cleans up after Ctrl-C does after this."""


def listen() -> None:
    """Answer SIGINT and SIGTERM from now on, in this process and not in its copies."""
    global _asked
    _asked = None
    _words.clear()
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as nohup and a shell's & have it
        signal.signal(signal.SIGINT, _stop)
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, _end)


def rest() -> None:
    """All is done and said: a signal that comes now changes neither the result nor its exit code.

    Python takes its handlers away while it ends, so a late SIGTERM would make a finished run look killed.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is _stop:
            signal.signal(number, signal.SIG_IGN)


def asked() -> bool:
    """Whether a signal came: whatever is raised after that may be its consequence."""
    return _asked is not None


@contextmanager
def kept(words: Callable[[], str]) -> Iterator[None]:
    """Should the process be stopped in here, ``words()`` say what is kept and how to go on."""
    _words.append(words)
    try:
        yield
    except KeyboardInterrupt as error:
        if not getattr(error, "__notes__", None):  # the innermost words are the ones that count
            error.add_note(words())
        raise  # with the words left there, for a process that does not come to its end
    except BaseException:
        _words.pop()
        raise
    else:
        _words.pop()


def said(error: BaseException) -> str:
    """What is to be told to the user: one line."""
    seen: BaseException | None = error
    while seen is not None:
        if notes := getattr(seen, "__notes__", None):
            return f"memprof: {_word()}; {notes[0]}\n"
        seen = seen.__cause__ or seen.__context__
    return f"memprof: {_word()}; {NOTHING}\n"


def code() -> int:
    """The exit code: 128 and the signal's number, as shells have it."""
    return 128 + (_asked or signal.SIGINT)


def _word() -> str:
    return "terminated" if _asked == signal.SIGTERM else "interrupted"


def _stop(number: int, frame: FrameType | None) -> None:
    global _asked
    again, _asked = _asked is not None, _asked or number
    if again:
        _end(number, frame)
    if hasattr(signal, "alarm"):
        signal.alarm(GRACE_SECONDS)
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _end(*_: Any) -> None:
    """End at once, also where an exception would not arrive."""
    said = NOTHING
    with suppress(Exception):
        said = _words[-1]()
    os.write(2, f"memprof: {_word()}; {said}\n".encode(errors="backslashreplace"))
    os._exit(code())


def _in_a_copy() -> None:
    """The keyboard is the parent's, and so is the goodbye."""
    for number in (signal.SIGTERM, getattr(signal, "SIGALRM", signal.SIGTERM)):
        if signal.getsignal(number) in (_stop, _end):
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_a_copy)


def leave() -> NoReturn:
    """End now that all is said and closed: the interpreter would wait for threads, and free gigabytes one by one."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code())


def finish(error: BaseException) -> int:
    """Say goodbye on stderr, if that is still there, and give the exit code."""
    with suppress(OSError, ValueError):
        sys.stderr.write(said(error))
        sys.stderr.flush()
    return code()
