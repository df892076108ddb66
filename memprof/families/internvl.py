"""InternVL 2, 2.5 and 3: InternViT, pixel shuffle to 256 tokens a tile, and a Llama or Qwen2 language model.

InternLM2 is Llama with a fused ``wqkv``, so InternVL2-2B runs as ``InternVLForConditionalGeneration`` over Llama.
Checkpoints come in two layouts. The original one (OpenGVLab, ``internvl_chat``) has a fused ``qkv`` in the vision tower
and, over InternLM2, a fused ``wqkv`` in the language model; the ``-hf`` one is transformers' own. The tests hold the
conversion to the numbers of OpenGVLab/InternVL at commit 2410d1d; that code itself is never run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from memprof.families import Family, Model, _pieces
from memprof.families._chat import Chat, Special, encode_parts
from memprof.families._tiling import choose_grid, cut_tiles, normalise
from memprof.prompts import Image

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image as Picture
    from transformers import PreTrainedConfig

    from memprof.families._chat import Part, Tokenizer

#: Chats by the names that conversation.py of OpenGVLab/InternVL (commit 2410d1d) gives them. ``hf`` is the template
#: of the ``-hf`` checkpoints, which has no system message unless the user writes one.
CHATS: Mapping[str, Chat] = {
    "internlm2-chat": Chat(
        "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。",
        between="",
    ),
    "internvl2_5": Chat(
        "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。",
        between="\n",
    ),
    "hf": Chat(None, between="\n"),
}


class InternVL(Family):
    """InternVL 2, 2.5 and 3 (OpenGVLab)."""

    title = "InternVL"
    model_types: ClassVar[tuple[str, ...]] = ("internvl", "internvl_chat")
    thumbnails = True
    # InternLM2's template was counted with its tokenizer: 41 tokens up to <img>, then </img>, newline and the 5 that
    # open the answer. The other templates are taken to be as long: their tokenizers are not at hand, and a few text
    # tokens are a thousandth of a prompt. Between two images stand </img>, newline, <img>.
    template = (41, 3, 7)

    def read(self, raw: Mapping[str, Any], special: Mapping[str, int]) -> PreTrainedConfig:
        """The ``InternVLConfig`` of either layout."""
        from transformers import InternVLConfig

        if raw["model_type"] == "internvl_chat":
            return InternVLConfig(**_original(raw, special))
        found: PreTrainedConfig = InternVLConfig.from_dict({"chat": "hf", **raw})
        return found

    def max_tiles(self, raw: Mapping[str, Any]) -> int:
        """What the original layout says, else 12, as the published models were run."""
        return int(raw.get("max_dynamic_patch", 12)) if raw.get("dynamic_image_size", True) else 1

    def size(self, model: Model) -> int:
        """Edge of a tile in pixels."""
        return int(model.vision["image_size"][0])

    def side(self, model: Model) -> int:
        """Visual tokens along one edge of a tile: 16 after pixel shuffle of 32 patches."""
        patches = self.size(model) // int(model.vision["patch_size"][0])
        return int(patches * model.config["downsample_ratio"])

    def image(self, model: Model, width: int, height: int, max_tiles: int | None = None) -> Image:
        """Dynamic tiling, thumbnail included."""
        columns, rows = choose_grid(width, height, max_tiles or model.max_tiles, self.size(model))
        views = columns * rows + (columns * rows > 1)
        return Image(((self.side(model),) * 2,) * views, columns, rows, width=width, height=height)

    def pixels(self, model: Model, image: Image, picture: Picture | None) -> npt.NDArray[np.float32] | tuple[int, ...]:
        """Tiles in row-major order, thumbnail last, normalised by ImageNet's mean and deviation."""
        size = self.size(model)
        if picture is None:
            return (image.tiles, 3, size, size)
        return normalise(cut_tiles(picture, image.columns, image.rows, size))

    def placeholders(self, model: Model, image: Image) -> Sequence[Part]:
        """The visual tokens between ``<img>`` and ``</img>``."""
        return Special("<img>"), Special(self.image_token(model), image.tokens), Special("</img>")

    def parts(self, model: Model, question: str, images: Sequence[Sequence[Part]]) -> list[Part]:
        """Each image and a newline, then the question, in the model's chat template."""
        asked = [part for image in images for part in (*image, "\n")]
        return CHATS[model.config["chat"]].parts([((*asked, question), None)])

    def conversation(
        self, model: Model, turns: Sequence[tuple[Sequence[Part], str | None]], tokenizer: Tokenizer
    ) -> list[int]:
        """Token ids of a whole conversation.

        Args:
            model: The model.
            turns: What the user sent, as text and :meth:`placeholders` in any order and number, and what the model
                answered; None where it is to answer now.
            tokenizer: The checkpoint's.
        """
        return encode_parts(CHATS[model.config["chat"]].parts(turns), tokenizer)

    def pieces(self, stored: str, config: Any) -> list[_pieces.Piece]:
        """Tensors of both layouts; the fused ones hold three parameters each."""
        name = _pieces.renamed(stored, (*_NAMES, *_pieces.HF))
        for fused, attention, part in _FUSED:
            block, found, kind = name.partition(fused)
            if found:
                return [
                    _pieces.Piece(f"{block}{attention}{which}_proj.{kind}", partial(part, config.text_config, number))
                    for number, which in enumerate("qkv")
                ]
        return _pieces.plain(name)


# -- the original layout's configuration -------------------------------------------------------------------------------

#: Language models of the original InternVL layout, and the transformers model that runs each.
_RUN_AS = {"internlm2": "llama", "llama": "llama", "qwen2": "qwen2"}
_TEXT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "rms_norm_eps", "hidden_act",
)  # fmt: skip
_TEXT_MAY = (
    "head_dim", "bos_token_id", "eos_token_id", "pad_token_id", "use_sliding_window", "sliding_window",
    "max_window_layers",
)  # fmt: skip
_VISION = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps",
)  # fmt: skip
#: Where ``<|im_end|>`` and ``<IMG_CONTEXT>`` lie in each tokenizer, counted from the end of the vocabulary.
_BEHIND = {"internlm2": (11, 7), "qwen2": (29, 7), "llama": (262, 7)}


def _original(raw: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
    """Arguments of an ``InternVLConfig`` from the original's ``config.json``."""
    from transformers import AutoConfig
    from transformers.models.internvl.configuration_internvl import InternVLVisionConfig

    llm, vision = raw["llm_config"], raw["vision_config"]
    size = raw.get("force_image_size") or vision["image_size"]
    for what, found, known in (
        ("a language model of type", llm.get("model_type"), tuple(_RUN_AS)),
        ("select_layer", raw.get("select_layer", -1), (-1,)),
        ("ps_version", raw.get("ps_version", "v2"), ("v2",)),
        ("force_image_size", size, (vision["image_size"],)),
        ("template", raw.get("template", "internlm2-chat"), tuple(CHATS)),
    ):
        if found not in known:
            raise ValueError(f"{what} {found!r} is not read; memprof reads {' or '.join(map(repr, known))}")
    text = {key: llm[key] for key in _TEXT} | {key: llm[key] for key in _TEXT_MAY if key in llm}
    if llm["model_type"] != "qwen2":  # whose attention always has biases
        text["attention_bias"] = bool(llm.get("bias") or llm.get("attention_bias"))
    # A turn ends with <|im_end|>; the file's own eos_token_id never comes in a chat. A checkpoint that brings no
    # tokenizer has its tokens where the published ones have them, counted from the end of the vocabulary.
    end, image = (int(llm["vocab_size"]) - behind for behind in _BEHIND[llm["model_type"]])
    text["eos_token_id"] = special.get("<|im_end|>", end)
    return {
        "text_config": AutoConfig.for_model(_RUN_AS[llm["model_type"]], rope_parameters=_rope(llm), **text),
        "vision_config": InternVLVisionConfig(
            **{key: vision[key] for key in _VISION},
            attention_bias=vision["qkv_bias"],
            use_qk_norm=vision["qk_normalization"],
            norm_type=vision.get("norm_type", "rms_norm"),
            image_size=[size, size],
            patch_size=[vision["patch_size"]] * 2,
            use_mean_pooling=True,  # no norm behind the last layer
        ),
        "image_token_id": special.get("<IMG_CONTEXT>", image),
        "downsample_ratio": raw["downsample_ratio"],
        "chat": raw.get("template", "internlm2-chat"),
    }


def _rope(llm: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings as transformers 5 writes them.

    InternVL2 asks for dynamic NTK with factor 2, which changes nothing within ``max_position_embeddings``. Beyond, the
    base grows with the longest position seen, here as in the reference. The reference keeps the grown table for every
    later, shorter prompt; that fault is not copied: a prompt within ``max_position_embeddings`` always gets the plain
    table. (Among prompts that are all beyond it, transformers keeps the longest one's.)
    """
    scaling = dict(llm.get("rope_scaling") or {})
    kind = scaling.pop("rope_type", None) or scaling.pop("type", "default")
    scaling.pop("type", None)
    return {"rope_type": kind, "rope_theta": float(llm["rope_theta"]), **scaling}


# -- tensors -----------------------------------------------------------------------------------------------------------

#: What the original layout calls them; behind these come transformers' own old names.
_NAMES: _pieces.Names = (
    (r"^vision_model\.encoder\.layers\.", "vision_tower.encoder.layer."),
    (r"^vision_model\.embeddings\.class_embedding$", "vision_tower.embeddings.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding$", "vision_tower.embeddings.position_embeddings"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "vision_tower.embeddings.patch_embeddings.projection."),
    (r"^(vision_tower\..*)\.ls([12])$", r"\1.lambda_\2"),
    (r"^(vision_tower\..*)\.norm1\.", r"\1.layernorm_before."),
    (r"^(vision_tower\..*)\.norm2\.", r"\1.layernorm_after."),
    (r"^(vision_tower\..*)\.attn\.proj\.", r"\1.attention.projection_layer."),
    (r"^(vision_tower\..*)\.attn\.", r"\1.attention."),
    (r"^mlp1\.0\.", "multi_modal_projector.layer_norm."),
    (r"^mlp1\.1\.", "multi_modal_projector.linear_1."),
    (r"^mlp1\.3\.", "multi_modal_projector.linear_2."),
    (r"^language_model\.output\.", "lm_head."),
    (r"^language_model\.model\.tok_embeddings\.", "language_model.model.embed_tokens."),
    (r"^(language_model\.model\..*)\.attention\.wo\.", r"\1.self_attn.o_proj."),
    (r"^(language_model\.model\..*)\.attention_norm\.", r"\1.input_layernorm."),
    (r"^(language_model\.model\..*)\.ffn_norm\.", r"\1.post_attention_layernorm."),
    (r"^(language_model\.model\..*)\.feed_forward\.w1\.", r"\1.mlp.gate_proj."),
    (r"^(language_model\.model\..*)\.feed_forward\.w3\.", r"\1.mlp.up_proj."),
    (r"^(language_model\.model\..*)\.feed_forward\.w2\.", r"\1.mlp.down_proj."),
)


def _third(_: Any, which: int, fused: torch.Tensor) -> torch.Tensor:
    """The vision tower's ``qkv``: query, key and value, one below the other."""
    return fused.view(3, -1, *fused.shape[1:])[which]


def _grouped(text: Any, which: int, fused: torch.Tensor) -> torch.Tensor:
    """InternLM2's ``wqkv``: for each KV head its query heads, then its key, then its value, ``head_dim`` rows each."""
    queries = text.num_attention_heads // text.num_key_value_heads
    rows = (slice(queries), slice(queries, queries + 1), slice(queries + 1, None))[which]
    grouped = fused.view(text.num_key_value_heads, queries + 2, text.head_dim, *fused.shape[1:])
    return grouped[:, rows].flatten(0, 2)


#: What fused tensors are called once renamed, where their parts belong, and how they are taken out.
_FUSED = ((".attention.qkv.", ".attention.", _third), (".attention.wqkv.", ".self_attn.", _grouped))
