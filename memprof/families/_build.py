"""From a card to a model that runs: weights at random, from a checkpoint, or none at all."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from memprof.families import Card, Family
from memprof.families._checkpoint import dtype_of, load_checkpoint


def build_model(
    family: Family,
    card: Card,
    *,
    device: str,
    dtype: str,
    weights: str = "random",
    attention: str = "sdpa",
    seed: int = 0,
) -> nn.Module:
    """A model ready to generate.

    Args:
        family: The family ``card`` is of.
        card: Which model.
        device: ``sim`` (no storage), ``cpu`` or ``cuda``.
        dtype: Name of the dtype of all weights.
        weights: ``random`` (seeded, built straight on the device), ``hub``, or the path of a checkpoint.
        attention: Attention of the language model; the vision tower runs SDPA.
        seed: Of random weights.
    """
    from transformers import AutoModelForImageTextToText

    config = family.config(card)
    implementation = {"text_config": attention, "vision_config": "sdpa"}

    def from_config() -> Any:  # a PreTrainedModel; transformers is not typed
        model = AutoModelForImageTextToText.from_config(
            config, dtype=dtype_of(dtype), attn_implementation=implementation
        )
        model.tie_weights()  # skipped together with the initialisation, and a tied head must count once
        return model

    if device == "sim":
        from memprof.simulator.weightless import build_weightless

        model: nn.Module = build_weightless(from_config)
    elif weights != "random":
        loaded: nn.Module = load_checkpoint(family, card, weights, device=device, dtype=dtype, attention=implementation)
        return loaded
    else:
        model = _random(from_config, device, seed)
    _never_stop(model)
    return model


def _random(from_config: Any, device: str, seed: int) -> nn.Module:
    """Weights drawn on ``device`` itself: fast, and no host copy. Their values move no byte."""
    from transformers.initialization import no_init_weights

    with torch.device(device), no_init_weights(), warnings.catch_warnings():
        model: nn.Module = from_config().eval()
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.02, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


def _never_stop(model: Any) -> None:
    """Random weights would stop at random; every run is to make as many tokens as asked for."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
