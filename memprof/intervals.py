"""A mean over samples, and what the draw of the samples leaves open."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from memprof.errors import MemprofError, UsageError


@dataclass(frozen=True)
class Interval:
    """A mean over samples and what the draw of samples leaves open: the interval holds it at level ``level``."""

    mean: float
    low: float
    high: float
    samples: int
    level: float = 0.95

    def to_json(self) -> dict[str, float]:
        """For a JSON file."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "samples": self.samples, "level": self.level}


def bootstrap(values: Iterable[float], *, draws: int = 2000, level: float = 0.95, seed: int = 0) -> Interval:
    """The mean of ``values`` with its percentile bootstrap interval (Efron 1979); resamples samples, ``draws`` times.

    For a paired comparison of two methods on the same samples, give the differences.

    Raises:
        UsageError: No values.
        MemprofError: One is NaN or infinite.
    """
    found = np.asarray(list(values), dtype=np.float64)
    if not len(found):
        raise UsageError("an interval needs at least one value")
    if not np.isfinite(found).all():
        raise MemprofError("a mean over samples was asked of a number that is none (NaN or infinite)")
    rng = np.random.default_rng(seed)
    # A hundred draws at a time: all of them, of a whole data set, would be hundreds of megabytes.
    means = np.concatenate(
        [found[rng.integers(0, len(found), (min(100, draws - i), len(found)))].mean(1) for i in range(0, draws, 100)]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(found.mean()), float(low), float(high), len(found), level)


def intervals(rows: Sequence[Mapping[str, float]], *, draws: int = 2000, seed: int = 0) -> dict[str, Interval]:
    """:func:`bootstrap` of every measure over ``rows``, one a sample."""
    return {name: bootstrap((row[name] for row in rows), draws=draws, seed=seed) for name in rows[0]} if rows else {}
