"""LLaVA-1.5: CLIP ViT-L/14-336 (layer -2, CLS dropped), an MLP projector, and Vicuna. One square image, 576 tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from memprof.families import Card, Family, PromptShape
from memprof.families._text import Part, Special, encode_parts
from memprof.families._tiling import normalise

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedConfig

    from memprof.families._text import Tokenizer

#: Mean and standard deviation CLIP normalises by.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_CLIP_L_336 = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
    "image_size": 336, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip


def _card(title: str, hidden: int, ffn: int, layers: int, heads: int, hub: str) -> Card:
    return Card(
        name=title.lower(), title=title, hub=hub, dtype="float16", source="configuration file of the checkpoint",
        text={
            "vocab_size": 32064, "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": heads, "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32001,
        },
        vision=_CLIP_L_336,
        extra={"image_token_index": 32000, "vision_feature_layer": -2, "vision_feature_select_strategy": "default"},
        # "USER: " with its BOS is 5 tokens of Llama's tokenizer; a newline (2) and " ASSISTANT:" (5) follow the image.
        template=(5, 7),
    )  # fmt: skip


class Llava(Family):
    """LLaVA-1.5 (llava-hf)."""

    title = "LLaVA-1.5"
    normalised_by = (CLIP_MEAN, CLIP_STD)
    cards = {
        card.name: card
        for card in (
            _card("LLaVA-1.5-7B", 4096, 11008, 32, 32, "llava-hf/llava-1.5-7b-hf"),
            _card("LLaVA-1.5-13B", 5120, 13824, 40, 40, "llava-hf/llava-1.5-13b-hf"),
        )
    }

    def config(self, card: Card) -> PreTrainedConfig:
        """The ``LlavaConfig`` of ``card``."""
        from transformers import AutoConfig, CLIPVisionConfig, LlavaConfig

        text = {"model_type": "llama", "tie_word_embeddings": False, **card.text}
        return LlavaConfig(
            vision_config=CLIPVisionConfig(**card.vision),
            text_config=AutoConfig.for_model(text.pop("model_type"), **text),
            tie_word_embeddings=text["tie_word_embeddings"],
            **card.extra,
        )

    def side(self, card: Card) -> int:
        """Visual tokens along one edge: 24 patches."""
        return int(card.vision["image_size"]) // int(card.vision["patch_size"])

    def shape(self, card: Card, width: int, height: int, question_tokens: int, max_tiles: int | None) -> PromptShape:
        """One square image whatever its size; ``max_tiles`` says nothing here."""
        del width, height, max_tiles
        before, after = card.template
        return PromptShape(1, 1, 1, self.side(card) ** 2, before, after + question_tokens)

    def pixels(
        self, card: Card, shape: PromptShape, image: Image.Image | None
    ) -> npt.NDArray[np.float32] | tuple[int, ...]:
        """Short edge to 336 pixels (bicubic), centre crop, normalised by CLIP's mean and deviation."""
        size = int(card.vision["image_size"])
        if image is None:
            return (shape.tiles, 3, size, size)
        from PIL import Image as Pil

        rgb = image.convert("RGB")
        scale = size / min(rgb.size)
        width, height = (max(size, int(edge * scale)) for edge in rgb.size)
        left, top = (width - size) // 2, (height - size) // 2
        resized = rgb.resize((width, height), Pil.Resampling.BICUBIC)
        return normalise([resized.crop((left, top, left + size, top + size))], *self.normalised_by)

    def image_token(self, card: Card) -> int:
        """Id of ``<image>``."""
        return int(card.extra["image_token_index"])

    def prompt(self, card: Card, question: str, shape: PromptShape, tokenizer: Tokenizer) -> list[int]:
        """``USER: <image>``, a newline, the question, `` ASSISTANT:``; without the image where ``shape`` has none.

        Source: the chat template of llava-hf/llava-1.5-7b-hf.
        """
        image: list[Part] = [Special(self.image_token(card), shape.visual_tokens), "\n"] if shape.visual_tokens else []
        return encode_parts(["USER: ", *image, question, " ASSISTANT:"], tokenizer)
