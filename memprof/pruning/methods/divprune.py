"""DivPrune: keep the visual tokens that differ most from each other, before the language model runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from memprof.plugins import setting
from memprof.pruning import OneCut, positions_setting

if TYPE_CHECKING:
    import torch

    from memprof.pruning.view import View


@dataclass(frozen=True)
class DivPrune(OneCut):
    """Greedy max-min diversity of the projected visual features, by cosine distance.

    The first token is the one whose nearest neighbour is farthest; then, again and again, the one whose nearest token
    among those already kept is farthest (paper; code, ``DivPrune`` in ``llava_arch.py``). Count ``round(n * keep)``,
    as in the code, whose own share is 0.098.

    Where it departs: the code holds the matrix of all pairs in the model's dtype and gathers a growing part of it at
    every step; here each step computes one row in float32. The tokens are those of the code in exact arithmetic, and
    copies of a kept token can come in again here only last, never twice.
    """

    title = "DivPrune"
    paper = "DivPrune, CVPR 2025, arXiv:2503.02175"
    reference = "vbdi/divprune, LlavaMetaForCausalLM.DivPrune"
    departs = "distances a row at a time in float32, never the matrix of all pairs"
    sequential = True
    layer: int = setting(0, "decoder layers that still see every token", origin="paper", ge=0)
    positions: str = positions_setting("compact", "code")

    @property
    def needs(self) -> frozenset[str]:
        """The tokens themselves."""
        return frozenset({"source"})

    def select(self, view: View, kept: int) -> torch.Tensor:
        """``kept`` tokens, in the order they were chosen."""
        import torch

        from memprof.pruning.pairs import lengths

        unit = view.source / lengths(view.source)[:, None]
        columns = unit.T
        chosen = [_nearest_neighbour(unit).argmin(1)]
        # Cosine of each token to the nearest one kept so far, (1, n).
        nearest = torch.mm(unit.index_select(0, chosen[0]), columns)
        for _ in range(kept - 1):
            # Kept: never again, not even where all that is left are its copies.
            nearest.index_fill_(1, chosen[-1], torch.inf)
            chosen.append(nearest.argmin(1))
            nearest.clamp_(min=torch.mm(unit.index_select(0, chosen[-1]), columns))
        return torch.cat(chosen)


def _nearest_neighbour(unit: torch.Tensor) -> torch.Tensor:
    """Cosine of each unit vector of ``(n, hidden)`` to the nearest other one: ``(1, n)`` float32."""
    import torch

    from memprof.pruning.pairs import blocks, dots

    nearest = []
    for start, stop in blocks(len(unit)):
        pairs = dots(unit[start:stop], unit)
        pairs.diagonal(start).fill_(-torch.inf)
        nearest.append(pairs.amax(1))
        del pairs
    return torch.cat(nearest)[None]
