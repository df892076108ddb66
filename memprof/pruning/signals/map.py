"""``map``: the ``row`` of the layer before the cut, read off its whole attention map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from memprof.pruning.signals import Cut, Held, Scene, scoped

if TYPE_CHECKING:
    import torch
    from torch import nn


class Map(Held):
    """The same as ``row``, ``(n,)`` float32, off the map that eager attention keeps.

    The reference's loop holds a layer's map until the next layer has made its own: that second map is part of what the
    method costs, so every layer up to the last cut is watched. Where it only masks (FastV's first code,
    ``last_layer_attention`` and ``last_layer_attention_avg`` in pkunlp-icler/FastV, ``LlamaModel.forward``), it goes on
    asking every layer for its map, and its variables hold the one it ranked by until the loop is over.
    """

    looks_back = True
    eager = True

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self._loop: list[torch.Tensor] = []

    def watch(self, before: Sequence[int]) -> None:
        """Hold each layer's attention map in place of the one before."""
        layers = self.scene.layers if self.scene.loop else self.scene.layers[: before[-1] + 1]
        for layer in layers:
            self.scene.post(cast("nn.Module", layer.self_attn), self._attended)

    def _attended(self, _: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        self.keep(out[1])

    @scoped
    def read(self, cut: Cut) -> torch.Tensor:
        """One row, of the map averaged over heads as a whole first, as FastV's reference does."""
        assert self.held is not None
        assert self.scene.visual is not None
        averaged = self.held.mean(1)
        if self.scene.loop:
            self._loop = [self.held, averaged]
        return averaged[0, -1].index_select(0, self.scene.visual).float()

    def end(self) -> None:
        """Let go of everything."""
        super().end()
        self._loop = []
