"""Dynamic tiling as InternVL does it.

Source: ``dynamic_preprocess`` and ``find_closest_aspect_ratio`` of OpenGVLab/InternVL,
``internvl_chat/internvl/train/dataset.py`` at commit 2410d1d. Held to that code by the tests on every size of its
oracle.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image

#: Mean and standard deviation of ImageNet, which InternVL normalises by (RGB, after scaling to [0, 1]).
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: Those CLIP normalises by.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@cache
def candidates(max_tiles: int) -> tuple[tuple[int, int], ...]:
    """Grids ``(columns, rows)`` of at most ``max_tiles`` tiles, in the order the reference tries them.

    It sorts a set by area, so grids of equal area stay in CPython's set order, which depends on the order of
    insertion. That order decides ties and is therefore reproduced, not tidied.
    """
    grids = {
        (i, j) for n in range(1, max_tiles + 1) for i in range(1, n + 1) for j in range(1, n + 1) if i * j <= max_tiles
    }
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def choose_grid(width: int, height: int, max_tiles: int, size: int = 448) -> tuple[int, int]:
    """The grid ``(columns, rows)`` whose aspect ratio is closest to the image's.

    At an exactly equal distance a later grid wins only if the image has more than half the pixels the grid would give
    it; the last grid that passes wins. Two different ratios can be at one distance.
    """
    aspect = width / height
    best, best_distance = (1, 1), float("inf")
    for columns, rows in candidates(max_tiles):
        distance = abs(aspect - columns / rows)
        bigger = width * height > 0.5 * size * size * columns * rows
        if distance < best_distance or (distance == best_distance and bigger):
            best, best_distance = (columns, rows), distance
    return best


def cut_tiles(image: Image.Image, columns: int, rows: int, size: int = 448) -> list[Image.Image]:
    """Resize ``image`` to the whole grid (bicubic, ratio not kept) and cut it row by row; a thumbnail comes last."""
    rgb = image.convert("RGB")
    whole = rgb.resize((columns * size, rows * size), Image.Resampling.BICUBIC)
    tiles = [
        whole.crop((c * size, r * size, (c + 1) * size, (r + 1) * size)) for r in range(rows) for c in range(columns)
    ]
    if len(tiles) > 1:
        tiles.append(rgb.resize((size, size), Image.Resampling.BICUBIC))
    return tiles


def normalise(
    tiles: list[Image.Image], mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD
) -> npt.NDArray[np.float32]:
    """Tiles as ``(tiles, 3, height, width)`` float32, scaled to [0, 1], then by ``mean`` and ``std``."""
    stacked = np.stack([np.asarray(tile, dtype=np.float32) for tile in tiles]) / np.float32(255)
    scaled = (stacked - np.asarray(mean, dtype=np.float32)) / np.asarray(std, dtype=np.float32)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def denormalise(
    pixels: npt.NDArray[np.float32], mean: tuple[float, ...], std: tuple[float, ...]
) -> npt.NDArray[np.uint8]:
    """The tiles that :func:`normalise` was given, ``(tiles, height, width, 3)`` in [0, 255]."""
    scaled = pixels.transpose(0, 2, 3, 1) * np.asarray(std, dtype=np.float32) + np.asarray(mean, dtype=np.float32)
    return (scaled * 255).round().clip(0, 255).astype(np.uint8)


def centres(across: int, down: int) -> npt.NDArray[np.float32]:
    """Centres of a grid's cells row by row, ``(across * down, 2)`` as x, y in units of the grid's edges."""
    x, y = ((np.arange(n, dtype=np.float32) + 0.5) / n for n in (across, down))
    rows, columns = np.meshgrid(y, x, indexing="ij")
    return np.stack([columns.ravel(), rows.ravel()], axis=1)
