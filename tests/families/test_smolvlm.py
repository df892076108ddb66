"""SmolVLM's views, its tokens between them and its pixels are those of transformers' processors."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pil

from memprof.families._chat import Special
from memprof.families.smolvlm import SmolVLM
from memprof.models.find import named

SIZES = [(448, 448), (1344, 896), (1792, 1344), (384, 1152), (37, 900), (901, 1), (1, 1), (4000, 3001), (641, 479)]
MODELS = [model for model in named().values() if isinstance(model.family, SmolVLM)]


def processor_of(model: Any, **more: Any) -> Any:
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    size = model.vision["image_size"]
    edges = {"size": {"longest_edge": 4 * size}, "max_image_size": {"longest_edge": size}}
    return SmolVLMImageProcessorPil(**{**edges, **more})


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_views_are_the_processors(model: Any, width: int, height: int) -> None:
    views, rows, columns = processor_of(model).get_number_of_image_patches(height, width)
    image = model.family.image(model, width, height)
    assert (image.tiles, image.rows, image.columns) == (views, rows, columns)
    small = processor_of(model, size={"longest_edge": 2 * model.vision["image_size"]})
    assert model.family.image(model, width, height, 4).tiles == small.get_number_of_image_patches(height, width)[0]
    assert model.family.image(model, width, height, 1).tiles == 1


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
@pytest.mark.parametrize(
    ("width", "height", "tiles"), [(448, 448, None), (1344, 896, None), (9, 900, None), (99, 99, 1)]
)
def test_what_stands_between_views_is_the_processors(model: Any, width: int, height: int, tiles: int | None) -> None:
    from transformers.models.smolvlm import processing_smolvlm as theirs

    family, around = model.family, ("<fake_token_around_image>", "<image>", "<global-img>")
    image = family.image(model, width, height, tiles)
    rows, columns = (image.rows, image.columns) if image.tiles > 1 else (0, 0)
    names = dict(zip(("fake_token_around_image", "image_token", "global_image_token"), around, strict=True))
    expected = theirs.get_image_prompt_string(rows, columns, family.side(model) ** 2, **names)
    written = "".join(
        part if isinstance(part, str) else ("<image>" if isinstance(part.token, int) else part.token) * part.times
        for part in family.placeholders(model, image)
    )
    assert written == expected
    tokens = re.findall(r"<[^>]+>|\n+", expected)
    seen = [number for number, token in enumerate(tokens) if token == "<image>"]
    assert len(seen) == image.tokens
    assert seen[-1] - seen[0] + 1 == image.tokens + image.marks == len(family.ids(model, image))
    assert (seen[0], len(tokens) - 1 - seen[-1]) == (2, 1)
    assert Special(family.image_token(model), image.tokens // image.tiles) in family.placeholders(model, image)


@pytest.mark.parametrize("size", [(300, 500), (700, 200), (64, 64)])
def test_pixels_are_the_image_processors(size: tuple[int, int]) -> None:
    model = MODELS[0]
    draw = np.random.default_rng(0)
    picture = Pil.fromarray(draw.integers(0, 255, (*size, 3), dtype=np.uint8))
    expected = processor_of(model)([[picture]], return_tensors="np")
    image = model.family.image(model, *picture.size)
    found = model.family.inputs(model, [image], [picture])
    for name in ("pixel_values", "pixel_attention_mask"):
        assert found[name].values.shape == expected[name].shape
        assert np.abs(found[name].values - expected[name]).max() < 0.02
    assert model.family.seen(model, image, found["pixel_values"].values).shape[0] == image.tiles
