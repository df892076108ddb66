"""Fixtures made by running published pruning code: found, not listed, so that others beside them are tried as well."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

#: Material beside the checkout that a plain clone does not have.
ORACLES = Path(__file__).parents[3] / "shared" / "data" / "oracles"


def files(method: str) -> Any:
    """Parametrises ``file`` over the fixtures of ``method``; one that is skipped where there are none."""
    found: list[Any] = sorted((ORACLES / method).glob("*.npz"))
    if not found:
        found = [pytest.param(None, marks=pytest.mark.skip(reason=f"../shared has no fixtures of {method}"))]
    return pytest.mark.parametrize("file", found, ids=lambda file: getattr(file, "stem", "none"))


class Fixture:
    """The arrays of one file: numbers as float32 tensors, indices as lists."""

    def __init__(self, file: Path) -> None:
        with np.load(file) as stored:
            self.arrays = {name: stored[name] for name in stored}

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def tensor(self, name: str) -> torch.Tensor:
        """An array of numbers."""
        return torch.from_numpy(self.arrays[name]).float()

    def indices(self, name: str) -> list[int]:
        """An array of whole numbers."""
        return [int(i) for i in self.arrays[name]]

    def number(self, name: str) -> int:
        """A whole number."""
        return int(self.arrays[name])

    def cases(self, pattern: str) -> Iterator[re.Match[str]]:
        """The arrays whose whole name is ``pattern``; raises if there are none."""
        found = [match for name in self.arrays if (match := re.fullmatch(pattern, name))]
        assert found, f"no array is called {pattern}"
        return iter(found)
