"""Attention as CUDA runs it: which kernel ``scaled_dot_product_attention`` picks, and what that kernel allocates.

It picks by device, so here it is picked as CUDA does
(``select_sdp_backend`` in ``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp``, ``scaled_dot_product_attention`` in
``.../transformers/attention.cpp``), and an operator of memprof's own stands for that kernel:

========== ============================================== ===========================================================
kernel     taken when                                     allocates beside its output
========== ============================================== ===========================================================
cuDNN      first on compute capability 9.0, 10.0 and 10.3, random seed and offset (8 bytes each); a workspace of 256
           half types, head dims multiples of 8 up to 256 bytes, for one query the partial results of split keys; a
           (9.0) or 128 (10.x), keys more than one        boolean mask as numbers
flash      half types, capability 8.0 on, no mask, head   logsumexp float32 ``(b, h, q)``; random state (16 and 8
           dim up to 256, not causal unless square        bytes); with few queries the split sums
efficient  what is left, half types or float32, head dim  a boolean mask as numbers; a mask whose rows are no multiple
           a multiple of 8 (float32: 4), heads not grouped of 8 once more (``cuda:pad_bias``); no logsumexp
math       what is left: float32 with grouped heads, too  everything: the operators themselves are recorded
========== ============================================== ===========================================================

cuDNN's rule (``check_prefer_cudnn_attention``, ``check_cudnn_tensor_shapes``) is the source's of early 2026, and 351
calls on an H200 under torch 2.11 and cuDNN 9.19 agree. Before 9.15.1 cuDNN is not first. The source of mid-2026 refuses
head dims over 128 under these versions on every card; which of the two 2.12 and 2.13 have was not to be seen. They
differ for such head dims alone. ``TORCH_CUDNN_SDPA_DEPRIORITIZED`` is taken to be unset.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from memprof.gpus import Card
from memprof.tracing.temporaries import HALF, Ends, Steps, Temporary, name_of

aten = torch.ops.aten
#: Compute capabilities on which cuDNN's attention is asked before the others.
_CUDNN_FIRST = ((9, 0), (10, 0), (10, 3))

#: Operators that stand for a kernel of attention: results shaped as that kernel leaves them, and nothing else.
_library: Any = cast(Any, torch.library.Library)("memprof", "DEF")
_library.define("cudnn_attention(Tensor query, Tensor key, Tensor value) -> Tensor")
_library.define("flash_attention(Tensor query, Tensor key, Tensor value) -> Tensor")
_library.define("efficient_attention(Tensor query, Tensor key, Tensor value, Tensor? mask) -> Tensor")


def _like_query(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The layout of ``query``, with the head dim of ``value``."""
    if value.shape[-1] == query.shape[-1]:
        return torch.empty_like(query)
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _heads_last(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """``(batch, n, heads, dim)`` in memory, whatever the query's layout is."""
    batch, heads, n, _ = query.shape
    return query.new_empty((batch, n, heads, value.shape[-1])).transpose(1, 2)


_library.impl("cudnn_attention", _like_query, "Meta")
_library.impl("flash_attention", _like_query, "Meta")
_library.impl("efficient_attention", _heads_last, "Meta")
_OURS = torch.ops.memprof
#: What torch calls the kernels that these operators stand for.
CALLED = {
    _OURS.cudnn_attention.default: "aten._scaled_dot_product_cudnn_attention.default",
    _OURS.flash_attention.default: "aten._scaled_dot_product_flash_attention.default",
    _OURS.efficient_attention.default: "aten._scaled_dot_product_efficient_attention.default",
}


def choose(card: Card, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> str:
    """The kernel CUDA runs: ``cudnn``, ``flash``, ``efficient`` or ``math``. Shapes are ``(batch, heads, n, dim)``."""
    dim, half, modern = query.shape[-1], query.dtype in HALF, card.capability >= (8, 0)
    same = dim == key.shape[-1] == value.shape[-1]
    low = modern or query.dtype == torch.float16
    widest = 256 if card.capability == (9, 0) else 128
    wide = max(dim, value.shape[-1]) > widest or dim % 8 or value.shape[-1] % 8
    if card.capability in _CUDNN_FIRST and half and not wide and key.shape[2] > 1:
        return "cudnn"
    square = not causal or query.shape[2] == key.shape[2]
    if modern and half and same and dim <= 256 and mask is None and square:
        return "flash"
    grouped = query.shape[1] != key.shape[1]  # cuDNN and flash take grouped heads, the efficient kernel does not
    if not grouped and (low if half else query.dtype == torch.float32) and same and dim % (8 if half else 4) == 0:
        return "efficient"
    return "math"


def attend(
    card: Card,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``scaled_dot_product_attention`` as CUDA runs it: the same operators on tensors without storage."""
    kernel = choose(card, query, key, value, attn_mask, is_causal)
    if kernel == "flash":
        return _flash(query, key, value)
    if kernel == "efficient":
        return _OURS.efficient_attention(query, key, value, attn_mask)  # type: ignore[no-any-return]
    if kernel == "cudnn":
        mask = _as_numbers(attn_mask, query)
        out: Tensor = _OURS.cudnn_attention(query, key, value)
        del mask
        return out
    return _math(query, key, value, attn_mask, is_causal)


def _flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Head dims that are no multiple of 8 are padded first (``pad_last_dim`` in ``attention.cpp``)."""
    dim = query.shape[-1]
    if dim % 8:
        query, key, value = (torch.nn.functional.pad(t, (0, 8 - dim % 8)) for t in (query, key, value))
    out = _OURS.flash_attention(query, key, value)
    del value, key, query
    return out[..., :dim]  # type: ignore[no-any-return]


def _math(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """``_scaled_dot_product_attention_math``, step by step: where tensors are of a subclass it takes other steps."""
    kind, groups = query.dtype, query.shape[1] // key.shape[1]
    numbers = _as_numbers(mask, query)
    if kind in HALF:
        query, key, value = query.float(), key.float(), value.float()
    scaled = query * 1.0
    inner = None
    if causal:
        # Made from the query: without storage, as that is.
        allowed = query.new_ones((query.shape[-2], key.shape[-2]), dtype=torch.bool).tril()
        numbers = inner = _as_numbers(allowed, query)
        del allowed
    if groups > 1:
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    turned = (key * 1.0).transpose(-2, -1)
    scores = scaled @ turned
    del turned
    if numbers is not None:
        scores.add_(numbers)
    shares = aten._safe_softmax(scores, -1)
    del scores
    kept = shares.to(kind)
    out = shares @ value
    if kind in HALF:
        out = out.to(kind)
        del shares, scaled, value, key, query, kept
    else:
        if causal:
            del numbers
        del key, value, scaled, inner, shares, kept
    return out  # type: ignore[no-any-return]


def _as_numbers(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """A boolean mask as numbers to add (``convert_boolean_attn_mask``)."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    low, zero = (torch.scalar_tensor(n, dtype=query.dtype, device=query.device) for n in (-math.inf, 0.0))
    numbers = torch.where(mask, zero, low)
    del zero
    return numbers


def _before_cudnn(card: Card, args: Sequence[Any], kwargs: Any) -> Steps:
    yield Temporary("cuda:cudnn attention seed", (8,))
    yield Temporary("cuda:cudnn attention offset", (8,))


def _after_cudnn(card: Card, args: Sequence[Any], kwargs: Any, out: Tensor) -> Steps:
    query, key = args[:2]
    batch, heads, queries, dim = query.shape
    lengths = (card.processors, batch, heads, key.shape[1], queries, key.shape[2], dim)
    yield Temporary("cuda:cudnn attention", lengths, brief=True)
    yield Ends(0)


def _after_flash(card: Card, args: Sequence[Any], kwargs: Any, out: Tensor) -> Steps:
    query, key = args[:2]
    batch, heads, queries, dim = query.shape
    if queries == 1 and heads > key.shape[1]:  # grouped heads become queries (seqlenq_ngroups_swapped)
        heads, queries = key.shape[1], heads // key.shape[1]
    lengths = card.processors, batch, heads, queries, key.shape[2], dim
    yield Temporary("cuda:flash logsumexp", (batch, heads, queries), "float32")
    yield Temporary("cuda:flash split logsumexp", lengths)
    yield Temporary("cuda:flash split output", lengths)
    yield Temporary("cuda:flash random state", (16,))
    yield Temporary("cuda:flash random state unused", (8,))
    yield from map(Ends, (1, 2, 0, 3, 4))


def _before_efficient(card: Card, args: Sequence[Any], kwargs: Any) -> Steps:
    """A mask as numbers, in rows of a multiple of 8 numbers (``preprocess_mask``, ``pad_bias`` in ``attention.cpp``).

    There is an entry at every length, of no bytes where nothing is copied: so the events are alike at all lengths.
    """
    query, mask = args[0], args[3]
    if mask is None:
        return
    item, shape = query.element_size(), tuple(mask.shape)
    if mask.dtype == torch.bool:
        kind = name_of(query.dtype)
        yield Temporary("cuda:mask low", (), kind)
        yield Temporary("cuda:mask zero", (), kind)
        yield Temporary("cuda:mask as numbers", shape, kind)
        yield Ends(1)
        yield Ends(0)
        yield Temporary("cuda:pad_bias", (item, *shape))
        yield Ends(2)
        yield Temporary("cuda:bias as it is", (item, *shape))
        return
    strides = mask.stride()
    shape = tuple(1 if not step else n for n, step in zip(shape, strides, strict=True))
    columns = shape[-1]
    if strides[-1] == 1 and strides[-2] in (0, columns):
        yield Temporary("cuda:pad_bias", (item, *shape))
    elif strides[-1] != 1 or any(step % 8 for step in strides[:-1]):
        yield Temporary("cuda:pad_bias of a view", (*shape[:-1], columns + 8 - columns % 8), name_of(mask.dtype))


#: What each takes before its result is made, and after.
BEFORE: dict[Any, Callable[..., Steps]] = {
    _OURS.cudnn_attention.default: _before_cudnn,
    _OURS.efficient_attention.default: _before_efficient,
}
AFTER: dict[Any, Callable[..., Steps]] = {
    _OURS.cudnn_attention.default: _after_cudnn,
    _OURS.flash_attention.default: _after_flash,
}
