"""Weights from a checkpoint, straight to the device and dtype asked for.

The module is built without storage; every check on names, shapes and files is made on headers alone; then each tensor
is copied from the mapped file into a parameter made where the model is to be, one at a time, so that host memory never
holds the checkpoint twice. Only safetensors are read, and no code that a checkpoint brings is ever run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from memprof.errors import BadValue, WeightsError
from memprof.families import Card, Family
from memprof.families._files import Stored, folder_of, locate, read_json, stored_tensors
from memprof.families._layouts import Piece, card_of, config_of, name_of, pieces_of
from memprof.families._text import special_tokens

#: Dtypes a weight may be stored in; others mean a quantised checkpoint.
_FLOATS = ("F64", "F32", "F16", "BF16")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype called ``name``; raises BadValue with the valid names."""
    if name not in DTYPES:
        raise BadValue(f"unknown dtype {name!r}; valid: {', '.join(DTYPES)}")
    return DTYPES[name]


def card_from_checkpoint(family: Family, card: Card, weights: str) -> Card:
    """``card`` as the checkpoint's own ``config.json`` has it; the same card where there is no such file.

    The file decides and the card only fills in what it leaves out, so that what is recorded about a model is true of
    the weights that run. Where sizes differ from the card's, the title says whose they are. The folder need not hold
    weights: a configuration is enough for a prediction.

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
    stored = stored_tensors(where) if any(folder_of(where).glob("*.safetensors")) else {}
    return _card_at(family, card, weights, where, stored)


def config_from_checkpoint(family: Family, card: Card, weights: str) -> Any:
    """The transformers configuration of :func:`card_from_checkpoint`; raises what that raises."""
    return family.config(card_from_checkpoint(family, card, weights))


def load_checkpoint(
    family: Family, card: Card, weights: str, *, device: str, dtype: str, attention: str | Mapping[str, str]
) -> nn.Module:
    """The model with its published weights, ready to generate.

    Layouts: the original InternVL one (OpenGVLab, over InternLM2, Llama or Qwen2), ``-hf`` InternVL, and llava-hf, in
    one file or many; of other families, transformers' own names. Sizes follow the checkpoint's ``config.json``
    (:func:`card_from_checkpoint`), the card where there is none.

    Args:
        family: The family ``card`` is of.
        card: The model asked for.
        weights: ``hub``, or the path of a folder or of one ``.safetensors`` file.
        device: Where the weights go: ``cpu`` or ``cuda``.
        dtype: Name of their dtype; rotary tables stay float32.
        attention: Attention of the language model, or of each tower by configuration name.

    Raises:
        WeightsError: A file missing, truncated or not safetensors; a tensor missing, of the wrong shape, or of another
            model. One line that names the tensor and the file.
    """
    where = locate(weights, card.hub)
    stored = stored_tensors(where)
    card = _card_at(family, card, weights, where, stored)
    config = family.config(card)
    model = _without_storage(config, dtype_of(dtype), attention)
    plan = _plan(card, config, model, where, stored)
    for tensor, pieces in plan:
        _read(model, tensor, pieces, dtype_of(dtype), device)
    model.tie_weights()
    _fill_buffers(model, device)
    model.generation_config.eos_token_id = card.text.get("eos_token_id")
    model.generation_config.pad_token_id = card.text.get("pad_token_id")
    ready: nn.Module = model.eval()
    return ready


def _card_at(family: Family, card: Card, weights: str, where: Path, stored: Mapping[str, Stored]) -> Card:
    """The card of the checkpoint at ``where``, whose tensors are ``stored`` and which the user calls ``weights``."""
    file = folder_of(where) / "config.json"
    raw = read_json(file)
    if raw is None:
        return card
    own = family.config(card)
    try:
        config = config_of(family, card, raw, special_tokens(folder_of(where)))
        generation = read_json(file.with_name("generation_config.json")) or {}
        if raw["model_type"] == own.model_type and generation.get("eos_token_id") is not None:
            config.text_config.eos_token_id = generation["eos_token_id"]
        text = raw.get("text_config") or raw.get("llm_config") or {}
        tied = bool(text.get("tie_word_embeddings", raw.get("tie_word_embeddings", False)))
        if tied:  # some say so and store both
            tied = all(name_of(name, own.model_type) != "lm_head.weight" for name in stored)
        return card_of(card, own, config, raw, card.hub if weights == "hub" else str(where), tied=tied)
    except KeyError as error:
        raise WeightsError(f"{file}: {error} is missing") from None
    except (TypeError, ValueError, AttributeError, StrictDataclassError) as error:
        raise WeightsError(f"{file}: {' '.join(str(error).split())}") from None


def _without_storage(config: Any, dtype: torch.dtype, attention: str | Mapping[str, str]) -> Any:
    """The model with every tensor on the meta device."""
    from transformers import AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    implementation = attention if isinstance(attention, str) else dict(attention)
    with torch.device("meta"), no_init_weights():
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=implementation)
    model.tie_weights()  # where the configuration says so; leaving out the initial values leaves this out too
    return model


def _plan(
    card: Card, config: Any, model: nn.Module, where: Path, stored: Mapping[str, Stored]
) -> list[tuple[Stored, list[Piece]]]:
    """Which parameters each stored tensor fills; that every one is filled, once and in its shape, is checked here."""
    wanted = dict(model.named_parameters())
    filled: dict[str, Stored] = {}
    plan = []
    for tensor in stored.values():
        pieces = pieces_of(tensor.name, config)
        for piece in pieces:
            if piece.target not in wanted:
                raise WeightsError(f"tensor {tensor.name!r} in {tensor.file} is no part of {card.title}")
            if piece.target in filled:
                twin = filled[piece.target]
                raise WeightsError(
                    f"tensors {twin.name!r} in {twin.file} and {tensor.name!r} in {tensor.file} are one and the same"
                )
            _check(card, tensor, piece, wanted[piece.target])
            filled[piece.target] = tensor
        if pieces:
            plan.append((tensor, pieces))
    missing = [name for name in wanted if name not in filled]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise WeightsError(f"tensor {missing[0]!r}{more} is missing from {where}; {card.title} needs it")
    return plan


def _check(card: Card, tensor: Stored, piece: Piece, parameter: torch.Tensor) -> None:
    """Raise WeightsError if ``piece`` of ``tensor`` is not what ``parameter`` needs."""
    if tensor.dtype not in _FLOATS:
        raise WeightsError(
            f"tensor {tensor.name!r} in {tensor.file} is stored as {tensor.dtype}; memprof reads {', '.join(_FLOATS)}"
        )
    try:
        shape = piece.take(torch.empty(tensor.shape, device="meta")).shape
    except (RuntimeError, IndexError):
        shape = None
    if shape != parameter.shape:
        raise WeightsError(
            f"tensor {tensor.name!r} in {tensor.file} has shape {tensor.shape}, from which {piece.target!r} of "
            f"{card.title} cannot have its {tuple(parameter.shape)}"
        )


def _read(model: nn.Module, tensor: Stored, pieces: list[Piece], dtype: torch.dtype, device: str) -> None:
    """Fill the parameters that ``tensor`` holds.

    The file is mapped anew for each tensor: its pages leave the process with the mapping, so what it holds of the
    checkpoint beside the model is one tensor.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(tensor.file, framework="pt", device="cpu") as file:
            source = file.get_tensor(tensor.name)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"tensor {tensor.name!r} in {tensor.file} cannot be read: {error}") from None
    for piece in pieces:
        owner, _, leaf = piece.target.rpartition(".")
        module = model.get_submodule(owner)
        old = getattr(module, leaf)
        new = torch.empty(old.shape, dtype=dtype, device=device)
        new.copy_(piece.take(source))
        setattr(module, leaf, nn.Parameter(new, requires_grad=old.requires_grad))


def _fill_buffers(model: Any, device: str) -> None:
    """Make what no checkpoint stores, such as rotary tables, by the model's own rules and in its own dtypes."""
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # transformers then leaves it alone
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device=device))
    model.initialize_weights()
