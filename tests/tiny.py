"""Tiny models of the true architectures, with real weights, for tests on the CPU."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import numpy as np
import torch

from memprof.bench.generate import profile_prompt
from memprof.families import FAMILIES, Family, Model
from memprof.meters import meter_for
from memprof.models.build import build_model
from memprof.models.find import named
from memprof.prompts import Input, Prompt
from memprof.pruning import build_pruner

#: What makes each family's first card tiny: sizes of the text and the vision tower.
_TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300,
}  # fmt: skip
_VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


#: The vision towers of the families whose images are grids of any size.
_GRIDS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
    "qwen2_5_vl": {
        "depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32,
        "window_size": 56, "fullatt_block_indexes": [1],
    },
    "qwen3_vl": {
        "depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1],
    },
}  # fmt: skip


def tiny_grids(card: Model) -> Model:
    """``card`` shrunk: up to 32 visual tokens an image."""
    rope = {**card.text["rope_parameters"], "mrope_section": [2, 1, 1]}
    head = {"head_dim": 8} if "head_dim" in card.text else {}
    ids = {"image_token_id": 290, "vision_start_token_id": 291, "vision_end_token_id": 292, "video_token_id": 293}
    card = card.but(
        text={**_TEXT, **_SPECIAL, **head, "rope_parameters": rope}, vision=_GRIDS[card.config["model_type"]],
        min_pixels=3136, max_pixels=32 * 28**2, **ids,
    )  # fmt: skip
    return dataclasses.replace(card, name=f"tiny-{card.family.title.lower()}", template=(3, 2), dtype="float32")


def tiny_card(family: Family) -> Model:
    """The family's first model, shrunk: 16 visual tokens a tile."""
    card = next(model for model in named().values() if model.family == family)
    if card.config["model_type"] in _GRIDS:
        return tiny_grids(card)
    size: Any = 112 if isinstance(card.vision["image_size"], int) else [112, 112]
    extra: dict[str, Any] = {key: 290 for key in card.config if key.startswith("image_token")}
    if "downsample_ratio" not in card.config:
        size = 4 * card.vision["patch_size"]
    if "scale_factor" in card.config:
        size = 4 * card.vision["patch_size"] * card.config["scale_factor"]
    if "image_grid_pinpoints" in card.config:
        extra["image_grid_pinpoints"] = [[size * down, size * across] for down in (1, 2) for across in (1, 2)]
    if "mm_tokens_per_image" in card.config:
        extra["mm_tokens_per_image"], size = 16, 112
    heads: dict[str, Any] = {"head_dim": 8} if "head_dim" in card.text else {}
    if "sliding_window" in card.text and "layer_types" in card.text:
        kinds = ["sliding_attention", "full_attention"] * 3
        heads |= {"sliding_window": 256, "query_pre_attn_scalar": 8, "layer_types": kinds[: _TEXT["num_hidden_layers"]]}
    card = card.but(text={**_TEXT, **_SPECIAL, **heads}, vision={**_VISION, "image_size": size}, **extra)
    return dataclasses.replace(card, name=f"tiny-{family.title.lower()}", template=(3, 2), dtype="float32")


def families() -> list[str]:
    """Every family that sees: found, not listed."""
    return [name for name, cls in FAMILIES if cls.sees]


@cache
def tiny_model(name: str, attention: str = "sdpa", device: str = "cpu") -> tuple[Family, Model, Any]:
    """A tiny model of family ``name``, built once; its weights are large enough for attention to matter."""
    family = FAMILIES.load(name)()
    card = tiny_card(family)
    model: Any = build_model(card, device=device, dtype="float32", attention=attention, seed=3)
    if device == "cpu":
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(8.0)
            for module in model.modules():
                if type(module).__name__ == "Gemma3RMSNorm":  # which multiplies by one more than its weight
                    module.weight.zero_()
    # transformers hooks a model for itself the first time it runs; after this, whatever is new is ours.
    meter = meter_for(model)
    profile_prompt(model, meter, build_pruner("baseline"), "current", tiny_prompt(family, card), new_tokens=1)
    return family, card, model


def tiny_prompt(
    family: Family, card: Model, width: int = 400, height: int = 200, text: int = 6, seed: int = 0
) -> Prompt:
    """A prompt about an image of ``width`` x ``height`` pixels, its pixels drawn at random."""
    prompt = family.drawn(card, family.shape(card, width, height, text, 4), seed)
    return with_pixels(prompt, np.random.default_rng(seed))


def with_pixels(prompt: Prompt, draw: np.random.Generator) -> Prompt:
    """``prompt`` with numbers for everything of which only the size is known."""
    known = {
        name: given if given.values is not None else Input.of(draw.standard_normal(given.shape).astype(np.float32))
        for name, given in prompt.inputs.items()
    }
    return dataclasses.replace(prompt, inputs=known)


def several_images(family: Family, card: Model, count: int = 2) -> Prompt:
    """A prompt with text between ``count`` images of one tile each."""
    shape = family.shape_of(card, [family.image(card, 100, 100, 1)] * count, 1)
    shape = dataclasses.replace(shape, text=(2, *[1] * (count - 1), 3))
    return with_pixels(family.drawn(card, shape), np.random.default_rng(1))


def no_image(family: Family, card: Model) -> Prompt:
    """A prompt of text alone."""
    return family.drawn(card, family.shape_of(card, [], 4))


def state_of(model: torch.nn.Module) -> dict[str, Any]:
    """All that a profiler or a surgery could leave behind on ``model``."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs",
             "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")  # fmt: skip
    return {
        name: (
            {h: list(getattr(module, h)) for h in hooks},
            sorted(k for k in vars(module) if not k.startswith("_output_capturing")),
            module.training,
            getattr(getattr(module, "config", None), "_attn_implementation", None),
        )
        for name, module in model.named_modules()
    }
