"""SmolVLM and Idefics3: an image cut into square views, and whole once more; pixel shuffle; a Llama language model.

Each view stands between tokens of its own that say its row and column. Source: the image processor and the processor
of transformers (``resize_for_vision_encoder``, ``split_images``, ``get_image_prompt_string``), which the tests ask.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from memprof.families import MARK, Family, Model, _pieces, runs_of
from memprof.families._chat import Special
from memprof.families._tiling import normalise
from memprof.prompts import Image, Input

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

    from memprof.families._chat import Part

#: Views along the longest edge of an image (``size`` of the published preprocessors is four of ``max_image_size``).
_ACROSS = 4
#: Edge of a view that a ``preprocessor_config.json`` means which does not say; transformers' own.
_UNSAID = 364
#: No image is made larger than this on its way (``MAX_IMAGE_SIZE``).
_LARGEST = 4096


class SmolVLM(Family):
    """SmolVLM, SmolVLM2 and Idefics3 (Hugging Face)."""

    title = "SmolVLM"
    model_types = ("smolvlm", "idefics3")
    thumbnails = True
    searched_images, searched_prompts = 8, 16
    normalised_by = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    # <|im_start|>, "User", ":" and the two tokens before the first view stand before the image; a token of its own,
    # <end_of_utterance>, newline, "Assistant", ":" behind it. Between two images stand one such and two such.
    template = (5, 3, 5)

    def of_processor(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The longest edge an image is resized to, the edge of a view, and whether an image is split.

        Raises:
            ValueError: Images are resized another way.
        """
        if not raw:
            return {}
        if raw.get("do_resize") is False:
            raise ValueError("its processor has do_resize=false, and memprof knows images that are resized alone")
        size, view = _edge(raw, "size", _ACROSS * _UNSAID), _edge(raw, "max_image_size", _UNSAID)
        split = bool(raw.get("do_image_splitting", True))
        return {"longest_edge": size, "view_edge": view, "do_image_splitting": split}

    def max_tiles(self, raw: Mapping[str, Any]) -> int:
        """Views of the largest image, the whole one not counted."""
        if not raw.get("do_image_splitting", True):
            return 1
        across = math.ceil(min(raw["longest_edge"], _LARGEST) / raw["view_edge"]) if "view_edge" in raw else _ACROSS
        return across**2

    def view(self, model: Model) -> int:
        """Pixels along one edge of a view: as its processor has it, else the tower's own."""
        return int(model.config.get("view_edge") or model.vision["image_size"])

    def longest(self, model: Model) -> int:
        """Pixels that the longest edge of an image is resized to."""
        return int(model.config.get("longest_edge") or _ACROSS * self.view(model))

    def side(self, model: Model) -> int:
        """Visual tokens along one edge of a view, after pixel shuffle."""
        return self.view(model) // int(model.vision["patch_size"]) // int(model.config["scale_factor"])

    def image(self, model: Model, width: int, height: int, max_tiles: int | None = None) -> Image:
        """The image, its longest edge so many views, cut into views; then all of it. One view: the image alone.

        ``max_tiles`` bounds the longest edge: as many views as its square root has.
        """
        view, longest = self.view(model), self.longest(model)
        if max_tiles is not None:
            longest = min(longest, math.isqrt(max_tiles) * view)
        columns, rows = (edge // view for edge in sizes(width, height, longest, view)[1])
        if not model.config.get("do_image_splitting", True):
            columns = rows = 1
        return dataclasses.replace(self._of(model, columns, rows), width=width, height=height)

    def tiled(self, model: Model, tiles: int) -> Image:
        """So many views, all but the whole in one row."""
        return self._of(model, max(1, tiles - 1), 1)

    def images_of(self, model: Model, ids: Sequence[int], inputs: Mapping[str, Any]) -> list[Image]:
        """All views as one image: what stands between two of an image, and of two images, looks alike."""
        del inputs
        token, views = self.image_token(model), len(runs_of(ids, self.image_token(model)))
        if not views:
            return []
        places = [number for number, one in enumerate(ids) if one == token]
        between = places[-1] - places[0] + 1 - len(places)
        whole = self.tiled(model, views)
        return [dataclasses.replace(whole, grids=whole.grids[:1] * views, marks=between)]

    def _of(self, model: Model, columns: int, rows: int) -> Image:
        """An image of so many views, and the whole one unless that is the only one.

        Two tokens stand before each view, and a newline behind each row; the last one is followed by another, and two
        newlines are one token of the published tokenizers. What stands before the first view and behind the last counts
        to the text.
        """
        views = columns * rows
        grids = ((self.side(model),) * 2,) * (views + (views > 1))
        return Image(grids, columns, rows, 2 * views + rows if views > 1 else 0)

    def pixels(self, model: Model, image: Image, picture: Picture | None) -> npt.NDArray[np.float32] | tuple[int, ...]:
        """Views row by row, then the whole image (Lanczos), scaled to -1 to 1."""
        size = self.view(model)
        if picture is None:
            return (image.tiles, 3, size, size)
        from PIL import Image as Pil

        split = model.config.get("do_image_splitting", True)
        most = max(image.columns, image.rows) * size if split else math.inf
        first, second = sizes(*picture.size, int(min(most, self.longest(model))), size)
        if not split:
            second = size, size
        whole = picture.convert("RGB").resize(first, Pil.Resampling.LANCZOS).resize(second, Pil.Resampling.LANCZOS)
        corners = [(x, y) for y in range(0, second[1], size) for x in range(0, second[0], size)]
        views = [whole.crop((x, y, x + size, y + size)) for x, y in corners]
        if len(views) > 1:
            views.append(whole.resize((size, size), Pil.Resampling.LANCZOS))
        return normalise(views, *self.normalised_by)

    def inputs(
        self, model: Model, images: Sequence[Image], pictures: Sequence[Picture] | None = None
    ) -> dict[str, Input]:
        """All views of a prompt's images together, and a mask of their pixels, all of which count.

        Their numbers are always known, drawn where there is no picture: the model leaves out views of nothing but
        zeros.
        """
        found = super().inputs(model, images, pictures)
        if not images:
            return found
        pixels, size = found["pixel_values"], self.view(model)
        views = 1, pixels.shape[0], size, size
        drawn = np.random.default_rng(0)
        values = drawn.standard_normal(pixels.shape, np.float32) if pixels.values is None else pixels.values
        return {
            "pixel_values": Input.of(values[None]),
            "pixel_attention_mask": Input.of(np.ones(views, dtype=np.int64), "int64"),
        }

    def ids(self, model: Model, image: Image) -> list[int]:
        """Each view's tokens, and what stands between them."""
        view = [self.image_token(model)] * _tokens(image)
        between, more = divmod(image.marks, max(1, image.tiles - 1))
        placed = [token for _ in image.grids[1:] for token in (*view, *[MARK] * between)]
        return placed + [MARK] * more + view

    def placeholders(self, model: Model, image: Image) -> Sequence[Part]:
        """Each view behind the tokens that say where it lies, rows ended by newlines, the whole image last."""
        around, tokens = Special("<fake_token_around_image>"), [Special(self.image_token(model), _tokens(image))]
        parts: list[Part] = []
        if image.tiles > 1:
            for row in range(image.rows):
                for column in range(image.columns):
                    parts += [around, Special(f"<row_{row + 1}_col_{column + 1}>"), *tokens]
                parts.append("\n")
            parts.append("\n")
        return [*parts, around, Special("<global-img>"), *tokens, around]

    def parts(self, model: Model, question: str, images: Sequence[Sequence[Part]]) -> list[Part]:
        """``User:``, the images, the question, in the model's chat.

        Source: the chat template of HuggingFaceTB/SmolVLM2-2.2B-Instruct; a space follows ``User:`` where text comes
        first.
        """
        asked = [part for image in images for part in image]
        said = "User:" if asked else "User: "
        return [Special("<|im_start|>"), said, *asked, question, Special("<end_of_utterance>"), "\nAssistant:"]

    def pieces(self, stored: str, config: Any) -> list[_pieces.Piece]:
        """Transformers' names."""
        return _pieces.plain(stored)


def _tokens(image: Image) -> int:
    """Visual tokens of one view."""
    return image.tokens // image.tiles


def _edge(raw: Mapping[str, Any], name: str, unsaid: int) -> int:
    """The ``longest_edge`` under ``name`` in a ``preprocessor_config.json``."""
    said = raw.get(name) or {"longest_edge": unsaid}
    edge = said.get("longest_edge") if isinstance(said, Mapping) else None
    if type(edge) is not int or edge < 1:
        raise ValueError(f"its processor's {name} is {said}, and memprof knows a longest_edge alone")
    return edge


def sizes(width: int, height: int, longest: int, view: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """What an image is resized to, one after the other: its longest edge ``longest``, then edges of whole views."""
    first = _below(*_longest(width, height, longest))
    return first, _whole(*first, view)


def _longest(width: int, height: int, longest: int) -> tuple[int, int]:
    """The longest edge as asked for; the other one even, and at least 1."""
    ratio = width / height
    if width >= height:
        width, height = longest, int(longest / ratio)
        height += height % 2
    else:
        width, height = int(longest * ratio), longest
        width += width % 2
    return max(width, 1), max(height, 1)


def _below(width: int, height: int) -> tuple[int, int]:
    ratio = width / height
    if width >= height and width > _LARGEST:
        width, height = _LARGEST, int(_LARGEST / ratio)
    elif height > width and height > _LARGEST:
        width, height = int(_LARGEST * ratio), _LARGEST
    return max(width, 1), max(height, 1)


def _whole(width: int, height: int, view: int) -> tuple[int, int]:
    ratio = width / height
    if width >= height:
        width = math.ceil(width / view) * view
        height = math.ceil(int(width / ratio) / view) * view
    else:
        height = math.ceil(height / view) * view
        width = math.ceil(int(height * ratio) / view) * view
    return width, height
