"""FastV: keep the visual tokens that the last prompt token attends to most in the layer before the cut."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memprof.plugins import setting
from memprof.pruning import OneCut

if TYPE_CHECKING:
    import torch

    from memprof.pruning.view import View


@dataclass(frozen=True)
class FastV(OneCut):
    """Top-k of the last query's attention, mean over heads, in layer ``layer - 1``.

    ``scores=row`` computes that one row from the cached keys beside any attention kernel; ``scores=map`` reads it off
    the whole map of eager attention, as the reference does: each layer's map is held until the next layer has made
    its own. ``drop=mask`` hides tokens and saves nothing: the form FastV's first code had. With ``scores=map`` it holds
    what that code's loop held: every layer's map in turn, and the map it ranked by to the end of the loop.
    """

    title = "FastV"
    paper = "FastV, ECCV 2024, arXiv:2403.06764"
    reference = "pkunlp-icler/FastV, LlamaModel.fastv_forward"
    departs = "original positions, one prune in prefill, KV ragged; no layer is run twice, so no KV is doubled"
    scores: str = setting(
        "auto",
        "where scores come from; auto: row, or map in the paper stack",
        origin="code",
        choices=("auto", "row", "map"),
    )
    drop: str = setting("true", "drop tokens, or only mask them", origin="code", choices=("true", "mask"))

    @property
    def needs(self) -> frozenset[str]:
        """One row of scores, or the whole map."""
        return frozenset({"map" if self.scores == "map" else "row"})

    @property
    def mask_only(self) -> bool:
        """Whether tokens are only masked."""
        return self.drop == "mask"

    def for_stack(self, stack: str) -> FastV:
        """Scores from the map where the run is to be as the paper's comparison was, else from one row."""
        return self if self.scores != "auto" else dataclasses.replace(self, scores="map" if stack == "paper" else "row")

    def select(self, view: View, kept: int) -> torch.Tensor:
        """The ``kept`` tokens with the highest scores."""
        scores = view.map if self.scores == "map" else view.row
        return scores.topk(kept, sorted=False).indices
