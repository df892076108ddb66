"""What the vision tower's own attention says of each visual token, without any N x N map of all tiles."""

from __future__ import annotations

from collections.abc import Iterable
from math import isqrt
from typing import Any

import torch
from torch import nn

from memprof.errors import UsageError
from memprof.pruning.pairs import blocks


def vision_attention(vision: Iterable[tuple[str, nn.Module]], layer: int) -> Any:
    """The attention module of layer number ``layer`` of a vision tower, given :attr:`memprof.anatomy.Anatomy.vision`.

    Raises:
        UsageError: There is none with query and key projections of its own.
    """
    stacks = [m for _, part in vision for m in part.modules() if isinstance(m, nn.ModuleList)]
    block = max(stacks, key=len)[layer] if stacks else nn.Identity()
    found = next((m for m in block.modules() if hasattr(m, "q_proj") and hasattr(m, "k_proj")), None)
    if found is None:
        raise UsageError("the method ranks by the vision tower's attention, and this tower has no q_proj and k_proj")
    return found


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
    extra = int(isqrt(positions) ** 2 != positions)
    heads = (tiles, positions, attention.num_heads, attention.head_dim)
    by_head, keys = query.view(heads).transpose(1, 2), key.view(heads).permute(0, 2, 3, 1)
    if extra and not getattr(attention.config, "use_mean_pooling", False):
        scores = torch.matmul(by_head[:, :, :1], keys).mul_(attention.scale).softmax(-1, dtype=torch.float32)
        return scores.mean((1, 2))[:, extra:]
    received = query.new_zeros((tiles, positions), dtype=torch.float32)
    for tile in range(tiles):
        for start, stop in blocks(positions, attention.num_heads * positions):
            scores = torch.matmul(by_head[tile, :, start:stop], keys[tile]).mul_(attention.scale)
            received[tile] += scores.softmax(-1, dtype=torch.float32).sum((0, 1))
    return received.div_(attention.num_heads * positions)[:, extra:]


def patches_to_tokens(scores: torch.Tensor, tokens: int) -> torch.Tensor:
    """Scores of patches as scores of the visual tokens they went into: ``(tokens,)`` from ``(tiles, patches)``.

    InternVL's pixel shuffle makes one token of 2 x 2 neighbours: memprof chose the mean of the four.
    """
    tiles, patches = scores.shape
    side = isqrt(patches)
    fold = side // isqrt(tokens // tiles)
    return scores.view(tiles, side // fold, fold, side // fold, fold).mean((2, 4)).flatten()
