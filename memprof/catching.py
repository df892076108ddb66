"""Every ``generate()`` of a process, caught on its way: who called it, and what is to be done around it.

The method of transformers' ``GenerationMixin`` is replaced, so that any model of any script is seen, also one inside a
pipeline. Nothing here loads torch or transformers before the script does.
"""

from __future__ import annotations

import functools
import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

#: Packages that call ``generate()`` for somebody: whoever called them is the caller.
_BETWEEN = {"transformers", "torch", "accelerate", "peft", "memprof", "contextlib", "functools"}

#: Given the model, the caller (``demo.py:12``), and ``generate`` with its arguments bound to call: gives its result.
Around = Callable[[Any, str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

#: How multiprocessing starts a process of its own, by the modules that it loads at the first one.
_STARTING = ("spawn_posix", "spawn_win32", "forkserver")

#: The module whose loading is waited for (:func:`memprof.script.on_import`).
MODULE = "transformers.generation.utils"


class Catch:
    """Replaces ``generate`` in transformers' module, so that ``around`` is asked instead; :meth:`undo` gives it back.

    A ``generate()`` inside another of the same thread (a draft model's, a wrapper's) belongs to the outer one, and a
    process that this one forks is left alone; :meth:`missed` says so.
    """

    def __init__(self, around: Around) -> None:
        self.around = around
        self._inside, self._process, self._here = threading.local(), os.getpid(), Path.cwd()
        self._in_a_copy = mmap.mmap(-1, 1)  # shared with every copy of this process
        self._mixin: Any = None
        self._real: Any = None

    def __call__(self, module: ModuleType) -> None:
        """Replace it: ``module`` is :data:`MODULE`, loaded."""
        self._mixin, self._real = module.GenerationMixin, module.GenerationMixin.generate
        self._mixin.generate = self._caught(self._real)

    def undo(self) -> None:
        """Leave transformers as it was."""
        if self._mixin is not None:
            self._mixin.generate = self._real
            self._mixin = None

    def missed(self) -> Iterator[str]:
        """A line for each kind of process whose calls were not seen, or may not have been."""
        if self._in_a_copy[0]:
            yield "calls of generate() in processes that were forked ran as without memprof, and are not counted"
        if any(f"multiprocessing.popen_{way}" in sys.modules for way in _STARTING):
            yield "processes were started by multiprocessing; calls of generate() in them, if any, are not counted"

    def _caught(self, real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
            if os.getpid() != self._process:
                self._in_a_copy[0] = 1
                return real(model, *args, **kwargs)
            if getattr(self._inside, "open", False):
                return real(model, *args, **kwargs)
            self._inside.open = True
            try:
                return self.around(model, caller(sys._getframe(1), self._here), real, args, kwargs)
            finally:
                self._inside.open = False

        return generate


def caller(frame: FrameType | None, here: Path) -> str:
    """``demo.py:12``: the innermost line below ``frame`` that is no library's on the way to ``generate()``.

    Its file is named as seen from ``here`` where it lies below, else by its own name.
    """
    while frame is not None:
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package == "threading":
            return f"thread {threading.current_thread().name}"
        if package not in _BETWEEN:
            return f"{_shown(frame.f_code.co_filename, here)}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown"


def _shown(file: str, here: Path) -> str:
    path = Path(file)
    try:
        return path.resolve().relative_to(here).as_posix()
    except (ValueError, OSError):
        return path.name
