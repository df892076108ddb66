"""SparseVLM+: SparseVLM's later version, which drops without merging and takes rotary distance out of attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memprof.plugins import setting
from memprof.pruning import Pruner, Stage, positions_setting
from memprof.pruning.methods.sparsevlm import raters, three_cuts

if TYPE_CHECKING:
    import torch

    from memprof.pruning.view import View

#: Tokens each cut keeps of 576, by budget (code, version 2_0).
_PUBLISHED = {64: (66, 34, 20), 96: (246, 54, 28), 128: (238, 108, 60), 192: (300, 200, 118)}
#: Heads that rate (code).
_HEADS = 14


@dataclass(frozen=True)
class SparseVLMPlus(Pruner):
    """Version 2_0 of SparseVLM's code: the same raters and the same three cuts, and three differences.

    Attention is divided by what rotary positions alone would give: the product of two vectors of ones, turned to their
    positions, over the root of their length. The 14 heads whose raters then attend to visual tokens most are the ones
    that rate. Nothing is merged, and tokens keep their positions.

    Far apart, that divisor comes near zero or below it, and a token's score is then its inverse: a fault of the rule
    that memprof keeps, as the code has it. The code needs 14 heads; where a model has fewer, memprof takes all. Counts
    are the code's tables for budgets of 192, 128, 96 and 64 of 576 tokens; elsewhere they follow as SparseVLM's do
    (:class:`~memprof.pruning.methods.sparsevlm.SparseVLM`).
    """

    title = "SparseVLM+"
    paper = "SparseVLM, ICML 2025, arXiv:2410.04417"
    reference = "Gumpest/SparseVLMs, LlamaDynamicvitModel.forward (version 2_0)"
    departs = "rows of attention in float32, not maps; all heads where there are fewer than 14; shares interpolated"
    keep: float = setting(
        0.333,
        "budget over visual tokens (code: 192 of 576)",
        origin="code",
        gt=0,
        le=1,
        search=(0.05, 1.0),
        monotone=True,
    )
    positions: str = positions_setting("original", "code")

    @property
    def needs(self) -> frozenset[str]:
        """What the text attends to, which text matters, and what positions alone make of it."""
        return frozenset({"text_rows", "text_match", "text_rotation"})

    def stages(self, n_visual: int, n_layers: int) -> Sequence[Stage]:
        """Three cuts; those that would take no token, or come behind the last layer, are left out."""
        return three_cuts(self.keep, _PUBLISHED, n_visual, n_layers)

    def select(self, view: View, kept: int) -> torch.Tensor:
        """The ``kept`` tokens with the highest scores."""
        scores = rated_by_heads(view.text_rows, view.text_match, view.text_rotation)
        return scores.argsort(descending=True, stable=True)[:kept]


def rated_by_heads(text_rows: torch.Tensor, match: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Score of each visual token, ``(n,)`` float32.

    Args:
        text_rows: Attention of text tokens to visual ones, ``(heads, t, n)``.
        match: How much each text token has to do with the picture, ``(t,)``.
        rotation: What positions alone give, ``(t, n)``.
    """
    import torch

    by_head = torch.einsum("tn,htn->hn", raters(match)[:, None] / rotation, text_rows)
    best = by_head.sum(1).topk(min(_HEADS, len(by_head))).indices
    return by_head.index_select(0, best).mean(0)
