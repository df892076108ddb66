"""Weights from a checkpoint, straight to the device and dtype asked for.

The module is built without storage; every check on names, shapes and files is made on headers alone; then each tensor is
copied from the mapped file into a parameter made where the model is to be, one at a time, so that host memory never holds
the checkpoint twice. Only safetensors are read, and no code that a checkpoint brings is ever run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memprof.errors import WeightsError
from memprof.families import Card, Family
from memprof.families._build import dtype_of
from memprof.families._files import Stored, folder_of, locate, read_json, stored_tensors
from memprof.families._layouts import Piece, card_of, config_of, name_of, pieces_of
from memprof.families._text import special_tokens

#: Dtypes a weight may be stored in; others mean a quantised checkpoint.
_FLOATS = ("F64", "F32", "F16", "BF16")


def card_from_checkpoint(family: Family, card: Card, weights: str) -> Card:
    """``card`` as the checkpoint's own ``config.json`` has it; the same card where there is no such file.

    The file decides and the card only fills in what it leaves out, so that what is recorded about a model is true of the
    weights that run. Where sizes differ from the card's the title says whose they are.

    Args:
        family: The family ``card`` is of.
        card: The model asked for.
        weights: ``random`` (the card itself), ``hub``, or the path of a folder or a ``.safetensors`` file.

    Raises:
        WeightsError: No checkpoint there, or one of another family, or of a variant memprof does not run.
    """
    if weights == "random":
        return card
    where = locate(weights, card.hub)
    return _card_at(family, card, where, None)


def config_from_checkpoint(family: Family, card: Card, weights: str) -> Any:
    """The transformers configuration of :func:`card_from_checkpoint`; raises what that raises."""
    return family.config(card_from_checkpoint(family, card, weights))


def load_checkpoint(
    family: Family, card: Card, weights: str, *, device: str, dtype: str, attention: str | Mapping[str, str]
) -> nn.Module:
    """The model with its published weights, ready to generate.

    Layouts: the original InternVL one (OpenGVLab, over InternLM2, Llama or Qwen2), ``-hf`` InternVL, and llava-hf, one file or
    many. Sizes follow the checkpoint's ``config.json`` (:func:`card_from_checkpoint`), the card where there is none.

    Args:
        family: The family ``card`` is of.
        card: The model asked for.
        weights: ``hub``, or the path of a folder or of one ``.safetensors`` file.
        device: Where the weights go: ``cpu`` or ``cuda``.
        dtype: Name of their dtype; rotary tables stay float32.
        attention: Attention of the language model, or of each tower by configuration name.

    Raises:
        WeightsError: A file missing, truncated or not safetensors; a tensor missing, of the wrong shape, or of another model.
            One line that names the tensor and the file.
    """
    where = locate(weights, card.hub)
    stored = stored_tensors(where)
    card = _card_at(family, card, where, stored)
    config = family.config(card)
    model = _without_storage(config, dtype_of(dtype), attention)
    plan = _plan(card, config, model, where, stored)
    for tensor, pieces in plan:
        _read(model, tensor, pieces, dtype_of(dtype), device)
    model.tie_weights()
    _fill_buffers(model, device)
    model.generation_config.eos_token_id = card.text.get("eos_token_id")
    model.generation_config.pad_token_id = card.text.get("pad_token_id")
    return model.eval()  # type: ignore[no-any-return]


def _card_at(family: Family, card: Card, where: Path, stored: Mapping[str, Stored] | None) -> Card:
    """The card of the checkpoint at ``where``, whose tensors are ``stored`` (None: not looked at yet)."""
    file = folder_of(where) / "config.json"
    raw = read_json(file)
    if raw is None:
        return card
    own = family.config(card)
    try:
        config = config_of(family, card, raw, special_tokens(folder_of(where)))
        text = raw.get("text_config") or raw.get("llm_config") or {}
        tied = bool(text.get("tie_word_embeddings", raw.get("tie_word_embeddings", False)))
        if tied:  # some say so and store both
            names = stored_tensors(where) if stored is None else stored
            tied = all(name_of(name, own.model_type) != "lm_head.weight" for name in names)
        found = card_of(card, own, config, raw, where, tied=tied)
    except WeightsError as error:
        raise WeightsError(f"{file} {error}" if str(file) not in str(error) else str(error)) from None
    except KeyError as error:
        raise WeightsError(f"{file} lacks {error}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise WeightsError(f"{file} is not a configuration memprof can read: {str(error).partition(chr(10))[0]}") from None
    generation = read_json(file.with_name("generation_config.json")) or {}
    if raw.get("model_type") == own.model_type and generation.get("eos_token_id") is not None:
        return _replace_text(found, eos_token_id=generation["eos_token_id"])
    return found
