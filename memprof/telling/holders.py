"""Who holds a peak, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from memprof.records import Holder

_PLAIN = {
    "kv_cache": "the KV cache", "mlp": "the MLP's activations", "pruner": "the pruner's own tensors",
    "inputs": "the inputs", "other": "hidden states and what lies between the parts",
    "unexplained": "what no part claims",
}  # fmt: skip


def leading_part(parts: Mapping[str, int]) -> str:
    """The part with the most bytes."""
    return max(parts, key=lambda part: parts[part], default="unexplained")


def words_for(part: str, holders: Sequence[Holder]) -> str:
    """What ``part`` is at a peak whose largest tensors are ``holders``: ``'the fp32 logits of all positions'``."""
    own = [holder for holder in holders if holder.part == part]
    if part == "logits":
        width = "fp32 " if any(h.dtype == "float32" for h in own) else ""
        every = any(len(h.shape) > 1 and h.shape[-2] > 1 for h in own)
        return f"the {width}logits of {'all positions' if every else 'the last position'}"
    if part == "attention":
        square = next((h.shape for h in own if is_map(h)), None)
        heads = f" ({square[1]} heads × {square[2]:,} × {square[3]:,})" if square else ""
        return f"the attention scores{heads}" if square else "attention's queries, keys and values"
    if part == "vision":
        running = [h for h in own if "layer" in h.module]
        tiles = max((h.shape[0] for h in own if len(h.shape) > 2), default=0)
        return f"the vision tower at work on {_tiles(tiles)}" if running else "the vision features"
    return _PLAIN[part]


def is_map(holder: Holder) -> bool:
    """Whether a tensor is an attention map of a prefill: ``(batch, heads, n, n)`` or longer in keys, n above 1."""
    shape = holder.shape
    return len(shape) == 4 and shape[1] > 1 and 1 < shape[2] <= shape[3] and holder.part in ("attention", "other")


def line(holder: Holder) -> str:
    """``'lm_head: _to_copy [1, 3426, 92553] float32, made in prefill'``, and the line of code where it was noted."""
    op = holder.op.removeprefix("aten.").partition(".")[0]
    where = f" by {holder.line}" if holder.line else ""
    return (
        f"{holder.module or '(outside any layer)'}: {op} {holder.shape} {holder.dtype}, made in {holder.phase}{where}"
    )


def _tiles(count: int) -> str:
    return f"{count} tiles" if count > 1 else "one tile"
