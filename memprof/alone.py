"""File descriptors that are this process's alone: a copy of it, made by ``fork``, closes them before it does anything.

A lock must end with the process that took it, and a pipe must close when the one process that holds its end dies: both
would live on in copies.
"""

from __future__ import annotations

import os
from contextlib import suppress

_held: set[int] = set()


def keep(number: int) -> int:
    """Let no copy of this process have descriptor ``number``; gives it back."""
    _held.add(number)
    return number


def close(number: int) -> None:
    """Close a descriptor that is kept; nothing where a copy closed it already."""
    if number in _held:
        _held.discard(number)
        os.close(number)


def _drop() -> None:
    for number in tuple(_held):
        with suppress(OSError):
            os.close(number)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop)
