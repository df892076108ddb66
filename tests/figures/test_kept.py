"""Pictures of what stayed: every token's cell lies where its tile does, kept ones clear, dropped ones veiled."""

from __future__ import annotations

import numpy as np
import pytest

from memprof.asked import Grid
from memprof.figures.kept import cell_pixels, cells, colours, corners, draw, staying, veil_of

#: Two columns, three rows, a thumbnail; 4 x 4 tokens a tile.
GRID = Grid(columns=2, rows=3, thumbnail=True, across=4, down=4)


def tiles_of(grid: Grid, shade: int = 200) -> np.ndarray:
    """Tiles of one shade, but each with a tint of its own in blue."""
    tiles = np.full((grid.tiles, 32, 32, 3), shade, dtype=np.uint8)
    tiles[..., 2] = 10 * np.arange(grid.tiles, dtype=np.uint8)[:, None, None]
    return tiles


def middles(grid: Grid) -> list[tuple[int, int]]:
    """The pixel in the middle of every token's cell, worked out from the corners of the tiles."""
    edge = cell_pixels(grid)
    return [
        (x + edge * column + edge // 2, y + edge * row + edge // 2)
        for x, y in zip(*corners(grid, edge), strict=True)
        for row in range(grid.down)
        for column in range(grid.across)
    ]


@pytest.mark.parametrize("shade", [200, 20])
def test_kept_tokens_are_clear_and_dropped_ones_veiled(shade: int) -> None:
    kept = [0, 3, 17, 95, 96, 111]
    tiles = tiles_of(GRID, shade)
    drawn = draw(tiles, GRID, kept)
    veil = np.array(veil_of(tiles))
    for token, at in enumerate(middles(GRID)):
        pixel = np.array(drawn.getpixel(at)[:3])
        true = np.array([shade, shade, 10 * (token // 16)])
        if token in kept:
            assert (pixel == true).all(), token
        else:
            assert np.abs(pixel - veil).max() <= 0.19 * np.abs(true - veil).max() + 1, token


def test_a_bright_picture_sinks_into_dark_and_a_dark_one_into_bright() -> None:
    assert sum(veil_of(tiles_of(GRID, 200))) < 3 * 60
    assert sum(veil_of(tiles_of(GRID, 20))) > 3 * 200


def test_tiles_run_row_by_row_and_the_thumbnail_stands_aside() -> None:
    left, top = corners(GRID, 1)
    assert left[0] == left[2] == left[4] < left[1] == left[3] == left[5] < left[6]
    assert top[0] == top[1] == top[6] < top[2] == top[3] < top[4]
    assert left[1] - left[0] == top[2] - top[0] == 5  # four cells and a frame
    assert left[6] - left[1] > 5
    drawn = draw(tiles_of(GRID), GRID, range(GRID.tokens))
    edge = cell_pixels(GRID)
    x, y = (corner[6] for corner in corners(GRID, edge))
    assert drawn.getpixel((x - 3, y))[3] == 0  # nothing between the picture and its thumbnail
    assert drawn.getpixel((x - 1, y)) == drawn.getpixel((0, 0)) == (150, 150, 156, 255)  # frames


def test_a_legend_is_set_below_on_white_and_broken_where_it_is_too_long() -> None:
    bare = draw(tiles_of(GRID), GRID, [])
    short, long = (draw(tiles_of(GRID), GRID, [], [text]) for text in ("few words", "many more words " * 12))
    assert bare.mode == "RGBA"
    assert short.mode == "RGB"
    assert bare.width == short.width == long.width
    assert bare.height < short.height < long.height
    below = np.asarray(short)[bare.height :]
    assert below.min() < 100
    assert (below[:, -5:] == 255).all()


def test_cells_measure_no_more_than_fits() -> None:
    assert cell_pixels(Grid(1, 1, False, 10, 10)) == 32
    assert cell_pixels(Grid(12, 1, True, 16, 16)) == 3
    assert draw(np.zeros((13, 32, 32, 3), dtype=np.uint8), Grid(12, 1, True, 16, 16), []).width < 800


def test_colours_are_means_under_each_token() -> None:
    tiles = np.zeros((1, 4, 4, 3), dtype=np.uint8)
    tiles[0, :2, 2:] = [10, 20, 30]
    tiles[0, 0, 2] = [50, 20, 30]
    assert colours(tiles, Grid(1, 1, False, 2, 2)).tolist() == [[0, 0, 0], [20, 20, 30], [0, 0, 0], [0, 0, 0]]


def test_a_map_has_a_cell_for_each_token_where_there_is_room() -> None:
    numbers = np.arange(GRID.tokens, dtype=float)
    found, pool = cells(GRID, numbers, 100)
    assert (found.shape, pool) == ((14, 15, 1), 1)
    assert found[0, :4, 0].tolist() == [0, 1, 2, 3]
    assert np.isnan(found[:, 4]).all()
    assert found[0, 5, 0] == 16
    assert found[5, 0, 0] == 32
    assert found[3, 14, 0] == 111
    assert np.isnan(found[4]).all()
    assert np.isnan(found[4:, 11:]).all()
    assert np.sort(found[~np.isnan(found)]).tolist() == numbers.tolist()


def test_a_narrow_map_takes_squares_of_tokens_together() -> None:
    found, pool = cells(GRID, staying(GRID, [0, 1, 4, 5, 6]).astype(float), 9)
    assert (pool, found.shape) == (2, (8, 9, 1))
    assert found[:2, :2, 0].tolist() == [[1, 0.25], [0, 0]]
    assert cells(GRID, np.zeros(GRID.tokens), 1)[1] == 4  # as coarse as it gets: a cell a tile


def test_a_grid_of_any_size_is_drawn_and_pooled_without_mixing_what_lies_apart() -> None:
    grid = Grid(1, 1, False, across=5, down=3)
    tiles = np.zeros((1, 3 * 14, 5 * 14, 3), dtype=np.uint8)
    assert draw(tiles, grid, [0]).size == (5 * 32 + 2, 3 * 32 + 2)
    assert colours(tiles, grid).shape == (15, 3)
    values = np.arange(15.0)
    whole, pool = cells(grid, values, 5)
    assert pool == 1
    assert whole[:, :, 0].tolist() == values.reshape(3, 5).tolist()
    small, pool = cells(grid, values, 3)
    assert pool == 2
    assert small[:, :, 0].tolist() == [[3.0, 5.0, 6.5], [10.5, 12.5, 14.0]]
