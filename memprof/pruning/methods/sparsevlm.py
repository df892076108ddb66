"""SparseVLM: drop what the question's words do not attend to, at three depths, and merge a part of what is dropped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random as Draw
from typing import TYPE_CHECKING

from memprof.plugins import setting
from memprof.pruning import Choice, Pruner, Stage, positions_setting

if TYPE_CHECKING:
    import torch

    from memprof.pruning.view import View

#: Decoder layers that run before each cut (code: behind layers 2, 6 and 15), and of how many in the published model.
_LAYERS, _DEPTH = (3, 7, 16), 32
#: Tokens each cut keeps of 576, by budget (code, ``score.py``).
_PUBLISHED = {64: (66, 30, 17), 96: (238, 48, 26), 128: (303, 110, 36), 192: (300, 200, 110)}
_OF = 576


@dataclass(frozen=True)
class SparseVLM(Pruner):
    """Tokens ranked by the attention of the text tokens that have to do with the picture, with recycling.

    Raters are the text tokens behind the image that visual tokens match more than the mean text token does, by the
    embeddings that enter layer 0. A visual token's score is the attention it receives from the raters, mean over heads
    and raters, in the layer whose OUTPUT is cut. Of the d tokens cut, the ``int(0.3 d) + 1`` with the highest scores
    are merged into a tenth as many by density peaks: density from the nearest neighbours, centres are dense and far
    from anything denser, and a cluster's tokens are averaged (code, ``LlamaDynamicvitModel.forward``,
    ``cluster_and_merge``, version 1_0). They stand behind the visual tokens, and later cuts rank them with the others.

    ``keep`` is the budget over all visual tokens. For 576 tokens and budgets of 192, 128, 96 and 64 the counts are the
    code's tables; between them memprof interpolates each cut's share, and applies shares to other numbers of tokens.
    Note that those budgets are means over 32 layers. The cuts are behind layers 2, 6 and 15, in a model of at most 16
    layers at the same depths in proportion (memprof's choice). The paper's rank-adaptive counts stood in the first
    release alone; they depend on numbers, and are not offered. Version 2_0 of the code is ``sparsevlm-plus``.

    The code adds noise of 1e-6 to densities, drawn anew each time, and for one or two clusters, where densities tie, it
    decides. memprof draws it with the sample's seed. The code numbers positions anew in each layer, which is the
    default, and rates by maps of all layers; here the rows of the text alone are worked out, beside any attention
    kernel.
    """

    title = "SparseVLM"
    paper = "SparseVLM, ICML 2025, arXiv:2410.04417"
    reference = "Gumpest/SparseVLMs, LlamaDynamicvitModel.forward (version 1_0)"
    departs = "seeded noise; rows of attention in float32, not maps; shares interpolated between the code's tables"
    keep: float = setting(
        0.333,
        "budget over visual tokens (code: 192 of 576)",
        origin="code",
        gt=0,
        le=1,
        search=(0.05, 1.0),
        monotone=True,
    )
    recycle: bool = setting(True, "merge a part of what is cut", origin="code", search=(True, False))
    positions: str = positions_setting("compact", "code")

    @property
    def needs(self) -> frozenset[str]:
        """What the text attends to, which text matters, and the tokens that may be merged."""
        return frozenset({"text_rows", "text_match"} | ({"output"} if self.recycle else set()))

    def stages(self, n_visual: int, n_layers: int) -> Sequence[Stage]:
        """Three cuts; those that would take no token, or come behind the last layer, are left out."""
        return three_cuts(
            self.keep, _PUBLISHED, n_visual, n_layers, lambda cut: merged_from(cut)[1] if self.recycle else 0
        )

    def select(self, view: View, kept: int) -> Choice:
        """The ``kept`` tokens with the highest scores, and what the best of the others are merged into."""
        import torch

        scores = rated(view.text_rows, view.text_match)
        order = scores.argsort(descending=True, stable=True)
        if not self.recycle:
            return Choice(order[:kept])
        some, clusters = merged_from(view.count - kept)[0], view.merged
        draw = Draw(view.seed)  # on the host, so that every device draws alike
        noise = torch.tensor([draw.random() for _ in range(some)], device=view.device)
        tokens = view.output.index_select(0, order[kept : kept + some])
        merged = clustered(tokens, clusters, noise).merged
        behind = torch.full((clusters,), view.count - 1, device=view.device)
        return Choice(order[:kept], merged.to(view.output.dtype), behind)


def three_cuts(
    keep: float,
    published: Mapping[int, Sequence[int]],
    n_visual: int,
    n_layers: int,
    merged: Callable[[int], int] = lambda cut: 0,
) -> tuple[Stage, ...]:
    """The cuts of a budget of ``keep``; those that would take no token, or come behind the last layer, are left out.

    Args:
        keep: The budget over all visual tokens, above 0 and at most 1.
        published: The code's counts, as :func:`shares` takes them.
        n_visual: Visual tokens of the prompt.
        n_layers: Decoder layers of the model.
        merged: How many tokens are made of so many that are cut.
    """
    cuts, left = list[Stage](), n_visual
    for layer, share in zip(cut_layers(n_layers), shares(keep, published), strict=False):
        kept = max(1, min(round(share * n_visual), left - 1))
        if keep == 1 or kept >= left:
            break
        cuts.append(Stage(layer, kept, merged(left - kept)))
        left = cuts[-1].tokens
    return tuple(cuts)


def cut_layers(n_layers: int) -> list[int]:
    """How many layers run before each cut in a model of ``n_layers``; no two cuts at one place, none behind the end."""
    scale = 1.0 if n_layers > _LAYERS[-1] else n_layers / _DEPTH
    layers = list[int]()
    for layer in _LAYERS:
        layers.append(max(1 + (layers[-1] if layers else 0), int(layer * scale)))
    return [layer for layer in layers if layer < n_layers]


def shares(keep: float, published: Mapping[int, Sequence[int]]) -> list[float]:
    """The share of all visual tokens that each cut keeps for a budget of ``keep``.

    Args:
        keep: The budget over all visual tokens, above 0 and at most 1.
        published: The code's counts of each cut, of 576 tokens, by budget; between them shares are interpolated.
    """
    from itertools import pairwise

    tables = {budget / _OF: tuple(k / _OF for k in kept) for budget, kept in published.items()}
    known = {0.0: (0.0,) * 3, **tables, 1.0: (1.0,) * 3}
    low, high = next((a, b) for a, b in pairwise(sorted(known)) if keep <= b + 1e-12)
    way = min(1.0, (keep - low) / (high - low))
    return [a + way * (b - a) for a, b in zip(known[low], known[high], strict=True)]


def merged_from(cut: int) -> tuple[int, int]:
    """Of ``cut`` tokens, how many are merged, and into how many (code)."""
    some = min(cut, int(0.3 * cut) + 1)
    return some, int(some / 10) + 1


def raters(match: torch.Tensor) -> torch.Tensor:
    """Weights of the text tokens ``(t,)`` that rate, summing to 1: those above the mean, or all where none is."""
    above = (match > match.mean()).float()
    above = above + (above.sum() == 0)
    return above / above.sum()


def rated(text_rows: torch.Tensor, match: torch.Tensor) -> torch.Tensor:
    """Score of each visual token, ``(n,)``: attention of the raters, mean over heads and raters."""
    return raters(match) @ text_rows.mean(0)


@dataclass(frozen=True)
class Clusters:
    """Clusters of m tokens.

    Attributes:
        centres: The tokens they have for centres, ``(c,)`` int64.
        of: The cluster of each token, ``(m,)`` int64.
        merged: The mean of each, ``(c, hidden)`` float32.
    """

    centres: torch.Tensor
    of: torch.Tensor
    merged: torch.Tensor


def clustered(tokens: torch.Tensor, clusters: int, noise: torch.Tensor) -> Clusters:
    """``tokens`` ``(m, hidden)`` by density peaks, their densities told apart by ``noise`` ``(m,)`` in [0, 1)."""
    import torch

    tokens = tokens.float()
    apart = torch.cdist(tokens, tokens) / tokens.shape[1] ** 0.5
    nearest = apart.topk(clusters, dim=1, largest=False).values
    density = nearest.square().mean(1).neg().exp() + 1e-6 * noise
    denser = density[None] > density[:, None]
    separation = torch.where(denser, apart, apart.max()).amin(1)
    centres = (separation * density).topk(clusters).indices
    of = apart.index_select(0, centres).argmin(0)
    of = of.scatter(0, centres, torch.arange(clusters, device=of.device))
    count = tokens.new_zeros(clusters).index_add_(0, of, tokens.new_ones(len(tokens)))
    total = tokens.new_zeros((clusters, tokens.shape[1])).index_add_(0, of, tokens)
    return Clusters(centres, of, total / (count[:, None] + 1e-6))
