"""Attention of a few queries, worked out beside whatever kernel a decoder layer runs."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch


def attention_rows(attention: Any, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last r tokens to every token: ``(heads, r, length)`` float32.

    Args:
        attention: The layer's attention module, for its heads and scale.
        query: Queries of those tokens by head, rotary applied, ``(1, heads, r, dim)``.
        keys: Keys of all tokens, rotary applied, ``(1, kv heads, length, dim)``.
    """
    heads, rows = keys.shape[1], query.shape[2]
    grouped = query[0].reshape(heads, -1, attention.head_dim)  # (kv heads, queries of each x r, dim)
    scores = torch.matmul(grouped, keys[0].transpose(1, 2)) * attention.scaling
    if rows > 1:
        later = scores.new_ones((rows, rows), dtype=torch.bool).triu_(1)
        scores.view(heads, -1, rows, scores.shape[-1])[..., -rows:].masked_fill_(later, torch.finfo(scores.dtype).min)
    shares: torch.Tensor = scores.softmax(-1, dtype=torch.float32)
    return shares.view(-1, rows, scores.shape[-1])


def heads_of(attention: Any, which: str, hidden: torch.Tensor) -> torch.Tensor:
    """Queries (``q``) or keys (``k``) of ``(1, r, hidden)`` by head, before rotary: ``(1, heads, r, dim)``."""
    made = getattr(attention, f"{which}_proj")(hidden).view(1, hidden.shape[1], -1, attention.head_dim)
    norm = getattr(attention, f"{which}_norm", None)
    return cast(torch.Tensor, made if norm is None else norm(made)).transpose(1, 2)


def turned(by_head: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """``by_head`` ``(1, heads, r, dim)`` with the rotary positions of the last r rows of ``rotary``, split halves."""
    cos, sin = (t[:, -by_head.shape[2] :].unsqueeze(1) for t in rotary)
    first, second = by_head.chunk(2, dim=-1)
    return by_head * cos + torch.cat((-second, first), dim=-1) * sin


def cached_keys(attention: Any, kwargs: Any) -> torch.Tensor:
    """Keys that a layer's attention has cached, ``(1, kv heads, length, dim)``."""
    return cast(torch.Tensor, kwargs["past_key_values"].layers[attention.layer_idx].keys)


def sizes_of_keys(keys: torch.Tensor) -> torch.Tensor:
    """L1 norm of keys ``(rows, heads, dim)``, all heads together: ``(rows,)`` float32."""
    return keys.abs().sum((1, 2), dtype=torch.float32)


def kind_of(layer: Any) -> str | None:
    """The kind of attention a decoder layer has, where its model tells kinds apart: ``sliding_attention`` or others."""
    return getattr(getattr(layer, "self_attn", None), "layer_type", None)


def window_of(layer: Any) -> int | None:
    """Tokens that a layer which slides looks back at, itself included; None for any other."""
    attention: Any = getattr(layer, "self_attn", None)
    config = getattr(attention, "config", None)
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or kinds[attention.layer_idx] == "sliding_attention"
    # Some attentions hold their own, others read it off the configuration each time (Mistral).
    found = getattr(attention, "sliding_window", getattr(config, "sliding_window", None) if slides else None)
    return cast("int | None", found)


def tables(rotary: Any, layer: Any, hidden: torch.Tensor, ids: torch.Tensor) -> Any:
    """Rotary tables of the positions ``ids`` for ``layer``, whose kind has its own in some models (Gemma 3).

    Not by a call, so that no hook takes it for the model's own run.
    """
    kinds = "layer_type" in inspect.signature(rotary.forward).parameters
    return rotary.forward(hidden, ids, kind_of(layer)) if kinds else rotary.forward(hidden, ids)


def additive(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask as numbers to add to scores."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min)
