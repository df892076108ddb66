"""Images of any resolution as LLaVA-NeXT and LLaVA-OneVision take them: the whole image, then its tiles as one grid.

A tower sees the whole image once and each tile of the best of the configured resolutions. The tiles' tokens are laid
out as one grid, what only padding made is cut away, and a token that begins a new line ends every row. Source: the
processors and models of transformers, ``select_best_resolution`` and ``unpad_image``; held to them by the tests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from memprof.families import Family, Model
from memprof.families._tiling import centres, normalise
from memprof.prompts import Image, Input

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


def best_resolution(width: int, height: int, resolutions: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The resolution ``(height, width)`` that shows most of an image, and of those the one that wastes least."""
    best, most, least = (0, 0), 0, math.inf
    for down, across in resolutions:
        scale = min(across / width, down / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        wasted = across * down - shown
        if shown > most or (shown == most and wasted < least):
            best, most, least = (down, across), shown, wasted
    return best


def unpadded(width: int, height: int, across: int, down: int) -> tuple[int, int]:
    """What is left of a grid ``across`` x ``down`` once padding is cut away from an image's two sides."""
    if width / height > across / down:
        return across, down - (down - int(round(height * (across / width), 7))) // 2 * 2
    return across - (across - int(round(width * (down / height), 7))) // 2 * 2, down


class AnyRes(Family):
    """Base of the families that see an image whole and in tiles."""

    def side(self, model: Model) -> int:
        """Visual tokens along one edge of a tile."""
        return int(model.vision["image_size"]) // int(model.vision["patch_size"])

    def most_tokens(self, model: Model) -> float:
        """Tokens that the tiles of one image are shrunk to where they are many more; no limit unless one is said."""
        del model
        return math.inf

    def image(self, model: Model, width: int, height: int, max_tiles: int | None = None) -> Image:
        """The whole image, then the grid of its tiles with a token behind each row.

        ``max_tiles`` says nothing: the configured resolutions alone decide, in the model too.
        """
        del max_tiles
        side, size = self.side(model), int(model.vision["image_size"])
        down, across = (edge // size for edge in best_resolution(width, height, model.config["image_grid_pinpoints"]))
        columns, rows = unpadded(width, height, across * side, down * side)
        ratio = math.sqrt(columns * rows / self.most_tokens(model))
        if ratio > 1.1:
            columns, rows = int(columns // ratio), int(rows // ratio)
        grids = (side, side), (columns + 1, rows)
        return Image(grids, across, down, width=width, height=height, views=1 + across * down, kind=int(ratio > 1.1))

    def images_of(self, model: Model, ids: Sequence[int], inputs: Mapping[str, Any]) -> list[Image]:
        """One for each row of ``image_sizes``, as many as the prompt has tokens for."""
        left, found = list(ids).count(self.image_token(model)), list[Image]()
        for height, width in inputs["image_sizes"].tolist() if "image_sizes" in inputs else ():
            if left > 0:
                found.append(self.image(model, width, height))
                left -= found[-1].tokens
        return found

    def inputs(
        self, model: Model, images: Sequence[Image], pictures: Sequence[Picture] | None = None
    ) -> dict[str, Input]:
        """Views of each image, as many as the largest has, and the images' sizes, which are known whatever is asked."""
        if not images:
            return {}
        size, most = int(model.vision["image_size"]), max(image.views for image in images)
        sizes = np.array([(image.height, image.width) for image in images], dtype=np.int64)
        shape = len(images), most, 3, size, size
        pixels = Input(shape)
        if pictures:
            padded = np.zeros(shape, dtype=np.float32)
            for row, image, picture in zip(padded, images, pictures, strict=True):
                row[: image.views] = self.pixels(model, image, picture)
            pixels = Input.of(padded)
        return {"pixel_values": pixels, "image_sizes": Input.of(sizes, "int64")}

    def pixels(self, model: Model, image: Image, picture: Picture | None) -> npt.NDArray[np.float32] | tuple[int, ...]:
        """The whole image squeezed to a square, then the tiles of it scaled and padded with black (bicubic)."""
        size = int(model.vision["image_size"])
        if picture is None:
            return (image.views, 3, size, size)
        from PIL import Image as Pil

        rgb, (across, down) = picture.convert("RGB"), (image.columns * size, image.rows * size)
        scale_x, scale_y = across / rgb.width, down / rgb.height
        if scale_x < scale_y:
            width, height = across, min(math.ceil(rgb.height * scale_x), down)
        else:
            width, height = min(math.ceil(rgb.width * scale_y), across), down
        whole = Pil.new("RGB", (across, down))
        resized = rgb.resize((width, height), Pil.Resampling.BICUBIC)
        whole.paste(resized, ((across - width) // 2, (down - height) // 2))
        corners = [(x, y) for y in range(0, down, size) for x in range(0, across, size)]
        tiles = [whole.crop((x, y, x + size, y + size)) for x, y in corners]
        return normalise([rgb.resize((size, size), Pil.Resampling.BICUBIC), *tiles], *self.normalised_by)

    def lengths(self, images: Sequence[Image]) -> tuple[int, ...]:
        """Views in all, padded ones included; then, image by image, its views and the rows of its tiles."""
        most = max((image.views for image in images), default=0)
        each = (number for image in images for number in (image.views, image.tokens, image.grids[1][1]))
        return most * len(images), sum(image.views for image in images), *each

    def positions(self, image: Image) -> npt.NDArray[np.float32]:
        """As the base class has it; the tokens that end a row lie on the image's right edge, as memprof chose."""
        (side, _), (across, down) = image.grids
        tiles = np.ones((down, across, 2), dtype=np.float32)
        tiles[:, :-1] = centres(across - 1, down).reshape(down, across - 1, 2)
        tiles[:, -1, 1] = centres(1, down)[:, 1]
        return np.concatenate([centres(side, side), tiles.reshape(-1, 2)])

    def tiled(self, model: Model, tiles: int) -> Image:
        """The image that fills the first configured resolution of so many views, or of the nearest number."""
        size = int(model.vision["image_size"])
        resolutions = [(down, across) for down, across in model.config["image_grid_pinpoints"]]
        down, across = min(resolutions, key=lambda one: abs(one[0] * one[1] // size**2 + 1 - tiles))
        return self.image(model, across, down)

    def of_tiles(self, model: Model, tiles: int, images: int = 1) -> list[Image]:
        """Images of their own: each has rows that end in a token, and padding that is cut away."""
        return [self.tiled(model, tiles)] * images

    def most_tiles(self, model: Model) -> int:
        """Views of the largest configured resolution, and the whole."""
        size = int(model.vision["image_size"])
        return 1 + max(int(down * across) // size**2 for down, across in model.config["image_grid_pinpoints"])
