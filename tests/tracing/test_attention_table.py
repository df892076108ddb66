"""351 calls of scaled_dot_product_attention on an H200: the kernel torch picked, how its result lies, what it took."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from memprof.gpus import find_card
from memprof.simulator.allocator import BLOCK_BYTES, SMALL_LIMIT
from memprof.tracing.attention import choose
from memprof.tracing.kernels import Kernels
from memprof.tracing.ledger import Ledger

TABLE = Path(__file__).parents[2] / "reference" / "attention_kernels_h200.json"
CALLS = json.loads(TABLE.read_text(encoding="utf-8"))["attention"]
CARD = find_card("h200")
FAKE = FakeTensorMode(allow_non_fake_inputs=True)


def tensors(call: dict[str, Any]) -> list[torch.Tensor]:
    kind = getattr(torch, call["dtype"])
    sizes = [(call["batch"], heads, n, call["dim"]) for heads, n in
             ((call["heads"], call["q"]), (call["kv_heads"], call["k"]), (call["kv_heads"], call["k"]))]  # fmt: skip
    with FAKE:
        made = [torch.empty(size, dtype=kind) for size in sizes]
        if call["mask"] is not None:
            mask = torch.bool if call["mask"] == "bool" else kind
            made.append(torch.empty(call["batch"], 1, call["q"], call["k"], dtype=mask))
    return made


def predicted(call: dict[str, Any]) -> tuple[list[int], int, int]:
    """Strides of the result, bytes at the peak above what was held, and blocks then that may keep an unsplit rest."""
    made, kernels = tensors(call), Kernels(CARD)
    ledger = Ledger("cpu", kernels)
    ledger.ignore(made)
    ledger.listen()
    with torch.no_grad(), kernels.dispatch():
        out = torch.nn.functional.scaled_dot_product_attention(
            *made[:3], attn_mask=made[3] if len(made) > 3 else None, is_causal=call["causal"],
            enable_gqa=call["heads"] != call["kv_heads"],
        )  # fmt: skip
    live: dict[int, int] = {}
    peak = large = 0
    for event in ledger.trace.events:
        if event >= 0:
            live[event] = -(-ledger.trace.nbytes[event] // BLOCK_BYTES) * BLOCK_BYTES
            peak = max(peak, sum(live.values()))
            large = max(large, sum(n_bytes > SMALL_LIMIT for n_bytes in live.values()))
        else:
            live.pop(~event, None)
    strides = list(out.stride())
    ledger.close()
    return strides, peak, large


@pytest.mark.parametrize("dtype", sorted({call["dtype"] for call in CALLS}))
def test_the_kernel_its_layout_and_its_peak(dtype: str) -> None:
    wrong = []
    for call in (call for call in CALLS if call["dtype"] == dtype):
        query, key, value, *mask = tensors(call)
        kernel = choose(CARD, query, key, value, mask[0] if mask else None, call["causal"])
        strides, peak, large = predicted(call)
        rest = call["peak_bytes"] - peak  # of blocks above 1 MiB up to 1 MiB is not split off, as it happens to be free
        if (
            call["picked"] != f"{kernel.upper()}_ATTENTION".replace("MATH_ATTENTION", "MATH")
            or strides != call["out_strides"]
            or not 0 <= rest <= large * SMALL_LIMIT
        ):
            wrong.append((call, kernel, strides, peak))
    assert not wrong, (len(wrong), wrong[0])
    assert CALLS
