"""Reports: runs as a table, a page, or another program's food. One file a format in ``memprof/reports/formats``.

A format is a module with a function ``render(runs, unit) -> str``. All read records only; nothing here imports torch.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from typing import Any

from memprof.errors import UnknownName
from memprof.records import Run
from memprof.reports.rows import unit_of

__all__ = ["check", "names", "render"]
_PACKAGE = "memprof.reports.formats"


def names() -> list[str]:
    """Every format, in alphabetical order; imports none of them."""
    path = importlib.import_module(_PACKAGE).__path__
    return sorted(m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_"))


def check(name: str) -> None:
    """Raise :class:`UnknownName`, with the valid ones, unless ``name`` is a format."""
    if name not in names():
        raise UnknownName("format", name, names())


def render(name: str, runs: Sequence[Run], unit: str | None = None, **how: Any) -> str:
    """``runs`` in the format ``name``.

    Args:
        name: One of :func:`names`.
        runs: Runs as :func:`memprof.store.find_runs` reads them.
        unit: The unit on screen, or None for the one that shows the highest peak, and the least cell, well; formats for
            programs (csv, json, chrome) hold bytes whatever it is.
        how: What only this format takes, such as ``width`` and ``colour`` of ``table``.

    Raises:
        UnknownName: No such format.
        BadValue: No such unit.
    """
    check(name)
    module = importlib.import_module(f"{_PACKAGE}.{name}")
    text: str = module.render(runs, unit_of(runs, unit), **how)
    return text
