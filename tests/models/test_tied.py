"""Whether the output embedding is the input embedding: as transformers ties the model that it makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as t
from safetensors.torch import save_file
from tiny import tiny_model

import memprof
from memprof.models.build import build_weightless_from
from memprof.models.find import find, of_config, plain_config

TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "head_dim": 8,
}  # fmt: skip
SIGLIP = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def gemma(**more: Any) -> Any:
    return t.Gemma3Config(text_config=TEXT, vision_config=SIGLIP, **more)


CONFIGS = {
    "a class that ties by default": gemma,
    "one that says no": lambda: gemma(tie_word_embeddings=False),
    "a language model that ties by default": lambda: t.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=300),
    "one that does not": lambda: t.LlamaConfig(**TEXT),
    "tied, and its language model says no": lambda: t.InternVLConfig(
        text_config={"model_type": "qwen2", **TEXT, "tie_word_embeddings": False},
        vision_config={**SIGLIP, "image_size": [112, 112]}, tie_word_embeddings=True,
    ),
    "not, and its language model says yes": lambda: t.Qwen3VLConfig(
        text_config={**TEXT, "tie_word_embeddings": True}, tie_word_embeddings=False,
        vision_config={"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("spelt", ["object", "whole file", "file of what differs"])
def test_weights_are_those_of_the_model_that_transformers_makes(case: str, spelt: str, tmp_path: Path) -> None:
    config = CONFIGS[case]()
    real = build_weightless_from(config, dtype="bfloat16")
    tied = real.get_output_embeddings().weight is real.get_input_embeddings().weight
    given: Any = config
    if spelt != "object":
        data = plain_config(config) if spelt == "whole file" else config.to_diff_dict()
        given = str(tmp_path / "config.json")
        Path(given).write_text(json.dumps({"model_type": config.model_type, **data}, default=str))
    parts = memprof.predict(given, text_tokens=4, new_tokens=1, dtype="bfloat16").record.static_parts
    assert parts["head"] == (0 if tied else real.get_output_embeddings().weight.nbytes)


def test_a_file_of_before_transformers_5_says_it_of_its_language_model() -> None:
    raw = plain_config(CONFIGS["tied, and its language model says no"]())
    del raw["tie_word_embeddings"]
    assert not of_config(raw).config["tie_word_embeddings"]
    raw["text_config"]["tie_word_embeddings"] = True
    assert of_config(raw).config["tie_word_embeddings"]


@pytest.mark.parametrize("stores", [False, True])
def test_weights_beside_the_file_know_best(stores: bool, tmp_path: Path) -> None:
    model = tiny_model("internvl")[2]
    model.config.tie_word_embeddings = True
    model.config.save_pretrained(tmp_path)
    weights = {name: weight.clone() for name, weight in model.state_dict().items() if stores or "lm_head" not in name}
    save_file(weights, tmp_path / "model.safetensors")
    assert find(tmp_path).config["tie_word_embeddings"] is not stores
