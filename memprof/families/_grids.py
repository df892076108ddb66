"""What the Qwen-VL families share: an image is one grid of any size, its patches are rows, and a few tokens are one."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor, sqrt
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from memprof.errors import BadValue
from memprof.families import Family, Model, _pieces
from memprof.families._chat import Chat, Special
from memprof.families._tiling import denormalise, normalise
from memprof.prompts import Image, Input

if TYPE_CHECKING:
    from collections.abc import Mapping

    from PIL.Image import Image as Picture

    from memprof.families._chat import Part

#: What a question about sizes alone takes an image to be: memprof chose a photograph's shape.
_USUAL = (1024, 768)
#: No edge of an image may be so many times the other: what the image processors refuse.
_NARROWEST = 200
#: Transformers' names before version 5, and what Qwen published.
_NAMES: _pieces.Names = (
    (r"^visual\.", "model.visual."),
    (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),
)


def whole_tokens(width: int, height: int, edge: int, least: int, most: int) -> tuple[int, int]:
    """Visual tokens across and down an image of ``width`` x ``height`` pixels.

    Both edges are rounded to whole tokens of ``edge`` pixels; then the image is made smaller, or larger, until it has
    from ``least`` to ``most`` pixels. Source: ``smart_resize`` in transformers' Qwen2-VL image processor.

    Raises:
        BadValue: One edge is more than 200 times the other.
    """
    if max(width, height) > _NARROWEST * min(width, height):
        raise BadValue(
            f"an image of {width} x {height} pixels is too narrow: the model takes edges up to {_NARROWEST}:1; crop it"
        )
    across, down = (round(pixels / edge) for pixels in (width, height))
    if across * down * edge**2 > most:
        scale = sqrt(width * height / most)
        across, down = (max(1, floor(pixels / scale / edge)) for pixels in (width, height))
    elif across * down * edge**2 < least:
        scale = sqrt(least / (width * height))
        across, down = (ceil(pixels * scale / edge) for pixels in (width, height))
    return across, down


class Grids(Family):
    """Base of the families whose images are grids of any size.

    Class attributes:
        chat: Their chat template.
        pixels_taken: Least and most pixels of an image, unless the checkpoint's ``preprocessor_config.json`` says.
    """

    searched_images = 32
    chat: ClassVar[Chat]
    pixels_taken: ClassVar[tuple[int, int]]

    def of_processor(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Least and most pixels of an image, under either of the names they have in ``preprocessor_config.json``."""
        size = raw.get("size") or {}
        least = raw.get("min_pixels", size.get("shortest_edge"))
        most = raw.get("max_pixels", size.get("longest_edge"))
        return {key: int(n) for key, n in (("min_pixels", least), ("max_pixels", most)) if n is not None}

    def image(self, model: Model, width: int, height: int, max_tiles: int | None = None) -> Image:
        """One grid, larger for a larger image; ``max_tiles`` says nothing here."""
        del max_tiles
        least, most = (model.config.get(key, n) for key, n in zip(_TAKEN, self.pixels_taken, strict=True))
        grid = whole_tokens(width, height, self._edge(model), least, most)
        return Image((grid,), width=width, height=height, views=1, kind=self.kind(*grid))

    def of_tiles(self, model: Model, tiles: int, images: int = 1) -> list[Image]:
        """Images so many times as high as one of :data:`_USUAL` pixels: there are no tiles.

        The tower attends within each image, in steps of its own.
        """
        across, down = self.image(model, *_USUAL).grids[0]
        return [Image(((across, down * tiles),), views=1, kind=self.kind(across, down * tiles))] * images

    def kind(self, across: int, down: int) -> int:
        """What tells a grid from those that the tower goes through in other steps: nothing, where it looks at all."""
        del across, down
        return 0

    def images_of(self, model: Model, ids: Sequence[int], inputs: Mapping[str, Any]) -> list[Image]:
        """One for each row of ``image_grid_thw``, as many as the prompt has tokens for."""
        left, merge = list(ids).count(self.image_token(model)), int(model.vision["spatial_merge_size"])
        found = list[Image]()
        for _, down, across in inputs["image_grid_thw"].tolist() if "image_grid_thw" in inputs else ():
            grid = across // merge, down // merge
            if left > 0:
                found.append(Image((grid,), views=1, kind=self.kind(*grid)))
                left -= found[-1].tokens
        return found

    def lengths(self, images: Sequence[Image]) -> tuple[int, ...]:
        """The tower runs over the patches of all images at once; positions are made row by row and column by column."""
        edges = (n for image in images for grid in image.grids for n in grid)
        return sum(image.tokens for image in images), *edges

    def inputs(
        self, model: Model, images: Sequence[Image], pictures: Sequence[Picture] | None = None
    ) -> dict[str, Input]:
        """The patches of all images, one a row, and each image's grid, in patches: a table that is always known."""
        if not images:
            return {}
        merge = int(model.vision["spatial_merge_size"])
        grids = np.asarray([(1, merge * down, merge * across) for one in images for across, down in one.grids])
        rows = Input((int(grids.prod(1).sum()), self._numbers(model)))
        if pictures is not None:
            pairs = zip(images, pictures, strict=True)
            rows = Input.of(np.concatenate([self._patches(model, one, picture) for one, picture in pairs]))
        return {"pixel_values": rows, "image_grid_thw": Input.of(grids.astype(np.int64), "int64")}

    def of_ids(self, model: Model, ids: Sequence[int]) -> dict[str, Input]:
        """Which tokens are visual, ``(1, length)``: the model makes its positions of it."""
        visual = np.asarray([ids]) == self.image_token(model)
        return {"mm_token_type_ids": Input.of(visual.astype(np.int32), "int32")}

    def placeholders(self, model: Model, image: Image) -> Sequence[Part]:
        """Between two tokens of their own."""
        return [Special("<|vision_start|>"), Special(self.image_token(model), image.tokens), Special("<|vision_end|>")]

    def parts(self, model: Model, question: str, images: Sequence[Sequence[Part]]) -> list[Part]:
        """The images, then the question, in the model's chat template."""
        return self.chat.parts([((*(part for image in images for part in image), question), None)])

    def pieces(self, stored: str, config: Any) -> list[_pieces.Piece]:
        """Transformers' names, and those of the published files."""
        return _pieces.plain(_pieces.renamed(stored, _NAMES))

    def seen(self, model: Model, image: Image, pixels: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        """Its patches put side by side again, the first frame of each: ``(1, height, width, 3)``."""
        (across, down), edge = image.grids[0], self._edge(model)
        patch, merge = int(model.vision["patch_size"]), int(model.vision["spatial_merge_size"])
        rows = pixels[: across * down * merge**2].reshape(down, across, merge, merge, 3, -1, patch, patch)
        whole = rows[:, :, :, :, :, 0].transpose(4, 0, 2, 5, 1, 3, 6).reshape(1, 3, down * edge, across * edge)
        return denormalise(whole, *self.normalised_by)

    # -- patches -------------------------------------------------------------------------------------------------------

    def _edge(self, model: Model) -> int:
        """Pixels along one edge of a visual token."""
        return int(model.vision["patch_size"]) * int(model.vision["spatial_merge_size"])

    def _numbers(self, model: Model) -> int:
        """Numbers in a patch: 3 colours, as many times as a film of frames has in one."""
        frames = int(model.vision.get("temporal_patch_size", 2))
        return 3 * frames * int(model.vision["patch_size"]) ** 2

    def _patches(self, model: Model, image: Image, picture: Picture) -> npt.NDArray[np.float32]:
        """Bicubic to whole tokens, normalised, cut into patches that go into a token side by side.

        Source: ``patchify`` in transformers' Qwen2-VL image processor.
        """
        from PIL.Image import Resampling

        (across, down), edge = image.grids[0], self._edge(model)
        patch, merge = int(model.vision["patch_size"]), int(model.vision["spatial_merge_size"])
        frames = int(model.vision.get("temporal_patch_size", 2))
        resized = picture.convert("RGB").resize((across * edge, down * edge), Resampling.BICUBIC)
        pixels = normalise([resized], *self.normalised_by)[0]
        cut = pixels.reshape(3, down, merge, patch, across, merge, patch).transpose(1, 4, 2, 5, 0, 3, 6)
        film = np.repeat(cut[:, :, :, :, :, None], frames, axis=5)
        return np.ascontiguousarray(film.reshape(down * across * merge**2, -1), dtype=np.float32)


#: What they are called in a configuration here.
_TAKEN = ("min_pixels", "max_pixels")
