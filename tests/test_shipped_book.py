"""The book that ships is of these versions: where this fails, ``python scripts/record_book.py`` makes it again."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from pinned import pinned

from memprof.forecasts import book
from memprof.models.find import named

ROOT = Path(__file__).parents[1]
#: Most bytes of all entries together: they are in every wheel.
MOST = 15_000_000


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("record_book", ROOT / "scripts" / "record_book.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["record_book"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_core_is_in_it_and_nothing_stale(monkeypatch: pytest.MonkeyPatch, script: ModuleType) -> None:
    """Where a method or a family does other things, ``RECORDER`` or a version changed, entries are found no more."""
    monkeypatch.setattr(book, "package_version", pinned)
    wanted = {name: set(script.entries_of(model)) for name, model in named().items()}
    there = {file.name.removesuffix(book.SUFFIX) for file in book.SHIPPED.glob(f"*{book.SUFFIX}")}
    missing = {name: len(wanted[name] - there) for name in script.CORE if wanted[name] - there}
    again = "make it again: python scripts/record_book.py core"
    assert not missing, f"the book that ships lacks entries of {missing}; {again}"
    stale = there - set().union(*wanted.values())
    assert not stale, f"{len(stale)} entries of the book that ships are found by nothing any more; {again}"


def test_it_is_small_and_whole() -> None:
    shipped = sorted(book.SHIPPED.glob(f"*{book.SUFFIX}"))
    assert sum(file.stat().st_size for file in shipped) <= MOST
    package = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"**/*{book.SUFFIX}"' in package, "entries are not packed into the wheel"
