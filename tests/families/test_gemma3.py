"""Gemma 3: prompts as its processor writes them, two kinds of layers, images that look both ways, windows that fill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pil
from tiny import tiny_model, tiny_prompt

from memprof.bench.generate import place, profile_prompt
from memprof.errors import UsageError, WeightsError
from memprof.meters import meter_for
from memprof.models.find import find, named
from memprof.pruning import build_pruner

MODELS = [model for model in named().values() if model.config["model_type"] == "gemma3"]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
@pytest.mark.parametrize("size", [(300, 500), (64, 1000), (896, 896)])
def test_pixels_and_tokens_are_the_processors(model: Any, size: tuple[int, int]) -> None:
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    edge = model.vision["image_size"]
    picture = Pil.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8))
    processor = Gemma3ImageProcessorPil(size={"height": edge, "width": edge}, do_pan_and_scan=False)
    expected = processor(picture, return_tensors="np")["pixel_values"]
    image = model.family.image(model, *picture.size)
    found = model.family.inputs(model, [image], [picture])["pixel_values"].values
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 0.02
    assert image.tokens == model.config["mm_tokens_per_image"]


def test_tokens_of_an_image_are_told_to_the_model() -> None:
    family, card, model = tiny_model("gemma3")
    prompt = tiny_prompt(family, card)
    types = place(prompt, model)["token_type_ids"]
    assert types.shape == (1, prompt.shape.length)
    assert types[0].nonzero()[:, 0].tolist() == prompt.places.index.tolist()


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_a_full_window_keeps_what_it_keeps(device: str) -> None:
    """The cache of a sliding layer is a token shorter than its window."""
    family, card, model = tiny_model("gemma3", device=device)
    window = card.text["sliding_window"]
    shape = family.shape(card, 400, 200, 0)
    long = family.drawn(card, shape.longer(window - shape.length + 9))
    memory = profile_prompt(model, meter_for(model), build_pruner("baseline"), "current", long, new_tokens=3).memory
    assert memory.kv_tokens_found == memory.kv_tokens_planned
    kinds = dict(zip(card.text["layer_types"], memory.kv_tokens_found, strict=True))
    assert kinds == {"sliding_attention": window - 1, "full_attention": window + 9}


@pytest.mark.parametrize("method", ["random:positions=compact", "fastv:scores=row", "fastv:drop=mask"])
def test_what_a_full_window_leaves_unknown_is_refused(method: str) -> None:
    family, card, model = tiny_model("gemma3")
    window = card.text["sliding_window"]
    shape = family.shape(card, 400, 200, 0)
    for tokens, length in ((1, window + 9), (9, window - 3)):
        prompt, pruner = family.drawn(card, shape.longer(length - shape.length)), build_pruner(method)
        if tokens > 1 and "scores=row" in method:  # the row was read before
            continue
        with pytest.raises(UsageError, match=rf"sliding window is full: it has {window} tokens, and \d+ are reached"):
            profile_prompt(model, meter_for(model), pruner, "current", prompt, new_tokens=tokens)


def test_pan_and_scan_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODELS[0].config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_pan_and_scan": True}))
    with pytest.raises(WeightsError, match="do_pan_and_scan"):
        find(str(tmp_path))
