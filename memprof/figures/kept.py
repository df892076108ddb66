"""Which visual tokens of a picture stayed, drawn over it: a picture by Pillow, and the same as a small map of cells.

Both show the picture as the model was given it: tile by tile, and beside them the thumbnail where there is one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from memprof.asked import Grid
from memprof.telling.palette import INK

if TYPE_CHECKING:
    from PIL.Image import Image

#: What dropped tokens sink into, and how far: bright pictures into a dark veil, dark ones into a bright one.
_DARK, _BRIGHT, _VEIL = (30, 32, 38), (232, 232, 236), 0.82
#: Every tile's frame, one pixel wide.
_FRAME = (150, 150, 156, 255)
#: Pixels from tile to tile, before the thumbnail, and of the legend's type and margin.
_GAP, _ASIDE, _TYPE, _MARGIN = 1, 12, 13, 6
_SMALLEST, _LARGEST = 3, 32  # pixels along a token's edge


def draw(
    tiles: npt.NDArray[np.uint8], grid: Grid, kept: Iterable[int], legend: Sequence[str] = (), longest: int = 800
) -> Image:
    """The picture with kept tokens clear and dropped ones veiled: on white with a legend, else RGBA on nothing.

    Args:
        tiles: The picture as the model was given it, ``(tiles, height, width, 3)`` uint8.
        grid: How its tokens lie.
        kept: Numbers of the tokens that stayed.
        legend: Lines set below the picture.
        longest: About how many pixels it may measure.
    """
    from PIL import Image

    edge = cell_pixels(grid, longest)
    width, height, veil = edge * grid.across, edge * grid.down, np.array(veil_of(tiles), dtype=np.float32)
    stays = staying(grid, kept).reshape(grid.tiles, grid.down, grid.across)
    left, top = corners(grid, edge)
    canvas = np.zeros((max(top) + height + 1, max(left) + width + 1, 4), dtype=np.uint8)
    for tile, clear, x, y in zip(tiles, stays, left, top, strict=True):
        enlarged = Image.fromarray(tile).resize((width, height), Image.Resampling.BICUBIC)
        pixels = np.asarray(enlarged, dtype=np.float32)
        shown = np.kron(clear, np.ones((edge, edge), dtype=bool))[..., None]
        canvas[y - 1 : y + height + 1, x - 1 : x + width + 1] = _FRAME
        canvas[y : y + height, x : x + width, :3] = np.where(shown, pixels, pixels + _VEIL * (veil - pixels)).round()
    picture = Image.fromarray(canvas)
    return _with_legend(picture, legend) if legend else picture


def cell_pixels(grid: Grid, longest: int = 800) -> int:
    """Pixels along the edge of one token's cell in :func:`draw`."""
    across = max((grid.columns + grid.thumbnail) * grid.across, grid.rows * grid.down)
    return min(max(longest // across, _SMALLEST), _LARGEST)


def corners(grid: Grid, edge: int) -> tuple[list[int], list[int]]:
    """Left and top of each tile in a drawing whose cells measure ``edge`` pixels, inside the frames."""
    left, top = _placed(grid, edge * grid.across, edge * grid.down, _GAP, _ASIDE)
    return [x + 1 for x in left], [y + 1 for y in top]


def veil_of(tiles: npt.NDArray[np.uint8]) -> tuple[int, int, int]:
    """The colour that dropped tokens of a picture sink into."""
    return _DARK if tiles.mean() > 90 else _BRIGHT


def staying(grid: Grid, kept: Iterable[int]) -> npt.NDArray[np.bool_]:
    """Whether each token stayed, ``(tokens,)``."""
    stays = np.zeros(grid.tokens, dtype=bool)
    stays[list(kept)] = True
    return stays


def colours(tiles: npt.NDArray[np.uint8], grid: Grid) -> npt.NDArray[np.float64]:
    """Mean colour under each token, ``(tokens, 3)`` in [0, 255]."""
    high, wide = tiles.shape[1] // grid.down, tiles.shape[2] // grid.across
    cut = tiles[:, : grid.down * high, : grid.across * wide]
    cut = cut.reshape(len(tiles), grid.down, high, grid.across, wide, 3)
    means: npt.NDArray[np.float64] = cut.mean((2, 4)).reshape(-1, 3)
    return means


def cells(grid: Grid, values: npt.NDArray[np.float64], width: int) -> tuple[npt.NDArray[np.float64], int]:
    """A value for each token as a map no more than ``width`` cells wide: ``(rows, columns, ...)``, NaN between tiles.

    Where the tokens are too many, squares of them become one cell, their mean; also returned is how many tokens a cell
    has along its edge. No square lies across a tile's edge: at its right and lower one they may be cut off.
    """
    pool = next(p for p in range(1, grid.across + 1) if p >= grid.across or _cells_across(grid, p) <= width)
    across, down = -(-grid.across // pool), -(-grid.down // pool)
    whole = np.full((grid.tiles, down * pool, across * pool, values[:1].size), np.nan)
    whole[:, : grid.down, : grid.across] = values.reshape(grid.tiles, grid.down, grid.across, -1)
    deep = np.nanmean(whole.reshape(grid.tiles, down, pool, across, pool, -1), (2, 4))
    left, top = _placed(grid, across, down, 1, 2)
    out = np.full((max(top) + down, max(left) + across, deep.shape[-1]), np.nan)
    for tile, x, y in zip(deep, left, top, strict=True):
        out[y : y + down, x : x + across] = tile
    return out, pool


def _cells_across(grid: Grid, pool: int) -> int:
    across = -(-grid.across // pool)
    return max(_placed(grid, across, across, 1, 2)[0]) + across


def _placed(grid: Grid, width: int, height: int, gap: int, aside: int) -> tuple[list[int], list[int]]:
    """Left and top of every tile of such a size, ``gap`` apart; the thumbnail stands ``aside`` to the right."""
    left = [column * (width + gap) for _ in range(grid.rows) for column in range(grid.columns)]
    top = [row * (height + gap) for row in range(grid.rows) for _ in range(grid.columns)]
    if grid.thumbnail:
        left.append(grid.columns * (width + gap) - gap + aside)
        top.append(0)
    return left, top


def _with_legend(picture: Image, legend: Sequence[str]) -> Image:
    """``picture`` on white with lines of text below it, broken where they are wider than it."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(_TYPE)
    lines = []
    for text in legend:
        line = ""
        for word in text.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > picture.width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    pitch = round(1.35 * _TYPE)
    whole = Image.new("RGB", (picture.width, picture.height + _MARGIN + pitch * len(lines)), "white")
    whole.paste(picture, mask=picture.getchannel("A"))
    pen = ImageDraw.Draw(whole)
    for number, line in enumerate(lines):
        pen.text((0, picture.height + _MARGIN + number * pitch), line, fill=INK, font=font)
    return whole
