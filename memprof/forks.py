"""Work on copies of this process, one a core: all that was built is there already, and only the answers travel."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

#: What the copies do: they are made with it, so that it need not travel.
_work: Callable[[Any], Any] | None = None


def forked(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """``[work(item) for item in items]``; what ``work`` changes stays in the copies.

    Answers, and what is raised, are pickled. Where the system cannot copy a process, or lost one, the work is done in
    this one.
    """
    global _work
    workers = min(len(items), _cores())
    if workers < 2 or "fork" not in multiprocessing.get_all_start_methods():
        return [work(item) for item in items]
    _work = work
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), initializer=_begin)
    try:
        return list(pool.map(_do, items))
    except BrokenProcessPool:  # one was killed, most likely for memory
        return [work(item) for item in items]
    finally:
        pool.shutdown(cancel_futures=True)
        _work = None


def _cores() -> int:
    """How many this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _begin() -> None:
    """The parent alone answers the keyboard, and a copy must not wait for threads that only the parent has."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _do(item: Any) -> Any:
    assert _work is not None
    return _work(item)
