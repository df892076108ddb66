"""Every ``generate()`` of a process, caught on its way: who called it, and what is to be done around it.

The method of transformers' ``GenerationMixin`` is replaced, so that any model of any script is seen, also one inside a
pipeline. Nothing here loads torch or transformers before the script does.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

#: Packages that call ``generate()`` for somebody: whoever called them is the caller.
_BETWEEN = {"transformers", "torch", "accelerate", "peft", "memprof", "contextlib", "functools"}

#: Given the model, the caller (``demo.py:12``), and ``generate`` with its arguments bound to call: gives its result.
Around = Callable[[Any, str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

#: The module whose loading is waited for (:func:`memprof.script.on_import`).
MODULE = "transformers.generation.utils"


class Catch:
    """Replaces ``generate`` in transformers' module, so that ``around`` is asked instead; :meth:`undo` gives it back.

    A ``generate()`` inside another of the same thread (a draft model's, a wrapper's) belongs to the outer one, and a
    process that this one forks is left alone.
    """

    def __init__(self, around: Around) -> None:
        self.around = around
        self._inside, self._process = threading.local(), os.getpid()
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

    def _caught(self, real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
            if getattr(self._inside, "open", False) or os.getpid() != self._process:
                return real(model, *args, **kwargs)
            self._inside.open = True
            try:
                return self.around(model, caller(sys._getframe(1)), real, args, kwargs)
            finally:
                self._inside.open = False

        return generate


def caller(frame: FrameType | None) -> str:
    """``demo.py:12``: the innermost line below ``frame`` that is no library's on the way to ``generate()``."""
    while frame is not None:
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package == "threading":
            return f"thread {threading.current_thread().name}"
        if package not in _BETWEEN:
            return f"{_shown(frame.f_code.co_filename)}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown"


def _shown(file: str) -> str:
    """A file as seen from here where it lies below, else by its own name."""
    path = Path(file)
    try:
        return path.resolve().relative_to(Path.cwd()).as_posix()
    except (ValueError, OSError):
        return path.name
