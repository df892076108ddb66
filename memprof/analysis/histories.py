"""Two recordings of one sample set against each other: which sizes of blocks only one of them made, and who did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from memprof.simulator.allocator import CachingAllocator
from memprof.simulator.trace import Trace
from memprof.snapshots.recording import ALLOC, FREE_COMPLETED, FREE_REQUESTED, Frame, Recording
from memprof.snapshots.report import call_site

#: How many cases, parts and sizes a report names, largest difference first.
NAMED = 8


@dataclass(frozen=True)
class Size:
    """Blocks of one size in a history: how many were held at its peak, how many were made, and who made most of them.

    ``bytes`` is what a request is rounded up to.
    """

    bytes: int
    held_measured: int
    held_predicted: int
    made_measured: int
    made_predicted: int
    site: str

    @property
    def change(self) -> int:
        """Bytes held at the predicted peak minus those at the measured one."""
        return (self.held_predicted - self.held_measured) * self.bytes


@dataclass(frozen=True)
class HistoryGap:
    """How a recorded history differs from the predicted one, size by size, largest difference at the peak first.

    ``alike``: every request and every end of a block came in the same order, to the end of the predicted one.
    """

    file: str
    peak_measured: int
    peak_predicted: int
    sizes: list[Size]
    alike: bool


def as_recording(trace: Trace, start: CachingAllocator) -> Recording:
    """What a card would have recorded of ``trace``, beginning from the state ``start`` (left as it is)."""
    allocator, at = start.copy(), dict[int, int]()
    events: list[tuple[int, int, int, int]] = []
    stacks: dict[tuple[str, str], int] = {}
    for event in trace.events[: trace.marks[-1]] if trace.marks else trace.events:
        slot = max(event, ~event)
        n_bytes, stack = trace.nbytes[slot], stacks.setdefault(trace.sites[slot], len(stacks) + 1)
        if event >= 0 and n_bytes:
            at[slot] = allocator.malloc(n_bytes)
            events.append((ALLOC, at[slot], n_bytes, stack))
        elif slot in at:
            address = at.pop(slot)
            allocator.free(address)
            events += [(action, address, n_bytes, 0) for action in (FREE_REQUESTED, FREE_COMPLETED)]
    columns = np.asarray(events, dtype=np.int64).reshape(-1, 4)
    return Recording(
        device=0, settings=start.settings, segments=(), actions=columns[:, 0].astype(np.int8), addresses=columns[:, 1],
        sizes=columns[:, 2], stack_ids=columns[:, 3].astype(np.int32), lane_ids=np.zeros(len(columns), dtype=np.int32),
        stacks=((), *((Frame(module, 0, op),) for module, op in stacks)), lanes=((0, (0, 0)),),
    )  # fmt: skip


@dataclass
class _Walk:
    """A recording gone through: blocks made by size, those held at its peak, who made them, and all in order: a size
    for a birth, ``-1 - number`` for an end.
    """

    made: Counter[int] = field(default_factory=Counter)
    held: Counter[int] = field(default_factory=Counter)
    sites: dict[int, Counter[str]] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    peak: int = 0

    @classmethod
    def of(cls, recording: Recording) -> _Walk:
        """What was allocated before the recording began is left out."""
        walk, now, at, live = cls(), 0, dict[int, int](), Counter[int]()
        numbers: dict[int, int] = {}
        events = zip(
            recording.actions.tolist(), recording.addresses.tolist(), recording.sizes.tolist(),
            recording.stack_ids.tolist(), strict=True,
        )  # fmt: skip
        for action, address, n_bytes, stack in events:
            if action == ALLOC:
                size = at[address] = recording.settings.round_size(n_bytes)
                numbers[address] = walk.made.total()
                walk.order.append(size)
                walk.made[size] += 1
                walk.sites.setdefault(size, Counter())[_site(recording.stacks[stack])] += 1
                live[size] += 1
                now += size
                if now > walk.peak:
                    walk.peak, walk.held = now, live.copy()
            elif action == FREE_REQUESTED and address in at:
                size = at.pop(address)
                walk.order.append(-1 - numbers[address])
                live[size] -= 1
                now -= size
        return walk


def _site(frames: Sequence[Frame]) -> str:
    """The line that made an allocation, or the module and operator predicted to."""
    return f"{frames[0].filename} {frames[0].name}" if frames and not frames[0].line else call_site(frames)


def set_against(file: str, measured: Recording, predicted: Recording) -> HistoryGap:
    """Where two histories of one sample differ: every size of which not as many blocks were made, or held at the peak.

    A size that one of them never made is an allocation that is missing from the other, and its site says which.
    """
    a, b = _Walk.of(measured), _Walk.of(predicted)
    sizes = [
        Size(
            n_bytes, a.held[n_bytes], b.held[n_bytes], a.made[n_bytes], b.made[n_bytes],
            (a.sites.get(n_bytes) or b.sites[n_bytes]).most_common(1)[0][0],
        )
        for n_bytes in {**a.made, **b.made}
        if a.made[n_bytes] != b.made[n_bytes] or a.held[n_bytes] != b.held[n_bytes]
    ]  # fmt: skip
    sizes.sort(key=lambda size: (-abs(size.change), -abs(size.made_predicted - size.made_measured) * size.bytes))
    return HistoryGap(file, a.peak, b.peak, sizes[:NAMED], a.order[: len(b.order)] == b.order)
