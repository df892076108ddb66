"""TopV: rank visual tokens by optimal transport to what their own layer makes of them; prune the least important."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from memprof.plugins import setting
from memprof.pruning import OneCut

if TYPE_CHECKING:
    import torch

    from memprof.pruning.transport import Cost
    from memprof.pruning.view import View


@dataclass(frozen=True)
class TopV(OneCut):
    """Importance from a transport plan between tokens entering a layer and the same after its post-attention norm.

    The paper's words: one prune in prefill at layer 2; source and target tokens are those two; cost = feature similarity +
    relative spatial distance + absolute central distance; Sinkhorn; the least important are pruned and a subset of
    them is recovered uniformly. It leaves open: norms, marginals, the relaxation, how importance is read, several
    tiles. There memprof chose what ranked best on a small trained model (cosine features, plan balanced by rows then
    columns, importance as the largest share a token sends to one target, no recovery); every other reading stays
    selectable.

    Two readings cannot work, and tests show it: ended on the rows, a balanced plan's row sums are its marginal
    whatever the cost; and the centre term, constant along a row, cancels in the row scaling.
    """

    title = "TopV"
    paper = "TopV, CVPR 2025, arXiv:2503.18278"
    departs = "no recovery by default, importance is the plan's row maximum: both measured best, neither is the paper's"
    features: str = setting(
        "cosine",
        "feature cost: distance of unit vectors, or raw squared distance",
        origin="memprof",
        choices=("cosine", "l2"),
        search=("cosine", "l2"),
    )
    marginals: str = setting(
        "uniform", "what a token has to send: alike, or by its norm", origin="memprof", choices=("uniform", "norm")
    )
    relax: str = setting(
        "none",
        "none: balanced plan; source: only targets have a marginal",
        origin="memprof",
        choices=("none", "source"),
    )
    score: str = setting(
        "max",
        "importance: row maximum or row sum of the plan, or mean feature cost",
        origin="memprof",
        choices=("max", "sum", "cost"),
        search=("max", "cost"),
    )
    recover: int = setting(
        0,
        "recover every n-th pruned token inside the same budget; 0: none",
        origin="paper",
        choices=(0, 4, 6),
        search=(0, 4, 6),
    )
    alpha: float = setting(1.0, "weight of the feature cost", origin="second-hand", ge=0)
    beta: float = setting(1.0, "weight of the spatial cost", origin="second-hand", ge=0)
    gamma: float = setting(0.01, "weight of the centre cost", origin="second-hand", ge=0)
    sigma: float = setting(
        10 / 24,
        "width of the spatial Gaussian, in image edges (10 cells of a 24-cell grid)",
        origin="second-hand",
        gt=0,
    )
    eps: float = setting(0.1, "entropic regularisation", origin="second-hand", gt=0)
    iterations: int = setting(3, "Sinkhorn passes", origin="second-hand", ge=1, le=100)

    @property
    def needs(self) -> frozenset[str]:
        """Source and target tokens."""
        return frozenset({"source", "target"})

    def select(self, view: View, kept: int) -> torch.Tensor:
        """The most important tokens, with every ``recover``-th of the others in place of the least of them."""
        import torch

        order = self.importance(view).argsort(descending=True, stable=True)
        if not self.recover:
            return order[:kept]
        # k tokens by rank and every recover-th of the n - k others fill the budget: k + (n - k) // recover = kept.
        best = max(0, (kept * self.recover - view.count) // (self.recover - 1))
        pruned = order[best:].sort().values
        places = torch.arange(kept - best, device=pruned.device) * len(pruned) // max(1, kept - best)
        return torch.cat((order[:best], pruned[places]))

    def importance(self, view: View) -> torch.Tensor:
        """Importance of each token, ``(n,)`` float32; the higher, the sooner it stays."""
        from memprof.pruning.transport import reduce_rows, sinkhorn, source_relaxed

        assert view.source is not None
        assert view.target is not None
        norms = _norms(view.source)
        if self.score == "cost":
            unit = view.target.div(_norms(view.target)[:, None]).mean(0)
            return -(view.source @ unit).float() / norms
        columns = norms.new_full((view.count,), 1 / view.count)
        if self.relax == "source":
            u, v = source_relaxed(self.costs(view), columns, self.eps)
        else:
            rows = norms / norms.sum() if self.marginals == "norm" else columns
            u, v = sinkhorn(self.costs(view), rows, columns, self.eps, self.iterations)
        return reduce_rows(self.costs(view), u, v, self.eps, _row_max if self.score == "max" else _row_sum)

    def costs(self, view: View) -> Cost:
        """Blocks of the weighted sum of the three terms, each of them in [0, 1]."""
        assert view.source is not None
        assert view.target is not None
        source, target, places, images = view.source, view.target, view.positions, view.images
        feature = cosine_cost if self.features == "cosine" else squared_cost
        source_norms, target_norms = _norms(source), _norms(target)

        def block(start: int, stop: int) -> torch.Tensor:
            total = feature(source[start:stop], target, source_norms[start:stop], target_norms, source_norms)
            total.mul_(self.alpha)
            if self.beta:
                near = spatial_cost(places[start:stop], places, self.sigma)
                near.masked_fill_(images[start:stop, None] != images, 1.0)
                total.add_(near, alpha=self.beta)
            if self.gamma:
                total.add_(centre_cost(places[start:stop])[:, None], alpha=self.gamma)
            return total

        return block


def cosine_cost(
    source: torch.Tensor, target: torch.Tensor, source_norms: torch.Tensor, target_norms: torch.Tensor, _: torch.Tensor
) -> torch.Tensor:
    """Half the distance of unit vectors, ``(b, n)`` float32 in [0, 1]."""
    from memprof.pruning.transport import dots

    cosine = dots(source, target).div_(source_norms[:, None]).div_(target_norms)
    return cosine.mul_(-0.5).add_(0.5).clamp_(min=0).sqrt_()


def squared_cost(
    source: torch.Tensor,
    target: torch.Tensor,
    source_norms: torch.Tensor,
    target_norms: torch.Tensor,
    all_source_norms: torch.Tensor,
) -> torch.Tensor:
    """Squared distance over its largest possible value, ``(b, n)`` float32 in [0, 1].

    memprof chose the bound in place of the largest value found, which would take a pass of its own.
    """
    from memprof.pruning.transport import dots

    squared = dots(source, target).mul_(-2).add_(source_norms.square()[:, None]).add_(target_norms.square())
    return squared.clamp_(min=0).div_((all_source_norms.max() + target_norms.max()).square())


def spatial_cost(places: torch.Tensor, all_places: torch.Tensor, sigma: float) -> torch.Tensor:
    """One minus a Gaussian of the distance on the image, ``(b, n)`` float32 in [0, 1]."""
    across = places[:, None, 0] - all_places[:, 0]
    down = places[:, None, 1] - all_places[:, 1]
    return across.square_().add_(down.square_()).div_(-2 * sigma**2).expm1_().neg_()


def centre_cost(places: torch.Tensor) -> torch.Tensor:
    """Distance from the image's centre over that of a corner, ``(b,)`` float32 in [0, 1]."""
    return places.sub(0.5).square_().sum(1).sqrt_().div_(0.5**0.5)


def _norms(tokens: torch.Tensor) -> torch.Tensor:
    """Length of each token, ``(n,)`` float32, never zero."""
    import torch

    norms: torch.Tensor = torch.linalg.vector_norm(tokens, dim=1, dtype=torch.float32)
    return norms.clamp_(min=1e-12)


def _row_max(plan: torch.Tensor) -> torch.Tensor:
    return plan.amax(1)


def _row_sum(plan: torch.Tensor) -> torch.Tensor:
    return plan.sum(1)
