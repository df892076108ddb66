"""Who made a block, told from its stack: by line, by module or by operator; and text that does no harm on a screen."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from memprof.errors import UnknownName
from memprof.lines import visible
from memprof.snapshots.recording import Frame

BEFORE_RECORDING = "(before the recording)"
NO_STACK = "(no stack recorded)"
#: How long a label may be; torch's C++ names run to thousands of letters.
LONGEST_LABEL = 120

#: Files of torch that stand in the way of a call site where a snapshot has lost its folders.
_TORCH_FILES = frozenset({
    "_contextlib.py", "_tensor.py", "activation.py", "adam.py", "adamw.py", "batchnorm.py", "container.py", "conv.py",
    "dropout.py", "function.py", "functional.py", "grad_mode.py", "graph.py", "linear.py", "loss.py", "module.py",
    "normalization.py", "optimizer.py", "pooling.py", "sgd.py", "sparse.py",
})  # fmt: skip
_OPERATOR = re.compile(r"at::_ops::(\w+)::")


def shown(text: str) -> str:
    r"""``text`` with every character that a terminal would obey written out (``\\x1b``), and not too long."""
    clean = visible(text[: 4 * LONGEST_LABEL])
    return clean if len(clean) <= LONGEST_LABEL else clean[: LONGEST_LABEL - 1] + "…"


def call_site(frames: Sequence[Frame]) -> str:
    """The line that a stack (innermost frame first) is best known by: ``model.py:31 forward``.

    That is the first Python frame outside torch; where the recorded stack does not reach that far out, the outermost
    Python frame; where it holds no Python at all, the outermost operator.
    """
    python = python_frames(frames)
    outside = next((frame for frame in python if not of_torch(frame.filename)), None)
    best = outside or (python[-1] if python else None)
    if best is not None:
        return line_of(best)
    operators = _operators(frames)
    return f"{operators[-1]} (no Python frame)" if operators else NO_STACK


def operator(frames: Sequence[Frame]) -> str:
    """The operator that asked: the outermost of torch's dispatcher, else the innermost Python function of torch."""
    operators = _operators(frames)
    if operators:
        return operators[-1]
    if frames and frames[0].filename.startswith("aten."):  # what memprof predicted
        return shown(frames[0].filename.split(".")[1])
    inner = next((frame for frame in python_frames(frames) if of_torch(frame.filename)), None)
    return line_of(inner) if inner else NO_STACK if not frames else "(no operator recorded)"


def module(frames: Sequence[Frame]) -> str:
    """The modules that were at work: the files of the ``forward`` calls around it, the outermost first.

    A stack names files and functions, not modules; three levels tell ``model › block › linear``. For what memprof
    predicted it is the module's own name.
    """
    if frames and frames[-1].filename == "<predicted by memprof>":
        return shown(frames[1].name) if len(frames) > 1 else NO_STACK
    calls = [frame.filename for frame in python_frames(frames) if frame.name.rpartition(".")[2] == "forward"]
    names = list(dict.fromkeys(file_name(path).removesuffix(".py") for path in calls))
    if names:
        return shown(" › ".join(names[2::-1] if len(names) > 2 else names[::-1]))
    return f"(outside forward) {call_site(frames)}" if frames else NO_STACK


#: What blocks may be added up by.
WAYS: dict[str, Callable[[Sequence[Frame]], str]] = {"line": call_site, "module": module, "op": operator}


def way(name: str) -> Callable[[Sequence[Frame]], str]:
    """The way called ``name``. Raises :class:`memprof.errors.UnknownName` with the valid ones for any other."""
    if name not in WAYS:
        raise UnknownName("way to add up", name, WAYS)
    return WAYS[name]


def line_of(frame: Frame) -> str:
    """``model.py:31 forward``."""
    return shown(f"{file_name(frame.filename)}:{frame.line} {frame.name}")


def file_name(path: str) -> str:
    """The last part of a path, whichever system wrote it."""
    return path.replace("\\", "/").rsplit("/", 1)[-1]


def python_frames(frames: Sequence[Frame]) -> list[Frame]:
    """The frames of Python, or of what stands for it in a prediction, innermost first."""
    return [frame for frame in frames if frame.filename.endswith(".py") or frame.filename.startswith("<")]


def _operators(frames: Sequence[Frame]) -> list[str]:
    return [match[1] for frame in frames if (match := _OPERATOR.search(frame.name[:4096]))]


def of_torch(path: str) -> bool:
    """Whether a file is torch's own. An environment may itself lie in a folder called ``torch``: what stands behind
    ``site-packages`` decides, where that is in the path.
    """
    path = path.replace("\\", "/")
    _, installed, package = path.rpartition("-packages/")
    if installed:
        return package.startswith("torch/")
    return "/torch/" in path or path.startswith("torch/") or path in _TORCH_FILES
