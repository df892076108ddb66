"""Views made by hand, for tests of the choice alone."""

from __future__ import annotations

import dataclasses

import torch

from memprof.pruning.view import View


def a_view(seed: int = 0, merged: int = 0, **signals: torch.Tensor) -> View:
    """A view of ``signals``, of which the first tells how many tokens there are; the rest is not there."""
    known = next(iter(signals.values()))
    n = len(known)
    placed = {
        "positions": torch.rand(n, 2, generator=torch.Generator().manual_seed(5)),
        "images": torch.zeros(n, dtype=torch.int64),
    }
    return View(n, known.device, seed, merged, 2**30, {**placed, **signals})


def other(view: View, **signals: torch.Tensor) -> View:
    """``view`` with other ``signals``."""
    return dataclasses.replace(view, signals={**view.signals, **signals})
