"""What checkpoints call their tensors, and how a parameter is a part of one of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    Take = Callable[[torch.Tensor], torch.Tensor]

#: Pairs of a pattern and what stands in its place, tried one after another.
Names = Iterable[tuple[str, str]]


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
HF: Names = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
)
#: Transformers' own towers became one level flatter.
FLAT = (r"^model\.vision_tower\.vision_model\.", "model.vision_tower.")
#: The same, with the token that ends a row.
WITH_LINES: Names = ((r"^image_newline$", "model.image_newline"), *HF, FLAT)
#: Buffers old checkpoints stored, which the model makes for itself.
_MADE = re.compile(r"\.rotary_emb\.inv_freq$|\.embeddings\.position_ids$")


def made(stored: str) -> bool:
    """Whether the model makes for itself what a checkpoint stores under this name."""
    return _MADE.search(stored) is not None


def renamed(stored: str, names: Names) -> str:
    """The name that transformers has for the tensor called ``stored``; unknown names stay."""
    for pattern, name in names:
        stored = re.sub(pattern, name, stored)
    return stored


def plain(name: str) -> list[Piece]:
    """The whole tensor as the parameter called ``name``."""
    return [] if made(name) else [Piece(name, lambda tensor: tensor)]
