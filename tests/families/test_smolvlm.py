"""SmolVLM's views, its tokens between them and its pixels are those of transformers' processors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pil

from memprof.errors import WeightsError
from memprof.families._chat import Special
from memprof.families.smolvlm import SmolVLM
from memprof.models.find import find, named

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


#: What a ``preprocessor_config.json`` may say of sizes; a file that says nothing means transformers' own.
SAID = [
    {"size": {"longest_edge": 1024}, "max_image_size": {"longest_edge": 512}},
    {"size": {"longest_edge": 1000}, "max_image_size": {"longest_edge": 512}, "do_image_splitting": True},
    {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}, "do_image_splitting": False},
    {"size": {"longest_edge": 9000}, "max_image_size": {"longest_edge": 1024}},
    {"do_normalize": True},
]  # fmt: skip


def saved(folder: Path, processor: dict[str, Any], *, nested: bool = False) -> Any:
    """The first card as a checkpoint with this image processor; ``nested``: as transformers 5 writes it."""
    (folder / "config.json").write_text(json.dumps(MODELS[0].config))
    name = "processor_config.json" if nested else "preprocessor_config.json"
    (folder / name).write_text(json.dumps({"image_processor": processor} if nested else processor))
    return find(str(folder))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("said", SAID)
def test_a_checkpoints_image_processor_decides(said: dict[str, Any], nested: bool, tmp_path: Path) -> None:
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    model, theirs = saved(tmp_path, said, nested=nested), SmolVLMImageProcessorPil(**said)
    split = said.get("do_image_splitting", True)
    for width, height in SIZES:
        image = model.family.image(model, width, height)
        assert image.tiles == (theirs.get_number_of_image_patches(height, width)[0] if split else 1)
        assert image.tiles <= model.family.most_tiles(model)
        assert model.family.pixels(model, image, None)[2:] == (theirs.max_image_size["longest_edge"],) * 2


@pytest.mark.parametrize("said", SAID[:3])
def test_its_pixels_are_that_processors(said: dict[str, Any], tmp_path: Path) -> None:
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    picture = Pil.fromarray(np.random.default_rng(0).integers(0, 255, (300, 500, 3), dtype=np.uint8))
    expected = SmolVLMImageProcessorPil(**said)([[picture]], return_tensors="np")["pixel_values"]
    model = saved(tmp_path, said)
    found = model.family.inputs(model, [model.family.image(model, *picture.size)], [picture])["pixel_values"].values
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 0.02


@pytest.mark.parametrize("said", [{"do_resize": False}, {"size": {"height": 9, "width": 9}}, {"max_image_size": 5}])
def test_another_way_to_resize_is_refused(said: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=next(iter(said))):
        saved(tmp_path, said)


@pytest.mark.parametrize("pictures", [1, 2, 3, 6])
def test_pictures_of_one_view_each_are_found_in_ids(pictures: int) -> None:
    model = MODELS[0]
    family, token = model.family, model.family.image_token(model)
    view = family.side(model) ** 2
    ids = [5] + [each for _ in range(pictures) for each in [7, *[token] * view, 8]]
    found = family.images_of(model, ids, {})
    assert sum(image.tiles for image in found) == pictures
    assert sum(image.tokens for image in found) == pictures * view
    assert sum(image.marks for image in found) == 2 * (pictures - 1)
