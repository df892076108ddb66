"""``output``: the tokens as the cut finds them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memprof.pruning.signals import Cut, Signal

if TYPE_CHECKING:
    import torch


class Output(Signal):
    """Hidden states that leave the layer before the cut, ``(n, hidden)`` in the model's dtype.

    For a cut before layer 0, the merged input embeddings, as in ``source``.
    """

    of_output = True

    def read(self, cut: Cut) -> torch.Tensor:
        """The visual rows of what is cut."""
        return self.scene.visual_rows(cut.hidden[0])
