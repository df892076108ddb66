"""Optimal transport between visual tokens in row blocks: no matrix of all pairs ever exists.

For 3,328 tokens one such matrix is 44 MB in float32 and would show in the peak it is meant to lower. Every pass
computes the costs of a block of rows anew from the features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

#: Rows of a block. 256 rows against 3,328 tokens are 3.3 MiB in float32.
BLOCK = 256
#: A block of costs: ``cost(start, stop)`` gives rows ``start`` to ``stop``, ``(stop - start, n)`` float32.
Cost = Callable[[int, int], torch.Tensor]


def blocks(n: int) -> Iterator[tuple[int, int]]:
    """Row ranges that cover ``n`` rows."""
    return ((start, min(start + BLOCK, n)) for start in range(0, n, BLOCK))


def dots(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Inner products ``(r, c)`` float32 of half or float features, summed in float32.

    Storage-less tensors take CUDA's way, since it is CUDA's bytes they stand for.
    """
    if rows.dtype in (torch.bfloat16, torch.float16) and (rows.is_cuda or type(rows) is not torch.Tensor):
        return torch.mm(rows, columns.T, out_dtype=torch.float32)
    out = rows.new_empty((len(rows), len(columns)), dtype=torch.float32)
    wide = rows.float()
    for start, stop in blocks(len(columns)):
        torch.mm(wide, columns[start:stop].float().T, out=out[:, start:stop])
    return out


def sinkhorn(
    cost: Cost, rows: torch.Tensor, columns: torch.Tensor, eps: float, iterations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scalings ``u, v`` of the entropic plan ``P = diag(u) exp(-C / eps) diag(v)`` (Cuturi 2013).

    Each iteration scales the rows to the marginal ``rows``, then the columns to ``columns``, in one pass over the
    costs: a block's row scalings need only the column scalings of the iteration before. It ends on the columns, so
    the row sums are NOT the row marginal: they carry the residue of convergence.

    Args:
        cost: Blocks of costs, small enough against ``eps`` that ``exp(-C / eps)`` does not vanish along a whole row.
        rows: ``(n,)`` float32, positive, summing to 1.
        columns: ``(n,)`` float32, positive, summing to 1.
        eps: Entropic regularisation, in units of cost.
        iterations: Passes, at least 1.

    Returns:
        ``u`` and ``v``, each ``(n,)`` float32.
    """
    u, v = torch.ones_like(rows), torch.ones_like(columns)
    for _ in range(iterations):
        reached = torch.zeros_like(v)
        for start, stop in blocks(len(rows)):
            kernel = cost(start, stop).div_(-eps).exp_()
            u[start:stop] = rows[start:stop] / (kernel @ v)
            reached += u[start:stop] @ kernel
        v = columns / reached
    return u, v


def source_relaxed(cost: Cost, columns: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scalings of the plan whose rows are free: ``P_ij = columns_j softmax_i(-C_ij / eps)``. One pass.

    Returns:
        ``u`` (ones) and ``v``, each ``(n,)`` float32.
    """
    reached = torch.zeros_like(columns)
    for start, stop in blocks(len(columns)):
        reached += cost(start, stop).div_(-eps).exp_().sum(0)
    return torch.ones_like(columns), columns / reached


def reduce_rows(
    cost: Cost, u: torch.Tensor, v: torch.Tensor, eps: float, reduce: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """``reduce`` of the plan's rows, a block at a time: ``(n,)`` float32. The plan itself is never whole."""
    out = torch.empty_like(u)
    for start, stop in blocks(len(u)):
        plan = cost(start, stop).div_(-eps).exp_().mul_(u[start:stop, None]).mul_(v)
        out[start:stop] = reduce(plan)
    return out
