"""Lifetimes of every storage a ``generate()`` makes, with the part that asked for it.

The ledger is a dispatch mode: it sees each operator's results, gives every new storage a slot in a
:class:`~memprof.simulator.trace.Trace`, and learns of its end from a weak reference. It works alike on real tensors
and on tensors without storage (:mod:`memprof.models.weightless`), which is why one profiler serves measuring and
predicting.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Mapping
from functools import cache, partial
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memprof import scopes
from memprof.errors import UsageError
from memprof.simulator.trace import Trace, bytes_of
from memprof.tracing.answers import answer
from memprof.tracing.kernels import Kernels, called, with_places
from memprof.tracing.temporaries import Ends, Temporary, name_of

#: Results that share their input's storage although the schema does not say so.
_SILENT_VIEWS = {torch.ops.aten._unsafe_view.default, torch.ops.aten._reshape_alias.default}


#: One product for all experts, whose rows are all tokens sorted by expert: bytes do not hang on who goes where.
_HALF_ONLY = {torch.ops.aten._grouped_mm.default}
#: Tensors made from Python numbers arrive through this operator, whose schema calls it a view.
_ARRIVALS = {torch.ops.aten.lift_fresh.default}


#: memprof's own files.
_HERE = Path(__file__).parents[1]


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records births and deaths of storages on ``device`` while it is entered.

    Args:
        device: Type of device whose storages count (``cuda``, ``cpu``).
        kernels: What a CUDA run allocates inside operators and this dispatch does not show; None on real devices.
        lines: Whether to note the line of code behind each storage.
    """

    def __init__(self, device: str, kernels: Kernels | None = None, *, lines: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.kernels, self.lines = device, kernels, lines
        self.trace = Trace()
        self._slots: dict[int, int] = {}
        self._watch: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._fresh: dict[Any, bool] = {}
        self._open = True

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Storages that were there before (weights) are no births."""
        for tensor in tensors:
            self._slots[tensor.untyped_storage()._cdata] = -1

    def adopt(self, tensor: torch.Tensor, op: str) -> None:
        """Count ``tensor``'s storage from now on, if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._slots:
            return
        part, module = scopes.current()
        slot = self.trace.birth(storage.nbytes(), part, (module, op), tuple(tensor.shape), name_of(tensor.dtype))
        if self.lines:
            self.trace.lines[slot] = line_of(sys._getframe(1))
        self._slots[key] = slot
        self._watch[key] = weakref.ref(storage, partial(self._died, key, slot))

    def claim(self, storages: Mapping[int, int], part: str) -> None:
        """These storages belong to ``part``, whoever made them: this is how a cache is told from attention.

        Args:
            storages: Their bytes by address.
            part: One of :data:`memprof.records.PARTS`.
        """
        for key in storages:
            slot = self._slots.get(key, -1)
            if slot >= 0:
                self.trace.parts[slot] = part

    def listen(self) -> Self:
        """Begin to see operators."""
        self.__enter__()  # type: ignore[no-untyped-call]
        return self

    def close(self) -> Trace:
        """Stop listening and return the trace."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._open = False
        self._watch.clear()
        return self.trace

    def _died(self, key: int, slot: int, _: object) -> None:
        self._slots.pop(key, None)
        self._watch.pop(key, None)
        if self._open:
            self.trace.death(slot)

    def _makes_storage(self, func: Any) -> bool:
        """Whether ``func`` can return a storage of its own; the schemas of views and in-place operators say no."""
        if func not in self._fresh:
            returns = func._schema.returns
            own = any(r.alias_info is None for r in returns)
            self._fresh[func] = func in _ARRIVALS or (own and func not in _SILENT_VIEWS)
        return self._fresh[func]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, then give each new storage it returned a slot."""
        kwargs, kernels = kwargs or {}, self.kernels
        if not self._makes_storage(func):
            return _called(func, types, args, kwargs)
        if kernels is None:
            return self._adopted(func, _called(func, types, args, kwargs))
        scratch = _Scratch(self.trace)
        scratch.take(kernels.before(func, args, kwargs))
        out = self._adopted(func, _called(func, types, args, kwargs))
        scratch.take(kernels.after(func, args, kwargs, out))
        scratch.end()
        return out

    def _adopted(self, func: Any, out: Any) -> Any:
        """What ``func`` gave, its storages counted."""
        for leaf in (out,) if isinstance(out, torch.Tensor) else tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == self.device:
                self.adopt(leaf, called(func))
        return out


def line_of(frame: FrameType | None) -> str:
    """``transformers/models/qwen2/modeling_qwen2.py:46``: the innermost line that is neither torch's nor memprof's."""
    while frame is not None:
        file = _told(frame.f_code.co_filename)
        if file is not None:
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


@cache
def _told(file: str) -> str | None:
    """A file as its package calls it, or from here; None of those that only pass a call on."""
    path = Path(file)
    parts = path.parts
    packages = [at for at, part in enumerate(parts) if part in ("site-packages", "dist-packages")]
    if packages:
        inside = parts[packages[-1] + 1 :]
        return None if inside[0] == "torch" else "/".join(inside)
    if path.is_relative_to(_HERE) or not path.exists():
        return None
    return path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else path.name


def _called(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """What ``func`` gives; raises UsageError where that hangs on values that weights without storage do not have."""
    try:
        if FakeTensor in types:
            return answer(func, with_places(func, args), kwargs)
        return func(*args, **kwargs)
    except (DynamicOutputShapeException, DataDependentOutputException):
        raise UsageError(
            f"{scopes.current()[1] or 'the model'} lets the values of a tensor decide what {func} makes, and weights "
            "without storage have no values; measure this model on a device (--device cuda or cpu)"
        ) from None
    except RuntimeError as error:
        if func in _HALF_ONLY and "BF16" in str(error):
            raise UsageError(
                f"{scopes.current()[1] or 'the model'} runs its experts by {func}, which is predicted in bfloat16 alone"
            ) from None
        raise


class _Scratch:
    """What one operator takes while it runs: births and deaths in ``trace``."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._made: list[int] = []
        self._live: list[int] = []

    def take(self, steps: Iterable[Temporary | Ends]) -> None:
        """Follow ``steps``; what does not end by itself waits for :meth:`end`."""
        part, module = scopes.current()
        for step in steps:
            if isinstance(step, Ends):
                slot = self._made[step.number]
                self._live.remove(slot)
                self.trace.death(slot)
                continue
            n_bytes = bytes_of(step.op, step.shape, step.dtype)
            slot = self.trace.birth(n_bytes, part, (module, step.op), step.shape, step.dtype)
            self._made.append(slot)
            if step.brief:
                self.trace.death(slot)
            else:
                self._live.append(slot)

    def end(self) -> None:
        """The operator is done: what it made last goes first."""
        for slot in reversed(self._live):
            self.trace.death(slot)
