"""Views made by hand, for tests of the choice alone."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from memprof.pruning.view import View


def nothing() -> NoReturn:
    raise AssertionError("not asked for")


def a_view(**given: Any) -> View:
    """A view of what is given; the rest is not there."""
    known = next(t for t in given.values() if isinstance(t, torch.Tensor))
    n = len(known)
    defaults: dict[str, Any] = {
        "count": n, "device": known.device, "source": None, "target": None, "vision": None,
        "positions": torch.rand(n, 2, generator=torch.Generator().manual_seed(5)),
        "images": torch.zeros(n, dtype=torch.int64), "row": nothing, "map": nothing, "ahead": nothing, "seed": 0,
    }  # fmt: skip
    return View(**{**defaults, **given})
