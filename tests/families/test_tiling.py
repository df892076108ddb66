"""Dynamic tiling: on every size of the oracle, by hand, and by its properties."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from memprof.families._tiling import candidates, choose_grid, cut_tiles, normalise
from memprof.models.find import find

EDGE = st.integers(1, 5000)
MOST = st.sampled_from([1, 2, 6, 12, 24])


@pytest.fixture(scope="module")
def folder(shared: Path) -> Path:
    return shared / "data" / "oracles" / "tiling"


@pytest.fixture(scope="module")
def oracle(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "tiling.json").read_text())


class TestOracle:
    def test_every_size(self, oracle: dict[str, Any]) -> None:
        card = find("internvl2-2b")
        family = card.family
        compared = 0
        for case in oracle["cases"]:
            for most, expected in case["by_max_num"].items():
                image = family.image(card, case["width"], case["height"], int(most))
                found = {"cols": image.columns, "rows": image.rows, "tiles": image.tiles}
                assert found == expected, (case["width"], case["height"], most)
                assert image.tokens == 256 * image.tiles
                compared += 1
        assert compared == 496

    def test_order_of_the_candidates(self, oracle: dict[str, Any]) -> None:
        for most, order in oracle["candidate_order"].items():
            assert [list(grid) for grid in candidates(int(most))] == order

    def test_pixels(self, oracle: dict[str, Any], folder: Path) -> None:
        card = find("internvl2-2b")
        family = card.family
        same_pillow = oracle["versions"]["pillow"] == PIL.__version__  # its bicubic filter decides single bits
        probes = oracle["pixel_check"]["probes_yx"]
        for case in oracle["pixel_check"]["images"]:
            with Image.open(folder / case["image"]) as image:
                cut = family.image(card, *image.size, case["max_num"])
                tiles = cut_tiles(image, cut.columns, cut.rows)
                pixels = family.pixels(card, cut, image)
            assert isinstance(pixels, np.ndarray)
            assert (len(tiles), pixels.shape) == (case["n_tiles"], (case["n_tiles"], 3, 448, 448))
            for tile, values, expected in zip(tiles, pixels, case["tiles"], strict=True):
                rgb = np.asarray(tile)
                np.testing.assert_allclose(rgb.mean((0, 1)), expected["mean_rgb"], atol=0.5)
                np.testing.assert_allclose(values.mean((1, 2)), expected["pixel_values_mean"], atol=0.01)
                probed = np.array([rgb[y, x] for y, x in probes], dtype=int)
                normal = np.array([values[:, y, x] for y, x in probes])
                if same_pillow:
                    assert hashlib.sha256(rgb.tobytes()).hexdigest() == expected["sha256_rgb_bytes"]
                    np.testing.assert_allclose(normal, expected["pixel_values_probe"], atol=1e-5)
                assert np.abs(probed - np.array(expected["probe_rgb"])).max() <= (0 if same_pillow else 3)


@pytest.mark.parametrize(
    ("width", "height", "most", "grid"),
    [
        (448, 448, 12, (1, 1)),  # a tile as it is: 2 x 2 has the same ratio and four times the area, too much
        (900, 900, 12, (2, 2)),  # 810,000 pixels: more than half of 2 x 2 tiles (401,408), less than half of 3 x 3
        (1000, 1000, 12, (3, 3)),  # 1,000,000: more than half of 3 x 3 (903,168)
        (1000, 1000, 6, (2, 2)),  # 3 x 3 is not among six
        (800, 400, 12, (2, 1)),  # half of 4 x 2 is 802,816 pixels, more than 320,000
        (1600, 800, 12, (4, 2)),
        (400, 800, 12, (1, 2)),
        (5000, 10, 12, (12, 1)),  # an extreme ratio takes the longest row
        (10, 5000, 12, (1, 12)),
        (633, 463, 6, (3, 2)),  # AI2D's median: 1.367 is nearer to 1.5 than to 1
        (1, 1, 12, (1, 1)),
        (3000, 2000, 1, (1, 1)),
    ],
)
def test_by_hand(width: int, height: int, most: int, grid: tuple[int, int]) -> None:
    assert choose_grid(width, height, most) == grid


@given(EDGE, EDGE, MOST)
def test_a_grid_is_a_candidate_and_none_is_closer(width: int, height: int, most: int) -> None:
    columns, rows = choose_grid(width, height, most)
    assert (columns, rows) in candidates(most)
    off = abs(width / height - columns / rows)
    assert all(off <= abs(width / height - c / r) for c, r in candidates(most))


@given(EDGE, EDGE, MOST)
def test_tiles_and_tokens_follow_from_the_grid(width: int, height: int, most: int) -> None:
    card = find("internvl2-2b")
    family = card.family
    shape = family.shape(card, width, height, 5, most)
    cut = shape.images[0].columns * shape.images[0].rows
    assert shape.tiles == (cut if cut == 1 else cut + 1) <= most + 1
    assert shape.visual_tokens == 256 * shape.tiles
    assert len(family.positions(shape.images[0])) == shape.visual_tokens


@given(st.integers(1, 24))
def test_candidates_are_every_grid_once_by_area(most: int) -> None:
    grids = candidates(most)
    areas = [c * r for c, r in grids]
    assert areas == sorted(areas)
    assert sorted(grids) == [(c, r) for c in range(1, most + 1) for r in range(1, most // c + 1)]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), MOST)
def test_cutting_loses_no_pixel(width: int, height: int, most: int) -> None:
    """Tiles, laid side by side, are the resized image; the thumbnail is the whole image."""
    draw = np.random.default_rng(width * 61 + height)
    image = Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
    columns, rows = choose_grid(width, height, most, 28)
    tiles = [np.asarray(tile) for tile in cut_tiles(image, columns, rows, 28)]
    laid = np.block([[[tiles[r * columns + c]] for c in range(columns)] for r in range(rows)])
    whole = image.resize((columns * 28, rows * 28), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(laid, np.asarray(whole))
    if len(tiles) > 1:
        np.testing.assert_array_equal(tiles[-1], np.asarray(image.resize((28, 28), Image.Resampling.BICUBIC)))


def test_any_mode_becomes_rgb() -> None:
    for mode in ("L", "P", "RGBA", "CMYK", "1"):
        assert [tile.mode for tile in cut_tiles(Image.new(mode, (9, 3)), 2, 1, 28)] == ["RGB"] * 3


def test_normalising() -> None:
    grey = Image.new("RGB", (2, 2), (255, 0, 51))
    values = normalise([grey])
    assert values.shape == (1, 3, 2, 2)
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225]
    np.testing.assert_allclose(values[0, :, 0, 0], expected, rtol=1e-6)
