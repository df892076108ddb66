"""PyramidDrop: drop a share of the visual tokens again and again as the language model goes deeper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memprof.errors import BadValue
from memprof.plugins import setting
from memprof.pruning import Pruner, Stage, positions_setting

if TYPE_CHECKING:
    import torch

    from memprof.pruning.view import View


@dataclass(frozen=True)
class PyramidDrop(Pruner):
    """Equal parts of the depth; between them, the share ``keep`` stays, ranked by the last instruction token.

    With 32 layers, cuts before layers 8, 16 and 24 leave 50, 25 and 12.5 % (paper; code, ``layer_list``
    and ``image_token_ratio_list``). The rank is attention of the last prompt token, mean over heads, in the layer
    BEHIND the cut: its norm and projections run once more ahead of it (code, ``pdrop_rank_drop``). Counts are
    ``int(n * keep ** cut)``, as in the code.

    The code numbers what it keeps anew from 0 in the layers behind each cut, which is the default; that decoding then
    goes on from each layer's own number of tokens is memprof's choice.

    Where it departs: of queries only the last is projected, and no values, where the code projects all three for
    every token. Depths that four does not divide (the code's lists name layers by hand) are cut at the floor.
    """

    title = "PyramidDrop"
    paper = "PyramidDrop, CVPR 2025, arXiv:2410.17247"
    reference = "Cooperx521/PyramidDrop, LlamaModel.pdrop_rank_drop"
    departs = "KV ragged; one query projected for the rank, not all"
    keep: float = setting(
        0.5,
        "share of the visual tokens that each cut keeps (the paper's lambda)",
        origin="paper",
        gt=0,
        le=1,
        search=(0.1, 1.0),
        monotone=True,
    )
    parts: int = setting(4, "equal parts of the depth, one cut between each two", origin="paper", ge=2, search=(2, 6))
    positions: str = positions_setting("compact", "code")

    @property
    def needs(self) -> frozenset[str]:
        """One row of scores in the layer behind each cut."""
        return frozenset({"ahead"})

    def stages(self, n_visual: int, n_layers: int) -> Sequence[Stage]:
        """A cut after each part but the last; cuts that would take no token are left out."""
        if self.parts > n_layers:
            raise BadValue(f"parts={self.parts} is more than the model's {n_layers} decoder layers")
        cuts, left = [], n_visual
        for number in range(1, self.parts):
            kept = min(left, max(1, int(n_visual * self.keep**number)))
            if kept < left:
                cuts.append(Stage(n_layers * number // self.parts, kept))
                left = kept
        return tuple(cuts)

    def select(self, view: View, kept: int) -> torch.Tensor:
        """The ``kept`` tokens with the highest scores."""
        return view.ahead.topk(kept, sorted=False).indices
