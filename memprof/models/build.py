"""From a configuration to a model that runs: weights at random, from a checkpoint, or none at all."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch import nn

from memprof.errors import LacksAttention, MemprofError, UsageError
from memprof.families import Model
from memprof.models.checkpoint import dtype_of, load_checkpoint
from memprof.models.faults import CORRECT, runs
from memprof.models.find import check_model


def build_model(
    model: Model,
    *,
    device: str,
    dtype: str,
    weights: str = "random",
    attention: str | None = "sdpa",
    seed: int = 0,
) -> nn.Module:
    """A model ready to generate.

    Args:
        model: Which.
        device: ``sim`` (no storage), ``cpu`` or ``cuda``.
        dtype: Name of the dtype of all weights.
        weights: ``random`` (seeded, built straight on the device), ``hub``, or the path of a checkpoint.
        attention: Attention of the language model; the vision tower runs SDPA. None: SDPA where the model has it, else
            eager.
        seed: Of random weights.

    Raises:
        LacksAttention: Transformers has not this attention for it.
        MemprofError: Its configuration cannot be built from.
    """
    with runs(f"{model.title}'s configuration", CORRECT):
        try:
            return _built(model, device, dtype, weights, attention or "sdpa", seed)
        except LacksAttention:
            if attention is not None:
                raise
            return _built(model, device, dtype, weights, "eager", seed)


def _built(model: Model, device: str, dtype: str, weights: str, attention: str, seed: int) -> nn.Module:
    """:func:`build_model`, where transformers' errors are its own."""
    config = model.family.config(model)
    implementation = attention_of(model, attention)

    def from_config() -> Any:  # a PreTrainedModel; transformers is not typed
        made = auto_class(model).from_config(
            config, dtype=dtype_of(dtype), attn_implementation=implementation
        )
        made.tie_weights()  # skipped together with the initialisation, and a tied head must count once
        return made

    try:
        if device == "sim":
            from memprof.models.weightless import build_weightless

            module: nn.Module = build_weightless(from_config)
        elif weights != "random":
            return load_checkpoint(model, weights, device=device, dtype=dtype, attention=implementation)
        else:
            module = _random(from_config, device, seed)
    except ValueError as error:
        if not _lacks_attention(error):
            raise
        said = f"transformers has no {attention} attention for {model.title}; use --attention eager"
        raise LacksAttention(said) from None
    _never_stop(module)
    return module


def _lacks_attention(error: BaseException | None) -> bool:
    """Whether it is transformers' word for a class without the attention that was asked for."""
    return isinstance(error, ValueError) and "does not support an attention implementation" in str(error)


def build_weightless_from(config: Any, *, dtype: str | None = None, attention: str | None = None) -> nn.Module:
    """A model without storage from a transformers configuration: of the class that it names, else of the one that
    transformers has for it. Weights are tied where it ties them.

    Args:
        config: The configuration object; it is left as it is.
        dtype: None: the configuration's, else bfloat16.
        attention: Of the language model; the vision tower runs SDPA where it has it. None: SDPA where the model has it,
            else eager.

    Raises:
        UsageError: It is no configuration, or transformers has no class that generates for it, or not with this
            attention.
    """
    import copy

    import transformers

    from memprof.models.weightless import build_weightless

    check_model(config)
    config = copy.deepcopy(config)
    named = str(getattr(config, "dtype", None) or "bfloat16").removeprefix("torch.")
    classes: list[Any] = [getattr(transformers, name, None) for name in config.architectures or ()]
    classes += [getattr(transformers, name) for name in _GENERATING]

    def built(asked: str) -> Any:
        for kind in classes:
            build = getattr(kind, "from_config", None) or getattr(kind, "_from_config", None)
            if build is None or (hasattr(kind, "from_config") and type(config) not in kind._model_mapping):
                continue
            by_part = {"text_config": asked} if hasattr(config, "text_config") else asked
            made = build(config, dtype=dtype_of(dtype or named), attn_implementation=by_part)
            made.tie_weights()
            return made
        raise UsageError(f"transformers has no class that generates from a {type(config).__name__}")

    found: Any = None
    for asked in (attention,) if attention is not None else ("sdpa", "eager"):
        try:
            with runs(f"this {type(config).__name__}", CORRECT):
                found = build_weightless(partial(built, asked))
            break
        except MemprofError as error:
            if not _lacks_attention(error.__cause__):
                raise
    if found is None:
        raise LacksAttention(f"transformers has no {attention} attention for a {type(config).__name__}; ask for eager")
    module: nn.Module = found
    _never_stop(module)
    return module


#: Transformers' classes that build what generates, in the order they are asked: what sees or reads before it writes
#: comes before its decoder alone.
_GENERATING = (
    "AutoModelForImageTextToText", "AutoModelForSpeechSeq2Seq", "AutoModelForSeq2SeqLM", "AutoModelForMultimodalLM",
    "AutoModelForCausalLM",
)  # fmt: skip


def auto_class(model: Model) -> Any:
    """Transformers' class that builds ``model`` from its configuration."""
    import transformers

    return getattr(transformers, model.family.auto)


def attention_of(model: Model, attention: str) -> str | dict[str, str]:
    """``attention`` for the language model, SDPA for what sees, as transformers is told."""
    return {"text_config": attention, "vision_config": "sdpa"} if "text_config" in model.config else attention


def _random(from_config: Any, device: str, seed: int) -> nn.Module:
    """Weights drawn on ``device`` itself: fast, and no host copy. Their values move no byte."""
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        # Imports what it needs: a package that makes a constant when it is imported would make it on the card.
        from_config()
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
