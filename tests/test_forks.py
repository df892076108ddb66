"""Work on copies of the process: the answers are those of the work itself, whatever becomes of a copy."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

from memprof import forks
from memprof.errors import UnknownName
from memprof.forks import forked, shared

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are copied on Linux alone")


@pytest.fixture(autouse=True)
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "_cores", lambda: 3)


def elsewhere(work: Callable[[int], int]) -> Callable[[int], tuple[int, bool]]:
    """``work``, and whether it ran in another process."""
    here = os.getpid()
    return lambda n: (work(n), os.getpid() != here)


def on_copies(work: Callable[[int], Any], items: Sequence[int]) -> list[Any]:
    return list(forked(work, items, 2))


def with_a_share(work: Callable[[int], Any], items: Sequence[int]) -> list[Any]:
    found = dict(shared(work, items))
    assert sorted(found) == list(range(len(items)))
    return [found[number] for number in range(len(items))]


Way = Callable[[Callable[[int], Any], Sequence[int]], list[Any]]
both = pytest.mark.parametrize("way", [on_copies, with_a_share])


@both
@pytest.mark.parametrize("count", [0, 1, 2, 3, 13])
def test_answers_are_those_of_the_work(way: Way, count: int) -> None:
    assert way(lambda n: n * n, range(count)) == [n * n for n in range(count)]


@linux
def test_who_works() -> None:
    assert [other for _, other in on_copies(elsewhere(abs), range(7))] == [True] * 7
    assert [other for _, other in on_copies(elsewhere(abs), range(2))] == [False] * 2  # one chunk
    here_first = [False, False, True, True, False, True, True]
    assert [other for _, other in with_a_share(elsewhere(abs), range(7))] == here_first


@both
def test_a_process_that_may_have_no_children_works_itself(way: Way) -> None:
    def child(queue: multiprocessing.SimpleQueue[list[tuple[int, bool]]]) -> None:
        queue.put(way(elsewhere(abs), [-1, -2, -3]))

    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=child, args=(queue,), daemon=True)
    process.start()
    assert queue.get() == [(1, False), (2, False), (3, False)]
    process.join()


@both
def test_a_process_that_uses_a_card_is_not_copied(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert way(elsewhere(abs), [-1, -2, -3]) == [(1, False), (2, False), (3, False)]


@both
@pytest.mark.parametrize("where", ["__init__", "submit"])
def test_a_system_that_refuses_copies_costs_none_of_the_work(
    way: Way, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no semaphores, or no memory for another process")

    monkeypatch.setattr(ProcessPoolExecutor, where, refuse)
    assert way(elsewhere(abs), [-1, -2, -3]) == [(1, False), (2, False), (3, False)]


def test_answers_come_before_an_error() -> None:
    def work(n: int) -> int:
        if n == 2:
            raise ValueError(f"number {n}")
        return n

    answers = forked(work, range(4), 1)
    assert next(answers) == 0
    with pytest.raises(ValueError, match="number 2"):
        list(answers)


@both
def test_an_error_that_cannot_be_pickled_is_raised_here(way: Way) -> None:
    def work(n: int) -> int:
        raise UnknownName("method", "x", ["y"])

    with pytest.raises(UnknownName):
        way(work, range(4))


@linux
@both
def test_the_work_of_a_lost_copy_is_done_here(way: Way) -> None:
    here = os.getpid()

    def work(n: int) -> int:
        if n == 5 and os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return n

    assert way(work, range(9)) == list(range(9))


@linux
def test_closing_early_ends_the_copies() -> None:
    answers = forked(abs, range(100), 1)
    assert next(answers) == 0
    answers.close()
    assert not multiprocessing.active_children()
