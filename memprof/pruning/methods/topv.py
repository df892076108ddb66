"""TopV: rank visual tokens by optimal transport to what their own layer makes of them; prune the least important."""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING

from memprof.errors import BadValue
from memprof.plugins import setting
from memprof.pruning import OneCut

if TYPE_CHECKING:
    import torch

    from memprof.pruning.transport import Block, Kernel
    from memprof.pruning.view import View


@dataclass(frozen=True)
class TopV(OneCut):
    """Importance from a transport plan between tokens entering a layer and the same after its post-attention norm.

    The paper's words: one prune in prefill, in layer 2 as FastV does; the source is the visual tokens entering that
    layer, the target the same after its Post-LN (memprof: the post-attention RMSNorm); cost = feature similarity +
    relative spatial distance + absolute central distance; Sinkhorn; the least important are pruned, and a subset of
    the pruned is recovered uniformly. memprof knows of no code by the authors.

    Left open, and chosen by memprof: norms, marginals, order and relaxation of the transport, how importance is read,
    several tiles. The defaults are the reading with all three terms and a transport that measured best on the proving
    model: unit vectors, a plan balanced by rows then columns, importance = the most a
    token sends to ONE target, a spatial Gaussian of half its cells, no recovery. The Gaussian matters most: as wide as
    second-hand notes have it, it asks a token to be unlike its neighbourhood, and tokens at the picture's edge, which
    have fewer neighbours, win. ``score=sum`` without the spatial term does as well, and falls to chance when the plan
    converges (``iterations=20``); ``score=cost`` has no transport. On the second proving model the default holds, and
    most readings tie (``docs/pruning.md`` has both). Two small models do not settle it: all readings stay selectable.
    Tokens of all tiles have their place on the whole image (:meth:`memprof.families.Family.visual_positions`); tokens
    of different images are as far apart as can be.

    What cannot work, shown by tests: (1) ended on the rows, a balanced plan's row sums are its marginal whatever the
    cost, so ``score=sum`` ranks by the residue of convergence alone; (2) the centre term is constant along a row and
    cancels in the row scaling, so ``gamma`` does nothing unless ``relax=source``; (3) ``recover=4`` at keep 0.25
    leaves no place for rank: the whole budget goes to the uniform part.
    """

    title = "TopV"
    paper = "TopV, CVPR 2025, arXiv:2503.18278"
    departs = "no recovery by default, importance is the plan's row maximum: measured on a small model, not the paper's"
    features: str = setting(
        "cosine",
        "feature cost: distance of unit vectors, or raw squared distance",
        origin="memprof",
        choices=("cosine", "l2"),
        search=("cosine", "l2"),
    )
    marginals: str = setting(
        "uniform",
        "what tokens send and receive: all alike, or by norm (second-hand)",
        origin="memprof",
        choices=("uniform", "norm"),
    )
    relax: str = setting(
        "none",
        "balanced plan, or only the targets have a marginal",
        origin="memprof",
        choices=("none", "source"),
        search=("none", "source"),
    )
    score: str = setting(
        "max",
        "importance: row maximum or row sum of the plan, or mean feature cost without one",
        origin="memprof",
        choices=("max", "sum", "cost"),
        search=("max", "cost"),
    )
    recover: int = setting(
        0,
        "recover every n-th pruned token inside the same budget; 0: none",
        origin="second-hand",
        choices=(0, 4, 6),
        search=(0, 4, 6),
    )
    alpha: float = setting(1.0, "weight of the feature cost", origin="second-hand", ge=0, search=(0.0, 2.0))
    beta: float = setting(1.0, "weight of the spatial cost", origin="second-hand", ge=0, search=(0.0, 2.0))
    gamma: float = setting(0.01, "weight of the centre cost; cancels unless relax=source", origin="second-hand", ge=0)
    sigma: float = setting(
        0.05,
        "width of the spatial Gaussian in image edges (second-hand: 10 cells of 24)",
        origin="memprof",
        gt=0,
        search=(0.02, 1.0),
    )
    eps: float = setting(0.1, "entropic regularisation", origin="second-hand", gt=0, search=(0.05, 1.0))
    iterations: int = setting(3, "Sinkhorn iterations", origin="second-hand", ge=1, le=100)

    def __post_init__(self) -> None:
        """Raise BadValue where ``exp(-cost / eps)`` would vanish in float32."""
        if self.alpha + self.beta + self.gamma > 80 * self.eps:
            raise BadValue(f"eps={self.eps} is too small for the weights: take alpha + beta + gamma over 80, or more")

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
        from memprof.pruning.transport import row_maxima, row_sums, sinkhorn, source_relaxed

        if self.score == "cost":
            return mean_cosine(view.source, view.target).neg_()
        kernel, (rows, columns) = self.kernel(view), self.marginal(view)
        if self.relax == "source":
            # The kernel has exp(beta / eps) too much, since its closeness is the spatial cost's less 1.
            centre = centre_cost(view.positions).mul_(-self.gamma / self.eps).sub_(self.beta / self.eps).exp_()
            u, v = source_relaxed(kernel, centre, columns)
        else:  # what is the same all along a row cancels when rows are scaled
            u, v = sinkhorn(kernel, rows, columns, self.iterations)
        return (row_maxima if self.score == "max" else row_sums)(kernel, u, v)

    def marginal(self, view: View) -> tuple[torch.Tensor, torch.Tensor]:
        """What each token sends, and what each receives: ``(n,)`` float32 summing to 1."""
        import torch

        from memprof.pruning.pairs import lengths

        if self.marginals == "norm":
            sent, received = (norms.div_(norms.sum()) for norms in map(lengths, (view.source, view.target)))
            return sent, received
        alike = view.source.new_full((view.count,), 1 / view.count, dtype=torch.float32)
        return alike, alike

    def kernel(self, view: View) -> Kernel:
        """``exp(-(alpha * feature + beta * spatial) / eps)`` but for a factor of all; each term is in [0, 1].

        Where the plan is balanced, a row is over its own sum: then its first scaling is done, in the pass that takes
        the exponential. Two matrices of pairs stand side by side while it is made, so they share the view's room.
        """
        import torch

        from memprof.pruning.pairs import blocks
        from memprof.pruning.transport import Kernel

        feature_cost = cosine_cost if self.features == "cosine" else squared_cost
        feature = feature_cost(view.source, view.target, self.alpha / self.eps)
        spatial = self.beta / self.eps
        closeness = spatial_closeness(view.positions, view.images, self.sigma, spatial)

        def block(start: int, stop: int) -> torch.Tensor:
            # What is near first: while the device is at it, the host hands out the rest.
            exponents = closeness(start, stop).sub_(feature(start, stop)) if spatial else feature(start, stop).neg_()
            return exponents.exp_() if self.relax == "source" else torch.softmax(exponents, 1)

        return Kernel(block, list(blocks(view.count, 2 * view.count, view.room * view.count)))


def cosine_cost(source: torch.Tensor, target: torch.Tensor, weight: float = 1.0) -> Block:
    """Half the distance of unit vectors, ``sqrt((1 - cos) / 2)`` in [0, 1], times ``weight``: ``(b, n)`` float32."""
    import torch

    from memprof.pruning.pairs import dots, lengths

    half = weight**2 / 2

    def block(start: int, stop: int) -> torch.Tensor:
        rows, columns = lengths(source[start:stop])[:, None], lengths(target)
        pairs = dots(source[start:stop], target).div_(rows)
        torch.addcdiv(columns.new_full((), half), pairs, columns, value=-half, out=pairs)
        return pairs.clamp_(min=0).sqrt_()  # rounding can take identical tokens below zero

    return block


def squared_cost(source: torch.Tensor, target: torch.Tensor, weight: float = 1.0) -> Block:
    """Squared distance over the largest it could be, ``(max |s| + max |t|)^2``, times ``weight``: ``(b, n)`` float32.

    memprof chose this bound in place of the largest value found, which would take a pass of its own.
    """
    from memprof.pruning.pairs import dots, lengths

    rows, columns = lengths(source), lengths(target)
    share = (rows.max() + columns.max()).square_().reciprocal_().mul_(weight)
    rows, columns = rows.square_().mul_(share)[:, None], columns.square_().mul_(share)
    share = share.mul_(-2)

    def block(start: int, stop: int) -> torch.Tensor:
        pairs = dots(source[start:stop], target).mul_(share)
        return pairs.add_(rows[start:stop]).add_(columns).clamp_(min=0)

    return block


def spatial_closeness(places: torch.Tensor, images: torch.Tensor, sigma: float, weight: float = 1.0) -> Block:
    """A Gaussian of the distance on the image, 0 between images, times ``weight``: ``(b, n)`` float32.

    It is 1 less the spatial cost.

    Args:
        places: Centres of the tokens, ``(n, 2)`` float32, in units of the image's edges.
        images: Number of the image of each, ``(n,)`` int64.
        sigma: Width of the Gaussian, in the same units.
        weight: Above 0.
    """
    import torch

    # Beyond these ends the Gaussian is the same in float32, and the numbers below would leave its range.
    width = min(max(sigma, 1e-12), 1e6) * 2**0.5

    def block(start: int, stop: int) -> torch.Tensor:
        x, y = places.unbind(1)
        # Images side by side, 20 widths apart: there the Gaussian is zero in float32, and no mask is needed.
        x = torch.add(x, images, alpha=1 + 20 * width)
        top = x.new_full((), log(weight))
        # Differences, not products: what is near is told apart to the last bit.
        across, down = (at[start:stop, None] - at for at in (x, y))
        torch.addcmul(top, across, across, value=-(width**-2), out=across)
        return across.addcmul_(down, down, value=-(width**-2)).exp_()

    return block


def centre_cost(places: torch.Tensor) -> torch.Tensor:
    """Distance from the image's centre over that of a corner, ``(n,)`` float32 in [0, 1]; the same for every target."""
    return places.sub(0.5).square_().sum(1).sqrt_().div_(0.5**0.5)


def mean_cosine(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean cosine of each source token to all targets, ``(n,)`` float32, without a pass over pairs."""
    import torch

    from memprof.pruning.pairs import blocks, lengths

    shares = lengths(target).reciprocal_().div_(len(target))
    parts = list(blocks(*target.shape))
    mean = torch.stack([shares[start:stop] @ target[start:stop].float() for start, stop in parts]).sum(0)
    return torch.cat([source[start:stop].float() @ mean for start, stop in parts]).div_(lengths(source))
