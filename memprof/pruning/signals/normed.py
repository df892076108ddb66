"""``normed``: the visual tokens the cut finds, behind the model's final norm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memprof.pruning.signals import Cut, Scene, Signal, scoped

if TYPE_CHECKING:
    import torch


class Normed(Signal):
    """What the language model's final norm makes of the output of the layer before the cut, ``(n, hidden)``."""

    of_output = True

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self._norm: Any = scene.anatomy.final_norm

    @scoped
    def read(self, cut: Cut) -> torch.Tensor:
        """The norm of the visual rows alone; not by a call, so that no hook takes it for the model's own run."""
        out: torch.Tensor = self._norm.forward(self.scene.visual_rows(cut.hidden[0]))
        return out
