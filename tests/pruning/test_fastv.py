"""FastV in its published forms. The reference's own numbers are held in test_fastv_oracle.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from doubled import DoubledKv
from test_contract import generate
from tiny import families, tiny_model, tiny_prompt

from memprof.bench.generate import place
from memprof.errors import BadValue, UsageError
from memprof.profiler import Profiler
from memprof.pruning import build_pruner
from memprof.pruning.surgery import Surgery

every_family = pytest.mark.parametrize("family", families())


@every_family
def test_one_row_ranks_as_the_whole_map_does(family: str) -> None:
    kind, card, model = tiny_model(family, "eager")
    prompt = tiny_prompt(kind, card)
    by_row, row, _ = generate(model, build_pruner("fastv:scores=row,keep=0.4"), prompt)
    by_map, whole, _ = generate(model, build_pruner("fastv:scores=map,keep=0.4"), prompt)
    assert row.kept() == whole.kept()
    assert all(torch.equal(a, b) for a, b in zip(by_row.logits, by_map.logits, strict=True))


@every_family
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_masking_computes_what_dropping_does_and_saves_nothing(family: str, attention: str) -> None:
    kind, card, model = tiny_model(family, attention)
    prompt = tiny_prompt(kind, card)
    dropped, drop, _ = generate(model, build_pruner("fastv:keep=0.4,scores=row"), prompt)
    masked, mask, profiler = generate(model, build_pruner("fastv:keep=0.4,scores=row,drop=mask"), prompt)
    assert drop.kept() == mask.kept()
    for a, b in zip(dropped.logits, masked.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert profiler.kv_tokens == mask.kv_tokens == [prompt.shape.length] * 5
    assert set(mask.visual_tokens) == {prompt.shape.visual_tokens}


def test_the_stack_fills_in_where_scores_come_from() -> None:
    assert build_pruner("fastv").needs == {"row"}
    assert build_pruner("fastv", "paper").needs == {"map"}
    assert build_pruner("fastv:scores=row", "paper").needs == {"row"}


def test_what_cannot_work_is_refused() -> None:
    kind, card, model = tiny_model(families()[0])
    prompt = tiny_prompt(kind, card)
    with pytest.raises(UsageError, match="eager"):
        Surgery(model, build_pruner("fastv:scores=map"), prompt.places)
    with pytest.raises(BadValue, match="layer=1"):
        build_pruner("fastv:layer=0").stages(100, 24)


@every_family
def test_a_doubled_kv_shows_in_the_cache_and_nowhere_else(family: str) -> None:
    kind, card, model = tiny_model(family)
    prompt = tiny_prompt(kind, card)
    pruner = build_pruner("fastv:keep=0.4")
    right, _, _ = generate(model, pruner, prompt, tokens=1)

    def doubled(tokens: int) -> tuple[Any, Surgery, Profiler]:
        with DoubledKv(model, pruner, prompt.places) as surgery, Profiler(model) as profiler:
            out = model.generate(
                **place(prompt, model), max_new_tokens=tokens, do_sample=False, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        return out, surgery, profiler

    out, surgery, profiler = doubled(1)
    assert torch.equal(out.logits[0], right.logits[0]), "the first token does not tell"
    length = prompt.shape.length
    assert surgery.kv_tokens[:2] == [length, length]
    assert profiler.kv_tokens[:2] == [length, 2 * length]
    assert profiler.kv_tokens[2:] == surgery.kv_tokens[2:]
