"""Who is asking for memory right now: a stack of parts that hooks and surgery push, and that the ledger reads.

No torch here, so that pruning can name its own bytes without knowing any meter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Scope(NamedTuple):
    """A part (one of :data:`memprof.records.PARTS`) and the module path inside which it is claimed."""

    part: str
    module: str


_stack: list[Scope] = [Scope("other", "")]


def current() -> Scope:
    """The innermost scope."""
    return _stack[-1]


def push(part: str | None, module: str) -> None:
    """Enter a scope; ``part=None`` keeps the part of the scope around it."""
    _stack.append(Scope(part or _stack[-1].part, module))


def pop() -> None:
    """Leave the innermost scope."""
    _stack.pop()


def depth() -> int:
    """How many scopes are open, for :func:`unwind`."""
    return len(_stack)


def unwind(depth: int) -> None:
    """Leave every scope above ``depth``: an exception skips the hooks that would have."""
    del _stack[depth:]


@contextmanager
def scope(part: str, module: str = "") -> Iterator[None]:
    """Everything allocated inside belongs to ``part``."""
    push(part, module)
    try:
        yield
    finally:
        pop()
