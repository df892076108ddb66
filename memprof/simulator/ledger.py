"""Lifetimes of every storage a ``generate()`` makes, with the part that asked for it.

The ledger is a dispatch mode: it sees each operator's results, gives every new storage a slot in a
:class:`~memprof.simulator.trace.Trace`, and learns of its end from a weak reference. It works alike on real tensors
and on tensors without storage (:mod:`memprof.simulator.weightless`), which is why one profiler serves measuring and
predicting.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memprof import scopes
from memprof.simulator.kernels import Kernels, Temporary
from memprof.simulator.trace import Trace, bytes_of

#: Results that share their input's storage although the schema does not say so.
_SILENT_VIEWS = {torch.ops.aten._unsafe_view.default, torch.ops.aten._reshape_alias.default}


#: Tensors made from Python numbers arrive through this operator, whose schema calls it a view.
_ARRIVALS = {torch.ops.aten.lift_fresh.default}


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records births and deaths of storages on ``device`` while it is entered.

    Args:
        device: Type of device whose storages count (``cuda``, ``cpu``).
        kernels: What a CUDA run allocates inside operators and this dispatch does not show; None on real devices.
    """

    def __init__(self, device: str, kernels: Kernels | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.kernels = device, kernels
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
        slot = self.trace.birth(
            storage.nbytes(), part, (module, op), tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        )
        self._slots[key] = slot
        self._watch[key] = weakref.ref(storage, partial(self._died, key, slot))

    def claim(self, tensor: torch.Tensor, part: str) -> None:
        """``tensor``'s storage belongs to ``part``, whoever made it: this is how a cache is told from attention."""
        slot = self._slots.get(tensor.untyped_storage()._cdata, -1)
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
        kwargs = kwargs or {}
        if not self._makes_storage(func):
            return func(*args, **kwargs)
        passing = self._enter(self.kernels.copies(func, args)) if self.kernels is not None else []
        out = func(*args, **kwargs)
        for leaf in (out,) if isinstance(out, torch.Tensor) else tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == self.device:
                self.adopt(leaf, str(func))
        if self.kernels is not None:
            passing += self._enter(self.kernels.temporaries(func, args, out))
        for slot in passing:
            self.trace.death(slot)
        return out

    def _enter(self, temporaries: Iterable[Temporary]) -> list[int]:
        """Births of what an operator takes while it runs; the caller ends them when it is done."""
        part, module = scopes.current()
        return [
            self.trace.birth(bytes_of(each.op, each.shape, each.dtype), part, (module, each.op), each.shape, each.dtype)
            for each in temporaries
        ]
