"""Work on copies of this process, one a core: all that was built is there already, and only the answers travel."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


def forked(work: Callable[[T], R], items: Sequence[T], chunk: int = 1) -> Generator[R, None, None]:
    """``work(item)`` for each of ``items``, in order, as they come; what ``work`` changes stays in the copies.

    The copies are made when the first answer is asked for, are given ``chunk`` items at a time, and end with the
    iterator, also where it is closed early. Answers, and what is raised, are pickled. Where the system cannot copy a
    process, or ended one of them, the work is done in this one.
    """
    workers = min(-(-len(items) // chunk), _cores())
    may_fork = sys.platform.startswith("linux") and not multiprocessing.current_process().daemon
    if workers < 2 or not may_fork:
        yield from map(work, items)
        return
    fork = multiprocessing.get_context("fork")
    pool, done = ProcessPoolExecutor(workers, fork, initializer=_begin, initargs=(work,)), 0
    try:
        with warnings.catch_warnings():
            # Of threads that copies lack: none is waited for there (see _begin).
            warnings.simplefilter("ignore", DeprecationWarning)
            answers = pool.map(_do, items, chunksize=chunk)
        for answer in answers:
            yield answer
            done += 1
    except BrokenProcessPool:  # most likely for want of memory
        yield from map(work, items[done:])
    finally:
        pool.shutdown(cancel_futures=True)


def _cores() -> int:
    """How many this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_work: Callable[[Any], Any]


def _begin(work: Callable[[Any], Any]) -> None:
    """In a copy: the other threads are gone, maybe with a stream's lock in hand, and the keyboard is the parent's."""
    import torch

    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for as long as the copy lives
    torch.set_num_threads(1)


def _do(item: Any) -> Any:
    return _work(item)
