"""``normed_text``: the text behind the image as the cut finds it, behind the model's final norm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memprof.pruning.signals import Cut, Scene, Signal, scoped

if TYPE_CHECKING:
    import torch


class NormedText(Signal):
    """The same as ``normed`` of the text behind the last visual token: ``(t, hidden)``."""

    leads = ("text",)
    of_output = True

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self._norm: Any = scene.anatomy.final_norm

    @scoped
    def read(self, cut: Cut) -> torch.Tensor:
        """The norm of the text rows alone."""
        out: torch.Tensor = self._norm.forward(self.scene.text_rows(cut.hidden[0]))
        return out
