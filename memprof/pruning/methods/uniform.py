"""Uniform selection: an even spread over the prompt's visual tokens, a strong control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from memprof.pruning import OneCut

if TYPE_CHECKING:
    import torch

    from memprof.pruning.view import View


@dataclass(frozen=True)
class Uniform(OneCut):
    """Evenly spaced tokens in prompt order: token ``floor((i + 1/2) n / kept)`` for each i."""

    title = "Uniform"
    paper = "control"

    def select(self, view: View, kept: int) -> torch.Tensor:
        """Evenly spaced indices."""
        import torch

        steps = torch.arange(kept, device=view.device)
        return ((2 * steps + 1) * view.count) // (2 * kept)
