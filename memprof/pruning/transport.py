"""Optimal transport between visual tokens, over a kernel ``exp(-C / eps)`` of all pairs.

A plan is kept as its two scalings, ``P = diag(u) K diag(v)``. The kernel is made whole where there is room for it, and
every pass is a product of a matrix and a vector; else in blocks of rows that every pass makes anew.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

#: Rows ``start`` to ``stop`` of a matrix of pairs, ``(stop - start, n)`` float32, for whoever asked to change in place.
Block = Callable[[int, int], torch.Tensor]


class Kernel:
    """A matrix ``exp(-C / eps)``, ``(n, n)`` float32, to be gone through from the first row to the last.

    Args:
        block: Makes rows ``start`` to ``stop``.
        ranges: The rows of each block. Is there one only, it is made once and kept.
    """

    def __init__(self, block: Block, ranges: list[tuple[int, int]]) -> None:
        self._block, self._ranges = block, ranges
        self._whole = block(*ranges[0]) if len(ranges) == 1 else None

    def each(self, made: Callable[..., torch.Tensor], *rows: torch.Tensor) -> torch.Tensor:
        """``made(block, ...)`` of every block, one below the other; a block is gone before the next one is made.

        What is given for each row comes along, cut as the blocks are.
        """
        if self._whole is not None:
            return made(self._whole, *rows)
        return torch.cat(
            [made(self._block(start, stop), *(of[start:stop] for of in rows)) for start, stop in self._ranges]
        )


def sinkhorn(
    kernel: Kernel, rows: torch.Tensor, columns: torch.Tensor, iterations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scalings of the entropic plan balanced on both sides (Cuturi 2013, arXiv:1306.0895, algorithm 1).

    Each iteration scales the rows to the marginal ``rows``, then the columns to ``columns``, in ONE pass over the
    kernel: a block's row scalings need only the column scalings of the iteration before. It ends on the columns, so
    column sums are exact and row sums carry the residue of convergence. (Ended on the rows, row sums would equal
    ``rows`` whatever the cost.)

    Args:
        kernel: Each of its rows sums to 1, so that the first row scalings are ``rows`` themselves. Of costs none of
            which is above 80 ``eps``: from 87 on, ``exp(-C / eps)`` is no ordinary float32.
        rows: ``(n,)`` float32, positive, summing to 1.
        columns: ``(n,)`` float32, positive, summing to 1.
        iterations: Passes, at least 1.

    Returns:
        ``u`` and ``v``, each ``(n,)`` float32.
    """
    u, v = rows, None
    for _ in range(iterations):
        reached = _Reached()
        u = kernel.each(partial(_scale, v, reached), rows)
        v = columns / reached.total
    assert v is not None, "at least one iteration"
    return u, v


def _scale(v: torch.Tensor | None, reached: _Reached, block: torch.Tensor, marginal: torch.Tensor) -> torch.Tensor:
    """Scalings of a block's rows, which sum to 1 where there is no ``v``; what they give each column is added."""
    return reached.add(block, marginal if v is None else marginal / block.mv(v))


class _Reached:
    """What each column has been given, ``(n,)`` float32, by the blocks so far."""

    total: torch.Tensor

    def add(self, block: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Add what rows scaled by ``u`` give; hands ``u`` on."""
        self.total = self.total.addmv_(block.T, u) if hasattr(self, "total") else block.T.mv(u)
        return u


def source_relaxed(kernel: Kernel, rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scalings of the plan whose rows are free: ``P_ij = columns_j rows_i K_ij / (rows K)_j``. One pass, and exact.

    Args:
        kernel: As for :func:`sinkhorn`.
        rows: What of ``exp(-C / eps)`` is the same all along a row and not in ``kernel``, ``(n,)`` float32, as small as
            ``kernel`` is too large.
        columns: ``(n,)`` float32, positive, summing to 1.

    Returns:
        ``u``, which is ``rows``, and ``v``, ``(n,)`` float32.
    """
    reached = _Reached()
    kernel.each(reached.add, rows)
    return rows, columns / reached.total


def row_maxima(kernel: Kernel, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Largest entry of each row of the plan, ``(n,)`` float32: the most that a token sends to one target. One pass."""
    return kernel.each(lambda block: (block * v).amax(1)).mul_(u)


def row_sums(kernel: Kernel, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Sum of each row of the plan, ``(n,)`` float32: all that a token sends. One pass."""
    return kernel.each(lambda block: block.mv(v)).mul_(u)
