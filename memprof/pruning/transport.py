"""Optimal transport between visual tokens in row blocks (:mod:`memprof.pruning.pairs`).

A plan is kept as its two scalings, ``P = diag(u) exp(-C / eps) diag(v)``; every pass computes the costs of a block of
rows anew from the features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from memprof.pruning.pairs import blocks

#: A block of costs: ``cost(start, stop)`` gives rows ``start`` to ``stop``, ``(stop - start, n)`` float32, for whoever
#: asked to change in place.
Cost = Callable[[int, int], torch.Tensor]


def sinkhorn(
    cost: Cost, rows: torch.Tensor, columns: torch.Tensor, eps: float, iterations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scalings of the entropic plan balanced on both sides (Cuturi 2013, arXiv:1306.0895, algorithm 1).

    Each iteration scales the rows to the marginal ``rows``, then the columns to ``columns``, in ONE pass over the
    costs: a block's row scalings need only the column scalings of the iteration before. It ends on the columns, so
    column sums are exact and row sums carry the residue of convergence. (Ended on the rows, row sums would equal
    ``rows`` whatever the cost.)

    Args:
        cost: Blocks of costs, none above 80 ``eps``: from 87 on, ``exp(-C / eps)`` is no ordinary float32.
        rows: ``(n,)`` float32, positive, summing to 1.
        columns: ``(n,)`` float32, positive, summing to 1.
        eps: Entropic regularisation, in units of cost.
        iterations: Passes, at least 1.

    Returns:
        ``u`` and ``v``, each ``(n,)`` float32.
    """
    u, v = torch.empty_like(rows), torch.ones_like(columns)
    for _ in range(iterations):
        reached = torch.zeros_like(v)
        for start, stop in blocks(len(rows)):
            kernel = _kernel(cost, start, stop, eps)
            scaled = torch.div(rows[start:stop], kernel @ v, out=u[start:stop])
            reached += scaled @ kernel
            del kernel  # before the next block is made: two blocks at a time, not three
        v = columns / reached
    return u, v


def source_relaxed(cost: Cost, columns: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scalings of the plan whose rows are free: ``P_ij = columns_j softmax_i(-C_ij / eps)``. One pass, and exact.

    Returns:
        ``u`` (ones) and ``v``, each ``(n,)`` float32.
    """
    reached = torch.zeros_like(columns)
    for start, stop in blocks(len(columns)):
        reached += _kernel(cost, start, stop, eps).sum(0)
    return torch.ones_like(columns), columns / reached


def row_maxima(cost: Cost, u: torch.Tensor, v: torch.Tensor, eps: float) -> torch.Tensor:
    """Largest entry of each row of the plan, ``(n,)`` float32: the most that a token sends to one target. One pass."""
    largest = [_kernel(cost, *block, eps).mul_(v).amax(1) for block in blocks(len(u))]
    return torch.cat(largest).mul_(u)


def row_sums(cost: Cost, u: torch.Tensor, v: torch.Tensor, eps: float) -> torch.Tensor:
    """Sum of each row of the plan, ``(n,)`` float32: all that a token sends. One pass."""
    return torch.cat([_kernel(cost, *block, eps) @ v for block in blocks(len(u))]).mul_(u)


def _kernel(cost: Cost, start: int, stop: int, eps: float) -> torch.Tensor:
    """``exp(-C / eps)`` of a block, in the block's own memory."""
    return cost(start, stop).div_(-eps).exp_()
