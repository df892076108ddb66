"""LLaVA-1.5: CLIP ViT-L/14-336 (layer -2, CLS dropped), an MLP projector, and Vicuna. One square image, 576 tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from memprof.families import Family, Model, _pieces
from memprof.families._tiling import CLIP_MEAN, CLIP_STD, normalise
from memprof.prompts import Image

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

    from memprof.families._chat import Part


class Llava(Family):
    """LLaVA-1.5 (llava-hf)."""

    title = "LLaVA-1.5"
    model_types = ("llava",)
    normalised_by = (CLIP_MEAN, CLIP_STD)
    # "USER: " with its BOS is 5 tokens of Llama's tokenizer; a newline (2) and " ASSISTANT:" (5) follow the image.
    template = (5, 2, 7)

    def side(self, model: Model) -> int:
        """Visual tokens along one edge: 24 patches."""
        return int(model.vision["image_size"]) // int(model.vision["patch_size"])

    def image(self, model: Model, width: int, height: int, max_tiles: int | None = None) -> Image:
        """One square view whatever the image's size; ``max_tiles`` says nothing here."""
        del max_tiles
        return Image(((self.side(model),) * 2,), width=width, height=height)

    def pixels(self, model: Model, image: Image, picture: Picture | None) -> npt.NDArray[np.float32] | tuple[int, ...]:
        """Short edge to 336 pixels (bicubic), centre crop, normalised by CLIP's mean and deviation."""
        size = int(model.vision["image_size"])
        if picture is None:
            return (image.tiles, 3, size, size)
        from PIL import Image as Pil

        rgb = picture.convert("RGB")
        scale = size / min(rgb.size)
        width, height = (max(size, int(edge * scale)) for edge in rgb.size)
        left, top = (width - size) // 2, (height - size) // 2
        resized = rgb.resize((width, height), Pil.Resampling.BICUBIC)
        return normalise([resized.crop((left, top, left + size, top + size))], *self.normalised_by)

    def parts(self, model: Model, question: str, images: Sequence[Sequence[Part]]) -> list[Part]:
        """``USER: <image>``, a newline, the question, `` ASSISTANT:``.

        Source: the chat template of llava-hf/llava-1.5-7b-hf.
        """
        return ["USER: ", *(part for image in images for part in (*image, "\n")), question, " ASSISTANT:"]

    def pieces(self, stored: str, config: Any) -> list[_pieces.Piece]:
        """Transformers' names, old and new; the tower's are one level flatter."""
        return _pieces.plain(_pieces.renamed(stored, (*_pieces.HF, _pieces.FLAT)))
