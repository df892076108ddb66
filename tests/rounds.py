"""Combinations for tests of many axes: every pair meets in ``make test``, all of them in ``make every``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import product
from typing import Any

#: Whether each combination is run.
EVERY = bool(os.environ.get("MEMPROF_EVERY"))


def rounds(
    first: Sequence[Any], second: Sequence[Any], *rest: Sequence[Any], every: bool = EVERY
) -> list[tuple[Any, ...]]:
    """Each of ``first`` with each of ``second``, and beside them the combinations of ``rest`` in turn.

    So two values of any two axes meet at least once; with ``every``, all combinations.
    """
    others = [*product(*rest)]
    assert len(others) <= min(len(first), len(second)), "then some two would not meet"
    if every:
        return [*product(first, second, *rest)]
    return [(a, b, *others[(i + j) % len(others)]) for i, a in enumerate(first) for j, b in enumerate(second)]
