"""Whether what a signal works out of a decoder layer would be that layer's own: its parts, its queries, its positions.

Attention rows are worked out beside the kernel (:mod:`memprof.pruning.attention`): queries by ``q_proj`` and a norm by
head, turned by split halves, before the same scale. Models whose attention does anything else to them (fused
projections, interleaved or partial rotary positions, layers without any, norms elsewhere, sinks, capped scores) would
give other rows without a word, so they are refused. What a layer does is read off its modules and off its own source,
not off a list of names.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from functools import cache
from typing import Any

from memprof.pruning.attention import turned

#: What signals look at of the layer before a cut (``ahead``: behind it).
_PARTS = {
    "ahead": ("self_attn", "input_layernorm"),
    "key_norms": ("self_attn",),
    "map": ("self_attn",),
    "row": ("self_attn",),
    "target": ("post_attention_layernorm", "mlp"),
    "text_key_norms": ("self_attn",),
    "text_rotation": ("self_attn",),
    "text_rows": ("self_attn",),
}
#: Signals for which queries, or rotary positions, are worked out again.
WORKED_OUT = frozenset({"ahead", "row", "text_rotation", "text_rows"})
_PROJECTIONS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "dense", "rotary_emb", "rotary_fn"})
_NORMS = ("q_norm", "k_norm")


def unreadable(signal: str, layer: Any, rotary: Any) -> str | None:
    """Why ``signal`` cannot be read at ``layer``, in words that follow "the layer"; None where it can.

    Args:
        signal: A name out of :attr:`memprof.pruning.Pruner.needs`.
        layer: The decoder layer it is about.
        rotary: The decoder's rotary embedding; None where it has none.
    """
    missing = next((part for part in _PARTS.get(signal, ()) if not hasattr(layer, part)), None)
    if missing is not None:
        return f"has no {missing}"
    return _attends_otherwise(layer.self_attn, rotary) if signal in WORKED_OUT else None


def _attends_otherwise(attention: Any, rotary: Any) -> str | None:
    """What the attention does to queries and keys that memprof does not work out."""
    own = {name for name, part in attention.named_children() if any(True for _ in part.parameters())}
    if not {"q_proj", "k_proj"} <= own:
        return "has no query and key projections of its own"
    odd = own - _PROJECTIONS - {*_NORMS} | {name for name, _ in attention.named_parameters(recurse=False)}
    if odd:
        return f"has parts in its attention that memprof does not know ({', '.join(sorted(odd))})"
    dim = attention.head_dim
    if attention.q_proj.out_features != attention.config.num_attention_heads * dim:
        return "makes more than queries by its query projection"
    if any(norm in own and getattr(attention, norm).weight.numel() != dim for norm in _NORMS):
        return "norms its queries over all heads at once"
    if getattr(attention, "attn_logit_softcapping", None):
        return "caps its scores"
    if rotary is None or any(2 * len(table) != dim for name, table in rotary.named_buffers() if "inv_freq" in name):
        return "turns no or only a part of its queries by rotary positions"
    kind: Any = type(attention)
    return None if _turns_by_halves(kind) else "turns its queries in another way than by split halves"


@cache
def _turns_by_halves(kind: type) -> bool:
    """Whether every forward turns queries and keys, as a whole, by a function that does as :func:`turned` does."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward))))  # type: ignore[attr-defined]
    except (OSError, TypeError, SyntaxError):
        return False
    unconditional: list[ast.stmt] = getattr(tree.body[0], "body", [])
    names = [name for statement in unconditional if (name := _turning(statement)) is not None]
    found = [getattr(sys.modules[kind.__module__], name, None) for name in names]
    return len(found) == 1 and found[0] is not None and _as_halves(found[0])


def _turning(statement: ast.stmt) -> str | None:
    """The name of the function in ``query, key = function(query, key, ...)``; None for any other statement."""
    if not (isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call)):
        return None
    call, target = statement.value, statement.targets[0]
    if not (isinstance(call.func, ast.Name) and isinstance(target, ast.Tuple) and "rotary" in call.func.id):
        return None
    given = [argument.id for argument in call.args[:2] if isinstance(argument, ast.Name)]
    made = [name.id for name in target.elts if isinstance(name, ast.Name)]
    return call.func.id if given == made == ["query_states", "key_states"] else None


def _as_halves(turn: Any) -> bool:
    """Whether ``turn(q, k, cos, sin)`` gives what :func:`turned` gives, tried on a few numbers."""
    import torch

    draw = torch.Generator().manual_seed(0)
    by_head, angles = (torch.randn(shape, generator=draw, device="cpu") for shape in ((1, 2, 3, 8), (1, 3, 8)))
    tables = angles.cos(), angles.sin()
    try:
        got, _ = turn(by_head, by_head, *tables)
    except (TypeError, ValueError, RuntimeError):
        return False
    return got.shape == by_head.shape and torch.allclose(got, turned(by_head, tables), atol=1e-5)
