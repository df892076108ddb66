"""What the vision tower's own attention says of each visual token, without any N x N map of all tiles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isqrt
from typing import Any, NoReturn, cast

import torch
from torch import nn

from memprof.errors import BadValue, UsageError
from memprof.pruning.pairs import blocks

#: Parts of projectors that work row by row, behind what changes the number of rows.
_ROWS = ("modality_projection", "mm_soft_emb_norm")

#: What towers call the class token that they put before the patches.
_CLASS_TOKENS = ("class_embedding", "cls_token")


def vision_block(vision: Iterable[tuple[str, nn.Module]], layer: int) -> nn.Module:
    """Layer number ``layer`` of a vision tower, given :attr:`memprof.anatomy.Anatomy.vision`.

    Raises:
        BadValue: The tower has fewer layers.
    """
    stacks = [m for _, part in vision for m in part.modules() if isinstance(m, nn.ModuleList)]
    tower = max((list(stack) for stack in stacks), key=len, default=[nn.Identity()] * 2)
    if not -len(tower) <= layer < len(tower):
        raise BadValue(f"vision_layer={layer} is beyond the vision tower's {len(tower)} layers")
    return tower[layer]


def vision_attention(vision: Iterable[tuple[str, nn.Module]], layer: int) -> Any:
    """The attention module of layer number ``layer`` of a vision tower.

    Raises:
        UsageError: There is none with query and key projections of its own.
        BadValue: The tower has fewer layers.
    """
    block = vision_block(vision, layer)
    found = next((m for m in block.modules() if hasattr(m, "q_proj") and hasattr(m, "k_proj")), None)
    if found is None:
        raise UsageError("the method ranks by the vision tower's attention, and this tower has no q_proj and k_proj")
    return found


def projector(vision: Sequence[tuple[str, nn.Module]]) -> nn.Module:
    """What turns features of the vision tower into the language model's, row by row: what it is given is a row a token.

    It is the projector, or the part of it that comes behind a pixel shuffle (Idefics3) or pooling (Gemma 3).

    Raises:
        UsageError: There is none to be found.
    """
    if len(vision) < 2:
        raise UsageError("the method looks at features before the projector, and this model has none that can be found")
    found: Any = vision[-1][1]
    return cast(nn.Module, next((part for name in _ROWS if (part := getattr(found, name, None)) is not None), found))


def projected(vision: Sequence[tuple[str, nn.Module]], rows: torch.Tensor) -> torch.Tensor:
    """What the projector makes of ``(m, c)``: ``(m, hidden)``; not by a call, so no hook takes it for its own run."""
    module: Any = projector(vision)
    out: torch.Tensor = module.forward(rows[None])[0]
    weight = getattr(vision[-1][1], "mm_input_projection_weight", None)  # Gemma 3 multiplies by a parameter of its own
    return out if weight is None else out @ cast(torch.Tensor, weight)


def refuse_clip() -> NoReturn:
    """Raise UsageError: no family brings a CLIP text tower, so nothing compares words with pictures."""
    raise UsageError(
        "relevance=clip compares the question with the picture by CLIP's text tower and projections, and this model "
        "has none; take relevance=question or relevance=none"
    )


def has_class_token(vision: Iterable[tuple[str, nn.Module]]) -> bool:
    """Whether a tower puts a class token before its patches, as CLIP does and SigLIP does not."""
    modules = [module for _, part in vision for module in part.modules()]
    return any(getattr(module, name, None) is not None for module in modules for name in _CLASS_TOKENS)


def uses_class_token(attention: Any) -> bool:
    """Whether a tower sums the picture up in its class token. InternViT has one and does not (``use_mean_pooling``)."""
    return not getattr(attention.config, "use_mean_pooling", False)


def patches_only(rows: torch.Tensor) -> torch.Tensor:
    """``(tiles, positions, ...)`` without the class token, which stands first where positions are no square."""
    return rows[:, int(isqrt(rows.shape[1]) ** 2 != rows.shape[1]) :]


def attention_received(attention: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Attention each patch receives in one layer of the vision tower, mean over heads: ``(tiles, patches)`` float32.

    From the class token where the tower has one that sums the picture up (CLIP), as VisionZip has it; else the mean
    over all queries, which is VisionZip's rule for towers without one. InternViT has a class token and does not use it
    (``use_mean_pooling``): memprof counts it to the latter.

    Args:
        attention: The layer's attention module, for its heads and scale.
        query: What its query projection made, ``(tiles, positions, hidden)``; a class token stands first.
        key: What its key projection made, likewise.
    """
    tiles, positions, _ = query.shape
    heads = (tiles, positions, attention.num_heads, attention.head_dim)
    by_head, keys = query.view(heads).transpose(1, 2), key.view(heads).permute(0, 2, 3, 1)
    if isqrt(positions) ** 2 != positions and uses_class_token(attention):
        scores = torch.matmul(by_head[:, :, :1], keys).mul_(attention.scale).softmax(-1, dtype=torch.float32)
        return patches_only(scores.mean((1, 2)))
    # Scores, and their softmax in float32 with the copy it is made from, in what the layer's MLP takes: one tile is
    # whole from a few tiles on.
    row = attention.num_heads * positions * (2 + query.element_size() / 4)
    room = 2 * tiles * positions * attention.config.intermediate_size * query.element_size()
    received = []
    for queries, keys_of_tile in zip(by_head, keys, strict=True):
        sums = []
        for start, stop in blocks(positions, int(row), room):
            scores = torch.bmm(queries[:, start:stop], keys_of_tile).mul_(attention.scale)
            sums.append(scores.softmax(-1, dtype=torch.float32).sum((0, 1)))
            del scores
        received.append(sums[0] if len(sums) == 1 else torch.stack(sums).sum(0))
    return patches_only(torch.stack(received).div_(attention.num_heads * positions))


def patches_to_tokens(rows: torch.Tensor, tokens: int) -> torch.Tensor:
    """Rows of patches as rows of the visual tokens they went into: ``(tokens, ...)`` from ``(tiles, patches, ...)``.

    InternVL's pixel shuffle makes one token of 2 x 2 neighbours: memprof chose the mean of the four.
    """
    tiles, patches = rows.shape[:2]
    side = isqrt(patches)
    fold = side // isqrt(tokens // tiles)
    return rows.view(tiles, side // fold, fold, side // fold, fold, *rows.shape[2:]).mean((2, 4)).flatten(0, 2)
