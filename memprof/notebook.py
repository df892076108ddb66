"""``%%memprof``: a notebook's cell with a window around it. IPython is not imported: a shell brings what is needed."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from memprof.api import Profile, profile
from memprof.errors import UsageError


class _Words(argparse.ArgumentParser):
    """A parser that raises where others end the process."""

    def error(self, message: str) -> Any:
        raise UsageError(f"%%memprof: {message}; {self.format_usage().strip()}")


_WORDS = _Words(add_help=False, usage="%%%%memprof [MODEL] [-o NAME]")
_WORDS.add_argument("model", nargs="?")
_WORDS.add_argument("-o", "--output", metavar="NAME")


def load(ipython: Any) -> None:
    """Give the shell ``ipython`` the cell magic ``%%memprof``."""

    def memprof(line: str, cell: str) -> Profile:
        """Run the cell with a window around it, and show what its generate() calls took.

        %%memprof [MODEL] [-o NAME]

        MODEL is a variable of the notebook; it may be left out where only one model is there. NAME is a variable that
        the result is left in, also where the cell ends by an exception.
        """
        names, words = ipython.user_ns, _WORDS.parse_args(shlex.split(line))
        source = ipython.transform_cell(cell)
        code = compile(source, ipython.compile.cache(source), "exec")
        with profile(_model(names, words.model)) as found:
            if words.output is not None:
                names[words.output] = found
            exec(code, names)
        return found

    ipython.register_magic_function(memprof, "cell", "memprof")


def _model(names: dict[str, Any], name: str | None) -> Any:
    """The model called ``name``, or the only one there is.

    Raises:
        UsageError: There is none, or several and none was named.
    """
    if name is not None:
        if name not in names:
            raise UsageError(f"%%memprof: there is no variable {name!r}")
        return names[name]
    from torch import nn

    found = {
        id(value): known
        for known, value in names.items()
        if isinstance(value, nn.Module) and hasattr(value, "generate") and not known.startswith("_")
    }
    if len(found) != 1:
        there = f"several models ({', '.join(found.values())})" if found else "no model"
        raise UsageError(f"%%memprof: there is {there} in this notebook; name one: %%memprof MODEL")
    return names[next(iter(found.values()))]
