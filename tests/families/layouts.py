"""Writes tiny models in the layouts of published checkpoints: the conversion's inverse, sharing no code with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from memprof.families import Model
from memprof.models.build import build_model
from memprof.models.find import find

TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 2048,
}  # fmt: skip
VISION = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
TILE = 56


def tiny(name: str, **text: Any) -> Model:
    """The model ``name``, shrunk; its special tokens keep their distance from the end of the vocabulary."""
    card = find(name)
    text = {**TEXT, **text}
    behind = text["vocab_size"] - card.text["vocab_size"]
    ids = {k: max(0, v + behind) for k, v in card.text.items() if k in ("eos_token_id",)}
    square = isinstance(card.vision["image_size"], int)
    image = {k: v + behind for k, v in card.config.items() if k.startswith("image_token")}
    tied = {"tie_word_embeddings": text["tie_word_embeddings"]} if "tie_word_embeddings" in text else {}
    return card.but(
        text={**text, **ids, "bos_token_id": 1, "pad_token_id": 2},
        vision={**VISION, "image_size": TILE if square else [TILE, TILE]},
        **image, **tied,
    )  # fmt: skip


def model_of(card: Model, seed: int = 0) -> Any:
    """A random model of ``card`` in which every parameter matters."""
    model: Any = build_model(card, device="cpu", dtype="float32", attention="eager", seed=seed)
    model.tie_weights()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1 + (parameter.ndim == 1) * 0.5)
    return model


def logits(model: Any, card: Model) -> torch.Tensor:
    """Logits of a fixed prompt with one image."""
    family = find(card.name).family
    token, visual = family.image_token(card), family.side(card) ** 2
    ids = torch.tensor([[1, 5, 9, *[token] * visual, 11, 7]])
    pixels = torch.randn(1, 3, TILE, TILE, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=ids, pixel_values=pixels).logits
    return out


def original_internvl(model: Any) -> dict[str, torch.Tensor]:
    """Tensors as OpenGVLab's code names and fuses them."""
    state, config = model.state_dict(), model.config
    out: dict[str, torch.Tensor] = {}
    tower = "model.vision_tower."
    out["vision_model.embeddings.class_embedding"] = state[tower + "embeddings.cls_token"]
    out["vision_model.embeddings.position_embedding"] = state[tower + "embeddings.position_embeddings"]
    for kind in ("weight", "bias"):
        mine = state[tower + f"embeddings.patch_embeddings.projection.{kind}"]
        out[f"vision_model.embeddings.patch_embedding.{kind}"] = mine
    for number in range(config.vision_config.num_hidden_layers):
        mine, theirs = f"{tower}encoder.layer.{number}.", f"vision_model.encoder.layers.{number}."
        out[theirs + "ls1"], out[theirs + "ls2"] = state[mine + "lambda_1"], state[mine + "lambda_2"]
        for kind in ("weight", "bias"):
            if mine + f"attention.q_proj.{kind}" in state:
                qkv = [state[mine + f"attention.{part}_proj.{kind}"] for part in "qkv"]
                out[theirs + f"attn.qkv.{kind}"] = torch.cat(qkv)
            for a, b in (
                ("attn.proj", "attention.projection_layer"), ("attn.q_norm", "attention.q_norm"),
                ("attn.k_norm", "attention.k_norm"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2"),
                ("norm1", "layernorm_before"), ("norm2", "layernorm_after"),
            ):  # fmt: skip
                if f"{mine}{b}.{kind}" in state:
                    out[f"{theirs}{a}.{kind}"] = state[f"{mine}{b}.{kind}"]
    for a, b in (("0", "layer_norm"), ("1", "linear_1"), ("3", "linear_2")):
        for kind in ("weight", "bias"):
            out[f"mlp1.{a}.{kind}"] = state[f"model.multi_modal_projector.{b}.{kind}"]
    text = config.text_config
    for name, tensor in state.items():
        if text.model_type != "llama" and name.startswith("model.language_model."):
            out["language_model.model." + name.removeprefix("model.language_model.")] = tensor
    if text.model_type != "llama":
        return out | {"language_model.lm_head.weight": state["lm_head.weight"]}
    out["language_model.model.tok_embeddings.weight"] = state["model.language_model.embed_tokens.weight"]
    out["language_model.model.norm.weight"] = state["model.language_model.norm.weight"]
    out["language_model.output.weight"] = state["lm_head.weight"]
    for number in range(text.num_hidden_layers):
        mine, theirs = f"model.language_model.layers.{number}.", f"language_model.model.layers.{number}."
        q, k, v = (state[mine + f"self_attn.{part}_proj.weight"] for part in "qkv")
        rows, each = [], text.num_attention_heads // text.num_key_value_heads
        for head in range(text.num_key_value_heads):
            for query in range(head * each, (head + 1) * each):
                rows.append(q[query * text.head_dim : (query + 1) * text.head_dim])
            rows += [t[head * text.head_dim : (head + 1) * text.head_dim] for t in (k, v)]
        out[theirs + "attention.wqkv.weight"] = torch.cat(rows)
        for a, b in (
            ("attention.wo", "self_attn.o_proj"), ("feed_forward.w1", "mlp.gate_proj"),
            ("feed_forward.w3", "mlp.up_proj"), ("feed_forward.w2", "mlp.down_proj"),
            ("attention_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm"),
        ):  # fmt: skip
            out[f"{theirs}{a}.weight"] = state[f"{mine}{b}.weight"]
    return out


def original_config(card: Model, kind: str, template: str) -> dict[str, Any]:
    """``config.json`` as OpenGVLab writes it; the language model is of type ``kind``."""
    text, vision = dict(card.text), card.vision
    rope = text.pop("rope_parameters")
    keep = (*TEXT, "rms_norm_eps", "bos_token_id", "pad_token_id")
    return {
        "model_type": "internvl_chat", "architectures": ["InternVLChatModel"], "downsample_ratio": 0.5,
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"}, "select_layer": -1, "ps_version": "v2",
        "force_image_size": TILE, "max_dynamic_patch": 6, "template": template, "torch_dtype": "bfloat16",
        "llm_config": {
            **{key: text[key] for key in keep}, "model_type": kind, "hidden_act": "silu", "eos_token_id": 2,
            "rope_theta": rope["rope_theta"], "rope_scaling": None, "tie_word_embeddings": False,
        },
        "vision_config": {
            **{key: vision[key] for key in VISION}, "model_type": "intern_vit_6b", "hidden_act": "gelu",
            "layer_norm_eps": vision["layer_norm_eps"], "image_size": TILE, "patch_size": 14,
            "qkv_bias": vision["attention_bias"], "qk_normalization": vision["use_qk_norm"],
            "norm_type": vision["norm_type"],
        },
    }  # fmt: skip


def old_hf(model: Any) -> dict[str, torch.Tensor]:
    """Tensors as the ``-hf`` checkpoints on the hub name them."""
    out = {}
    clip = model.config.vision_config.model_type == "clip_vision_model"
    for name, tensor in model.state_dict().items():
        name = name.replace("model.language_model.", "language_model.model.")
        name = name.replace("model.vision_tower.", "vision_tower.vision_model." if clip else "vision_tower.")
        name = name.replace("model.multi_modal_projector.", "multi_modal_projector.")
        out["language_model.lm_head.weight" if name == "lm_head.weight" else name] = tensor
    return out


def write(folder: Path, tensors: Mapping[str, torch.Tensor], config: Any = None, shards: int = 1) -> Path:
    """A checkpoint folder, with an index if it has several shards."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    files = [f"model-{number + 1:05}-of-{shards:05}.safetensors" for number in range(shards)]
    files = files if shards > 1 else ["model.safetensors"]
    index = {}
    for number, file in enumerate(files):
        part = {name: tensors[name].contiguous() for name in names[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder
