"""HoloV: share the budget out over runs of the picture by how much each holds, before the language model runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from memprof.plugins import setting
from memprof.pruning import OneCut, positions_setting

if TYPE_CHECKING:
    import torch

    from memprof.pruning.view import View


@dataclass(frozen=True)
class HoloV(OneCut):
    """Tokens by the vision tower's attention, within quotas of runs of tokens in prompt order.

    A run's share follows from its tokens' mean score: 1000 times the attention a token receives, and 0.09 times the
    variance of its cosines to the others of the run, scaled to the attention's mean. Quotas are rounded down, and what
    is left goes one each to the runs of most weight. In a run tokens are taken by attention alone (code, ``HoloV`` in
    ``utils.py``). Runs, ``crops=0``: ``int(1024 n / 576 / budget)`` of them, at least one and at most one a token, as
    in the code for Qwen; the code for LLaVA has 16 for its budget of 64, which is the same.

    Where a run's quota is more than it holds, the code keeps all of it in prompt order, leaves the surplus, and fills
    up with vectors of ZEROS at the end. Here the surplus goes to the tokens not yet taken that receive most attention,
    in falling order, behind the others. The code's order is run by run, by falling attention; they stand in prompt
    order here, as in the code for Qwen. Runs are one-dimensional, not windows of the picture, as reported for the code.
    memprof chose: the attention received from all patches for towers that do not use a class token, and runs through
    all tiles as they come. The paper's refetching is not in the code, nor here.
    """

    title = "HoloV"
    paper = "HoloV, NeurIPS 2025, arXiv:2510.02912"
    reference = "obananas/HoloV, HoloV in llava/model/utils.py"
    departs = "surplus quotas go to tokens, not to zero vectors; prompt order; budget round(n * keep)"
    layer: int = setting(0, "decoder layers that still see every token", origin="paper", ge=0)
    crops: int = setting(0, "runs; 0: int(1024 n / 576 / budget)", origin="code", ge=0)
    vision_layer: int = setting(-2, "vision layer whose attention is read", origin="code")
    positions: str = positions_setting("compact", "code")

    @property
    def needs(self) -> frozenset[str]:
        """The vision tower's attention, and the tokens."""
        return frozenset({"vision", "source"})

    def select(self, view: View, kept: int) -> torch.Tensor:
        """``kept`` tokens, run by run, then what fills the surplus."""
        import torch

        scores, sizes, crop = self._runs(view, kept)
        weight = scores / (scores.sum() + 1e-6)
        quota = quotas(weight, kept)
        order = view.vision.argsort(descending=True, stable=True)
        rank = _rank(order, crop, sizes, quota)
        taken = torch.minimum(quota, sizes)
        place = (taken.cumsum(0) - taken).index_select(0, crop) + rank
        behind = torch.empty_like(order).scatter_(0, order, torch.arange(view.count, device=view.device))
        return torch.where(rank < quota.index_select(0, crop), place, view.count + behind).argsort()[:kept]

    def number_of_crops(self, n_visual: int, kept: int) -> int:
        """How many runs there are."""
        return min(n_visual, self.crops or max(1, int(1024 * n_visual / 576 / kept)))

    def _runs(self, view: View, kept: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean score and size of each run, ``(p,)`` float32 and int64, and the run of each token, ``(n,)`` int64."""
        import torch

        crops = self.number_of_crops(view.count, kept)
        size, longer = divmod(view.count, crops)
        split = longer * (size + 1)
        means = [
            scores_of_runs(part.reshape(runs, -1, part.shape[-1]), attention.reshape(runs, -1)).mean(1)
            for runs, part, attention in (
                (longer, view.source[:split], view.vision[:split]),
                (crops - longer, view.source[split:], view.vision[split:]),
            )
            if runs
        ]
        sizes = torch.arange(crops, device=view.device).lt(longer).add(size)
        token = torch.arange(view.count, device=view.device)
        crop = torch.where(token < split, token // (size + 1), longer + (token - split) // size)
        return torch.cat(means), sizes, crop


def _rank(order: torch.Tensor, crop: torch.Tensor, sizes: torch.Tensor, quota: torch.Tensor) -> torch.Tensor:
    """Place of each token in its own run, by the ``order`` of falling attention; as they come where a quota takes all.

    All are int64: ``order`` and the run of each token ``crop`` ``(n,)``, sizes and quotas of runs ``(p,)``.
    """
    import torch

    natural = torch.arange(len(order), device=order.device)
    by_crop = order[crop.index_select(0, order).argsort(stable=True)]
    place = torch.empty_like(natural).scatter_(0, by_crop, natural)
    whole = (quota >= sizes).index_select(0, crop)
    first = (sizes.cumsum(0) - sizes).index_select(0, crop)
    return torch.where(whole, natural, place) - first


def quotas(weight: torch.Tensor, budget: int) -> torch.Tensor:
    """``budget`` shared out by ``weight`` ``(p,)``: rounded down, the remainder one each to the largest; int64."""
    import torch

    quota = (weight * budget).floor().long()
    order = weight.argsort(descending=True, stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(weight), device=weight.device))
    return quota + (place < budget - quota.sum())


def scores_of_runs(tokens: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    """Scores of tokens ``(runs, s, hidden)`` that receive ``attention`` ``(runs, s)``: ``(runs, s)`` float32."""
    if tokens.shape[1] == 1:
        return attention
    received, spread = 1000 * attention, _variance(tokens)
    scale = received.abs().mean(1, keepdim=True) / (spread.abs().mean(1, keepdim=True) + 1e-6)
    return received + 0.09 * scale * spread


def _variance(tokens: torch.Tensor) -> torch.Tensor:
    """Variance of each token's cosines to the others of its run, its own counted as zero: ``(runs, s)`` float32."""
    import torch

    from memprof.pruning.pairs import blocks

    runs, size, _ = tokens.shape
    unit = tokens / (torch.linalg.vector_norm(tokens, dim=2, keepdim=True) + 1e-6)
    columns, found = unit.transpose(1, 2), []
    for start, stop in blocks(size, runs * size):
        pairs = torch.matmul(unit[:, start:stop], columns).float()
        pairs.diagonal(start, 1, 2).zero_()
        mean = pairs.sum(2, keepdim=True) / (size - 1)
        found.append(pairs.sub_(mean).square_().sum(2) / (size - 1))
        del pairs
    return torch.cat(found, 1)
