"""Bytes of what kernels take while they run and that no product of lengths gives: plain arithmetic, no torch.

Each rule takes the lengths that stand for the entry's shape (see :class:`memprof.tracing.temporaries.Temporary`) and
gives bytes. So a program (:mod:`memprof.simulator.program`) can evaluate it for lengths that were never traced.
Formulas are those of the sources named beside them; each was held to the allocator's events of single calls on an H100
(``reference/kernels_h100.json``: torch 2.11, CUDA 13.0, cuDNN 9.19), and ``tests/simulator/test_kernel_table.py``
holds them to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

#: CUB aligns each part of its scratch to so many bytes, and asks for one less on top.
_CUB_ALIGN = 256
#: Items a block of CUB's radix sort takes, by bytes of a key; payloads have 8 bytes (``policy_hub`` of compute
#: capability 9.0).
_SORT_ITEMS = {1: 3456, 2: 5760, 4: 5376, 8: 4608}
#: Items a block of CUB's scan takes, and bytes of the word it leaves for the next, by bytes of what is summed. CUDA
#: 13.0.
_SCAN = {8: (896, 16), 4: (1920, 8), 2: (1920, 16)}
#: Up to so many elements along a dimension are sorted inside one block (``should_use_small_sort``, ``cuda/Sort.cpp``).
SMALL_SORT = 4096


def _aligned(n_bytes: int, to: int = _CUB_ALIGN) -> int:
    return -(-n_bytes // to) * to


def flash_splits(batch_heads_blocks: int, processors: int, key_blocks: int, most: int = 128) -> int:
    """In how many parts FlashAttention-2 cuts the keys, to fill a card with few queries.

    Source: ``num_splits_heuristic`` in ``aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp``.
    """
    if batch_heads_blocks >= 0.8 * processors:
        return 1
    best, efficiency = 0.0, dict[int, float]()
    for splits in range(1, min(most, processors, key_blocks) + 1):
        if splits == 1 or -(-key_blocks // splits) != -(-key_blocks // (splits - 1)):
            waves = batch_heads_blocks * splits / processors
            efficiency[splits] = waves / -(-batch_heads_blocks * splits // processors)
            best = max(best, efficiency[splits])
    return next((splits for splits, value in efficiency.items() if value >= 0.85 * best), 1)


def _flash(lengths: Sequence[int], head: bool) -> int:
    """Bytes of the partial results of split keys, from ``(processors, batch, heads, queries, keys, head dim)``."""
    processors, batch, heads, queries, keys, dim = lengths
    if not processors:
        return 0
    wide = 256 if dim <= 64 else 128 if dim <= 128 else 64
    splits = flash_splits(batch * heads * -(-queries // 64), 2 * processors, -(-keys // wide))
    rounded = -(-dim // 32) * 32 if dim <= 192 else 256
    return 0 if splits == 1 else 4 * splits * batch * heads * queries * (rounded if head else 1)


def cudnn_splits(processors: int, heads: int, keys: int) -> int:
    """In how many parts cuDNN's attention cuts the keys of a single query; 1: it does not.

    cuDNN's source is closed: this is what 9.19 did in 480 calls on cards of 132 processors. Not below 513 keys, from
    there a power of two that leaves a part 128 keys, from 4 to 64, and fewer parts of all ``heads`` of the keys (of the
    whole batch) than two for each processor.
    """
    if keys <= 512:
        return 1
    fine = (s for s in (4, 8, 16, 32, 64) if heads * s < 2 * processors and -(-keys // s) >= 128)
    return max(fine, default=1)


def _cudnn_attention(lengths: Sequence[int]) -> int:
    """The workspace of cuDNN's attention, from ``(processors, batch, heads, heads of the keys, queries, keys, dim)``.

    For one query: the partial outputs and two sums a part in float32, each aligned to 128 bytes, and 128 more; none
    where keys are not split. For several: 256 bytes.
    """
    processors, batch, heads, kv_heads, queries, keys, dim = lengths
    if not processors:
        return 0
    if queries > 1:
        return 256
    splits = cudnn_splits(processors, batch * kv_heads, keys)
    rows = 4 * splits * batch * heads
    return 0 if splits == 1 else _aligned(rows * dim, 128) + 2 * _aligned(rows, 128) + 128


def _padded_mask(lengths: Sequence[int]) -> int:
    """Bytes of an attention mask copied to rows of a multiple of 8 numbers, from ``(bytes of one, ..., columns)``; none
    where the rows are one already.
    """
    columns = lengths[-1]
    return 0 if columns % 8 == 0 else prod(lengths[:-1]) * (columns + 8 - columns % 8)


def _kept_mask(lengths: Sequence[int]) -> int:
    """Bytes of a mask that is not copied because its rows are a multiple of 8, from the same lengths."""
    return 0 if lengths[-1] % 8 else prod(lengths)


def _scan(lengths: Sequence[int]) -> int:
    """CUB's scratch of a running sum, from ``(bytes of one, *shape)``: a word a block and 32 more (``DeviceScan``)."""
    item_bytes, items = lengths[0], prod(lengths[1:])
    per_block, word = _SCAN[item_bytes]
    return _aligned((-(-items // per_block) + 32) * word) + 2 * _CUB_ALIGN - 1


def _radix_sort(lengths: Sequence[int]) -> int:
    """CUB's scratch of a radix sort of pairs, from ``(bytes of a key, *shape)``; payloads have 8 bytes.

    Histograms of every pass, one of 256 counters a block, one counter a pass, and where there are several passes a
    second copy of keys and payloads (``DeviceRadixSort``, one sweep). None up to :data:`SMALL_SORT`, where one block
    sorts.
    """
    key_bytes, items = lengths[0], prod(lengths[1:])
    if items <= SMALL_SORT:
        return 0
    blocks = -(-items // _SORT_ITEMS[key_bytes])
    copies = _aligned(items * key_bytes) + _aligned(items * 8) if key_bytes > 1 else 0
    return copies + key_bytes * 256 * 8 + blocks * 1024 + _CUB_ALIGN + _CUB_ALIGN - 1


def _sort_by_row(lengths: Sequence[int]) -> int:
    """CUB's scratch of bringing sorted pairs back into their rows, from their shape: one pass over the rows'
    numbers.
    """
    return 256 * 8 + -(-prod(lengths) // 5760) * 1024 + 2 * _CUB_ALIGN - 1


def _nonzero_flags(lengths: Sequence[int]) -> int:
    """CUB's scratch of counting what is not zero, from the shape: one byte where one block does
    (``DeviceReduce``).
    """
    return 1 if prod(lengths) <= 4096 else 21_503


def _convolution(lengths: Sequence[int]) -> int:
    """The workspace of cuDNN's convolution, from ``(bytes of one, 1 for bfloat16, images, channels, rows, columns,
    output channels, numbers in a kernel, rows of the output, columns of the output)``.

    cuDNN computes with the channels last, and changes the layout of what does not lie so: input, weights, output and 16
    bytes. Few channels of half types are filled up to 8, but for inputs of 400 rows and more. Which engine runs is
    cuDNN's choice, and no rule of it is published: these are the ones of 9.19 on an H100, seen in 279 calls.
    """
    item, bfloat, images, channels, rows, columns, made, kernel, out_rows, out_columns = lengths
    pixels, out_pixels = rows * columns, out_rows * out_columns
    if kernel == 1:
        return 0
    taken = item * images * channels * pixels
    weights = item * made * channels * kernel
    out = item * images * made * out_pixels
    if out_pixels == 1:  # each patch is an image of its own: the output has no layout to change
        return taken + weights + 16 if item == 4 else 0
    if item == 2 and channels < 8 and rows < 400:
        return (taken + weights) // channels * 8 + out + 16
    if item == 2 and bfloat and channels < 8:
        return 0
    few = images * out_pixels <= (400 if kernel >= 1024 else 1024)
    if item == 4 and (rows < 500 if kernel == 256 else few or (kernel >= 1024 and rows < 400)):
        return 0
    return _aligned(taken, 16) + _aligned(weights, 16) + _aligned(out, 16) + 16


def _last_power(n: int) -> int:
    return 1 << max(n, 1).bit_length() - 1


class _Reduction:
    """How PyTorch spreads a reduction over blocks: ``setReduceConfig`` in ``aten/src/ATen/native/cuda/Reduce.cuh``.

    Lengths: ``(processors, bytes of what is accumulated, which dimensions are reduced, in which order they lie,
    *shape)``. The third has bit ``d`` set for dimension ``d``; the fourth has the dimensions as digits to the base of
    8, the fastest first. Dimensions are taken to lie densely, as those of a slice are before it was cut.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        processors, self.acc, reduced, order, *shape = lengths
        over, kept = _joined(reduced, order, shape)
        self.outputs, self.inputs = (prod(n for _, n in group) for group in (kept, over))
        self.fast = not kept or (bool(over) and over[0][0] < kept[0][0])
        (step, length), *others = (over or [(1, 1)]) + kept if self.fast else kept + over
        self.by_block, self.vector = 1, 1
        width, height = (self.inputs, self.outputs) if self.fast else (self.outputs, self.inputs)
        if step == 1 and self.fast and width > 128 and not kept and len(over) <= 1 and self.acc < 16:
            width //= 4
        elif step == 1 and not self.fast:
            self.vector = next(v for v in (4, 2, 1) if all(n % v == 0 for n in (length, *(s for s, _ in others))))
            width //= self.vector
        most = 512 // self.vector
        wide, high = (_last_power(n) if n < most else most for n in (width, height))
        self.width = min(wide, 32)
        tall = min(high, most // self.width)
        self.width = min(wide, most // tall)
        step_in, step_out = (self.width, 1) if self.fast else (1, self.width)
        across = -(-self.inputs // step_in) >= min(tall * 16, 256)
        step_in, step_out = (step_in * tall, step_out) if across else (step_in, step_out * tall)
        self.grid = -(-(self.outputs // self.vector) // step_out)
        each, target = -(-self.inputs // step_in), processors * (2048 // (self.width * tall))
        if across and each >= 256 and self.grid <= target:
            self.by_block = max(min(-(-target // self.grid), -(-each // 16)), -(-each // 256))

    @property
    def partial_bytes(self) -> int:
        """Bytes of the partial results that blocks leave for each other."""
        if self.by_block == 1:
            return 0
        return self.acc * self.outputs * self.by_block * (1 if self.fast else self.width * self.vector)

    @property
    def semaphore_bytes(self) -> int:
        """One counter a column of blocks."""
        return 0 if self.by_block == 1 else 4 * self.grid


def _joined(reduced: int, order: int, shape: Sequence[int]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Stride and length of the reduced dimensions and of the kept ones, as a TensorIterator orders and joins them."""
    groups: tuple[list[tuple[int, int]], list[tuple[int, int]]] = [], []
    step = 1
    for _ in shape:
        order, dim = divmod(order, 8)
        group, n = groups[not reduced >> dim & 1], shape[dim]
        if n == 1:
            continue
        if group and group[-1][0] * group[-1][1] == step:
            group[-1] = group[-1][0], group[-1][1] * n
        else:
            group.append((step, n))
        step *= n
    return groups


def _reduction(lengths: Sequence[int], of: str) -> int:
    if not lengths[0] or not all(lengths[4:]):
        return 0
    return int(getattr(_Reduction(lengths), of))


#: Bytes of the temporaries whose size is no product of lengths, from the lengths that stand for their shape.
RULES: dict[str, Callable[[Sequence[int]], int]] = {
    "cuda:pad_bias": _padded_mask,
    "cuda:bias as it is": _kept_mask,
    "cuda:flash split logsumexp": lambda lengths: _flash(lengths, head=False),
    "cuda:flash split output": lambda lengths: _flash(lengths, head=True),
    "cuda:cudnn attention": _cudnn_attention,
    "cuda:cudnn convolution": _convolution,
    "cuda:scan": _scan,
    "cuda:radix sort": _radix_sort,
    "cuda:sort by row": _sort_by_row,
    "cuda:count": _nonzero_flags,
    "cuda:reduction": lambda lengths: _reduction(lengths, "partial_bytes"),
    "cuda:reduction semaphores": lambda lengths: _reduction(lengths, "semaphore_bytes"),
}
