"""Arrays as tensors on the host, unseen by the modes that watch a window: they stand for no byte of a card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch


def on_host(values: npt.NDArray[Any], dtype: torch.dtype | None = None) -> torch.Tensor:
    """``values`` as a CPU tensor, over the same memory unless another ``dtype`` is asked for.

    What is copied from it to where a model is, is the one allocation there: a copy that also changes the dtype would
    make two.
    """
    import torch
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        host = torch.from_numpy(values)
        return host if dtype is None else host.to(dtype)
