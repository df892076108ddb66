"""What a CUDA run allocates that the CPU dispatch does not show: one place, each entry named, each with its source.

The simulator runs operators on storage-less CPU tensors. Most results are those CUDA gives. What is not:

**Attention.** ``scaled_dot_product_attention`` picks its kernel by device, so here it is picked as CUDA does
(``select_sdp_backend`` in ``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp``, ``scaled_dot_product_attention`` in
``.../transformers/attention.cpp``), and that kernel's own operator runs:

========== ============================================== ===========================================================
kernel     taken when                                     allocates beside its output
========== ============================================== ===========================================================
cuDNN      first on compute capability 9.0, 10.0 and 10.3, logsumexp only under autograd; a workspace (not modelled)
           half types, head dims multiples of 8 up to 256
           (9.0) or 128 (10.x), keys more than one
flash      half types, capability 8.0 on, no mask, head   logsumexp float32 ``(b, h, q)``; random state and offset
           dim up to 256, not causal unless square        (512 B each); with few queries the split sums, below
efficient  what is left, half types or float32, head dim  a boolean mask as numbers; a mask whose rows are no multiple
           a multiple of 8 (float32: 4)                   of 8 once more (``cuda:pad_bias``); no logsumexp
math       what is left                                   everything: the operators themselves are recorded
========== ============================================== ===========================================================

cuDNN's rule (``check_prefer_cudnn_attention``, ``check_cudnn_tensor_shapes``) is the source's of early 2026, taken
to be torch 2.11's, under the cuDNN that PyPI's wheels ask for: 9.19 (torch 2.11) and 9.20 (2.12, 2.13). Before 9.15.1
cuDNN is not first. The source of mid-2026 refuses head dims over 128 under these versions on every card; which of the
two 2.12 and 2.13 have was not to be seen. They differ for such head dims alone, and no model here has one.
``TORCH_CUDNN_SDPA_DEPRIORITIZED`` is taken to be unset.

**Temporaries**, alive while an operator runs, made before its results (:meth:`Kernels.copies`) or after them
(:meth:`Kernels.temporaries`):

* ``cuda:pad_bias``: the efficient kernel's mask, its rows padded to a multiple of 8 (``pad_bias``, ``attention.cpp``);
* ``cuda:masked_scatter``: the prefix sum, int64 as large as the result, and the mask made contiguous
  (``masked_scatter__cuda`` in ``native/cuda/IndexKernel.cpp``, ``launch_masked_scatter_kernel`` in ``IndexKernel.cu``);
* ``cuda:flash``: where the keys are cut to fill the card, the partial sums and outputs (``set_params_splitkv`` in
  ``flash_attn/flash_api.cpp``), which follow from the number of processors.

**Lasting workspaces** of cuBLAS and cuBLASLt are static bytes (:func:`memprof.simulator.cards.cublas_workspace_bytes`).

**Softmax** of float16 with ``dtype=float32`` is one kernel on CUDA (``half_to_float``); the CPU, and CUDA for bfloat16,
first make a float32 copy (``softmax`` in ``aten/src/ATen/native/SoftMax.cpp``).

Seen as they are, because the dispatch is the same on both devices: repeat_kv copies, ``cat``, ``index``,
``index_select``, ``argmax``, ``topk``, and ``sort`` up to 4,096 elements (their results are all they allocate).

**Not modelled**, because only a card can tell:

============================================ ======================================================================
what                                         why
============================================ ======================================================================
scratch of CUB (cumsum, masked_scatter's     its size is asked of the library at run time; kilobytes at these sizes
scan, sort beyond 4,096, nonzero)
cuDNN's convolution and attention workspace  chosen by heuristics of the library for card and version
reductions over several blocks               a buffer and semaphores where one block is not enough (``Reduce.cuh``);
                                             kilobytes
grouped-query attention by the efficient     whether keys and values are repeated first depends on the version
kernel
kernels' code, and the context               outside the allocator (``device`` bytes; ``cards.CONTEXT_BYTES``)
============================================ ======================================================================
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from memprof.simulator.cards import ANY, Card

aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)
#: Compute capabilities on which cuDNN's attention is asked before the others.
_CUDNN_FIRST = ((9, 0), (10, 0), (10, 3))
_SOFTMAX = (torch.nn.functional.softmax, torch.Tensor.softmax, torch.softmax)


class Temporary(NamedTuple):
    """Memory an operator takes while it runs: what it is called, its shape and dtype.

    Where a name is in :data:`memprof.simulator.cards.RULES`, the bytes follow from the shape by that rule instead.
    """

    op: str
    shape: tuple[int, ...]
    dtype: str


class Kernels:
    """The kernels of a card, as far as bytes go."""

    def __init__(self, card: Card = ANY) -> None:
        self.card = card

    @property
    def name(self) -> str:
        """What distinguishes traces made with these kernels from others."""
        return self.card.architecture

    def dispatch(self) -> TorchFunctionMode:
        """A mode in which functions that choose their operators by device choose as on the card."""
        return _Dispatch(self.card)

    def copies(self, func: Any, args: Any) -> Iterator[Temporary]:
        """What ``func`` makes of its arguments before its results, in order of allocation."""
        if func is aten._scaled_dot_product_efficient_attention.default and args[3] is not None:
            strides = args[3].stride()
            shape = tuple(1 if not step else n for n, step in zip(args[3].shape, strides, strict=True))
            columns = shape[-1]
            if strides[-1] == 1 and strides[-2] in (0, columns):
                # An entry in any case, with no bytes where nothing is padded: so the events are alike at all lengths.
                yield Temporary("cuda:pad_bias", (args[3].element_size(), *shape), "uint8")
            elif strides[-1] != 1 or any(step % 8 for step in strides[:-1]):
                yield Temporary(
                    "cuda:pad_bias of a view", (*shape[:-1], columns + 8 - columns % 8), _name(args[3].dtype)
                )

    def temporaries(self, func: Any, args: Any, out: Any) -> Iterator[Temporary]:
        """What ``func`` takes beside its results, in order of allocation."""
        if func is aten.masked_scatter.default:
            mask, shape = args[1], tuple(out.shape)
            yield Temporary("cuda:masked_scatter prefix sum", shape, "int64")
            if tuple(mask.shape) != shape or not mask.is_contiguous():
                yield Temporary("cuda:masked_scatter mask", shape, "bool")
        elif func is aten._scaled_dot_product_flash_attention.default:
            query, key = args[:2]
            batch, heads, queries, dim = query.shape
            if queries == 1 and heads > key.shape[1]:  # grouped heads become queries (seqlenq_ngroups_swapped)
                heads, queries = key.shape[1], heads // key.shape[1]
            lengths = self.card.processors, batch, heads, queries, key.shape[2], dim
            yield Temporary("cuda:flash split logsumexp", lengths, "float32")
            yield Temporary("cuda:flash split output", lengths, "float32")


class _Dispatch(TorchFunctionMode):
    """See :meth:`Kernels.dispatch`."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and isinstance(args[0], FakeTensor):
            return attend(self.card, *args, **kwargs)
        if func in _SOFTMAX and args[0].dtype == torch.float16 and kwargs.get("dtype") == torch.float32:
            return aten._softmax(args[0], kwargs["dim"] if "dim" in kwargs else args[1], True)
        return func(*args, **kwargs)


def choose(card: Card, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> str:
    """The kernel CUDA runs: ``cudnn``, ``flash``, ``efficient`` or ``math``. Shapes are ``(batch, heads, n, dim)``."""
    dim, half, modern = query.shape[-1], query.dtype in _HALF, card.capability >= (8, 0)
    same = dim == key.shape[-1] == value.shape[-1]
    low = modern or query.dtype == torch.float16
    widest = 256 if card.capability == (9, 0) else 128
    wide = max(dim, value.shape[-1]) > widest or dim % 8 or value.shape[-1] % 8
    if card.capability in _CUDNN_FIRST and half and not wide and key.shape[2] > 1:
        return "cudnn"
    square = not causal or query.shape[2] == key.shape[2]
    if modern and half and same and dim <= 256 and mask is None and square:
        return "flash"
    if (low if half else query.dtype == torch.float32) and same and dim % (8 if half else 4) == 0:
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
    if kernel == "math":
        made: tuple[Tensor, ...] = aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )
        return made[0]
    if kernel == "flash":
        dim = query.shape[-1]
        if dim % 8:
            pad = (0, 8 - dim % 8)
            query, key, value = (torch.nn.functional.pad(t, pad) for t in (query, key, value))
            scale = 1 / math.sqrt(dim) if scale is None else scale
        out: Tensor = aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]
        return out[..., :dim]
    mask = _as_numbers(attn_mask, query)
    if kernel == "cudnn":
        return torch.empty_like(query)
    if mask is not None:
        mask = mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    efficient: tuple[Tensor, ...] = aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, False, dropout_p, is_causal, scale=scale
    )
    return efficient[0]


def _name(dtype: torch.dtype) -> str:
    """``dtype`` without ``torch.``."""
    return str(dtype).removeprefix("torch.")


def _as_numbers(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """A boolean mask as numbers to add (``convert_boolean_attn_mask``)."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.where(mask, 0.0, torch.scalar_tensor(-math.inf, dtype=query.dtype, device=query.device))
