"""VisionZip: keep what the vision tower itself attends to most, and merge the rest, before the language model runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from memprof.plugins import setting
from memprof.pruning import Choice, OneCut, Stage, positions_setting

if TYPE_CHECKING:
    import torch

    from memprof.pruning.view import View


@dataclass(frozen=True)
class VisionZip(OneCut):
    """Dominant tokens by the attention received in the vision tower, contextual tokens merged of all others.

    Dominant ones are the top-k of the attention from the class token where the tower uses one (LLaVA's CLIP), else of
    the mean over all queries (paper; code, ``CLIPVisionTower_VisionZip.forward``: attention map -2). Of the others
    every so-manieth is a target, and each of the rest is assigned to the target whose keys in the same layer, mean over
    heads, are most alike by cosine: a target plus the mean of what was assigned to it is one contextual token, made of
    features before the projector and projected then. They stand behind the dominant ones. ``contextual`` is their share
    of the budget: 10 of 64, 20 of 128 and 30 of 192 in the code.

    ``class_token=true`` hands the class token on before all others, as the code for LLaVA does, in place of one
    dominant token; it is refused where a tower has none in use, and of several tiles the first one's stands for the
    picture. Off by default, so that the method is one for all families.

    Where it departs: with several tiles the code takes equally many of each; here they are ranked together, and
    targets are spread over all. One row of attention, or a block of rows, is worked out beside any kernel, where the
    code asks every layer for its whole map. memprof chose the mean of keys and scores of patches that went into one
    token (:mod:`memprof.pruning.vision`).
    """

    title = "VisionZip"
    paper = "VisionZip, CVPR 2025, arXiv:2412.04467"
    reference = "dvlab-research/VisionZip, CLIPVisionTower_VisionZip"
    departs = "no class token unless asked for; all tiles ranked together; one row of attention, not maps"
    layer: int = setting(0, "decoder layers that still see every token", origin="paper", ge=0)
    contextual: float = setting(
        0.15625, "share of the budget that is merged (10 of 64)", origin="code", ge=0, le=0.5, search=(0.0, 0.5)
    )
    class_token: bool = setting(False, "hand the vision tower's class token on", origin="memprof")
    vision_layer: int = setting(-2, "vision layer whose attention and keys are read", origin="code")
    positions: str = positions_setting("compact", "code")

    @property
    def needs(self) -> frozenset[str]:
        """The vision tower's attention, and what is merged."""
        merging = {"vision_keys", "patches"} if self.contextual else set[str]()
        return frozenset({"vision"} | merging | ({"class_token"} if self.class_token else set()))

    def cut(self, n_visual: int, budget: int) -> Stage:
        """Dominant tokens, and beside them contextual ones and the class token."""
        del n_visual
        merged = min(budget - 1, round(budget * self.contextual) + self.class_token)
        return Stage(self.layer, budget - merged, merged)

    def select(self, view: View, kept: int) -> Choice:
        """The ``kept`` tokens that received most, and what the others are merged into."""
        import torch

        order = view.vision.argsort(descending=True, stable=True)
        first = [view.project(view.class_token[:1])] if self.class_token and view.merged else []
        contextual = view.merged - len(first)
        if contextual:
            first.append(view.project(merged_rest(view, order[kept:].sort().values, contextual)))
        if not first:
            return Choice(order[:kept])
        at = torch.full((view.merged,), view.count - 1, device=view.device)
        at[: view.merged - contextual] = -1
        return Choice(order[:kept], torch.cat(first), at)


def merged_rest(view: View, rest: torch.Tensor, contextual: int) -> torch.Tensor:
    """The tokens ``rest`` ``(r,)``, rising, as so many features before the projector: ``(contextual, c)``."""
    import torch

    from memprof.pruning.pairs import blocks, dots, lengths

    keys = view.vision_keys.index_select(0, rest)
    keys = keys / lengths(keys)[:, None].to(keys.dtype)
    step = max(1, len(rest) // contextual)
    places = torch.arange(len(rest), device=rest.device)
    targets = places[::step][:contextual]
    is_target = torch.zeros_like(places).index_fill_(0, targets, 1)
    others = is_target.argsort(stable=True)[: len(rest) - contextual]
    to = dots(keys.index_select(0, others), keys.index_select(0, targets)).argmax(1)
    width = view.patches.shape[1]
    total = view.patches.new_zeros((contextual, width), dtype=torch.float32)
    sources = rest.index_select(0, others)
    for start, stop in blocks(len(sources), width):
        total.index_add_(0, to[start:stop], view.patches.index_select(0, sources[start:stop]).float())
    count = total.new_zeros(contextual).index_add_(0, to, total.new_ones(len(to)))
    mean = total / count.clamp(min=1)[:, None]
    return (view.patches.index_select(0, rest.index_select(0, targets)) + mean).to(view.patches.dtype)
