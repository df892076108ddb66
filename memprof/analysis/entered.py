"""What :mod:`memprof.analysis.whatif` enters on a model for want of an option: really carried out, on any model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from memprof import scopes
from memprof.anatomy import anatomy, attention_in


@contextmanager
def quantised_cache(model: nn.Module) -> Iterator[None]:
    """Keep each layer's KV as int8 with a scale for every head and token while no layer works on it.

    transformers' own quantised caches need further packages (quanto or HQQ), so hooks do it: before a layer runs, its
    keys and values are widened; when it is done they are rounded to int8 and the wide ones are let go.
    """

    def widen(layer: Any, args: Any, kwargs: Any) -> None:
        entry = _entry(layer, args, kwargs)
        if entry is not None and hasattr(entry, "scales"):
            with scopes.scope("kv_cache", f"{scopes.current().module}.8-bit cache"):
                entry.keys, entry.values = (
                    narrow * scale for narrow, scale in zip((entry.keys, entry.values), entry.scales, strict=True)
                )

    def narrow(layer: Any, args: Any, kwargs: Any, out: Any) -> None:
        entry = _entry(layer, args, kwargs)
        if entry is not None:
            with scopes.scope("kv_cache", f"{scopes.current().module}.8-bit cache"):
                entry.keys, key_scale = _to_int8(entry.keys)
                entry.values, value_scale = _to_int8(entry.values)
                entry.scales = (key_scale, value_scale)

    hooks = []
    for _, layer in anatomy(model).layers:
        hooks.append(layer.register_forward_pre_hook(widen, with_kwargs=True))
        # First of all: what others note when a layer is done comes after its cache is narrow.
        hooks.append(layer.register_forward_hook(narrow, with_kwargs=True, prepend=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _entry(layer: Any, args: Any, kwargs: Any) -> Any:
    """A decoder layer's place in the cache, or None before it has one; some are given the cache by its place."""
    number = attention_in(layer).layer_idx
    cache = next((one for one in (kwargs.get("past_key_values"), *args) if hasattr(one, "layers")), None)
    return cache.layers[number] if cache is not None and number < len(cache.layers) else None


def _to_int8(wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``wide`` rounded to int8, and the scale of each row of its last dimension."""
    scale = wide.abs().amax(-1, keepdim=True).clamp_min(1e-6) / 127
    return (wide / scale).round().to(torch.int8), scale
