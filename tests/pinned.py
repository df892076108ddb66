"""The versions that memprof is tested with."""

from __future__ import annotations

import re
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"


def pinned(package: str) -> str:
    """The version of ``package`` in ``constraints.txt``."""
    found = re.search(rf"^{package}==(.+)$", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return found[1]
