"""A method of somebody else's package: every n-th visual token, from the first on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from memprof.pruning import OneCut

if TYPE_CHECKING:
    import torch

    from memprof.pruning.view import View


@dataclass(frozen=True)
class EveryOther(OneCut):
    """Tokens at equal distances."""

    title = "EveryOther"
    paper = "none: an example"

    def select(self, view: View, kept: int) -> torch.Tensor:
        """The ``kept`` tokens."""
        import torch

        return torch.arange(kept, device=view.device) * view.count // kept
