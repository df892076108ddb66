"""All pairs of tokens, a block of rows at a time.

For 3,328 tokens the matrix of all pairs is 44 MB in float32. It is whole only where that is no more than the room a
choice has (:attr:`memprof.pruning.view.View.room`): elsewhere it would show in the peak that pruning is meant to lower.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

#: Bytes of one block of pairs in float32 where nobody says how much room there is.
BLOCK_BYTES = 8 * 2**20


def blocks(n: int, width: int | None = None, room: int | None = None) -> Iterator[tuple[int, int]]:
    """Row ranges that cover ``n`` rows of ``width`` float32 pairs (by default ``n``), each of at most ``room`` bytes.

    As few as there can be, and as equal as there can be; one row at least, however wide. Without a ``room``,
    :data:`BLOCK_BYTES`.
    """
    most = max(1, (BLOCK_BYTES if room is None else room) // max(1, 4 * (n if width is None else width)))
    rows = -(-n // max(1, -(-n // most))) or 1
    return ((start, min(start + rows, n)) for start in range(0, n, rows))


def lengths(tokens: torch.Tensor) -> torch.Tensor:
    """Length of each token of ``(n, hidden)``: ``(n,)`` float32, never zero."""
    norms: torch.Tensor = torch.linalg.vector_norm(tokens, dim=1, dtype=torch.float32)
    return norms.clamp_(min=1e-12)


def dots(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Inner products ``(r, c)`` float32 of ``(r, hidden)`` and ``(c, hidden)``, summed in float32 whatever their dtype.

    Storage-less tensors take CUDA's way, since it is CUDA's bytes they stand for.
    """
    if rows.dtype == torch.float32:
        return rows @ columns.T
    if rows.is_cuda or type(rows) is not torch.Tensor:
        return torch.mm(rows, columns.T, out_dtype=torch.float32)
    out = rows.new_empty((len(rows), len(columns)), dtype=torch.float32)
    wide = rows.float()
    for start, stop in blocks(*columns.shape):
        torch.mm(wide, columns[start:stop].float().T, out=out[:, start:stop])
    return out
