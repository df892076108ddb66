"""Sliding windows: which decoder layers have one, of how many tokens, as a configuration says. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from memprof.families import Model
from memprof.prompts import Shape
from memprof.pruning import Pruner, visual_tokens_per_layer

#: Kinds of layers whose cache forgets, and where the configuration says how many tokens it keeps.
_FORGETFUL: Mapping[str, str] = {
    "sliding_attention": "sliding_window", "hybrid_sliding": "sliding_window",
    "reference_sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size",
}  # fmt: skip


def windows_of(model: Model) -> tuple[int | None, ...]:
    """The window of each decoder layer, None where it keeps all; as the cache that transformers makes has them.

    A layer that uses another's cache has none of its own.
    """
    text, layers = model.text, model.layers
    kinds = text.get("layer_types") or [_kind_of_all(text)] * layers
    shared = text.get("kv_sharing_modes") or [None] * layers
    return tuple(
        None if mode == "reuse" else text.get(_FORGETFUL.get(kind, "")) or None
        for kind, mode in zip(kinds, shared, strict=False)
    )


def capped(tokens: Sequence[int], windows: Sequence[int | None]) -> list[int]:
    """Of so many tokens a layer, those it looks at in the next step: a full window lacks the one to come."""
    return [min(n, window - 1) if window else n for n, window in zip(tokens, windows, strict=True)]


def cached_by_first(pruner: Pruner, shape: Shape, layers: int) -> int:
    """Tokens that the first of the decoder layers has cached of a prompt: what tells how full windows are."""
    if pruner.mask_only:
        return shape.length
    stages = pruner.stages(shape.visual_tokens, layers)
    return shape.text_tokens + visual_tokens_per_layer(stages, shape.visual_tokens, layers)[0]


def _kind_of_all(text: Mapping[str, Any]) -> str:
    """What layers are where nobody says it of each."""
    said = (kind for kind in ("sliding_attention", "chunked_attention") if text.get(_FORGETFUL[kind]) is not None)
    return next(said, "full_attention")
