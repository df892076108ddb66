"""The tiny InternVL2 that the original code wrote gives, converted, the original's numbers (../shared/data/oracles)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memprof.models.checkpoint import load_checkpoint
from memprof.models.find import find

#: What float32 noise allows: the original's own float32 and float64 logits differ by 1.5e-5.
CLOSE = {"rtol": 0.0, "atol": 1e-4}


@pytest.fixture(scope="module")
def oracle(shared: Path) -> Path:
    return shared / "data" / "oracles" / "internvl2"


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(oracle: Path, request: pytest.FixtureRequest) -> Any:
    return load(oracle, request.param)


def load(folder: Path, attention: str = "eager") -> Any:
    card = find("internvl2-2b", str(folder))
    return load_checkpoint(card, str(folder), device="cpu", dtype="float32", attention=attention)


def arrays(file: Path) -> dict[str, torch.Tensor]:
    with np.load(file) as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored}


def generate(model: Any, expected: dict[str, torch.Tensor], **inputs: torch.Tensor) -> None:
    """Greedy tokens and the logits of every step are the original's."""
    ids, steps = expected["generated_ids"], expected["generated_step_logits"]
    out = model.generate(
        **inputs, max_new_tokens=steps.shape[1], do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    # transformers 4.37 puts a BOS in front where it was given embeddings; here the prompt stands in front.
    assert out.sequences[:, inputs["input_ids"].shape[1] :].tolist() == ids[:, 1:].tolist()
    torch.testing.assert_close(torch.stack(out.logits, 1), steps, **CLOSE)


def test_card_says_what_the_file_says(oracle: Path) -> None:
    card = find("internvl2-2b")
    family = card.family
    found = find(card.name, str(oracle))
    facts = json.loads((oracle / "facts.json").read_text())
    assert found.name == card.name
    assert found.title == "InternVL2-2B as in internvl2"
    assert (found.text["hidden_size"], found.text["num_hidden_layers"], found.text["vocab_size"]) == (64, 4, 300)
    assert (found.vision["hidden_size"], found.vision["image_size"]) == (64, [56, 56])
    assert family.side(found) ** 2 == facts["num_image_token"]
    assert family.image_token(found) == facts["img_context_token_id"]
    assert found.text["eos_token_id"] == facts["eos_token_id_used_for_generation"]
    assert found.dtype == "float32"
    assert str(oracle) in found.source


def test_parameters(model: Any, oracle: Path) -> None:
    facts = json.loads((oracle / "facts.json").read_text())
    assert sum(p.numel() for p in model.parameters()) == facts["n_params"]
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])


@torch.no_grad()
def test_vision(model: Any, oracle: Path) -> None:
    io = arrays(oracle / "io.npz")
    tower = model.model.vision_tower(io["pixel_values"], output_hidden_states=True)
    torch.testing.assert_close(torch.stack(tower.hidden_states), io["vision_hidden_states"], **CLOSE)
    torch.testing.assert_close(tower.last_hidden_state, io["vision_hidden_states"][-1], **CLOSE)
    embeddings = model.get_image_features(io["pixel_values"]).pooler_output
    torch.testing.assert_close(embeddings, io["vit_embeds"], **CLOSE)


@torch.no_grad()
def test_language_model(model: Any, oracle: Path) -> None:
    io = arrays(oracle / "io.npz")
    out = model(input_ids=io["input_ids"], pixel_values=io["pixel_values"], output_hidden_states=True)
    torch.testing.assert_close(torch.stack(out.hidden_states), io["llm_hidden_states"], **CLOSE)
    torch.testing.assert_close(out.logits, io["logits"], **CLOSE)
    torch.testing.assert_close(out.past_key_values.layers[0].keys, io["kv_key_layer0"], **CLOSE)
    torch.testing.assert_close(out.past_key_values.layers[0].values, io["kv_value_layer0"], **CLOSE)
    torch.testing.assert_close(model(input_ids=io["text_input_ids"]).logits, io["text_logits"], **CLOSE)


def test_generation(model: Any, oracle: Path) -> None:
    io = arrays(oracle / "io.npz")
    mask = torch.ones_like(io["input_ids"])
    generate(model, io, input_ids=io["input_ids"], pixel_values=io["pixel_values"], attention_mask=mask)


def test_batch_generation(model: Any, oracle: Path) -> None:
    io = arrays(oracle / "io_batch.npz")
    inputs = {name: io[name] for name in ("input_ids", "pixel_values", "attention_mask")}
    generate(model, io, **inputs)


class TestDynamicNTK:
    """Rotary tables beyond ``max_position_embeddings``, which this checkpoint sets below the prompt's length."""

    @pytest.fixture
    def folder(self, oracle: Path, tmp_path: Path) -> Path:
        config = json.loads((oracle / "config.json").read_text())
        config["llm_config"] |= {"max_position_embeddings": 24, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "model.safetensors").symlink_to(oracle / "model.safetensors")
        return tmp_path

    @torch.no_grad()
    def test_grown_table(self, folder: Path, oracle: Path) -> None:
        io = arrays(oracle / "io_rope_long.npz")
        model = load(folder)
        torch.testing.assert_close(model(input_ids=io["text_input_ids"]).logits, io["text_logits_fresh_model"], **CLOSE)
        out = model(input_ids=io["input_ids"], pixel_values=io["pixel_values"])
        torch.testing.assert_close(out.logits, io["logits"], **CLOSE)

    @torch.no_grad()
    def test_the_references_fault_is_not_copied(self, folder: Path, oracle: Path) -> None:
        """The reference keeps the grown table; here a short prompt after a long one is as on a fresh model."""
        io = arrays(oracle / "io_rope_long.npz")
        model = load(folder)
        model(input_ids=io["input_ids"], pixel_values=io["pixel_values"])
        after = model(input_ids=io["text_input_ids"]).logits
        torch.testing.assert_close(after, io["text_logits_fresh_model"], **CLOSE)
        assert (after - io["text_logits_after_long_pass"]).abs().max() > 0.1

    def test_generation(self, folder: Path, oracle: Path) -> None:
        io = arrays(oracle / "io_rope_long.npz")
        mask = torch.ones_like(io["input_ids"])
        generate(load(folder), io, input_ids=io["input_ids"], pixel_values=io["pixel_values"], attention_mask=mask)


def test_single_file_follows_the_configuration_beside_it(oracle: Path) -> None:
    assert sum(p.numel() for p in load(oracle / "model.safetensors").parameters()) == 339_008


def test_published_configuration_is_the_card(shared: Path) -> None:
    """The published config.json gives the card's own sizes, but for the 512 positions its carrier wrote in."""
    card = find("internvl2-2b")
    family = card.family
    found = find(card.name, str(shared / "data" / "tokenizers" / "internvl2-2b"))
    assert found.title == card.title
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_key_value_heads", "eos_token_id", "rms_norm_eps")
    assert {k: found.text[k] for k in same} == {k: card.text[k] for k in same}
    assert found.vision["hidden_size"] == card.vision["hidden_size"]
    assert family.image_token(found) == family.image_token(card) == 92546
