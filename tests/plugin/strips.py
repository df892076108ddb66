"""A family of somebody else's package: Qwen2-VL. An image is one grid of any size, and comes with a second input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from memprof.errors import UsageError
from memprof.families import Family, Model
from memprof.prompts import Image, Input


class Strips(Family):
    """Qwen2-VL (Qwen): 14-pixel patches, four to a visual token, rotary positions of time, height and width."""

    title = "Strips"
    model_types = ("qwen2_vl",)
    template = (4, 2, 5)

    def image(self, model: Model, width: int, height: int, max_tiles: int | None = None) -> Image:
        """One grid: the image's edges rounded to whole tokens."""
        del max_tiles
        edge = model.vision["patch_size"] * model.vision["spatial_merge_size"]
        across, down = (max(2, round(pixels / edge)) for pixels in (width, height))
        return Image(((across, down),), width=width, height=height)

    def inputs(self, model: Model, images: Sequence[Image], pictures: Any = None) -> dict[str, Input]:
        """Patches, one a row, and each image's grid in patches, which is known whatever is asked."""
        if pictures is not None:
            raise UsageError(f"{self.title} is predicted only: how a picture becomes patches is not written here")
        if not images:
            return {}
        merge, patch = model.vision["spatial_merge_size"], model.vision["patch_size"]
        grids = np.array([(1, down * merge, across * merge) for one in images for across, down in one.grids])
        rows = int(grids.prod(1).sum())
        return {
            "pixel_values": Input((rows, 6 * patch**2)),
            "image_grid_thw": Input.of(grids.astype(np.int64), "int64"),
        }

    def lengths(self, images: Sequence[Image]) -> tuple[int, ...]:
        """The tower runs over the patches of all images at once: four a token."""
        return (4 * sum(image.tokens for image in images),)

    def parts(self, model: Model, question: str, images: Any) -> list[Any]:
        """Images, then the question."""
        return [*(part for image in images for part in image), question]
