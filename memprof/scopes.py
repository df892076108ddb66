"""Who is asking for memory right now: a stack of parts that hooks and surgery push, and that the ledger reads.

Each thread has a stack of its own, so that what one does, or dies of, is nothing to another. No torch here, so that
pruning can name its own bytes without knowing any meter.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Scope(NamedTuple):
    """A part (one of :data:`memprof.records.PARTS`) and the module path inside which it is claimed."""

    part: str
    module: str


class _Open(threading.local):
    def __init__(self) -> None:
        self.stack: list[Scope] = [Scope("other", "")]


_open = _Open()


def current() -> Scope:
    """The innermost scope."""
    return _open.stack[-1]


def push(part: str | None, module: str) -> None:
    """Enter a scope; ``part=None`` keeps the part of the scope around it."""
    stack = _open.stack
    stack.append(Scope(part or stack[-1].part, module))


def pop() -> None:
    """Leave the innermost scope; the outermost stays, whoever forgot to enter."""
    if len(_open.stack) > 1:
        _open.stack.pop()


def depth() -> int:
    """How many scopes are open, for :func:`unwind`."""
    return len(_open.stack)


def unwind(depth: int) -> None:
    """Leave every scope above ``depth``: an exception skips the hooks that would have."""
    del _open.stack[max(depth, 1) :]


@contextmanager
def scope(part: str, module: str = "") -> Iterator[None]:
    """Everything allocated inside belongs to ``part``."""
    push(part, module)
    try:
        yield
    finally:
        pop()
