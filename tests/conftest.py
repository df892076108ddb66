"""What all tests share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
#: Material beside the checkout that a plain clone does not have.
SHARED = Path(__file__).parents[2] / "shared"


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
