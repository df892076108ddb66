"""What an IPython shell is to memprof, without IPython: variables, magics, and cells that are run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import memprof


class Shell:
    """Runs cells; ``%load_ext`` and ``%%memprof`` are all the magics it knows."""

    def __init__(self) -> None:
        self.user_ns: dict[str, Any] = {}
        self.magics: dict[str, Any] = {}
        self.compile = SimpleNamespace(cache=lambda source: "<cell>")

    def transform_cell(self, cell: str) -> str:
        return cell

    def register_magic_function(self, function: Any, kind: str, name: str) -> None:
        assert kind == "cell"
        self.magics[name] = function

    def run(self, cell: str) -> Any:
        """What a cell's magic gives; None of a plain one."""
        if cell.startswith("%load_ext memprof"):
            return memprof.load_ipython_extension(self)
        if cell.startswith("%%"):
            first, _, rest = cell.partition("\n")
            name, _, line = first.removeprefix("%%").partition(" ")
            return self.magics[name](line, rest)
        exec(compile(cell, "<cell>", "exec"), self.user_ns)
        return None
