"""What differs between versions of torch, for recordings and for the allocator's rules.

``c10/cuda/CUDACachingAllocator.cpp`` was compared as it stood between 2.1 and 2.2, between 2.2 and 2.5, between 2.6 and
2.7, and between 2.11 and 2.12, with the rules of :mod:`memprof.simulator.allocator` (2.13): rounding, the two pools,
best fit, when a block is split, sizes of segments and pages, what a request may be rounded up to under
``max_split_size_mb``, the order in which memory is given back. For the pools that all share they are the same. What
differs, and what memprof does about it:

* up to 2.0 there are no expandable segments, so none are offered to such a recording;
* up to 2.2 or so ``roundup_power2_divisions:1`` left sizes above 512 B as they were, later it rounds to 512 B as
  without it; memprof does the latter;
* up to 2.7 or so a large cached block of an expandable segment made ``max_split_size_mb`` under pressure end in an
  internal error (pytorch/pytorch#123548); memprof follows the later versions, which pass it over;
* up to 2.11 events do not say which memory pool they belong to (pytorch/pytorch#177717); their addresses do;
* a CUDA graph's pool gives nothing back while its graph lives, in all versions: so in memprof's trials;
* from 2.9 or so a ``MemPool`` may be made not to split its blocks; nothing in a snapshot says so, and a recording of
  one does not replay exactly.

A snapshot does not say which torch wrote it. Its form tells a part
(:func:`memprof.snapshots.recording.read_recordings`), and a file that memprof wrote tells it in words.
"""

from __future__ import annotations

import re

#: What a file's form can tell.
OLD, MIDDLE, NEW = "2.0 or earlier", "2.1 or later", "2.12 or later"


def knows_expandable_segments(version: str) -> bool:
    """Whether a torch of ``version``, as a recording tells it, has expandable segments."""
    found = re.match(r"([0-9]{1,3})\.([0-9]{1,3})", version)
    return found is None or (int(found[1]), int(found[2])) >= (2, 1)
