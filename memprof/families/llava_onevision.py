"""LLaVA-OneVision: SigLIP over the whole image and its tiles (anyres_max_9), an MLP projector, and Qwen2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from memprof.families import Model, _pieces
from memprof.families._anyres import AnyRes
from memprof.families._chat import Chat

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from memprof.families._chat import Part


class LlavaOnevision(AnyRes):
    """LLaVA-OneVision (llava-hf).

    Several images of a prompt are each shown in tiles, as the model takes them where ``batch_num_images`` is not given.
    Its processor gives that where it is handed a list of images for each prompt, and then shows each image whole; your
    own such inputs are predicted as they are (``memprof.predict(..., inputs=...)``).
    """

    title = "LLaVA-OneVision"
    model_types = ("llava_onevision",)
    normalised_by = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    # <|im_start|>, "user", a space or newline stand before the image; a newline, <|im_end|>, newline, <|im_start|>,
    # "assistant", newline behind it. Between two images stands nothing but a space or newline.
    template = (3, 1, 6)

    def read(self, raw: Mapping[str, Any], special: Mapping[str, int]) -> PreTrainedConfig:
        """As transformers has it.

        Raises:
            ValueError: Its ``vision_aspect_ratio`` names no largest number of tiles, without which transformers fails.
        """
        config = super().read(raw, special)
        said = str(config.vision_aspect_ratio)
        if not said.removeprefix("anyres_max_").isdecimal():
            raise ValueError(f"vision_aspect_ratio is {said!r}, and transformers runs anyres_max_9 and the like alone")
        return config

    def most_tokens(self, model: Model) -> float:
        """``anyres_max_9``: the tokens of nine tiles."""
        return int(str(model.config["vision_aspect_ratio"]).removeprefix("anyres_max_")) * self.side(model) ** 2

    def parts(self, model: Model, question: str, images: Sequence[Sequence[Part]]) -> list[Part]:
        """``user``, the images, a newline and the question, in Qwen2's chat.

        Source: the chat template of llava-hf/llava-onevision-qwen2-0.5b-ov-hf, which has no system turn.
        """
        asked = [part for image in images for part in (*image, "\n")]
        return Chat(None, between="\n").parts([((*asked, question), None)])

    def pieces(self, stored: str, config: Any) -> list[_pieces.Piece]:
        """Transformers' names, old and new; the tower's are one level flatter."""
        return _pieces.plain(_pieces.renamed(stored, _pieces.WITH_LINES))
