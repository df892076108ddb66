from __future__ import annotations

import numpy as np
import pytest

from memprof.errors import UsageError
from memprof.intervals import bootstrap, intervals


def test_bootstrap() -> None:
    it = bootstrap([0, 1] * 50)
    assert it == bootstrap([0, 1] * 50)
    assert it.mean == 0.5
    # A binomial of 100 at one half: 1.96 standard errors of 0.05.
    assert it.low == pytest.approx(0.5 - 0.098, abs=0.02)
    assert it.high == pytest.approx(0.5 + 0.098, abs=0.02)
    assert bootstrap([3.0] * 4).to_json() == {"mean": 3.0, "low": 3.0, "high": 3.0, "samples": 4, "level": 0.95}
    narrow = bootstrap([0, 1] * 50, level=0.5)
    assert it.low < narrow.low < narrow.high < it.high
    with pytest.raises(UsageError, match="at least one"):
        bootstrap([])


def test_intervals_of_every_measure() -> None:
    rows = [{"agreement": 1.0, "kl": 0.0}, {"agreement": 0.5, "kl": 1.0}]
    found = intervals(rows)
    assert {name: it.mean for name, it in found.items()} == {"agreement": 0.75, "kl": 0.5}
    assert found["kl"].samples == 2
    assert intervals([]) == {}


def test_draws_are_taken_in_portions_that_change_nothing() -> None:
    values = np.random.default_rng(1).random(30)
    draws = np.random.default_rng(0).integers(0, 30, (250, 30))
    low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
    found = bootstrap(values, draws=250)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-12)
