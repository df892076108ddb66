"""Record on a card what single operators allocate: ``python scripts/record_kernels.py -o reference/kernels_h100.json``.

For each call of a long list (attention of many shapes, sums, sorts, scans, convolutions, ...) the allocator's own
events are written down: ``n`` for a request of n bytes, ``-(i + 1)`` where request number i ended, up to the return
of the call. A test holds :mod:`memprof.tracing.kernels` to this table. No weights, no model; about a minute, mostly
cuDNN's plans.

``--model`` predicts instead, on tensors without storage: the same file, made without a card.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from memprof.environment import environment


@dataclass(frozen=True)
class Input:
    """A tensor that stands ready before the call. ``fill`` says what is in it; a view may follow."""

    shape: tuple[int, ...]
    dtype: str = "bfloat16"
    fill: str = "normal"

    def make(self, device: str) -> Tensor:
        """The tensor on ``device``."""
        kind = getattr(torch, self.dtype)
        if self.fill == "normal":
            return torch.randn(self.shape, device=device, dtype=torch.float32).to(kind)
        if self.fill == "ones":
            return torch.ones(self.shape, device=device, dtype=kind)
        if self.fill == "half":  # every other element true
            n = 1
            for length in self.shape:
                n *= length
            return (torch.arange(n, device=device) % 2 == 0).reshape(self.shape).to(kind)
        return torch.arange(self.shape[-1], device=device, dtype=kind).expand(self.shape).contiguous()


@dataclass(frozen=True)
class Case:
    """One call."""

    op: str
    inputs: tuple[Input, ...]
    options: dict[str, Any]

    def run(self, tensors: list[Tensor]) -> Any:
        """Call the operator."""
        return OPS[self.op](*tensors, **self.options)

    def to_json(self) -> dict[str, Any]:
        """Plain."""
        return {
            "op": self.op,
            "inputs": [[list(each.shape), each.dtype, each.fill] for each in self.inputs],
            "options": self.options,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Case:
        """The other way."""
        inputs = tuple(Input(tuple(shape), dtype, fill) for shape, dtype, fill in data["inputs"])
        return cls(data["op"], inputs, data["options"])


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)


def _heads_last(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    """Attention on ``(b, n, h, d)`` seen as ``(b, h, n, d)``: as a projection's result is."""
    return _attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, **options)


OPS: dict[str, Callable[..., Any]] = {
    "sdpa": _attend,
    "sdpa_heads_last": _heads_last,
    "cumsum": lambda x, dim: x.cumsum(dim),
    "cumprod": lambda x, dim: x.cumprod(dim),
    "sum": lambda x, dim=None: x.sum() if dim is None else x.sum(dim),
    "mean": lambda x, dim=None: x.mean() if dim is None else x.mean(dim),
    "all": lambda x, dim=None: x.all() if dim is None else x.all(dim),
    "any": lambda x, dim=None: x.any() if dim is None else x.any(dim),
    "max": lambda x, dim=None: x.max() if dim is None else x.max(dim),
    "amax": lambda x, dim: x.amax(dim),
    "argmax": lambda x, dim: x.argmax(dim),
    "norm": lambda x, dim: torch.linalg.vector_norm(x, dim=dim),
    "var": lambda x, dim: x.var(dim),
    "std": lambda x, dim: x.std(dim),
    "sort": lambda x, stable=False, descending=False: torch.sort(x, stable=stable, descending=descending),
    "argsort": lambda x: x.argsort(),
    "topk": lambda x, k: x.topk(k),
    "kthvalue": lambda x, k: x.kthvalue(k),
    "median": lambda x: x.median(),
    "nonzero": lambda x: x.nonzero(),
    "masked_select": lambda x, m: x[m],
    "masked_fill": lambda x, m: x.masked_fill(m, 0),
    "masked_scatter": lambda x, m, s: x.masked_scatter(m, s),
    "index": lambda x, i: x[i],
    "index_two": lambda x, i, j: x[i[:, None], j[None, :]],
    "index_mixed": lambda x, i: x[:, i],
    "index_put": lambda x, i, v: x.index_put((i,), v),
    "index_add": lambda x, i, v: x.index_add(0, i, v),
    "index_select": lambda x, i: x.index_select(0, i),
    "gather": lambda x, i: x.gather(1, i),
    "scatter": lambda x, i, v: x.scatter(1, i, v),
    "searchsorted": lambda x, i: torch.searchsorted(x, i),
    "bucketize": lambda x, i: torch.bucketize(x, i),
    "isin": lambda x, i: torch.isin(x, i),
    "unique_consecutive": lambda x: torch.unique_consecutive(x),
    "unique": lambda x: torch.unique(x),
    "bincount": lambda x: torch.bincount(x),
    "one_hot": lambda x, n: F.one_hot(x, n),
    "repeat_interleave": lambda x, r: torch.repeat_interleave(x, r),
    "repeat_interleave_int": lambda x, r, dim: torch.repeat_interleave(x, r, dim=dim),
    "layer_norm": lambda x, w, b: F.layer_norm(x, w.shape, w, b),
    "rms_norm": lambda x, w: F.rms_norm(x, w.shape, w),
    "group_norm": lambda x, w, b: F.group_norm(x, 8, w, b),
    "softmax": lambda x, dtype=None: F.softmax(x, -1, dtype=dtype and getattr(torch, dtype)),
    "log_softmax": lambda x, dtype=None: F.log_softmax(x, -1, dtype=dtype and getattr(torch, dtype)),
    "logsumexp": lambda x: x.logsumexp(-1),
    "linear": lambda x, w, b=None: F.linear(x, w, b),
    "matmul": lambda x, y: x @ y,
    "bmm": lambda x, y: torch.bmm(x, y),
    "einsum": lambda x, y: torch.einsum("bhqd,bhkd->bhqk", x, y),
    "cdist": lambda x, y: torch.cdist(x, y),
    "conv": lambda x, w, b=None, stride=1, padding=0: F.conv2d(x, w, b, stride=stride, padding=padding),
    "conv3d": lambda x, w, b=None, stride=1: F.conv3d(x, w, b, stride=stride),
    "conv1d": lambda x, w, b=None, stride=1, padding=0, groups=1: F.conv1d(x, w, b, stride, padding, 1, groups),
    "interpolate": lambda x, size, mode, align=None, antialias=False: F.interpolate(
        x, size=tuple(size), mode=mode, align_corners=align, antialias=antialias
    ),
    "avg_pool": lambda x, k: F.avg_pool2d(x, k),
    "adaptive_avg_pool": lambda x, k: F.adaptive_avg_pool2d(x, k),
    "max_pool": lambda x, k: F.max_pool2d(x, k),
    "pixel_shuffle": lambda x, k: F.pixel_shuffle(x, k),
    "gelu": lambda x, approximate="none": F.gelu(x, approximate=approximate),
    "silu": lambda x: F.silu(x),
    "glu": lambda x: F.glu(x),
    "pad": lambda x, pad: F.pad(x, pad),
    "roll": lambda x: x.roll(1, 0),
    "flip": lambda x: x.flip(0),
    "tril": lambda x: x.tril(),
    "cat": lambda x, y: torch.cat([x, y], -1),
    "where": lambda m, x, y: torch.where(m, x, y),
    "embedding": lambda i, w: F.embedding(i, w),
    "multinomial": lambda x: torch.multinomial(x, 1),
    "quantile": lambda x: x.quantile(0.5),
    "randperm": lambda x: torch.randperm(x.shape[0], device=x.device),
    "pow_float": lambda x: x**2.0,
    "to_float": lambda x: x.float(),
    "dropout": lambda x: F.dropout(x, 0.1, False),
    "outer": lambda x, y: torch.outer(x, y),
    "addmm": lambda x, y, b: torch.addmm(b, x, y),
    "baddbmm": lambda x, y, b: torch.baddbmm(b, x, y),
    "complex": lambda x: torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2)),
}


def _attention() -> Iterator[Case]:
    def case(
        dtype: str, b: int, h: int, kv: int, q: int, k: int, d: int, causal: bool, mask: str | None, op: str
    ) -> Case:
        sizes = [(b, h, q, d), (b, kv, k, d), (b, kv, k, d)]
        if op == "sdpa_heads_last":
            sizes = [(one[0], one[2], one[1], one[3]) for one in sizes]
        made = [Input(size, dtype) for size in sizes]
        if mask is not None:
            made.append(Input((b, 1, q, k), "bool" if mask == "bool" else dtype, "ones"))
        return Case(op, tuple(made), {"is_causal": causal, "enable_gqa": h != kv})

    every = (
        (16, 16, 128),
        (16, 8, 128),
        (28, 4, 128),
        (16, 16, 64),
        (14, 2, 64),
        (8, 4, 256),
        (16, 16, 72),
        (16, 16, 80),
        (32, 8, 96),
    )
    for dtype in ("bfloat16", "float16", "float32"):
        for h, kv, d in every:
            for causal, mask in ((False, None), (True, None), (False, "bool"), (False, "float")):
                yield case(dtype, 1, h, kv, 1025, 1025, d, causal, mask, "sdpa")
                if not causal:
                    yield case(dtype, 1, h, kv, 1, 3430, d, False, mask, "sdpa")
            yield case(dtype, 4, h, kv, 513, 513, d, True, None, "sdpa")
            yield case(dtype, 13, h, kv, 577, 577, d, False, None, "sdpa_heads_last")
    keys = (
        2,
        17,
        64,
        65,
        127,
        128,
        129,
        191,
        255,
        256,
        257,
        320,
        358,
        384,
        400,
        448,
        511,
        512,
        513,
        576,
        600,
        640,
        641,
        704,
        767,
        768,
        769,
        896,
        1000,
        1023,
        1024,
        1025,
        1200,
        1280,
        1400,
        1535,
        1536,
        1537,
        1765,
        1920,
        2047,
        2048,
        2049,
        2500,
        3000,
        3430,
        4096,
        4097,
        5000,
        6000,
        8192,
        8193,
        10000,
        12289,
        16384,
        20000,
    )
    for k in keys:
        for b, h, kv, d in ((1, 16, 16, 128), (1, 16, 8, 128), (1, 32, 32, 128), (1, 14, 2, 64)):
            yield case("bfloat16", b, h, kv, 1, k, d, False, None, "sdpa")
    near = (1001, 1008, 1009, 1012, 1016, 1017, 1020, 1921, 1936, 1984, 2000, 2016, 2032, 2040, 3500, 4000, 4080, 4088)
    for k in (*near, 4089, 6500, 7000, 8000, 8180, 8185, 16_000):
        yield case("bfloat16", 1, 16, 2, 1, k, 128, False, None, "sdpa")
    for kv in (3, 5, 6, 7, 9, 10, 12, 14, 20, 24, 28, 33, 40, 48, 56, 64, 65, 96, 127):
        yield case("bfloat16", 1, kv, kv, 1, 9000, 64, False, None, "sdpa")
        yield case("bfloat16", 1, kv * 2, kv, 1, 1500, 64, False, None, "sdpa")
    for k in (129, 358, 641, 1025, 1765, 2500, 3430, 8193):
        for b, h, kv, d in (
            (2, 16, 16, 128),
            (4, 16, 8, 128),
            (8, 32, 32, 128),
            (16, 32, 8, 64),
            (4, 28, 4, 128),
            (32, 16, 16, 64),
            (1, 8, 8, 64),
            (1, 4, 1, 256),
            (1, 64, 8, 128),
            (1, 16, 2, 128),
        ):
            yield case("bfloat16", b, h, kv, 1, k, d, False, None, "sdpa")
            yield case("bfloat16", b, h, kv, 1, k, d, False, "bool", "sdpa")
    for q in (2, 3, 5, 8, 16, 17, 32, 64, 65, 128, 129, 256, 300):
        for k in (q, q + 700, 3430):
            yield case("bfloat16", 1, 16, 8, q, k, 128, q == k, None, "sdpa")
    for d in (24, 32, 40, 48, 88, 112, 160, 192, 257, 60, 36, 20):
        for dtype in ("bfloat16", "float32"):
            for mask in (None, "bool"):
                yield case(dtype, 1, 8, 8, 700, 700, d, False, mask, "sdpa")
                yield case(dtype, 1, 8, 8, 1, 700, d, False, mask, "sdpa")


def _scans() -> Iterator[Case]:
    for n in (1, 2, 300, 641, 896, 897, 3429, 5000, 28672, 28673, 65536, 300_000, 2_625_536, 7_022_592):
        for dtype in ("int64", "int32", "bool", "float32", "bfloat16"):
            if n < 4000 or dtype in ("int64", "float32"):
                yield Case("cumsum", (Input((1, n), dtype, "ones"),), {"dim": -1})
                yield Case("cumsum", (Input((n,), dtype, "ones"),), {"dim": 0})
    for shape, dim in (((4, 700), -1), ((700, 4), 0), ((2, 3, 500), -1), ((1, 700, 4), 1), ((4, 9000), -1)):
        for dtype in ("int64", "float32", "bool"):
            yield Case("cumsum", (Input(shape, dtype, "ones"),), {"dim": dim})
    for n in (1, 5, 100, 357, 1000, 4096, 4097, 50_000):
        for dtype in ("bool", "int64", "float32"):
            yield Case("nonzero", (Input((1, n), dtype, "half"),), {})
            yield Case("nonzero", (Input((n,), dtype, "half"),), {})
        yield Case("masked_select", (Input((n, 8)), Input((n,), "bool", "half")), {})
        yield Case("unique_consecutive", (Input((n,), "int64", "arange"),), {})
        yield Case("unique", (Input((n,), "int64", "arange"),), {})
        yield Case("bincount", (Input((n,), "int64", "arange"),), {})
        yield Case("repeat_interleave", (Input((n,), "int64", "arange"), Input((n,), "int64", "ones")), {})
        yield Case("randperm", (Input((n,)),), {})
        for dtype in ("float32", "bfloat16", "int64", "int32", "int8", "bool"):
            yield Case("sort", (Input((n,), dtype, "half"),), {})
            yield Case("sort", (Input((n,), dtype, "half"),), {"stable": True})
        yield Case("sort", (Input((n,), "float32"),), {"descending": True})
        for batch in (2, 16):
            yield Case("sort", (Input((batch, n), "float32"),), {})
        yield Case("argsort", (Input((n,), "float32"),), {})
    for n in (20, 357, 576, 1024, 1025, 3328, 4097, 10_240, 92_553, 151_936):
        for k in sorted({1, 10, n // 2, n - 1}):
            for dtype in ("float32", "bfloat16"):
                yield Case("topk", (Input((n,), dtype),), {"k": k})
        yield Case("topk", (Input((4, n), "float32"),), {"k": n // 2})
        yield Case("topk", (Input((n,), "int64", "arange"),), {"k": n // 2})
    for dtype in ("bfloat16", "float16", "float32"):
        for b, n, width in (
            (1, 357, 2048),
            (1, 3429, 2048),
            (1, 641, 4096),
            (2, 400, 896),
            (1, 1615, 2048),
            (1, 953, 2560),
        ):
            source = Input((b * n // 2 + 1, width), dtype)
            yield Case("masked_scatter", (Input((b, n, width), dtype), Input((b, n, 1), "bool", "half"), source), {})
            yield Case(
                "masked_scatter",
                (Input((b, n, width), dtype), Input((b, n, width), "bool", "half"), Input((b * n, width), dtype)),
                {},
            )


def _reductions() -> Iterator[Case]:
    for op in ("sum", "all", "any", "max", "mean"):
        for shape in ((1, 357), (1, 3429), (4, 641), (64,), (300_000,), (3429, 2048), (7_000_000,)):
            for dtype in ("bool", "int64", "int32", "int8", "float32", "bfloat16"):
                if op == "mean" and dtype not in ("float32", "bfloat16"):
                    continue
                yield Case(op, (Input(shape, dtype, "ones"),), {})
    for op in ("sum", "mean", "amax", "argmax", "norm", "var", "std", "max", "all"):
        for shape, dim in (
            ((1, 92553), -1),
            ((4, 151_936), -1),
            ((1, 3429, 2048), -1),
            ((3328, 2048), 0),
            ((3328, 3328), 0),
            ((3328, 3328), -1),
            ((16, 3328), 0),
            ((1, 576, 1024), 1),
            ((700, 3), -1),
            ((2_000_000, 2), 0),
        ):
            for dtype in ("float32", "bfloat16") if op != "all" else ("bool",):
                yield Case(op, (Input(shape, dtype, "ones"),), {"dim": dim})
    for dtype in ("float32", "bfloat16", "float16"):
        for shape in ((1, 3429, 2048), (13, 1025, 1024), (577, 1024), (4, 4), (1, 576, 72)):
            width = shape[-1]
            weight = Input((width,), dtype)
            yield Case("layer_norm", (Input(shape, dtype), weight, weight), {})
            yield Case("rms_norm", (Input(shape, dtype), weight), {})
        yield Case("group_norm", (Input((2, 64, 20, 20), dtype), Input((64,), dtype), Input((64,), dtype)), {})
        for shape in ((1, 16, 641, 641), (1, 92553), (16, 3328)):
            for to in (None, "float32"):
                yield Case("softmax", (Input(shape, dtype),), {"dtype": to})
                yield Case("log_softmax", (Input(shape, dtype),), {"dtype": to})
        yield Case("logsumexp", (Input((3328, 3328), dtype),), {})
        yield Case("multinomial", (Input((1, 92553), dtype, "ones"),), {})
    yield Case("quantile", (Input((3328,), "float32"),), {})
    yield Case("median", (Input((3328,), "float32"),), {})
    yield Case("kthvalue", (Input((3328,), "float32"),), {"k": 100})
    for dtype in ("float32", "bfloat16", "int64"):
        yield Case("pow_float", (Input((3328, 8), dtype, "ones"),), {})


def _indexing() -> Iterator[Case]:
    for n in (300, 3328, 9000):
        picks = Input((n // 2,), "int64", "arange")
        wide = Input((n, 512))
        yield Case("index", (wide, picks), {})
        yield Case("index_mixed", (Input((4, n, 16)), picks), {})
        yield Case("index_two", (Input((n, n)), picks, picks), {})
        yield Case("index_select", (wide, picks), {})
        yield Case("index_put", (wide, picks, Input((n // 2, 512))), {})
        yield Case("index_add", (wide, picks, Input((n // 2, 512))), {})
        yield Case("gather", (Input((8, n)), Input((8, n // 2), "int64", "arange")), {})
        yield Case("scatter", (Input((8, n)), Input((8, n // 2), "int64", "arange"), Input((8, n // 2))), {})
        yield Case("searchsorted", (Input((n,), "int64", "arange"), picks), {})
        yield Case("bucketize", (picks, Input((n,), "int64", "arange")), {})
        yield Case("isin", (Input((n,), "int64", "arange"), picks), {})
        yield Case("one_hot", (picks,), {"n": n})
        yield Case("repeat_interleave_int", (wide,), {"r": 2, "dim": 0})
        yield Case("masked_fill", (wide, Input((n, 1), "bool", "half")), {})
        yield Case("where", (Input((n, 1), "bool", "half"), wide, wide), {})
        yield Case("embedding", (picks, wide), {})
        yield Case("pad", (wide,), {"pad": [0, 3]})
        yield Case("roll", (wide,), {})
        yield Case("flip", (wide,), {})
        yield Case("cat", (wide, wide), {})
        yield Case("tril", (Input((n, n)),), {})


def _products() -> Iterator[Case]:
    for dtype in ("bfloat16", "float16", "float32"):
        for n in (1, 4, 357, 3429):
            for i, o in ((2048, 2048), (2048, 8192), (8192, 2048), (2048, 92_553), (1024, 3072)):
                if n < 3429 or o < 90_000:
                    yield Case("linear", (Input((1, n, i), dtype), Input((o, i), dtype)), {})
                if o < 90_000:
                    yield Case("linear", (Input((1, n, i), dtype), Input((o, i), dtype), Input((o,), dtype)), {})
        yield Case("matmul", (Input((1, 64, 1), "float32"), Input((1, 1, 3429), "float32")), {})
        yield Case("matmul", (Input((3328, 2048), dtype), Input((2048, 3328), dtype)), {})
        yield Case("matmul", (Input((3328, 3328), dtype), Input((3328,), dtype)), {})
        yield Case("matmul", (Input((1, 16, 641, 128), dtype), Input((1, 16, 128, 641), dtype)), {})
        yield Case("bmm", (Input((16, 641, 128), dtype), Input((16, 128, 641), dtype)), {})
        yield Case("einsum", (Input((1, 16, 641, 128), dtype), Input((1, 16, 641, 128), dtype)), {})
        yield Case("addmm", (Input((641, 128), dtype), Input((128, 641), dtype), Input((641,), dtype)), {})
        yield Case("outer", (Input((700,), dtype), Input((700,), dtype)), {})
    yield Case("cdist", (Input((500, 2), "float32"), Input((500, 2), "float32")), {})
    yield Case("cdist", (Input((500, 512), "float32"), Input((500, 512), "float32")), {})


def _convolutions() -> Iterator[Case]:
    patches = (
        (14, 224, 1024),
        (14, 336, 1024),
        (14, 448, 1024),
        (14, 384, 1152),
        (14, 378, 1152),
        (16, 384, 768),
        (16, 224, 768),
        (14, 392, 1152),
        (32, 448, 1280),
        (14, 896, 1152),
    )
    for dtype in ("bfloat16", "float16", "float32"):
        for patch, pixels, width in patches:
            for batch in (1, 2, 3, 5, 7, 13):
                for bias in (True, False):
                    if batch in (1, 3, 13) or (patch == 14 and pixels in (336, 448)):
                        weight = Input((width, 3, patch, patch), dtype)
                        about = (
                            Input((batch, 3, pixels, pixels), dtype),
                            weight,
                            *([Input((width,), dtype)] if bias else []),
                        )
                        yield Case("conv", about, {"stride": patch})
        for patch, high, wide, width, batch in (
            (14, 406, 406, 1024, 1), (14, 420, 420, 1152, 1), (14, 434, 434, 1024, 2), (14, 392, 448, 1024, 1),
            (14, 448, 392, 1152, 1), (14, 490, 490, 1152, 1), (14, 560, 560, 1280, 1), (14, 560, 560, 1280, 4),
            (16, 512, 512, 1152, 1), (16, 512, 512, 1152, 5), (16, 448, 448, 1024, 1), (16, 256, 256, 768, 4),
            (14, 364, 364, 1152, 17), (14, 400, 400, 1024, 1), (32, 224, 224, 768, 1), (32, 384, 384, 768, 3),
            (14, 980, 980, 1152, 1), (14, 336, 672, 1024, 1), (14, 168, 1008, 1024, 1),
        ):  # fmt: skip
            weight = Input((width, 3, patch, patch), dtype)
            yield Case("conv", (Input((batch, 3, high, wide), dtype), weight), {"stride": patch})
        for patches_n in (64, 1024, 6144):
            yield Case(
                "conv3d",
                (Input((patches_n, 3, 2, 14, 14), dtype), Input((1280, 3, 2, 14, 14), dtype)),
                {"stride": [2, 14, 14]},
            )
            yield Case(
                "conv3d",
                (Input((patches_n, 3, 2, 16, 16), dtype), Input((1024, 3, 2, 16, 16), dtype), Input((1024,), dtype)),
                {"stride": [2, 16, 16]},
            )
        yield Case("conv", (Input((1, 64, 56, 56), dtype), Input((64, 64, 3, 3), dtype)), {"stride": 1, "padding": 1})
        yield Case("conv", (Input((1, 768, 24, 24), dtype), Input((1024, 768, 1, 1), dtype)), {})
        yield Case(
            "conv1d",
            (Input((1, 128, 3000), dtype), Input((1280, 128, 3), dtype), Input((1280,), dtype)),
            {"padding": 1},
        )
        for mode, extra in (
            ("bilinear", {"align": False}),
            ("bicubic", {"align": False}),
            ("nearest", {}),
            ("area", {}),
            ("bicubic", {"align": False, "antialias": True}),
        ):
            yield Case("interpolate", (Input((1, 1024, 24, 24), dtype),), {"size": [17, 31], "mode": mode, **extra})
        yield Case("avg_pool", (Input((1, 1152, 64, 64), dtype),), {"k": 4})
        yield Case("adaptive_avg_pool", (Input((1, 1152, 64, 64), dtype),), {"k": 16})
        yield Case("max_pool", (Input((1, 64, 64, 64), dtype),), {"k": 2})
        for op in ("gelu", "silu", "glu", "to_float", "dropout", "complex"):
            yield Case(op, (Input((1, 700, 2048), dtype),), {})
        yield Case("gelu", (Input((1, 700, 2048), dtype),), {"approximate": "tanh"})


def cases() -> list[Case]:
    """Every call, each once."""
    every = [*_scans(), *_reductions(), *_indexing(), *_products(), *_attention(), *_convolutions()]
    return list({json.dumps(case.to_json()): case for case in every}.values())


def record(case: Case) -> dict[str, Any]:
    """The allocator's events in one call on the card."""
    tensors = [each.make("cuda") for each in case.inputs]
    case.run(tensors)  # workspaces that last, and plans
    torch.cuda.synchronize()
    torch.cuda.memory._record_memory_history("all", context=None, max_entries=10_000, clear_history=True)
    out = case.run(tensors)
    torch.cuda.synchronize()
    trace = torch.cuda.memory._snapshot()["device_traces"][0]
    torch.cuda.memory._record_memory_history(None)
    numbers: dict[int, int] = {}
    events: list[int] = []
    for entry in trace:
        if entry["action"] == "alloc":
            numbers[entry["addr"]] = sum(event >= 0 for event in events)
            events.append(entry["size"])
        elif entry["action"] == "free_requested":
            events.append(-1 - numbers.pop(entry["addr"], 10**6))
    leaves = [one for one in (out if isinstance(out, tuple | list) else (out,)) if isinstance(one, Tensor)]
    return {"events": events, "strides": [list(one.stride()) for one in leaves]}


def main(argv: list[str] | None = None) -> int:
    """Record every case; one that fails is written down with its error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", help="only operators of this name")
    asked = parser.parse_args(argv)
    made, every = [], [case for case in cases() if asked.only in (None, case.op)]
    torch.set_grad_enabled(False)
    for number, case in enumerate(every):
        try:
            made.append(case.to_json() | record(case))
        except Exception as error:
            made.append(case.to_json() | {"error": str(error).partition("\n")[0]})
            torch.cuda.empty_cache()
        if number % 200 == 0:
            print(f"{number} of {len(every)}", file=sys.stderr, flush=True)
            torch.cuda.empty_cache()
            write(asked.output, made)
    write(asked.output, made)
    print(f"{len(made)} calls, {sum('error' in one for one in made)} failed", file=sys.stderr)
    return 0


def write(path: Path, made: list[dict[str, Any]]) -> None:
    """One call a line."""
    properties = torch.cuda.get_device_properties(0)
    about = {
        "schema": 1,
        "gpu": properties.name,
        "capability": [properties.major, properties.minor],
        "processors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "environment": environment(),
    }
    lines = ",\n".join(json.dumps(one, separators=(",", ":")) for one in made)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"about":{json.dumps(about)},\n"calls":[\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
