"""Random selection: the control every pruning method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random as Draw
from typing import TYPE_CHECKING

from memprof.plugins import setting
from memprof.pruning import OneCut

if TYPE_CHECKING:
    import torch

    from memprof.pruning.view import View


@dataclass(frozen=True)
class Random(OneCut):
    """Tokens drawn without replacement, the same ones for the same sample and seed."""

    title = "Random"
    paper = "control"
    seed: int = setting(0, "seed of the draw, mixed with the sample's", origin="memprof", ge=0)

    def select(self, view: View, kept: int) -> torch.Tensor:
        """A seeded draw without replacement, made on the host so that every device draws alike."""
        import torch

        draw = Draw(f"{self.seed}/{view.seed}").sample(range(view.count), kept)
        return torch.tensor(draw, dtype=torch.int64, device=view.device)
