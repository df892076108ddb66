"""What all tests share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
#: Material beside the checkout that a plain clone does not have.
SHARED = Path(__file__).parents[2] / "shared"


def pytest_configure(config: pytest.Config) -> None:
    """Workers of pytest-xdist have cores of their own, and so have the programs that their tests start.

    Work that is shared among cores is then shared among those: on two cores, two workers do not wait for each other.
    """
    about = getattr(config, "workerinput", None)
    if about is not None and hasattr(os, "sched_setaffinity"):
        cores, workers = sorted(os.sched_getaffinity(0)), about["workercount"]
        mine = cores[int(about["workerid"].removeprefix("gw")) % workers :: workers]
        os.sched_setaffinity(0, mine or cores)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the checkout, or a skip."""
    if not SHARED.is_dir():
        pytest.skip("../shared is not here")
    return SHARED


@pytest.fixture(autouse=True)
def one_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every terminal is as wide as the next, whoever runs the tests."""
    monkeypatch.setenv("COLUMNS", "120")


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--record`` writes reference files of tests anew instead of holding the code to them."""
    parser.addoption("--record", action="store_true", help="write reference files anew")


@pytest.fixture(autouse=True)
def own_list_of_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What tests save is put on no user's list of runs, and a test finds no run but its own."""
    monkeypatch.setattr("memprof.cli._runs.LIST", tmp_path / "saved-runs" / "runs.txt")


@pytest.fixture(scope="session")
def shared_book(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A folder for ``MEMPROF_CACHE``: what one test has recorded serves the others, those of other workers, too."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if hasattr(request.config, "workerinput") else base) / "book"
