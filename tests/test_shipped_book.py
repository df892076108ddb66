"""The book that ships is of these versions: where this fails, ``python scripts/record_book.py`` makes it again."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from pinned import pinned
from rounds import EVERY

from memprof.analysis.fit import QUESTION_TOKENS, answer
from memprof.bench import Bench
from memprof.forecasts import book
from memprof.gpus import CONTEXT_BYTES, find_card
from memprof.models.find import find, named
from memprof.pruning import kept_share, method_spec
from memprof.records import RunSpec
from memprof.units import GIB

ROOT = Path(__file__).parents[1]
#: Most bytes of all entries together: they are in every wheel.
MOST = 15_000_000


def loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("record_book", ROOT / "scripts" / "record_book.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["record_book"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = loaded()


def test_the_core_is_in_it_and_nothing_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a method or a family does other things, ``RECORDER`` or a version changed, entries are found no more."""
    monkeypatch.setattr(book, "package_version", pinned)
    wanted = {name: set(script.entries_of(model)) for name, model in named().items()}
    there = {file.name.removesuffix(book.SUFFIX) for file in book.SHIPPED.glob(f"*{book.SUFFIX}")}
    missing = {name: len(wanted[name] - there) for name in script.CORE if wanted[name] - there}
    again = "make it again: python scripts/record_book.py core"
    assert not missing, f"the book that ships lacks entries of {missing}; {again}"
    stale = there - set().union(*wanted.values())
    assert not stale, f"{len(stale)} entries of the book that ships are found by nothing any more; {again}"


@pytest.mark.parametrize("name", named() if EVERY else script.CORE)
def test_what_ships_answers_run_and_fit(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Every bundled sample, every share kept, and all that ``fit`` looks at on a small card and on a large one.

    Where each grid of patches is a program of its own, the usual picture stands for the others; and where each number
    of images is one, or prompts are text alone, what ``fit`` looks at is recorded when it is asked for.
    """
    monkeypatch.setattr(book, "package_version", pinned)
    monkeypatch.setenv("MEMPROF_CACHE", "")
    monkeypatch.setattr(Bench, "_recorder", lambda _, ask: pytest.fail(f"recorded for {ask}"))
    model = find(name)
    for entry in script.entries_of(model).values():
        if not entry.run or not script.file_of(entry.name).exists():
            continue
        spec = RunSpec(name, method_spec(entry.ask.pruner), "ai2d", "sim", entry.ask.stack, dtype=model.dtype)
        bench, ask = Bench(entry.setup), dataclasses.replace(entry.ask, new_tokens=spec.max_new_tokens)
        shapes = script.bundled(model)
        if script.each_its_own(model):
            shapes = [model.family.shape_of(model, model.family.of_tiles(model, 1), 0), script.largest(model)]
        texts = script.questions_of(model)[0], QUESTION_TOKENS, 400
        prompts = [shape.longer(tokens) for shape in shapes for tokens in texts]
        keeps = [None] if kept_share(entry.ask.pruner) is None else [0.01, 1 / 3, 0.9]
        for keep in keeps:
            pruner = ask.pruner if keep is None else dataclasses.replace(ask.pruner, keep=keep)
            asks = [dataclasses.replace(ask, pruner=pruner).about(prompt) for prompt in prompts]
            unknown = [one.shape for one in asks if not bench.knows(one)]
            assert not unknown, f"{pruner}: {len(unknown)} of {len(asks)}"
        if not (model.family.sees and model.family.one_batch(model)):
            continue
        static = bench.standing(ask.pruner, ask.manner).static_bytes
        for room in (2 * GIB, 40 * GIB):
            answer(spec, find_card(f"{static + CONTEXT_BYTES + room}B"), bench=bench)


def test_it_is_small_and_whole() -> None:
    shipped = sorted(book.SHIPPED.glob(f"*{book.SUFFIX}"))
    assert sum(file.stat().st_size for file in shipped) <= MOST
    package = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"**/*{book.SUFFIX}"' in package, "entries are not packed into the wheel"
