"""VisPruner: the tokens the vision tower attends to most, and of the others those that differ, before the LLM runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from memprof.plugins import setting
from memprof.pruning import OneCut, positions_setting

if TYPE_CHECKING:
    import torch

    from memprof.pruning.view import View

#: Tokens dropped in one step of thinning out (code).
_STEP = 8


@dataclass(frozen=True)
class VisPruner(OneCut):
    """Important tokens by the class token's attention, diverse ones by thinning out the rest.

    ``int(budget * important)`` tokens are the ones that the class token attends to most. The rest, in falling order of
    attention, is thinned out until it fills the budget: the places are dealt in turn to two halves, and of the first
    half the (at most 8) tokens most alike to one of the second are dropped; what is left of the first half comes first
    in the next step, in falling order of likeness (code, ``LlavaMetaForCausalLM.encode_images``). Likeness is the
    cosine of features before the projector.

    The code fails where an odd number of tokens is to be dealt, or a half has fewer than are to be dropped (576 tokens
    with budgets of 63 or 8, or of 64 with ``important=0.3``). Here the first half is the larger one of an odd number,
    and no more is dropped than it has. memprof chose, for towers that do not use a class token, the attention received
    from all patches, as VisionZip does; tiles are ranked together, where the code's budget is for each tile. Steps
    follow one another: their number grows with what is dropped. The order within the rest hangs on rounding: in half
    precision another kernel may keep other tokens.
    """

    title = "VisPruner"
    paper = "VisPruner, ICCV 2025, arXiv:2412.01818"
    reference = "Theia-4869/VisPruner, LlavaMetaForCausalLM.encode_images"
    departs = "no failure at odd numbers; cosines summed in float32; all tiles ranked together"
    sequential = True
    layer: int = setting(0, "decoder layers that still see every token", origin="paper", ge=0)
    important: float = setting(
        0.5, "share of the budget that goes to attention", origin="code", ge=0, le=1, search=(0.0, 1.0)
    )
    vision_layer: int = setting(-2, "vision layer whose attention is read", origin="code")
    positions: str = positions_setting("compact", "code")

    @property
    def needs(self) -> frozenset[str]:
        """The vision tower's attention, and the features it hands on."""
        return frozenset({"vision", "patches"})

    def select(self, view: View, kept: int) -> torch.Tensor:
        """The important tokens by falling attention, then the diverse ones as the last step leaves them."""
        import torch

        by_attention = view.vision.argsort(descending=True, stable=True)
        important = int(kept * self.important)
        return torch.cat((by_attention[:important], self._thinned(view, by_attention[important:], kept - important)))

    def _thinned(self, view: View, rest: torch.Tensor, left: int) -> torch.Tensor:
        """``left`` tokens of ``rest``."""
        import torch

        from memprof.pruning.pairs import lengths

        if not left:
            return rest[:0]
        unit = view.patches / lengths(view.patches)[:, None].to(view.patches.dtype)
        while len(rest) > left:
            half, other = rest[::2], rest[1::2]
            dropped = min(_STEP, len(rest) - left, len(half))
            likeness = _likeness(unit.index_select(0, half), unit.index_select(0, other))
            rest = torch.cat((half[likeness.argsort(descending=True, stable=True)[dropped:]], other))
        return rest


def _likeness(tokens: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """The largest inner product of each of ``(r, c)`` with one of ``(s, c)``: ``(r,)`` float32; zero without others."""
    import torch

    from memprof.pruning.pairs import blocks, dots

    if not len(others):
        return tokens.new_zeros(len(tokens), dtype=torch.float32)
    rows = list(blocks(len(tokens), len(others)))
    return torch.cat([dots(tokens[start:stop], others).amax(1) for start, stop in rows])
