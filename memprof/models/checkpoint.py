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
from torch import nn

from memprof.errors import BadValue, WeightsError
from memprof.families import Model
from memprof.families._pieces import Piece
from memprof.models.files import Stored, locate, stored_tensors

#: Dtypes a weight may be stored in; others mean a quantised checkpoint.
_FLOATS = ("F64", "F32", "F16", "BF16")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype called ``name``; raises BadValue with the valid names."""
    if name not in DTYPES:
        raise BadValue(f"unknown dtype {name!r}; valid: {', '.join(DTYPES)}")
    return DTYPES[name]


def load_checkpoint(
    model: Model, weights: str, *, device: str, dtype: str, attention: str | Mapping[str, str]
) -> nn.Module:
    """The model with its published weights, ready to generate.

    In one file or many, in whichever layouts its family knows (:meth:`memprof.families.Family.pieces`).

    Args:
        model: The model, with the configuration of these very weights (:func:`memprof.models.find.find`).
        weights: ``hub``, or the path of a folder or of one ``.safetensors`` file.
        device: Where the weights go: ``cpu`` or ``cuda``.
        dtype: Name of their dtype; rotary tables stay float32.
        attention: Attention of the language model, or of each tower by configuration name.

    Raises:
        WeightsError: A file missing, truncated or not safetensors; a tensor missing, of the wrong shape, or of another
            model. One line that names the tensor and the file.
    """
    where = locate(weights, model.hub)
    stored = stored_tensors(where)
    config = model.family.config(model)
    module = _without_storage(model.family.auto, config, dtype_of(dtype), attention)
    plan = _plan(model, config, module, where, stored)
    for tensor, pieces in plan:
        _read(module, tensor, pieces, dtype_of(dtype), device)
    module.tie_weights()
    _fill_buffers(module, device)
    module.generation_config.eos_token_id = model.text.get("eos_token_id")
    module.generation_config.pad_token_id = model.text.get("pad_token_id")
    ready: nn.Module = module.eval()
    return ready


def _without_storage(auto: str, config: Any, dtype: torch.dtype, attention: str | Mapping[str, str]) -> Any:
    """The model with every tensor on the meta device."""
    import transformers
    from transformers.initialization import no_init_weights

    implementation = attention if isinstance(attention, str) else dict(attention)
    with torch.device("meta"), no_init_weights():
        model = getattr(transformers, auto).from_config(config, dtype=dtype, attn_implementation=implementation)
    model.tie_weights()  # where the configuration says so; leaving out the initial values leaves this out too
    return model


def _plan(
    model: Model, config: Any, module: nn.Module, where: Path, stored: Mapping[str, Stored]
) -> list[tuple[Stored, list[Piece]]]:
    """Which parameters each stored tensor fills; that every one is filled, once and in its shape, is checked here."""
    wanted = dict(module.named_parameters())
    filled: dict[str, Stored] = {}
    plan = []
    for tensor in stored.values():
        pieces = model.family.pieces(tensor.name, config)
        for piece in pieces:
            if piece.target not in wanted:
                raise WeightsError(f"tensor {tensor.name!r} in {tensor.file} is no part of {model.title}")
            if piece.target in filled:
                twin = filled[piece.target]
                raise WeightsError(
                    f"tensors {twin.name!r} in {twin.file} and {tensor.name!r} in {tensor.file} are one and the same"
                )
            _check(model, tensor, piece, wanted[piece.target])
            filled[piece.target] = tensor
        if pieces:
            plan.append((tensor, pieces))
    missing = [name for name in wanted if name not in filled]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise WeightsError(f"tensor {missing[0]!r}{more} is missing from {where}; {model.title} needs it")
    return plan


def _check(model: Model, tensor: Stored, piece: Piece, parameter: torch.Tensor) -> None:
    """Raise WeightsError if ``piece`` of ``tensor`` is not what ``parameter`` needs."""
    if tensor.dtype not in _FLOATS:
        raise WeightsError(
            f"tensor {tensor.name!r} in {tensor.file} is stored as {tensor.dtype}; memprof reads {', '.join(_FLOATS)}"
        )
    try:
        shape = piece.take(torch.empty(tensor.shape, device="meta")).shape
    except (RuntimeError, IndexError, TypeError, ValueError, OverflowError):  # of sizes that no tensor has
        shape = None
    if shape != parameter.shape:
        raise WeightsError(
            f"tensor {tensor.name!r} in {tensor.file} has shape {tensor.shape}, from which {piece.target!r} of "
            f"{model.title} cannot have its {tuple(parameter.shape)}"
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
