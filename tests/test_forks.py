"""Work on copies of the process: the answers are those of the work itself, whatever becomes of a copy."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable

import pytest

from memprof import forks
from memprof.errors import UnknownName
from memprof.forks import forked

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are copied on Linux alone")


@pytest.fixture(autouse=True)
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "_cores", lambda: 3)


def elsewhere(work: Callable[[int], int]) -> Callable[[int], tuple[int, bool]]:
    """``work``, and whether it ran in another process."""
    here = os.getpid()
    return lambda n: (work(n), os.getpid() != here)


@pytest.mark.parametrize("chunk", [1, 4])
def test_answers_come_in_order(chunk: int) -> None:
    answers = list(forked(elsewhere(lambda n: n * n), range(13), chunk))
    assert [answer for answer, _ in answers] == [n * n for n in range(13)]
    assert all(other for _, other in answers) == sys.platform.startswith("linux")


def test_one_item_is_worked_on_here() -> None:
    assert list(forked(elsewhere(abs), [-3])) == [(3, False)]
    assert list(forked(abs, [])) == []


def test_a_process_that_may_have_no_children_works_itself() -> None:
    def child(queue: multiprocessing.SimpleQueue[list[int]]) -> None:
        queue.put(list(forked(abs, [-1, -2])))

    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=child, args=(queue,), daemon=True)
    process.start()
    assert queue.get() == [1, 2]
    process.join()


def test_what_is_raised_reaches_the_caller() -> None:
    def work(n: int) -> int:
        if n == 2:
            raise ValueError(f"number {n}")
        return n

    answers = forked(work, range(4))
    assert next(answers) == 0
    with pytest.raises(ValueError, match="number 2"):
        list(answers)


@linux
def test_an_error_that_cannot_be_pickled_is_raised_here() -> None:
    def work(n: int) -> int:
        raise UnknownName("method", "x", ["y"])

    with pytest.raises(UnknownName):
        list(forked(work, range(4)))


@linux
def test_the_work_of_a_lost_copy_is_done_here() -> None:
    here = os.getpid()

    def work(n: int) -> int:
        if n == 5 and os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return n

    assert list(forked(work, range(9))) == list(range(9))


@linux
def test_closing_early_ends_the_copies() -> None:
    answers = forked(abs, range(100))
    assert next(answers) == 0
    answers.close()
    assert not multiprocessing.active_children()
