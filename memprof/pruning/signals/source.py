"""``source``: the tokens as they enter the layer before the cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from memprof.pruning.signals import Cut, Held, entering

if TYPE_CHECKING:
    import torch


class Source(Held):
    """Hidden states entering the layer before the cut, ``(n, hidden)`` in the model's dtype.

    For a cut before layer 0, the merged input embeddings: the projector's output.
    """

    def watch(self, before: Sequence[int]) -> None:
        """Look at what those layers are given."""
        for number in before:
            if number >= 0:
                self.scene.pre(self.scene.layers[number], lambda _, args, kwargs: self.keep(entering(args, kwargs)))

    def read(self, cut: Cut) -> torch.Tensor:
        """The visual rows of it."""
        return self.scene.visual_rows((cut.hidden if self.held is None else self.held)[0])
