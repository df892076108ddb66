"""Every call of single operators that a card recorded, predicted again: the allocator's events, one by one."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from memprof.gpus import find_card
from memprof.tracing.kernels import Kernels
from memprof.tracing.ledger import Ledger

ROOT = Path(__file__).parents[2]
TABLES = sorted((ROOT / "reference").glob("kernels_*.json"))
#: What follows from values, so that tensors without any cannot be asked.
VALUES = {"nonzero", "masked_select", "repeat_interleave"}
#: Not modelled, each for a reason that stands in :mod:`memprof.simulator.kernels`.
APART = {
    "isin", "cdist", "median", "quantile", "multinomial", "unique", "unique_consecutive", "bincount", "randperm",
    "conv1d",
}  # fmt: skip


def recorder() -> Any:
    if "record_kernels" not in sys.modules:
        spec = importlib.util.spec_from_file_location("record_kernels", ROOT / "scripts" / "record_kernels.py")
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules["record_kernels"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["record_kernels"]


def skipped(call: dict[str, Any]) -> bool:
    """Calls outside what is modelled."""
    (shape, dtype, _), *others = call["inputs"]
    return (
        "error" in call
        or call["op"] in APART
        or (call["op"] == "topk" and (max(shape) > 20_000 or (max(shape) > 4096 and call["options"]["k"] > 4096)))
        or (call["op"] == "pow_float" and dtype == "int64")  # integers to a float power: a copy, then the power
        or (call["op"] == "conv" and max(others[0][0][2:]) in (1, 3))  # no patches
    )


def predicted(call: dict[str, Any], kernels: Kernels, mode: FakeTensorMode) -> tuple[list[int], list[list[int]]]:
    """Events and strides, written as the recorder writes them."""
    case = recorder().Case.from_json(call)
    with nullcontext() if call["op"] in VALUES else mode:
        tensors = [each.make("cpu") for each in case.inputs]
    ledger = Ledger("cpu", kernels)
    ledger.ignore(tensors)
    ledger.listen()
    with kernels.dispatch():
        out = case.run(tensors)
    trace, numbers, events = ledger.trace, dict[int, int](), list[int]()
    for event in list(trace.events):
        if event >= 0 and trace.nbytes[event]:
            numbers[event] = len(numbers)
            events.append(trace.nbytes[event])
        elif ~event in numbers:
            events.append(-1 - numbers[~event])
    ledger.close()
    leaves = [one for one in (out if isinstance(out, tuple | list) else (out,)) if isinstance(one, torch.Tensor)]
    return events, [list(one.stride()) for one in leaves]


@pytest.mark.parametrize("table", TABLES, ids=lambda path: path.stem)
def test_every_call_allocates_what_the_card_allocated(table: Path) -> None:
    data = json.loads(table.read_text(encoding="utf-8"))
    kernels, mode = Kernels(find_card(table.stem.removeprefix("kernels_"))), FakeTensorMode(allow_non_fake_inputs=True)
    wrong, alike = [], Counter[str]()
    with torch.no_grad():
        for call in data["calls"]:
            if skipped(call):
                continue
            events, strides = predicted(call, kernels, mode)
            if events == call["events"] and (strides == call["strides"] or call["op"] == "einsum"):
                alike[call["op"]] += 1
            else:
                wrong.append((call, events, strides))
    assert not wrong, f"{len(wrong)} of {len(data['calls'])} differ, first: {wrong[0]}"
    assert sum(alike.values()) >= 0.95 * len(data["calls"])


def test_there_is_a_table() -> None:
    assert TABLES
