from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from memprof.gpus import ANY, CARDS, find_card
from memprof.simulator.trace import Trace
from memprof.tracing.attention import choose
from memprof.tracing.kernels import Kernels
from memprof.tracing.ledger import Ledger

sdpa = torch.nn.functional.scaled_dot_product_attention
FAKE = FakeTensorMode(allow_non_fake_inputs=True)


def heads(n: int, dtype: torch.dtype = torch.bfloat16, dim: int = 64, count: int = 4) -> torch.Tensor:
    with FAKE:
        return torch.empty(1, count, n, dim, dtype=dtype)


@pytest.mark.parametrize(
    ("card", "dtype", "dim", "masked", "causal", "queries", "kernel"),
    [
        ("a100", torch.bfloat16, 64, False, True, 10, "flash"),
        ("a100", torch.float16, 128, False, False, 1, "flash"),
        ("a100", torch.bfloat16, 64, False, True, 1, "efficient"),  # causal and not square
        ("a100", torch.bfloat16, 64, True, False, 10, "efficient"),
        ("a100", torch.float32, 64, False, True, 10, "efficient"),
        ("a100", torch.bfloat16, 512, False, False, 10, "efficient"),
        ("a100", torch.float32, 6, False, False, 10, "math"),
        ("h100", torch.bfloat16, 128, True, False, 10, "cudnn"),
        ("h100", torch.bfloat16, 256, False, False, 10, "cudnn"),
        ("h100", torch.bfloat16, 252, False, False, 10, "flash"),
        ("h100", torch.bfloat16, 264, False, False, 10, "efficient"),
        ("t4", torch.float16, 64, False, True, 10, "efficient"),
        ("t4", torch.bfloat16, 64, False, True, 10, "math"),
    ],
)
def test_the_kernel_cuda_would_choose(
    card: str, dtype: torch.dtype, dim: int, masked: bool, causal: bool, queries: int, kernel: str
) -> None:
    query, key = heads(queries, dtype, dim), heads(10, dtype, dim)
    mask = torch.ones(queries, 10) if masked else None
    assert choose(CARDS[card], query, key, key, mask, causal) == kernel


@pytest.mark.parametrize(
    ("capability", "dim", "keys", "kernel"),
    [
        ((9, 0), 128, 1, "flash"),
        ((10, 0), 128, 10, "cudnn"),
        ((10, 0), 136, 10, "flash"),
        ((10, 3), 128, 10, "cudnn"),
        ((10, 1), 128, 10, "flash"),
        ((12, 0), 128, 10, "flash"),
    ],
)
def test_cudnn_is_first_where_pytorch_says_so(capability: tuple[int, int], dim: int, keys: int, kernel: str) -> None:
    query, key = heads(1, dim=dim), heads(keys, dim=dim)
    assert choose(replace(ANY, capability=capability), query, key, key, None, False) == kernel


def traced(run: Any, card: str | None = None) -> Trace:
    kernels = Kernels(find_card(card))
    ledger = Ledger("cpu", kernels).listen()
    with torch.no_grad(), kernels.dispatch():
        kept = run()
    trace = ledger.close()
    del kept
    return trace


def made(trace: Trace) -> dict[str, int]:
    return {op: n for (_, op), n in zip(trace.sites, trace.nbytes, strict=True)}


def test_flash_makes_its_output_a_float32_sum_and_random_state() -> None:
    query, key = heads(100, count=4), heads(100, count=2)
    trace = traced(lambda: sdpa(query, key, key, is_causal=True, enable_gqa=True), "a100")
    assert sorted(trace.nbytes) == [0, 0, 8, 16, 4 * 4 * 100, 2 * 4 * 100 * 64]  # no splits
    assert {"float32", "bfloat16"} <= set(trace.dtypes)


def test_split_keys_of_a_decode_step() -> None:
    query, key = heads(1, dim=128, count=16), heads(3388, dim=128, count=8)
    trace = traced(lambda: sdpa(query, key, key, enable_gqa=True), "a100")
    assert made(trace)["cuda:flash split output"] == 4 * 27 * 8 * 2 * 128
    assert len(trace.live_after(len(trace.events))) == 1


def test_a_boolean_mask_of_the_efficient_kernel_is_padded() -> None:
    query, key = heads(10), heads(13)
    mask = torch.ones(1, 1, 10, 13, dtype=torch.bool)
    trace = traced(lambda: sdpa(query, key, key, attn_mask=mask), "a100")
    assert 10 * 13 * 2 in trace.nbytes
    assert 10 * 16 * 2 in trace.nbytes
    assert 2 * 4 * 10 * 64 in trace.nbytes


def test_cudnn_makes_its_output_a_seed_an_offset_and_a_workspace() -> None:
    query = heads(100)
    assert traced(lambda: sdpa(query, query, query), "h100").nbytes == [8, 8, 2 * 4 * 100 * 64, 256]


def test_softmax_of_float16_is_one_kernel() -> None:
    for dtype, births in ((torch.float16, 1), (torch.bfloat16, 2)):
        scores = heads(50, dtype)
        trace = traced(lambda scores=scores: torch.nn.functional.softmax(scores, dim=-1, dtype=torch.float32))
        assert trace.nbytes == [4 * 4 * 50 * 64] * births


def test_masked_scatter_counts_its_places() -> None:
    with FAKE:
        into, source = torch.empty(1, 100, 32, dtype=torch.bfloat16), torch.empty(40, 32, dtype=torch.bfloat16)
        mask = torch.empty(1, 100, 1, dtype=torch.bool).expand(1, 100, 32)
    trace = traced(lambda: into.masked_scatter(mask, source))
    assert trace.nbytes == [2 * 3200, 8 * 3200, 3200, 1279]  # the result, the prefix sum, the mask, CUB's scratch
    assert trace.live_after(len(trace.events)) == [0]


def test_real_tensors_are_left_alone() -> None:
    query = torch.randn(1, 2, 5, 8)
    with Kernels(ANY).dispatch():
        assert torch.equal(sdpa(query, query, query), sdpa(query, query, query))
