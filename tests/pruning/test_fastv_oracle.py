"""FastV keeps what the reference keeps, and computes what it computes (../shared/data/oracles/fastv).

The reference is the authors' own modified Llama; here a plain transformers Llama is pruned from outside.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from memprof.prompts import Places
from memprof.pruning.methods.fastv import FastV
from memprof.pruning.surgery import Surgery
from memprof.pruning.view import View

CASES = ["k2_r0p5", "k2_r0p75", "k3_r0p5", "k3_r0p75"]
CLOSE = {"rtol": 0.0, "atol": 1e-4}


@pytest.fixture(scope="module")
def folder(shared: Path) -> Path:
    return shared / "data" / "oracles" / "fastv"


@pytest.fixture(scope="module")
def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "io.json").read_text())


@pytest.fixture(scope="module")
def io(folder: Path) -> dict[str, torch.Tensor]:
    with np.load(folder / "io.npz") as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored}


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@contextmanager
def cache_lengths(model: Any) -> Iterator[list[list[int]]]:
    """KV length of every layer after each forward."""
    seen: list[list[int]] = []

    def look(_: Any, args: Any, out: Any) -> None:
        seen.append([int(layer.keys.shape[-2]) for layer in out.past_key_values.layers])

    hook = model.register_forward_hook(look)
    try:
        yield seen
    finally:
        hook.remove()


def layout(facts: dict[str, Any]) -> Places:
    where = facts["layout"]
    index = np.arange(where["text_before"], where["text_before"] + where["image"])
    positions = np.zeros((len(index), 2), dtype=np.float32)
    return Places(where["seq_len"], index, positions, np.zeros(len(index), dtype=np.int64))


def test_plain_llama_is_the_references(model: Any, io: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        logits = model(inputs_embeds=io["inputs_embeds"]).logits[0]
    torch.testing.assert_close(logits, io["plain_prefill_logits"], **CLOSE)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("scores", ["row", "map"])
@pytest.mark.parametrize("name", CASES)
class TestCase:
    @pytest.fixture(autouse=True)
    def _attention(self, model: Any, attention: str, scores: str) -> Iterator[None]:
        if (attention, scores) == ("sdpa", "map"):
            pytest.skip("only eager attention makes maps")
        model.set_attn_implementation(attention)
        yield
        model.set_attn_implementation("eager")

    def surgery(self, model: Any, facts: dict[str, Any], name: str, scores: str) -> tuple[Surgery, dict[str, Any]]:
        case = next(case for case in facts["cases"] if case["name"] == name)
        settings = case["fastv_config"]
        pruner = FastV(keep=1 - settings["fastv_r"], layer=settings["fastv_k"], scores=scores)
        return Surgery(model, pruner, layout(facts)), case

    def test_prefill(
        self, model: Any, facts: dict[str, Any], io: dict[str, torch.Tensor], name: str, scores: str
    ) -> None:
        surgery, case = self.surgery(model, facts, name, scores)
        with torch.no_grad(), surgery:
            out = model(inputs_embeds=io["inputs_embeds"], use_cache=True, output_hidden_states=True)
        visual = layout(facts).index
        kept = surgery.kept()
        assert kept is not None
        gone = set(visual.tolist()) - set(visual[kept[0]].tolist())
        assert [i for i in range(facts["layout"]["seq_len"]) if i not in gone] == case["kept_indices"]
        torch.testing.assert_close(out.logits[0], io[f"{name}_prefill_logits_all_kept"], **CLOSE)
        torch.testing.assert_close(out.logits[0, -1], io[f"{name}_prefill_last_logits"], **CLOSE)
        torch.testing.assert_close(out.hidden_states[-1][0], io[f"{name}_final_hidden"], **CLOSE)
        assert surgery.kv_tokens == case["prefill_kv_lengths"]
        cut = case["fastv_config"]["fastv_k"]
        for number in (0, cut - 1, cut):
            cached = out.past_key_values.layers[number]
            torch.testing.assert_close(cached.keys[0], io[f"{name}_prefill_key_layer{number}"], **CLOSE)
            torch.testing.assert_close(cached.values[0], io[f"{name}_prefill_value_layer{number}"], **CLOSE)

    def test_generation(
        self, model: Any, facts: dict[str, Any], io: dict[str, torch.Tensor], name: str, scores: str
    ) -> None:
        surgery, case = self.surgery(model, facts, name, scores)
        with surgery, cache_lengths(model) as lengths:
            out = model.generate(
                inputs_embeds=io["inputs_embeds"],
                attention_mask=torch.ones(io["inputs_embeds"].shape[:2], dtype=torch.long),
                max_new_tokens=len(case["greedy_ids"]), do_sample=False,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        assert out.sequences[0].tolist() == case["greedy_ids"]
        torch.testing.assert_close(torch.cat(out.logits), io[f"{name}_step_logits"], **CLOSE)
        assert lengths == case["kv_lengths_after_each_forward"][: len(lengths)]
        assert len(lengths) == len(case["greedy_ids"])


class Spy(FastV):
    """FastV that remembers the scores it ranked by."""

    seen: ClassVar[list[torch.Tensor]] = []

    def select(self, view: View, kept: int) -> torch.Tensor:
        self.seen.append(view.row if self.scores == "row" else view.map)
        return super().select(view, kept)


@pytest.mark.parametrize("scores", ["row", "map"])
@pytest.mark.parametrize("name", CASES)
def test_scores(model: Any, facts: dict[str, Any], io: dict[str, torch.Tensor], name: str, scores: str) -> None:
    """Row and map give the reference's score of every visual token, not only its choice."""
    settings = next(case for case in facts["cases"] if case["name"] == name)["fastv_config"]
    pruner = Spy(keep=1 - settings["fastv_r"], layer=settings["fastv_k"], scores=scores)
    with torch.no_grad(), Surgery(model, pruner, layout(facts)):
        model(inputs_embeds=io["inputs_embeds"], use_cache=True)
    torch.testing.assert_close(Spy.seen.pop(), io[f"{name}_image_scores"], rtol=0, atol=1e-6)


def test_kept_count_is_pythons_round() -> None:
    """Halves go to the even number, as in the reference."""
    assert [FastV(keep=0.5).stages(n, 6)[0].kept for n in (3, 5, 7, 48)] == [2, 2, 4, 24]
