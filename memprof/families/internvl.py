"""InternVL 2, 2.5 and 3: InternViT, pixel shuffle to 256 tokens a tile, and a Llama or Qwen2 language model.

InternLM2 is Llama with a fused ``wqkv``, so InternVL2-2B runs as ``InternVLForConditionalGeneration`` over Llama.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from memprof.families import Card, Family, PromptShape
from memprof.families._text import CHATS, Special, encode_parts
from memprof.families._tiling import choose_grid, cut_tiles, normalise

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedConfig

    from memprof.families._text import Part, Tokenizer

#: InternViT-300M-448px: 24 layers, qkv bias, no qk-norm, LayerNorm. With CLS and 32 x 32 patches it runs 1,025
#: positions.
_VIT_300M = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
    "attention_bias": True, "use_qk_norm": False, "norm_type": "layer_norm", "layer_norm_eps": 1e-6,
    "image_size": [448, 448], "patch_size": [14, 14], "use_mean_pooling": True,
}  # fmt: skip
#: InternViT-6B-448px: 45 layers, qk-norm, RMSNorm.
_VIT_6B = {
    "hidden_size": 3200, "num_hidden_layers": 45, "num_attention_heads": 25, "intermediate_size": 12800,
    "attention_bias": False, "use_qk_norm": True, "norm_type": "rms_norm", "layer_norm_eps": 1e-6,
    "image_size": [448, 448], "patch_size": [14, 14], "use_mean_pooling": True,
}  # fmt: skip
_THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "max_position_embeddings": 32768}


def _sizes(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads,
    }  # fmt: skip


def _internlm2(*sizes: int) -> dict[str, Any]:
    special = {"bos_token_id": 1, "eos_token_id": 92542, "pad_token_id": 2}
    return {"model_type": "llama", "vocab_size": 92553, "rms_norm_eps": 1e-5, **special, **_THETA, **_sizes(*sizes)}


def _qwen2(*sizes: int) -> dict[str, Any]:
    special = {"bos_token_id": 151643, "eos_token_id": 151645, "pad_token_id": 151643}
    return {"model_type": "qwen2", "vocab_size": 151674, "rms_norm_eps": 1e-6, **special, **_THETA, **_sizes(*sizes)}


#: InternLM2 1.8B, 7B and 20B: hidden, FFN, layers, heads, KV heads.
_2B, _8B, _20B = (2048, 8192, 24, 16, 8), (4096, 14336, 32, 32, 8), (6144, 16384, 48, 48, 8)
_LLAMA3_70B = {
    "model_type": "llama", "vocab_size": 128265, "rms_norm_eps": 1e-5, "bos_token_id": 128000, "eos_token_id": 128003,
    "pad_token_id": 128003, **_THETA, **_sizes(8192, 28672, 80, 64, 8),
}  # fmt: skip
#: Id of ``<IMG_CONTEXT>`` in each tokenizer.
_INTERNLM2_IMAGE, _QWEN2_IMAGE = 92546, 151667
#: Chat template of each generation (:data:`memprof.families._text.CHATS`); InternVL3's cards name ``-hf`` checkpoints.
_CHAT = {"InternVL2": "internlm2-chat", "InternVL2.5": "internvl2_5", "InternVL3": "hf"}
_READ = "configuration file of the checkpoint"
_RECALLED = "published sizes, not read off a file here; they give the published number of parameters"


def _card(
    title: str,
    text: dict[str, Any],
    hub: str,
    image_token: int,
    *,
    vision: dict[str, Any] = _VIT_300M,
    source: str = _RECALLED,
) -> tuple[str, Card]:
    # InternLM2's template was counted with its tokenizer: 41 tokens up to <img>, then </img>, newline and the 5 that
    # open the answer. The other templates are taken to be as long: their tokenizers are not at hand, and a few text
    # tokens are a thousandth of a prompt.
    card = Card(
        name=title.lower(), title=title, hub=hub, dtype="bfloat16", source=source, text=text, vision=vision,
        extra={"image_token_id": image_token, "downsample_ratio": 0.5, "chat": _CHAT[title.partition("-")[0]]},
        template=(41, 7), max_tiles=12,
    )  # fmt: skip
    return card.name, card


class InternVL(Family):
    """InternVL 2, 2.5 and 3 (OpenGVLab)."""

    title = "InternVL"
    thumbnails = True
    cards = dict(
        [
            _card("InternVL2-2B", _internlm2(*_2B), "OpenGVLab/InternVL2-2B", _INTERNLM2_IMAGE, source=_READ),
            _card("InternVL2-8B", _internlm2(*_8B), "OpenGVLab/InternVL2-8B", _INTERNLM2_IMAGE),
            _card("InternVL2-26B", _internlm2(*_20B), "OpenGVLab/InternVL2-26B", _INTERNLM2_IMAGE, vision=_VIT_6B),
            _card("InternVL2-76B", _LLAMA3_70B, "OpenGVLab/InternVL2-Llama3-76B", 128258, vision=_VIT_6B),
            _card("InternVL2.5-1B", _qwen2(896, 4864, 24, 14, 2), "OpenGVLab/InternVL2_5-1B", _QWEN2_IMAGE),
            _card("InternVL2.5-2B", _internlm2(*_2B), "OpenGVLab/InternVL2_5-2B", _INTERNLM2_IMAGE),
            _card("InternVL2.5-4B", _qwen2(2048, 11008, 36, 16, 2), "OpenGVLab/InternVL2_5-4B", _QWEN2_IMAGE),
            _card("InternVL2.5-8B", _internlm2(*_8B), "OpenGVLab/InternVL2_5-8B", _INTERNLM2_IMAGE),
            _card("InternVL3-1B", _qwen2(896, 4864, 24, 14, 2), "OpenGVLab/InternVL3-1B-hf", _QWEN2_IMAGE),
            _card("InternVL3-2B", _qwen2(1536, 8960, 28, 12, 2), "OpenGVLab/InternVL3-2B-hf", _QWEN2_IMAGE),
            _card("InternVL3-8B", _qwen2(3584, 18944, 28, 28, 4), "OpenGVLab/InternVL3-8B-hf", _QWEN2_IMAGE),
        ]
    )

    def config(self, card: Card) -> PreTrainedConfig:
        """The ``InternVLConfig`` of ``card``."""
        from transformers import AutoConfig, InternVLConfig
        from transformers.models.internvl.configuration_internvl import InternVLVisionConfig

        text = {"tie_word_embeddings": False, **card.text}
        return InternVLConfig(
            vision_config=InternVLVisionConfig(**card.vision),
            text_config=AutoConfig.for_model(text.pop("model_type"), **text),
            tie_word_embeddings=text["tie_word_embeddings"],
            **card.extra,
        )

    def side(self, card: Card) -> int:
        """Visual tokens along one edge of a tile: 16 after pixel shuffle of 32 patches."""
        patches = int(card.vision["image_size"][0]) // int(card.vision["patch_size"][0])
        return int(patches * card.extra["downsample_ratio"])

    def shape(self, card: Card, width: int, height: int, question_tokens: int, max_tiles: int | None) -> PromptShape:
        """Sizes after dynamic tiling, thumbnail included."""
        columns, rows = choose_grid(width, height, max_tiles or card.max_tiles, int(card.vision["image_size"][0]))
        tiles = columns * rows + (columns * rows > 1)
        before, after = card.template
        return PromptShape(tiles, columns, rows, tiles * self.side(card) ** 2, before, after + question_tokens)

    def pixels(
        self, card: Card, shape: PromptShape, image: Image.Image | None
    ) -> npt.NDArray[np.float32] | tuple[int, ...]:
        """Tiles in row-major order, thumbnail last, normalised by ImageNet's mean and deviation."""
        size = int(card.vision["image_size"][0])
        if image is None:
            return (shape.tiles, 3, size, size)
        return normalise(cut_tiles(image, shape.columns, shape.rows, size))

    def image_token(self, card: Card) -> int:
        """Id of ``<IMG_CONTEXT>``."""
        return int(card.extra["image_token_id"])

    def prompt(self, card: Card, question: str, shape: PromptShape, tokenizer: Tokenizer) -> list[int]:
        """The image (if ``shape`` has visual tokens), a newline, the question, in the model's chat template."""
        image = (*self.image(card, shape.visual_tokens), "\n") if shape.visual_tokens else ()
        return self.conversation(card, [((*image, question), None)], tokenizer)

    def image(self, card: Card, visual_tokens: int) -> tuple[Part, ...]:
        """How an image of ``visual_tokens`` stands in a prompt."""
        return Special("<img>"), Special(self.image_token(card), visual_tokens), Special("</img>")

    def conversation(
        self, card: Card, turns: Sequence[tuple[Sequence[Part], str | None]], tokenizer: Tokenizer
    ) -> list[int]:
        """Token ids of a whole conversation.

        Args:
            card: The model.
            turns: What the user sent, as text and :meth:`image` parts in any order and number, and what the model
                answered; None where it is to answer now.
            tokenizer: The checkpoint's.
        """
        return encode_parts(CHATS[card.extra["chat"]].parts(turns), tokenizer)
