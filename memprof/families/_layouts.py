"""What checkpoints call things: their configuration as a card, their tensors as transformers names them.

InternVL comes in two layouts. The original one (OpenGVLab, ``internvl_chat``) has a fused ``qkv`` in the vision tower
and, over InternLM2, a fused ``wqkv`` in the language model; the ``-hf`` one is transformers' own. The tests hold the
conversion to the numbers of OpenGVLab/InternVL at commit 2410d1d; that code itself is never run.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from memprof.families import Card, Family
from memprof.families._text import CHATS

# -- configurations ----------------------------------------------------------------------------------------------------

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
#: Settings beside the towers that say how they are joined.
_JOINT = ("projector_hidden_act", "vision_feature_layer", "vision_feature_select_strategy")
#: What decides bytes: a checkpoint that differs from its card here is another model and is called so.
_SIZES = (*_TEXT[:6], "image_size", "patch_size")


def config_of(family: Family, card: Card, raw: Mapping[str, Any], special: Mapping[str, int]) -> Any:
    """The transformers configuration that ``config.json`` describes.

    Args:
        family: The family ``card`` is of.
        card: The model asked for; it fills in what the file leaves out.
        raw: ``config.json``.
        special: Ids of the tokenizer's special tokens, where the checkpoint has one.

    Raises:
        ValueError: The file describes another family, or a variant memprof does not run.
        KeyError: It lacks an entry.
    """
    own = family.config(card)
    kind = raw.get("model_type")
    if kind == "internvl_chat" and own.model_type == "internvl":
        config = type(own)(**_original_internvl(card, raw, special))
    elif kind == own.model_type:
        config = type(own).from_dict(({"chat": "hf"} if "chat" in card.extra else {}) | dict(raw))
    else:
        raise ValueError(f"this is a model of type {kind!r}, and {card.name} is {own.model_type!r}")
    if type(config.vision_config) is not type(own.vision_config):
        raise ValueError(f"its vision tower is of type {config.vision_config.model_type!r}, which {card.name} has not")
    return config


def card_of(card: Card, own: Any, config: Any, raw: Mapping[str, Any], where: str, *, tied: bool) -> Card:
    """``card`` with the numbers of ``config``; where its sizes are others, its title says whose they are.

    Args:
        card: The model asked for.
        own: Its own configuration.
        config: What the checkpoint at ``where`` says (:func:`config_of`).
        raw: The checkpoint's ``config.json``.
        where: The checkpoint, as the user calls it.
        tied: Whether the output embedding is the input embedding.
    """
    same = all(
        getattr(mine, key, None) == getattr(theirs, key, None)
        for mine, theirs in ((own.text_config, config.text_config), (own.vision_config, config.vision_config))
        for key in _SIZES
    )
    named = str(raw.get("dtype") or raw.get("torch_dtype")).removeprefix("torch.")
    return dataclasses.replace(
        card,
        title=card.title if same else f"{card.title} as in {Path(where).name}",
        dtype=named if named in ("bfloat16", "float16", "float32") else card.dtype,
        source=f"configuration file of {where}",
        text={"model_type": config.text_config.model_type, **_numbers(config.text_config), "tie_word_embeddings": tied},
        vision=_numbers(config.vision_config),
        extra={**card.extra, **{key: getattr(config, key) for key in (*card.extra, *_JOINT) if hasattr(config, key)}},
        max_tiles=int(raw.get("max_dynamic_patch", card.max_tiles)) if raw.get("dynamic_image_size", True) else 1,
    )


def _numbers(config: Any) -> dict[str, Any]:
    """What a configuration says beyond what every configuration says."""
    from transformers import PreTrainedConfig

    return {k: v for k, v in config.to_dict().items() if k not in PreTrainedConfig().to_dict() and k != "model_type"}


def _original_internvl(card: Card, raw: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
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
    # InternVL adds its tokens behind the vocabulary, so a checkpoint that brings no tokenizer has them where the card
    # has them, counted from the end. A turn ends with <|im_end|>; the file's own eos_token_id never comes in a chat.
    behind = int(llm["vocab_size"]) - int(card.text["vocab_size"])
    text["eos_token_id"] = special.get("<|im_end|>", int(card.text["eos_token_id"]) + behind)
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
        "image_token_id": special.get("<IMG_CONTEXT>", int(card.extra["image_token_id"]) + behind),
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

Take = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Piece:
    """A parameter as a part of a stored tensor.

    Attributes:
        target: The parameter's name in the transformers model.
        take: Gives the parameter's values from the stored tensor; also run on tensors without storage, for their shape.
    """

    target: str
    take: Take


#: Old transformers checkpoints (every ``-hf`` one on the hub) nest the towers differently.
_HF = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
)
_NAMES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "internvl": (
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
        *_HF,
    ),
    "llava": (*_HF, (r"^model\.vision_tower\.vision_model\.", "model.vision_tower.")),
}
#: Buffers old checkpoints stored, which the model makes for itself.
_MADE = re.compile(r"\.rotary_emb\.inv_freq$|\.embeddings\.position_ids$")


def name_of(stored: str, model_type: str) -> str:
    """The name that transformers' model of ``model_type`` has for the tensor called ``stored``; unknown names stay."""
    for pattern, name in _NAMES.get(model_type, ()):
        stored = re.sub(pattern, name, stored)
    return stored


def pieces_of(stored: str, config: Any) -> list[Piece]:
    """The parameters that the tensor called ``stored`` holds; none for a buffer the model makes for itself."""
    if _MADE.search(stored):
        return []
    name = name_of(stored, config.model_type)
    for fused, attention, part in _FUSED:
        block, found, kind = name.partition(fused)
        if found:
            return [
                Piece(f"{block}{attention}{which}_proj.{kind}", partial(part, config.text_config, number))
                for number, which in enumerate("qkv")
            ]
    return [Piece(name, lambda tensor: tensor)]


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
