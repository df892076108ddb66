"""Tiny models of the true architectures, with real weights, for tests on the CPU."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import numpy as np
import torch

from memprof.families import FAMILIES, Card, Family
from memprof.families._build import build_model
from memprof.meters import meter_for
from memprof.pruning import build_pruner
from memprof.pruning.surgery import Layout
from memprof.runner import Prompt, make_prompt, profile_prompt

#: What makes each family's first card tiny: sizes of the text and the vision tower.
_TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300,
}  # fmt: skip
_VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def tiny_card(family: Family) -> Card:
    """The family's first card, shrunk: 16 visual tokens a tile."""
    card = next(iter(family.cards.values()))
    size: Any = 112 if isinstance(card.vision["image_size"], int) else [112, 112]
    extra = {k: 290 if k.startswith("image_token") else v for k, v in card.extra.items()}
    if "downsample_ratio" not in extra:
        size = 56
    return dataclasses.replace(
        card,
        name=f"tiny-{family.title.lower()}",
        text={**card.text, **_TEXT, **_SPECIAL},
        vision={**card.vision, **_VISION, "image_size": size},
        extra=extra,
        template=(3, 2),
        dtype="float32",
    )


def families() -> list[str]:
    """Every family there is: found, not listed."""
    return [name for name, _ in FAMILIES]


@cache
def tiny_model(name: str, attention: str = "sdpa", device: str = "cpu") -> tuple[Family, Card, Any]:
    """A tiny model of family ``name``, built once; its weights are large enough for attention to matter."""
    family = FAMILIES.load(name)()
    card = tiny_card(family)
    model: Any = build_model(family, card, device=device, dtype="float32", attention=attention, seed=3)
    if device == "cpu":
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(8.0)
    # transformers hooks a model for itself the first time it runs; after this, whatever is new is ours.
    meter = meter_for(model)
    profile_prompt(model, meter, build_pruner("baseline"), "current", tiny_prompt(family, card), new_tokens=1)
    return family, card, model


def tiny_prompt(
    family: Family, card: Card, width: int = 400, height: int = 200, text: int = 6, seed: int = 0
) -> Prompt:
    """A prompt about an image of ``width`` x ``height`` pixels, its pixels drawn at random."""
    shape = family.shape(card, width, height, text, 4)
    prompt = make_prompt(family, card, shape, seed=seed)
    assert isinstance(prompt.pixels, tuple)
    pixels = np.random.default_rng(seed).standard_normal(prompt.pixels).astype(np.float32)
    return dataclasses.replace(prompt, pixels=pixels)


def several_images(family: Family, card: Card, count: int = 2) -> Prompt:
    """A prompt with text between ``count`` images of one tile each."""
    one = family.shape(card, 100, 100, 0, 1)
    token, each = family.image_token(card), one.visual_tokens
    ids = [1, 5]
    for number in range(count):
        ids += [*[token] * each, 7 + number]
    ids += [9, 9]
    index = np.flatnonzero(np.asarray(ids) == token).astype(np.int64)
    layout = Layout(
        len(ids), index, np.tile(family.visual_positions(card, one), (count, 1)), np.repeat(np.arange(count), each)
    )
    shape = dataclasses.replace(
        one, tiles=count, visual_tokens=count * each, before=2, after=len(ids) - 2 - count * each
    )
    size = family.pixels(card, shape, None)
    assert isinstance(size, tuple)
    return Prompt(shape, ids, np.random.default_rng(1).standard_normal(size).astype(np.float32), layout)


def no_image(family: Family, card: Card) -> Prompt:
    """A prompt of text alone."""
    shape = dataclasses.replace(family.shape(card, 1, 1, 4, 1), tiles=0, columns=0, rows=0, visual_tokens=0)
    return make_prompt(family, card, shape)


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
