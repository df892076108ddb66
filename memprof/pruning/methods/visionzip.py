"""VisionZip: keep the visual tokens that the vision tower itself attends to most, before the language model runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from memprof.plugins import setting
from memprof.pruning import OneCut

if TYPE_CHECKING:
    import torch

    from memprof.pruning.view import View


@dataclass(frozen=True)
class VisionZip(OneCut):
    """VisionZip's dominant tokens: top-k of the attention received in the vision tower's second last layer.

    Attention comes from the class token where the tower uses one (LLaVA's CLIP), else it is the mean over all queries
    (paper; code, ``CLIPVisionTower_VisionZip.forward``: attention map -2, row of the class token, summed
    over heads). See :mod:`memprof.pruning.vision` for InternVL.

    Where it departs: this is the selection half. The code merges what is left into a few contextual tokens (10 beside
    54 dominant ones), and hands the class token on as one more visual token; both put tokens into the prompt that are
    not there, which a choice of indices cannot. With several tiles the code takes equally many of each; here they are
    ranked together. The code numbers what it keeps anew from 0; memprof keeps the original positions. And one row of
    attention, or a block of rows, is worked out beside any kernel, where the code asks every layer for its whole map.
    """

    title = "VisionZip"
    paper = "VisionZip, CVPR 2025, arXiv:2412.04467"
    reference = "dvlab-research/VisionZip, CLIPVisionTower_VisionZip"
    departs = "dominant tokens only, no contextual merging, no class token; all tiles ranked together"
    layer: int = setting(0, "decoder layers that still see every token", origin="paper", ge=0)

    @property
    def needs(self) -> frozenset[str]:
        """The vision tower's attention."""
        return frozenset({"vision"})

    def select(self, view: View, kept: int) -> torch.Tensor:
        """The ``kept`` tokens that received most."""
        assert view.vision is not None
        return view.vision.topk(kept, sorted=False).indices
