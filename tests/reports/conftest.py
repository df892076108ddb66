"""Fixtures of the reports' tests; the made-up runs are those of the figures' tests."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "figures"))

from synthetic import make_runs

from memprof.records import Run


@pytest.fixture
def runs() -> list[Run]:
    return make_runs(samples=6, tokens=4)
