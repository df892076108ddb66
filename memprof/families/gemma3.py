"""Gemma 3: SigLIP over one square view, 4 x 4 patches pooled to a token, and a language model with sliding windows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from memprof.families import Family, Model
from memprof.families._chat import Special
from memprof.families._tiling import normalise
from memprof.prompts import Image, Input

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

    from memprof.families._chat import Part


class Gemma3(Family):
    """Gemma 3 (Google), as its processor has it by default: no pan and scan."""

    title = "Gemma-3"
    model_types = ("gemma3",)
    searched_images = 16  # of many, the mask alone takes gigabytes of the host
    normalised_by = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    # <bos>, <start_of_turn>, "user", newlines (one token) and <start_of_image> stand before the image; <end_of_image>
    # and newlines behind it, then <end_of_turn>, newline, <start_of_turn>, "model", newline. Between two images stand
    # <end_of_image>, newlines, <start_of_image>.
    template = (5, 3, 7)

    def of_processor(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Nothing: an image is one square view.

        Raises:
            ValueError: Its processor pans and scans.
        """
        if raw.get("do_pan_and_scan"):
            raise ValueError("its processor has do_pan_and_scan=true, and memprof knows one view an image: turn it off")
        return {}

    def side(self, model: Model) -> int:
        """Visual tokens along one edge: 16."""
        return math.isqrt(int(model.config["mm_tokens_per_image"]))

    def image(self, model: Model, width: int, height: int, max_tiles: int | None = None) -> Image:
        """One square view whatever the image's size; ``max_tiles`` says nothing here."""
        del max_tiles
        return Image(((self.side(model),) * 2,), width=width, height=height)

    def pixels(self, model: Model, image: Image, picture: Picture | None) -> npt.NDArray[np.float32] | tuple[int, ...]:
        """The image squeezed to 896 x 896 pixels (bilinear), scaled to -1 to 1."""
        size = int(model.vision["image_size"])
        if picture is None:
            return (image.tiles, 3, size, size)
        from PIL import Image as Pil

        return normalise([picture.convert("RGB").resize((size, size), Pil.Resampling.BILINEAR)], *self.normalised_by)

    def of_ids(self, model: Model, ids: Sequence[int]) -> dict[str, Input]:
        """Which tokens are an image's: they look at each other both ways."""
        return {"token_type_ids": Input.of((np.asarray([ids]) == self.image_token(model)).astype(np.int64), "int64")}

    def placeholders(self, model: Model, image: Image) -> Sequence[Part]:
        """The visual tokens between ``<start_of_image>`` and ``<end_of_image>``, set apart by newlines."""
        tokens = Special(self.image_token(model), image.tokens)
        return "\n\n", Special("<start_of_image>"), tokens, Special("<end_of_image>"), "\n\n"

    def parts(self, model: Model, question: str, images: Sequence[Sequence[Part]]) -> list[Part]:
        """``user``, the images, the question, ``model``.

        Source: the chat template of google/gemma-3-4b-it.
        """
        asked = [part for image in images for part in image]
        start, end = Special("<start_of_turn>"), Special("<end_of_turn>")
        return [start, "user\n", *asked, question, end, "\n", start, "model\n"]
