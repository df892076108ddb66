"""Tokens of images of any resolution are those that transformers' processors count and its models make."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pil
from tiny import tiny_model, tiny_prompt

from memprof.bench.generate import place
from memprof.families import FAMILIES
from memprof.families._anyres import AnyRes, best_resolution
from memprof.models.find import named

SIZES = [(448, 448), (1344, 896), (1792, 1344), (384, 1152), (37, 900), (901, 1), (1, 1), (4000, 3001), (640, 479)]
MODELS = [model for model in named().values() if isinstance(model.family, AnyRes)]


def counted(model: Any, width: int, height: int) -> int:
    """Placeholders of one image by the processor's own functions, which need no tokenizer or pictures."""
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
    from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

    size, side = model.vision["image_size"], model.family.side(model)

    class Sizes:
        image_grid_pinpoints = model.config["image_grid_pinpoints"]

    kind = {"llava_next": LlavaNextProcessor, "llava_onevision": LlavaOnevisionProcessor}[model.config["model_type"]]
    processor = kind.__new__(kind)
    processor.image_processor = Sizes()
    processor.num_image_tokens, processor.vision_aspect_ratio = side**2, model.config.get("vision_aspect_ratio")
    processor.patch_size, processor.num_additional_image_tokens = model.vision["patch_size"], 0
    return int(processor._get_number_of_features(height, width, size, size))


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_tokens_are_the_processors(model: Any, width: int, height: int) -> None:
    from transformers.image_processing_utils import select_best_resolution

    image = model.family.image(model, width, height)
    assert image.tokens == counted(model, width, height)
    resolutions = model.config["image_grid_pinpoints"]
    best = best_resolution(width, height, resolutions)
    assert best == select_best_resolution((height, width), resolutions)
    assert image.tiles == 1 + best[0] * best[1] // model.vision["image_size"] ** 2
    assert model.family.positions(image).shape == (image.tokens, 2)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_as_many_tiles_as_are_asked_for(model: Any) -> None:
    size = model.vision["image_size"] ** 2
    for down, across in model.config["image_grid_pinpoints"]:
        assert model.family.tiled(model, down * across // size + 1).tiles == down * across // size + 1
    assert model.family.tiled(model, 1).tiles == min(d * a // size for d, a in model.config["image_grid_pinpoints"]) + 1


@pytest.mark.parametrize("kind", sorted({name for name, _ in FAMILIES if name in ("llava-onevision", "llava-next")}))
@pytest.mark.parametrize(("width", "height"), [(100, 100), (400, 200), (33, 900), (100, 67)])
def test_each_token_is_where_the_model_puts_its_pixels(kind: str, width: int, height: int) -> None:
    """A picture lit at one place moves the features of the tokens that lie there, and newline tokens not at all."""
    family, model, module = tiny_model(kind)
    prompt = tiny_prompt(family, model, width, height)
    inputs = {name: place(prompt, module)[name] for name in prompt.inputs}
    with torch.no_grad():
        (found,) = module.model.get_image_features(**inputs, return_dict=True).pooler_output
    image = prompt.shape.images[0]
    assert found.shape[0] == image.tokens == len(prompt.places.index)
    (side, _), (across, down) = image.grids
    lines = found[side**2 :].reshape(down, across, -1)[:, -1]
    assert torch.equal(lines, module.model.image_newline.expand_as(lines))


@pytest.mark.parametrize("model", MODELS[:1] + MODELS[-1:], ids=lambda model: model.name)
def test_pixels_are_the_image_processors(model: Any) -> None:
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    mean, std = model.family.normalised_by
    kind, side = model.config["model_type"], model.vision["image_size"]
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    cls: Any = {"llava_next": LlavaNextImageProcessorPil, "llava_onevision": LlavaOnevisionImageProcessorPil}[kind]
    processor = cls(
        image_mean=list(mean), image_std=list(std), image_grid_pinpoints=model.config["image_grid_pinpoints"],
        **(size if kind == "llava_next" else {}),
    )  # fmt: skip
    draw = np.random.default_rng(0)
    pictures = [Pil.fromarray(draw.integers(0, 255, (h, w, 3), dtype=np.uint8)) for h, w in ((300, 500), (700, 200))]
    expected = processor(pictures, return_tensors="np")
    images = [model.family.image(model, *picture.size) for picture in pictures]
    found = model.family.inputs(model, images, pictures)
    assert np.array_equal(found["image_sizes"].values, expected["image_sizes"])
    assert found["pixel_values"].values.shape == expected["pixel_values"].shape
    assert np.abs(found["pixel_values"].values - expected["pixel_values"]).max() < 0.02
