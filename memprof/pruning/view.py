"""What a pruner may look at: the visual tokens at the place where it prunes, and nothing it could change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class View:
    """The visual tokens still alive at one pruning stage, in prompt order.

    What a pruner does not name in its ``needs`` is not there for it, so that nothing is kept alive for nobody.

    Attributes:
        count: How many there are: n.
        device: Where they are.
        source: Hidden states entering the layer before the cut, ``(n, hidden)`` in the model's dtype; for a cut at
            layer 0, the merged input embeddings.
        target: The same tokens after that layer's post-attention norm, ``(n, hidden)``.
        vision: Attention each token's patches received in the vision tower's second last layer, ``(n,)`` float32 (see
            :mod:`memprof.pruning.vision`).
        positions: Centre of each token on its image, ``(n, 2)`` float32, x and y in units of the image's edges.
        images: Number of the image each token belongs to, ``(n,)`` int64.
        row: Gives ``(n,)`` float32: attention of the LAST prompt token to each visual token in the layer before the
            cut, mean over heads.
        map: Gives the same from that layer's kept attention map (eager attention only).
        ahead: Gives the same for the layer BEHIND the cut, worked out before that layer runs.
        seed: For pruners that draw at random; the same for the same sample.
    """

    count: int
    device: torch.device
    source: torch.Tensor | None
    target: torch.Tensor | None
    vision: torch.Tensor | None
    positions: torch.Tensor
    images: torch.Tensor
    row: Callable[[], torch.Tensor]
    map: Callable[[], torch.Tensor]
    ahead: Callable[[], torch.Tensor]
    seed: int
