"""The small pool alone, served piece by piece, with a memory.

Until the driver refuses, the small pool does not know of the large one. Then its rules are few: every segment has
:data:`~memprof.simulator.allocator.SMALL_SEGMENT` bytes, the smallest gap that is large enough is cut (at the lowest
address of equals), the rest is always split off, and nothing goes back. A dozen gaps and as many blocks are all there
is to it at any instant, so a piece of a trace (one layer of one step) that finds the pool as another piece did, and
asks for the same, leaves it alike. That happens from layer to layer, from step to step and from prompt to prompt.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from memprof.simulator.allocator import SMALL_SEGMENT, CachingAllocator

#: The small pool at one instant: its gaps, ascending; the first address, and the one after the last, of each block that
#: the trace holds, by birth, one after another; the number of segments. Plain tuples, of which very many may live
#: without being walked through by the collector of garbage.
Pool: TypeAlias = "tuple[tuple[int, ...], tuple[int, ...], int]"

#: A gap is one number, its bytes above its address: in order of those, best fit is the first that is large enough.
_ADDRESS_BITS = 44
_ADDRESS = (1 << _ADDRESS_BITS) - 1


def pool_of(allocator: CachingAllocator) -> Pool:
    """The small pool of ``allocator``. What is handed out there stays so."""
    segments, gaps = allocator.segments(small=True), list[int]()
    for number, (_, blocks) in enumerate(segments):
        address = _address(number)
        for n_bytes, handed_out in blocks:
            if not handed_out:
                gaps.append(n_bytes << _ADDRESS_BITS | address)
            address += n_bytes
    return tuple(sorted(gaps)), (), len(segments)


def serve(pool: Pool, order: Sequence[int], wants: Sequence[int]) -> Pool:
    """The pool after a piece of a trace.

    Args:
        pool: As the piece finds it.
        order: ``k >= 0`` allocates number ``k``, ``~k`` frees it. The first numbers are the blocks held.
        wants: Block sizes of the others, already rounded.
    """
    gaps, segments = list(pool[0]), pool[2]
    held = len(pool[1]) // 2
    live = dict(enumerate(zip(pool[1][::2], pool[1][1::2], strict=True)))
    starts = {gap & _ADDRESS: gap for gap in gaps}
    stops = {(gap & _ADDRESS) + (gap >> _ADDRESS_BITS): gap for gap in gaps}
    for number in order:
        if number >= 0:
            want = wants[number - held]
            at = bisect_left(gaps, want << _ADDRESS_BITS)
            if at < len(gaps):
                gap = gaps.pop(at)
                start = gap & _ADDRESS
                stop = start + (gap >> _ADDRESS_BITS)
                del starts[start], stops[stop]
            else:
                start = _address(segments)
                stop = start + SMALL_SEGMENT
                segments += 1
            live[number] = start, start + want
            start += want
            if start == stop:
                continue
        else:
            start, stop = live.pop(~number)
            if start in stops:
                gap = stops.pop(start)
                del gaps[bisect_left(gaps, gap)]
                start = gap & _ADDRESS
            if stop in starts:
                gap = starts.pop(stop)
                del gaps[bisect_left(gaps, gap)]
                stop += gap >> _ADDRESS_BITS
        gap = (stop - start) << _ADDRESS_BITS | start
        insort(gaps, gap)
        starts[start] = stops[stop] = gap
    return tuple(gaps), tuple(edge for block in live.values() for edge in block), segments


class Known:
    """What readings that begin from one state learn from each other: how pieces left the small pool.

    Pools are known by number; number 0 is the one they begin from.
    """

    #: How many pieces are kept, about 1.5 kB each.
    MOST = 65_536

    def __init__(self, start: CachingAllocator) -> None:
        self._pools = list[Pool]()
        self._number: dict[Pool, int] = {}
        self._after: dict[tuple[int, bytes, bytes], int] = {}
        self._number_of(pool_of(start))

    def grown(self, number: int) -> int:
        """Bytes by which pool ``number`` is larger than the first."""
        return (self._pools[number][2] - self._pools[0][2]) * SMALL_SEGMENT

    def after(self, number: int, order: bytes, wants: bytes) -> int:
        """The pool after a piece that finds pool ``number``; its order and sizes as int32 (see :func:`serve`)."""
        left = self._after.get((number, order, wants))
        if left is None:
            if len(self._after) >= self.MOST:
                number = self._forget_but(number)
            as_lists = (np.frombuffer(one, dtype=np.int32).tolist() for one in (order, wants))
            left = self._after[number, order, wants] = self._number_of(serve(self._pools[number], *as_lists))
        return left

    def _number_of(self, pool: Pool) -> int:
        """The number of a pool, which it is given where it has none."""
        if pool not in self._number:
            self._number[pool] = len(self._pools)
            self._pools.append(pool)
        return self._number[pool]

    def _forget_but(self, number: int) -> int:
        """Forget all pools but the first and the one of that number; returns its new number."""
        first, kept = self._pools[0], self._pools[number]
        for known in (self._pools, self._number, self._after):
            known.clear()
        self._number_of(first)
        return self._number_of(kept)


def _address(number: int) -> int:
    """Where segment ``number`` begins: they rise, and no two touch."""
    return 2 * number * SMALL_SEGMENT
