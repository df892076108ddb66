"""``target``: the tokens behind the post-attention norm of the layer before the cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from memprof.pruning.signals import Cut, Held

if TYPE_CHECKING:
    import torch
    from torch import nn


class Target(Held):
    """What the post-attention norm of the layer before the cut makes of the tokens, ``(n, hidden)``."""

    looks_back = True

    def watch(self, before: Sequence[int]) -> None:
        """Look at what those layers' norms give."""
        for number in before:
            layer = self.scene.layers[number]
            # Gemma's layers have another norm between the attention's own and the MLP.
            norm = cast("nn.Module", getattr(layer, "pre_feedforward_layernorm", layer.post_attention_layernorm))
            self.scene.post(norm, lambda _, args, kwargs, out: self.keep(out))

    def read(self, cut: Cut) -> torch.Tensor:
        """The visual rows of it."""
        assert self.held is not None
        return self.scene.visual_rows(self.held[0])
