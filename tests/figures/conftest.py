"""Fixtures of the figures' tests: made-up runs, three methods on two tasks."""

import pytest
from synthetic import make_runs

from memprof.records import Run


@pytest.fixture
def runs() -> list[Run]:
    return make_runs(samples=6, tokens=4)
