"""Work on copies of this process, one a core: all that was built is there already, and only the answers travel.

Where the system cannot copy a process, or ended a copy, the work is done in this one. What ``work`` changes stays in
the copies; answers, and what is raised, are pickled.

Copies end with the process they are copies of, however it dies: each waits for the closing of a pipe whose other end
nobody else has.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any, Self, TypeVar

from memprof import alone

#: Most processes that work side by side: each may come to hold as much as the one it is a copy of.
MOST = 8

T = TypeVar("T")
R = TypeVar("R")


def shared(work: Callable[[T], R], items: Sequence[T]) -> Iterator[tuple[int, R]]:
    """The number of each of ``items`` and ``work(item)``, as they come. This process takes a share itself: for few and
    long ones.

    The first is done before the process is copied: what it imports and remembers, the copies need not.
    """
    if items:
        yield 0, work(items[0])
    left = range(1, len(items))
    shares = min(len(left), _cores()) if _may_fork() else 1
    if shares < 2:
        yield from ((number, work(items[number])) for number in left)
        return
    with _Copies(shares - 1, work) as copies:
        parts = [left[i::shares] for i in range(1, shares)]
        given = [(part, items[part.start :: shares]) for part in parts]
        answers = [copies.give(some) for _, some in given]
        yield from ((number, work(items[number])) for number in left[::shares])
        for (part, some), theirs in zip(given, answers, strict=True):
            yield from zip(part, copies.take(theirs, some), strict=True)


def forked(work: Callable[[T], R], items: Sequence[T], chunk: int) -> Generator[R, None, None]:
    """``work(item)`` for each of ``items``, in order, as they come. This process only waits: for many and short ones.

    The copies are made when the first answer is asked for, are given ``chunk`` items at a time, and end with the
    generator, also where it is closed early.
    """
    workers = min(-(-len(items) // chunk), _cores()) if _may_fork() else 1
    if workers < 2:
        yield from map(work, items)
        return
    with _Copies(workers, work) as copies:
        chunks = [items[begin : begin + chunk] for begin in range(0, len(items), chunk)]
        for some, answers in zip(chunks, [copies.give(some) for some in chunks], strict=True):
            yield from copies.take(answers, some)


class _Copies:
    """Copies of this process that all do the same work."""

    def __init__(self, count: int, work: Callable[[Any], Any]) -> None:
        self.work = work
        self.pool: ProcessPoolExecutor | None = None
        self._theirs, ours = os.pipe()
        self._lifeline = alone.keep(ours)
        with suppress(ImportError, NotImplementedError, OSError):  # a system without semaphores
            fork = multiprocessing.get_context("fork")
            self.pool = ProcessPoolExecutor(count, fork, initializer=_begin, initargs=(work, self._theirs))

    def __enter__(self) -> Self:
        gc.collect()
        gc.freeze()  # a copy that collects garbage would write to, and so duplicate, everything there is
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:  # nobody waits for what the copies are at
            alone.close(self._lifeline)
        try:
            if self.pool is not None:
                self.pool.shutdown(cancel_futures=True)
        finally:
            alone.close(self._lifeline)
            os.close(self._theirs)

    def give(self, items: Sequence[Any]) -> Future[list[Any]] | None:
        """Have a copy work on ``items``; the copies are made at the first call. None where there are none."""
        with warnings.catch_warnings(), suppress(BrokenProcessPool, OSError):
            # Of threads that copies lack: none is waited for there (see _begin).
            warnings.simplefilter("ignore", DeprecationWarning)
            return self.pool.submit(_do, items) if self.pool is not None else None
        return None

    def take(self, answers: Future[list[Any]] | None, items: Sequence[Any]) -> list[Any]:
        """The answers about ``items``; worked out here if a copy was lost, most likely for want of memory."""
        with suppress(BrokenProcessPool):
            if answers is not None:
                return answers.result()
        return [self.work(item) for item in items]


def _cores() -> int:
    """How many cores this process may run on, as far as there is use for them."""
    return min(MOST, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _may_fork() -> bool:
    """Elsewhere than on Linux system libraries do not bear it, nor does CUDA; and a daemon may have no children."""
    torch: Any = sys.modules.get("torch")  # where nobody has loaded it, nobody has begun with CUDA
    busy = multiprocessing.current_process().daemon or (torch is not None and torch.cuda.is_initialized())
    return sys.platform.startswith("linux") and not busy


_work: Callable[[Any], Any]


def _begin(work: Callable[[Any], Any], lifeline: int) -> None:
    """In a copy: the other threads are gone, maybe with a stream's lock in hand, and the keyboard is the parent's."""
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for as long as the copy lives
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)


def _do(items: Sequence[Any]) -> list[Any]:
    return [_work(item) for item in items]


def _end_with_parent(lifeline: int) -> None:
    """Wait until nobody can write to the pipe any more: the parent is gone, or wants no more answers."""
    with suppress(OSError):
        os.read(lifeline, 1)
    os._exit(1)
