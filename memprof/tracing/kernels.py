"""What a CUDA run allocates that the CPU dispatch does not show: one place, each entry named, each with its source.

The simulator runs operators on storage-less CPU tensors. Most results are those CUDA gives. What is not:

**Attention** has a file of its own (:mod:`memprof.tracing.attention`).

**Temporaries**, alive while an operator runs, made before its results (:meth:`Kernels.before`) or after them
(:meth:`Kernels.after`). Their bytes follow from their shape, or by a rule of :mod:`memprof.simulator.rules`: scratch of
scans, sorts and ``nonzero`` (CUB), partial results of reductions over several blocks (``Reduce.cuh``), integers copied
to what they are summed as, index tensors made contiguous, the prefix sum of ``masked_scatter``, a changed layout around
a convolution (cuDNN).

**Layers that are one kernel on CUDA**: softmax of float16 with ``dtype=float32`` (``half_to_float``); ``layer_norm``
and ``rms_norm``, whose statistics are float32 for half types too.

**Lasting workspaces** of cuBLAS and cuBLASLt are static bytes (:func:`memprof.gpus.cublas_workspace_bytes`).

Seen as they are, because the dispatch is the same on both devices, and held to the card by the same table: linear
layers and other products, ``cat``, ``index_select``, ``gather``, ``where``, padding, activations, pooling,
interpolation, softmax.

**Not modelled**, because no model here runs it in generate(), or only a card can tell:

============================================ ======================================================================
what                                         why
============================================ ======================================================================
``isin``, ``cdist``, ``median``, ``quantile``, many small tensors each; no method or model here calls them
``multinomial``, ``unique``, ``bincount``
``topk`` of rows from 20,000 on, or of more  kilobytes of counters a block; sorts of more than 4,096 picks
than 4,096 elements
cuDNN's convolutions beyond patches          its choice of engine is a heuristic for card and version
kernels' code, and the context               outside the allocator (``device`` bytes; ``cards.CONTEXT_BYTES``)
============================================ ======================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from memprof.gpus import ANY, Card
from memprof.simulator.rules import SMALL_SORT
from memprof.tracing import attention
from memprof.tracing.temporaries import HALF, Ends, Steps, Temporary, name_of

aten = torch.ops.aten


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

    def before(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Steps:
        """What ``func`` takes before its results are made, in order."""
        return iter(()) if func not in _BEFORE else _BEFORE[func](self.card, args, kwargs)

    def after(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Steps:
        """What ``func`` takes once its results are made, in order."""
        return iter(()) if func not in _AFTER else _AFTER[func](self.card, args, kwargs, out)


# ----------------------------------------------------------------------------------------------- norms in one kernel

#: Operators that stand for a norm: its result and its statistics.
_library: Any = cast(Any, torch.library.Library)("memprof", "FRAGMENT")
_library.define("layer_norm(Tensor source, int rows) -> (Tensor, Tensor, Tensor)")
_library.define("rms_norm(Tensor source, int rows) -> (Tensor, Tensor)")


def _with_statistics(count: int) -> Callable[[Tensor, int], tuple[Tensor, ...]]:
    """A norm's result and ``count`` numbers a row: float32 for half types (``at::toAccumulateType``)."""

    def made(source: Tensor, rows: int) -> tuple[Tensor, ...]:
        kind = torch.float32 if source.dtype in HALF else source.dtype
        out = torch.empty_like(source, memory_format=torch.contiguous_format)
        return out, *(source.new_empty(rows, dtype=kind) for _ in range(count))

    return made


_library.impl("layer_norm", _with_statistics(2), "Meta")
_library.impl("rms_norm", _with_statistics(1), "Meta")
_OURS = torch.ops.memprof
#: What torch calls the kernels that operators of memprof's own stand for.
_CALLED = {
    **attention.CALLED,
    _OURS.layer_norm.default: "aten.native_layer_norm.default",
    _OURS.rms_norm.default: "aten._fused_rms_norm.default",
}


@cache
def called(func: Any) -> str:
    """The name of operator ``func``, as the card's dispatch has it."""
    return _CALLED.get(func) or str(func)


# -------------------------------------------------------------------------------------------- sums, scans, sorts, picks


def _reduced(args: Sequence[Any], kwargs: dict[str, Any]) -> list[int]:
    """The dimensions a reduction goes over; all where none is named."""
    dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
    n = args[0].dim()
    if isinstance(dims, int):
        dims = [dims]
    if not isinstance(dims, list | tuple) or not dims:
        return list(range(n))
    return [d % n for d in dims] if n else []


def _spread(card: Card, source: Tensor, dims: Sequence[int], acc: int) -> Steps:
    """What a reduction over ``dims`` leaves in global memory where one block an output is not enough.

    Lengths as they are, no products of them: a program is linear in each (:mod:`memprof.simulator.program`).
    """
    fastest_first = sorted(range(source.dim()), key=lambda d: (source.stride(d), source.shape[d] == 1, -d))
    order = sum(d * 8**place for place, d in enumerate(fastest_first))
    lengths = (card.processors, acc, sum(1 << d for d in set(dims)), order, *source.shape)
    yield Temporary("cuda:reduction", lengths)
    yield Temporary("cuda:reduction semaphores", lengths)


def _after_sum(card: Card, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> Steps:
    """Integers and truth values are first copied to what they are summed as (``make_reduction_from_out_ty``)."""
    source = args[0]
    half_to_float = source.dtype in HALF and out.dtype == torch.float32
    if source.dtype != out.dtype and not half_to_float:
        yield Temporary("cuda:sum of a copy", tuple(source.shape), name_of(out.dtype))
        source = torch.empty_like(source, dtype=out.dtype, device="meta")
    acc = 4 if source.dtype in HALF else source.element_size()
    yield from _spread(card, source, _reduced(args, kwargs), acc)
    if out.dtype != args[0].dtype and not half_to_float:
        yield from (Ends(2), Ends(1), Ends(0))
    else:
        yield from (Ends(1), Ends(0))


def _after_pick(acc: int | None) -> Callable[..., Steps]:
    """Reductions that keep the type of what they read, ``acc`` bytes an accumulated value (None: as many as it has)."""

    def after(card: Card, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Steps:
        source = args[0]
        yield from _spread(card, source, _reduced(args, kwargs), acc or source.element_size())

    return after


def _after_norm(card: Card, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> Steps:
    dims = kwargs.get("dim", args[2] if len(args) > 2 else None)
    yield from _spread(card, args[0], _reduced([args[0], dims], {}), max(4, args[0].element_size()))


def _after_scan(card: Card, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> Steps:
    """``cumsum``: integers are copied to int64 first; one row is scanned by CUB (``launch_cumsum_cuda_kernel``)."""
    source, dim = args[0], kwargs.get("dim", args[1] if len(args) > 1 else 0)
    if source.dtype != out.dtype:
        yield Temporary("cuda:sum of a copy", tuple(source.shape), name_of(out.dtype))
    if source.numel() and (source.dim() == 0 or source.numel() == source.shape[dim]):
        yield Temporary("cuda:scan", (out.element_size(), *source.shape), brief=True)


def _after_masked_scatter(card: Card, args: Sequence[Any], kwargs: Any, out: Tensor) -> Steps:
    """The prefix sum, the mask made contiguous, and CUB's scratch (``launch_masked_scatter_kernel``)."""
    mask, shape = args[1], tuple(out.shape)
    yield Temporary("cuda:masked_scatter prefix sum", shape, "int64")
    if tuple(mask.shape) != shape or not mask.is_contiguous():
        yield Temporary("cuda:masked_scatter mask", shape, "bool")
    yield Temporary("cuda:scan", (8, *shape), brief=True)


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype == torch.bool


def with_places(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """``args`` of ``func`` with the places that a mask of known numbers names, where a tensor without storage is asked
    for them: the size of the result is then known.
    """
    if func not in _INDEXED or not isinstance(args[0], FakeTensor):
        return args
    found = list[Tensor | None]()
    for index in args[1]:
        found += index.nonzero().unbind(1) if _is_mask(index) and not isinstance(index, FakeTensor) else [index]
    return args[0], found, *args[2:]


def _before_index(card: Card, args: Sequence[Any], kwargs: Any) -> Steps:
    """A mask is turned into places; several index tensors are made alike in their strides (``AdvancedIndex`` in
    ``TensorAdvancedIndexing.cpp``).
    """
    named = [index for index in args[1] if index is not None]
    masks = [index for index in named if index.dtype == torch.bool]
    if masks:
        if len(named) == 1 and not isinstance(masks[0], FakeTensor):
            yield from _before_nonzero(card, masks, {})
            yield Temporary("cuda:places of a mask", (int(masks[0].sum()), masks[0].dim()), "int64")
            yield Temporary("cuda:places of nonzero", (1023,), brief=True)
            yield Ends(0)
        return
    if len(named) < 2:
        return
    alike = cast(Any, torch.broadcast_tensors)(*(index.to("meta") for index in named))
    steps = {tuple(each.stride()) for each in alike}
    if len(steps) > 1:
        for each in alike:
            if not each.is_contiguous():
                yield Temporary("cuda:index made contiguous", tuple(each.shape), name_of(each.dtype))


def _before_repeat(card: Card, args: Sequence[Any], kwargs: Any) -> Steps:
    """``repeat_interleave_cuda``: a running sum of how often, and a check that none is negative."""
    repeats = args[0]
    yield Temporary("cuda:repeats summed", tuple(repeats.shape), "int64")
    yield Temporary("cuda:scan", (8, *repeats.shape), brief=True)
    yield Temporary("cuda:repeats checked", tuple(repeats.shape), "bool")
    yield Temporary("cuda:repeats all checked", (), "bool")
    yield Ends(3)
    yield Ends(2)


def _after_safe_softmax(card: Card, args: Sequence[Any], kwargs: Any, out: Tensor) -> Steps:
    """Rows that are masked throughout are looked for, and filled with zeros (``_safe_softmax``)."""
    shape = tuple(out.shape)
    yield Temporary("cuda:safe softmax masked", shape, "bool")
    yield Temporary("cuda:safe softmax masked rows", shape[:-1], "bool")
    yield Temporary("cuda:safe softmax zero", (), name_of(out.dtype))


def _after_sort(card: Card, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Steps:
    values = out[0]
    given = [a for a in args[1:] if not isinstance(a, bool) and isinstance(a, int)]
    dim = kwargs.get("dim", given[0] if given else -1)
    length = values.shape[dim] if values.dim() else 1
    yield from _sorting(values, length, math.prod(values.shape) // max(length, 1))


def _sorting(values: Tensor, length: int, rows: int) -> Steps:
    """``sort_stable_kernel`` and what it calls in ``aten/src/ATen/native/cuda/Sort.cpp``.

    Up to :data:`SMALL_SORT` elements are sorted in one block beside their numbers. More are sorted by CUB: one row at
    once, several rows together and then by row.
    """
    item = values.element_size()
    if length <= SMALL_SORT or rows == 1:
        yield Temporary("cuda:sort numbers", (length,), "int64")
        yield Temporary("cuda:radix sort", (item, length), brief=True)
        return
    yield Temporary("cuda:sort numbers", (rows, length), "int64")
    yield Temporary("cuda:sort pairs", (rows, length), "int64")
    yield Temporary("cuda:sort keys", (rows, length), name_of(values.dtype))
    yield Temporary("cuda:radix sort", (item, length, rows), brief=True)
    yield Ends(2)
    yield Temporary("cuda:sort by row", (length, rows), brief=True)


def _before_nonzero(card: Card, args: Sequence[Any], kwargs: Any) -> Steps:
    yield Temporary("cuda:count of nonzero", (), "int32")
    yield Temporary("cuda:count", tuple(args[0].shape), brief=True)


def _after_nonzero(card: Card, args: Sequence[Any], kwargs: Any, out: Tensor) -> Steps:
    yield Temporary("cuda:places of nonzero", (1023,), brief=True)


def _before_logsumexp(card: Card, args: Sequence[Any], kwargs: Any) -> Steps:
    source = args[0]
    kind, rows = name_of(source.dtype), source.numel() // max(source.shape[-1], 1)
    yield Temporary("cuda:logsumexp maxima", (rows,), kind)
    yield Temporary("cuda:logsumexp sizes", (rows,), kind)
    yield Temporary("cuda:logsumexp infinite", (rows,), "bool")
    yield Ends(2)
    yield Ends(1)
    yield Temporary("cuda:logsumexp exponentials", tuple(source.shape), kind)


# --------------------------------------------------------------------------------------------------------------- layers


def _after_group_norm(card: Card, args: Sequence[Any], kwargs: Any, out: Any) -> Steps:
    batch, channels = args[3], args[4]
    kind = "float32" if args[0].dtype in HALF else name_of(args[0].dtype)
    yield Temporary("cuda:group_norm scale", (batch, channels), kind)
    yield Temporary("cuda:group_norm shift", (batch, channels), kind)


def _after_convolution(card: Card, args: Sequence[Any], kwargs: Any, out: Tensor) -> Steps:
    source, weight = args[:2]
    if not card.processors or source.dtype not in (*HALF, torch.float32) or (len(args) > 8 and args[8] != 1):
        return
    about = (
        source.element_size(), int(source.dtype == torch.bfloat16), source.shape[0], source.shape[1], source.shape[-2],
        math.prod(source.shape[2:]) // source.shape[-2], weight.shape[0], math.prod(weight.shape[2:]), out.shape[-2],
        math.prod(out.shape[2:]) // max(out.shape[-2], 1),
    )  # fmt: skip
    yield Temporary("cuda:cudnn convolution", about, brief=True)


#: Operators whose second argument is a list of indices.
_INDEXED = (
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default,
    aten._unsafe_index_put.default,
)  # fmt: skip
_BEFORE: dict[Any, Callable[..., Steps]] = {
    **attention.BEFORE,
    aten.index.Tensor: _before_index,
    aten.nonzero.default: _before_nonzero,
    aten.logsumexp.default: _before_logsumexp,
    aten.repeat_interleave.Tensor: _before_repeat,
}
_PICKS = (
    aten.max.default, aten.min.default, aten.amax.default, aten.amin.default, aten.all.default, aten.all.dim,
    aten.all.dims, aten.any.default, aten.any.dim, aten.any.dims,
)  # fmt: skip
#: Reductions that carry a value and its place, or a mean and a variance.
_WIDE = (
    aten.argmax.default, aten.argmin.default, aten.max.dim, aten.min.dim, aten.var.correction, aten.std.correction,
    aten.var_mean.correction, aten.std_mean.correction,
)  # fmt: skip
_SUMS = (aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim, aten.prod.default, aten.prod.dim_int)
_AFTER: dict[Any, Callable[..., Steps]] = {
    **attention.AFTER,
    aten.masked_scatter.default: _after_masked_scatter,
    aten.cumsum.default: _after_scan,
    aten.sort.default: _after_sort,
    aten.sort.stable: _after_sort,
    aten.nonzero.default: _after_nonzero,
    aten.native_group_norm.default: _after_group_norm,
    aten.convolution.default: _after_convolution,
    aten.linalg_vector_norm.default: _after_norm,
    aten._safe_softmax.default: _after_safe_softmax,
    **dict.fromkeys(_SUMS, _after_sum),
    **dict.fromkeys(_PICKS, _after_pick(None)),
    **dict.fromkeys(_WIDE, _after_pick(16)),
}


# -------------------------------------------------------------------------------------- functions that choose by device

_SOFTMAX = (torch.nn.functional.softmax, torch.Tensor.softmax, torch.softmax)
_LOG_SOFTMAX = (torch.nn.functional.log_softmax, torch.Tensor.log_softmax, torch.log_softmax)


class _Dispatch(TorchFunctionMode):
    """See :meth:`Kernels.dispatch`."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and isinstance(args[0], FakeTensor):
            return attention.attend(self.card, *args, **kwargs)
        if func in _FOR_FAKE and args and isinstance(args[0], FakeTensor):
            return _FOR_FAKE[func](func, *args, **kwargs)
        return func(*args, **kwargs)


def _softmax(func: Any, source: Tensor, *args: Any, **kwargs: Any) -> Any:
    """float16 with ``dtype=float32`` is one kernel on CUDA (``half_to_float``, ``SoftMax.cpp``)."""
    if source.dtype == torch.float16 and kwargs.get("dtype") == torch.float32:
        to = aten._log_softmax if func in _LOG_SOFTMAX else aten._softmax
        return to(source, kwargs["dim"] if "dim" in kwargs else args[0], True)
    return func(source, *args, **kwargs)


def _layer_norm(func: Any, source: Tensor, shape: Any, *_: Any, **__: Any) -> Tensor:
    """``layer_norm_cuda``: the mean and the scale of each row are in float32, for half types too."""
    return _norm(_OURS.layer_norm, source, shape)


def _rms_norm(func: Any, source: Tensor, shape: Any, *_: Any, **__: Any) -> Tensor:
    """``_fused_rms_norm``: one kernel on CUDA, which the CPU and fake tensors take apart."""
    return _norm(_OURS.rms_norm, source, shape)


def _norm(operator: Any, source: Tensor, shape: Sequence[int]) -> Tensor:
    out, *statistics = operator(source, source.numel() // max(math.prod(shape), 1))
    while statistics:
        del statistics[0]
    return out  # type: ignore[no-any-return]


def _one_hot(func: Any, source: Tensor, num_classes: int = -1) -> Tensor:
    """Zeros, and ones put in their places; without the checks that the CPU makes of the classes."""
    if num_classes < 0:
        return func(source, num_classes)  # type: ignore[no-any-return]
    return source.new_zeros((*source.shape, num_classes))


_FOR_FAKE: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((*_SOFTMAX, *_LOG_SOFTMAX), _softmax),
    torch.nn.functional.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    torch.nn.functional.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    torch.nn.functional.one_hot: _one_hot,
}
