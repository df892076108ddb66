"""Baseline: nothing is pruned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memprof.pruning import Pruner, Stage


@dataclass(frozen=True)
class Baseline(Pruner):
    """Every visual token stays in every layer."""

    title = "Baseline"
    paper = "the unpruned model"

    def stages(self, n_visual: int, n_layers: int) -> Sequence[Stage]:
        """No cut."""
        del n_visual, n_layers
        return ()
