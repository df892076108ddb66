"""The profiler: a context manager around any transformers ``generate()``; a meter answers, one entry a token.

::

    with Profiler(model) as profiler:
        model.generate(**inputs, max_new_tokens=16)
    print(profiler.reading.peak_allocated_bytes)

Everything is done with hooks, and every hook is gone when the window ends, also by an exception.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import nn

from memprof import scopes
from memprof.anatomy import Anatomy, anatomy
from memprof.meters import Meter, meter_for
from memprof.records import TokenColumns
from memprof.simulator.replay import Reading


class Profiler:
    """Profiles one ``generate()`` call.

    Token 0 is prefill, from the window's start (inputs made inside it count) to the second forward; token t ends where
    forward t + 1 begins, and the last one where the window ends, its cache still held. The vision encoder is a phase of
    token 0 wherever ``generate()`` runs it.

    Args:
        model: A transformers model with a decoder and, if it sees, a vision tower.
        meter: Where bytes come from; by default the one that serves ``model`` (:func:`memprof.meters.meter_for`). A
            meter can be used for one window after another.

    Attributes:
        reading: What the meter read, once the window has ended.
        tokens: The same as the columns of a record, with KV bytes and seconds.
        kv_tokens: KV length of each layer after prefill.
        kv_bytes_per_layer: Bytes of each layer's KV storages after prefill; a view counts with its whole storage.
        failed: Whether the window ended by an exception.
    """

    def __init__(self, model: nn.Module, meter: Meter | None = None) -> None:
        self.model = model
        self.meter = meter or meter_for(model)
        self.anatomy: Anatomy = anatomy(model)
        self.reading = Reading()
        self.kv_tokens: list[int] = []
        self.kv_bytes_per_layer: list[int] = []
        self.failed = False
        self._kv_bytes: list[int] = []
        self._seconds: list[float] = []
        self._hooks: list[Any] = []
        self._cache: Any = None
        self._forwards = 0

    @property
    def tokens(self) -> TokenColumns:
        """One entry a token in every column."""
        r = self.reading
        timed = self.meter.status == "measured"
        return TokenColumns(
            peak_allocated_bytes=r.peak_allocated_bytes,
            allocated_bytes=r.allocated_bytes,
            reserved_bytes=r.reserved_bytes,
            kv_bytes=self._kv_bytes,
            device_used_bytes=r.device_used_bytes,
            seconds=list(self._seconds) if timed else [None] * len(self._seconds),
        )

    def __enter__(self) -> Profiler:
        self._depth = scopes.depth()
        self.meter.open()
        try:
            self._place_hooks()
        except BaseException:
            self._leave()
            raise
        self.meter.phase("prefill")
        self._clock = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.failed = error is not None
        try:
            if self._forwards:
                self._end_token()
        finally:
            self._leave()

    def _leave(self) -> None:
        """Take every hook back and let the meter finish."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        scopes.unwind(self._depth)
        self.reading = self.meter.close()
        self._cache = None

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def _place_hooks(self) -> None:
        self._hooks.append(self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True))
        self._hooks.append(self.model.register_forward_hook(self._after_forward))
        if self.anatomy.vision:
            first, last = self.anatomy.vision[0][1], self.anatomy.vision[-1][1]
            self._hooks.append(first.register_forward_pre_hook(self._phase("vision"), prepend=True))
            self._hooks.append(last.register_forward_hook(self._phase("prefill")))
        if self.meter.ledger is not None:  # nobody else asks for scopes, and two hooks a module take time in decoding
            for name, module in self.anatomy.scoped(self.model):
                self._scope(module, self.anatomy.part_of(name), name)

    def _scope(self, module: nn.Module, part: str, name: str) -> None:
        """Everything ``module`` allocates while it runs belongs to ``part``."""

        def entering(*_: Any) -> None:
            scopes.push(part, name)

        def leaving(*_: Any) -> None:
            scopes.pop()

        self._hooks.append(module.register_forward_pre_hook(entering, prepend=True))
        self._hooks.append(module.register_forward_hook(leaving))

    def _phase(self, name: str) -> Callable[..., None]:
        def change(*_: Any) -> None:
            self.meter.phase(name)

        return change

    def _before_forward(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if self._forwards:
            self._end_token()
            if self._forwards == 1:
                self.meter.phase("decode")
        self._forwards += 1
        scopes.unwind(self._depth)

    def _after_forward(self, model: nn.Module, args: Any, out: Any) -> None:
        self._cache = getattr(out, "past_key_values", None)
        if self.meter.ledger is not None:
            for tensor in cache_tensors(self._cache):
                self.meter.ledger.claim(tensor, "kv_cache")
        # What follows until the next forward is the choice of a token.
        scopes.push("logits", "generate")

    def _end_token(self) -> None:
        self.meter.mark()
        self._seconds.append(time.perf_counter() - self._clock)
        layers = [cache_tensors(layer) for layer in _layers(self._cache)]
        if not self._kv_bytes:
            self.kv_bytes_per_layer = [storage_bytes(tensors) for tensors in layers]
            self.kv_tokens = [max((int(t.shape[-2]) for t in tensors), default=0) for tensors in layers]
        self._kv_bytes.append(storage_bytes([t for tensors in layers for t in tensors]))
        self._clock = time.perf_counter()  # counting is no part of a token's time


def _layers(cache: Any) -> list[Any]:
    return list(getattr(cache, "layers", [])) if cache is not None else []


def cache_tensors(cache: Any) -> list[torch.Tensor]:
    """Key and value tensors of a transformers cache, or of one layer of it."""
    layers = _layers(cache) or ([cache] if cache is not None else [])
    found = (getattr(layer, name, None) for layer in layers for name in ("keys", "values"))
    return [t for t in found if isinstance(t, torch.Tensor) and t.numel()]


def storage_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of the storages behind ``tensors``, each storage once: a sliced view counts with all it holds on to."""
    return sum({s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())
