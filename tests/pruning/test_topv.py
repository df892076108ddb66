"""TopV: its cost terms, its transport against a dense float64 one, its recovery, its memory, and what cannot work."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from views import a_view, other

from memprof.errors import BadValue
from memprof.models.find import find
from memprof.pruning import build_pruner, pairs
from memprof.pruning.methods import topv
from memprof.pruning.methods.topv import TopV
from memprof.pruning.transport import row_maxima, row_sums, sinkhorn
from memprof.pruning.view import View


def tokens(n: int, *, hidden: int = 24, seed: int = 0, images: int = 1) -> View:
    """Random tokens, their targets correlated with them as a norm of them would be."""
    draw = torch.Generator().manual_seed(seed)
    source = torch.randn(n, hidden, generator=draw) * (1 + torch.rand(n, 1, generator=draw))
    target = source * torch.rand(hidden, generator=draw) + torch.randn(n, hidden, generator=draw) / 2
    return a_view(
        source=source,
        target=target,
        positions=torch.rand(n, 2, generator=draw),
        images=torch.arange(n) * images // n,
    )


def dense(pruner: TopV, view: View) -> torch.Tensor:
    """Importance once more, in float64, with every matrix whole."""
    source, target, at = view.source.double(), view.target.double(), view.positions.double()
    if pruner.features == "cosine":
        unit = [x / x.norm(dim=1, keepdim=True) for x in (source, target)]
        feature = (unit[0][:, None] - unit[1]).norm(dim=2) / 2
    else:
        bound = source.norm(dim=1).max() + target.norm(dim=1).max()
        feature = (source[:, None] - target).square().sum(2) / bound**2
    apart = (at[:, None] - at).square().sum(2)
    near = torch.where(view.images[:, None] == view.images, (-apart / (2 * pruner.sigma**2)).exp(), 0.0)
    centre = (at - 0.5).norm(dim=1, keepdim=True) / 0.5**0.5
    kernel = (-(pruner.alpha * feature + pruner.beta * (1 - near) + pruner.gamma * centre) / pruner.eps).exp()

    def mass(x: torch.Tensor) -> torch.Tensor:
        return x.norm(dim=1) / x.norm(dim=1).sum() if pruner.marginals == "norm" else torch.ones(len(x)) / len(x)

    u, v = torch.ones(len(source)).double(), torch.ones(len(source)).double()
    if pruner.relax == "source":
        v = mass(target) / kernel.sum(0)
    else:
        for _ in range(pruner.iterations):
            u = mass(source) / (kernel @ v)
            v = mass(target) / (u @ kernel)
    plan = u[:, None] * kernel * v
    return plan.amax(1) if pruner.score == "max" else plan.sum(1)


READINGS = [
    {},
    {"relax": "source"},
    {"score": "sum"},
    {"relax": "source", "score": "sum", "gamma": 0.5},
    {"features": "l2", "marginals": "norm"},
    {"marginals": "norm", "relax": "source", "iterations": 1},
]


@pytest.mark.parametrize("fields", READINGS, ids=str)
@pytest.mark.parametrize("n", [1, 2, 64, 130, 333])
@pytest.mark.parametrize("room", [2**30, 2 * 4 * 64])  # whole; 130 tokens in three blocks, the last one smaller
def test_the_solver_equals_a_dense_one_in_float64(n: int, fields: Any, room: int) -> None:
    pruner, view = TopV(**fields), dataclasses.replace(tokens(n, images=2), room=room)
    torch.testing.assert_close(pruner.importance(view).double(), dense(pruner, view), rtol=1e-5, atol=0)


@pytest.mark.parametrize("n", [0, 1, 5, 576, 3328, 6400])
@pytest.mark.parametrize("room", [None, 0, 10_000, 2**27])
def test_blocks_cover_every_row_once_and_stay_in_their_room(n: int, room: int | None) -> None:
    ranges, most = list(pairs.blocks(n, room=room)), pairs.BLOCK_BYTES if room is None else room
    assert [row for start, stop in ranges for row in range(start, stop)] == list(range(n))
    assert all(4 * n * (stop - start) <= max(most, 4 * n) for start, stop in ranges)
    rows = max(1, most // (4 * n)) if n else 1
    assert len(ranges) == -(-n // rows), "as few as there can be"


@pytest.mark.parametrize("fields", [*READINGS, {"score": "cost"}], ids=str)
def test_permuting_tokens_permutes_importance(fields: Any) -> None:
    view = tokens(90, images=3)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(1))
    turned = other(view, **{name: getattr(view, name)[order] for name in ("source", "target", "positions", "images")})
    pruner = TopV(**fields)
    torch.testing.assert_close(pruner.importance(turned), pruner.importance(view)[order], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("fields", [*READINGS, {"score": "cost"}], ids=str)
def test_identical_tokens_tie(fields: Any) -> None:
    view = tokens(60)
    for rows in (view.source, view.target, view.positions):
        rows[41] = rows[7]
    importance = TopV(**fields).importance(view)
    torch.testing.assert_close(importance[41], importance[7], rtol=1e-5, atol=1e-7)


def ranks(view: View, **fields: Any) -> list[int]:
    return TopV(**fields).importance(view).argsort(stable=True).tolist()


def test_each_cost_term_changes_the_ranking_when_it_should() -> None:
    view = tokens(80)
    assert ranks(view) != ranks(view, alpha=0.0)
    assert ranks(view) != ranks(view, beta=0.0)
    assert ranks(view, sigma=0.1) != ranks(view, sigma=1.0)
    assert ranks(view, relax="source") != ranks(view, relax="source", gamma=0.5)


@pytest.mark.parametrize(("extreme", "as_good_as"), [(5e-324, 1e-9), (1e300, 1e5)])
def test_a_width_beyond_float32_is_as_good_as_one_at_its_end(extreme: float, as_good_as: float) -> None:
    found, same = (TopV(sigma=sigma).importance(tokens(60, images=2)) for sigma in (extreme, as_good_as))
    torch.testing.assert_close(found, same)
    nothing, none = (TopV(beta=beta, eps=10.0).importance(tokens(60)) for beta in (5e-324, 0.0))
    torch.testing.assert_close(nothing, none)


def test_terms_are_what_they_say() -> None:
    view = tokens(40)
    for term in (topv.cosine_cost, topv.squared_cost):
        block = term(view.source, view.target)(10, 30)
        assert block.shape == (20, 40)
        assert 0 <= block.min() < block.max() <= 1
        torch.testing.assert_close(term(view.source, view.target, 7.0)(10, 30), 7 * block)
    opposite = topv.cosine_cost(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 2.0], [-1.0, 0.0]]))(0, 1)
    torch.testing.assert_close(opposite, torch.tensor([[0.0, 0.5**0.5, 1.0]]))
    places, images = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.9, 0.8]]), torch.tensor([0, 1, 1])
    spatial = 1 - topv.spatial_closeness(places, images, 0.4)(0, 3)
    torch.testing.assert_close(spatial[0], torch.tensor([0.0, 1.0, 1.0]))  # the same place on another image is far away
    assert 0 < spatial[1, 2] < 1
    torch.testing.assert_close(spatial, spatial.T)
    torch.testing.assert_close(topv.spatial_closeness(places, images, 0.4, 7.0)(0, 3), 7 * (1 - spatial))
    corners = torch.tensor([[0.5, 0.5], [0.0, 1.0], [1.0, 1.0], [0.5, 1.0]])
    torch.testing.assert_close(topv.centre_cost(corners), torch.tensor([0.0, 1.0, 1.0, 0.5**0.5]))
    torch.testing.assert_close(
        topv.mean_cosine(view.source, view.target),
        torch.cosine_similarity(view.source[:, None], view.target, dim=2).mean(1),
    )


def test_positions_know_no_tile_edges() -> None:
    card = find("internvl2-2b")
    family = card.family
    shape = family.shape(card, 896, 448, 10, None)
    assert (shape.images[0].columns, shape.images[0].rows, shape.tiles) == (2, 1, 3)
    at = torch.from_numpy(family.positions(shape.images[0]))
    cost = 1 - topv.spatial_closeness(at, torch.zeros(len(at), dtype=torch.int64), 0.4)(0, len(at))
    left_of_edge, right_of_edge, right_edge, thumbnail = 15, 256, 256 + 15, 512
    assert cost[left_of_edge, right_of_edge] < cost[0, left_of_edge] < cost[0, right_edge]
    # The thumbnail's first token lies over the first four of the left tile's top rows.
    assert cost[thumbnail, 0] < 1e-3
    assert cost[thumbnail, right_edge] > 0.9


def test_degeneracy_row_sums_of_a_plan_ended_on_the_rows_are_the_marginal_whatever_the_cost() -> None:
    for seed in (1, 2):
        view = tokens(70, seed=seed)
        pruner = TopV()
        mass, _ = TopV(marginals="norm").marginal(view)
        kernel = pruner.kernel(view)
        u, v = sinkhorn(kernel, mass, mass, 3)
        u = u * mass / row_sums(kernel, u, v)  # one more scaling of the rows: the plan ends on them
        torch.testing.assert_close(row_sums(kernel, u, v), mass)
        # Row maxima still tell tokens apart.
        assert row_maxima(kernel, u, v).div(mass).std() > 0.01
    # Ended on the columns, row sums differ from the marginal by what has not converged, and by that alone.
    reading = {"score": "sum", "sigma": 1.0}  # the narrower the Gaussian, the more iterations convergence takes
    early, late = (TopV(iterations=n, **reading).importance(view).mul(70).sub(1).abs().max() for n in (1, 100))
    assert late < 1e-3 * early


def test_degeneracy_the_centre_term_cancels_in_the_row_scaling() -> None:
    view = tokens(70)
    for score in ("max", "sum"):
        plain, centred = (TopV(score=score, gamma=gamma).importance(view) for gamma in (0.0, 1.0))
        torch.testing.assert_close(plain, centred, rtol=1e-5, atol=0)


def test_degeneracy_recovery_takes_the_whole_budget_at_keep_a_quarter() -> None:
    view = tokens(100)
    taken = TopV(recover=4).select(view, 25).sort().values
    torch.testing.assert_close(taken, torch.arange(25) * 4)


@pytest.mark.parametrize("recover", [4, 6])
@pytest.mark.parametrize(("n", "kept"), [(100, 50), (101, 77), (3328, 1664), (64, 3), (30, 29), (16, 16)])
def test_recovery_is_uniform_and_stays_inside_the_budget(n: int, kept: int, recover: int) -> None:
    view = tokens(n, hidden=4)
    pruner = TopV(recover=recover, score="cost")
    chosen = pruner.select(view, kept)
    assert len(chosen) == kept == len(set(chosen.tolist()))
    order = pruner.importance(view).argsort(descending=True, stable=True).tolist()
    best = next((i for i, (a, b) in enumerate(zip(chosen.tolist(), order, strict=False)) if a != b), kept)
    best = min(best, max(0, (kept * recover - n) // (recover - 1)))
    assert chosen[:best].tolist() == order[:best]
    pruned = sorted(order[best:])
    places = [pruned.index(token) for token in chosen[best:].tolist()]
    gaps = {b - a for a, b in pairwise(places)}
    assert max(gaps, default=1) - min(gaps, default=1) <= 1, "one pruned token in every so many"
    assert kept - best <= -(-(n - best) // recover) + 1 or best == 0


def test_costs_that_would_vanish_are_refused() -> None:
    with pytest.raises(BadValue, match="eps"):
        build_pruner("topv:eps=0.001")
