"""A flame graph as a table: who called whom to hold an instant's bytes, the outermost line first."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from memprof.snapshots.holding import Instant
from memprof.snapshots.recording import Frame
from memprof.snapshots.sites import BEFORE_RECORDING, call_site, line_of, of_torch, python_frames

#: What is below this share of the whole is left out, and how many rows a table has.
LEAST_SHARE, MOST_ROWS = 0.01, 30


@dataclass(frozen=True, slots=True)
class Flame:
    """One row: a line (or several that only lead to each other), its depth in the tree, and the bytes below it."""

    depth: int
    lines: tuple[str, ...]
    bytes: int
    share: float


@dataclass
class _Node:
    bytes: int = 0
    below: dict[str, _Node] = field(default_factory=dict)


def flames(instant: Instant) -> list[Flame]:
    """The rows of an instant's tree, the largest first at each level."""
    root = _Node()
    numbers, place = np.unique(instant.stacks, return_inverse=True)
    held = np.bincount(place.reshape(-1), instant.sizes, len(numbers)).astype(np.int64)
    for number, n_bytes in zip(numbers.tolist(), held.tolist(), strict=True):
        path = (BEFORE_RECORDING,) if number < 0 else _path(instant.recording.stacks[number])
        root.bytes += n_bytes
        node = root
        for line in path:
            node = node.below.setdefault(line, _Node())
            node.bytes += n_bytes
    return _rows(root)


def _path(frames: tuple[Frame, ...]) -> tuple[str, ...]:
    """The lines of a stack outside torch, outermost first; its call site where there is none."""
    own = [line_of(frame) for frame in reversed(python_frames(frames)) if not of_torch(frame.filename)]
    return tuple(own) or (call_site(frames),)


def _rows(root: _Node) -> list[Flame]:
    rows: list[Flame] = []
    total = max(root.bytes, 1)
    waiting = [(0, name, node) for name, node in sorted(root.below.items(), key=_smallest_first)]
    while waiting and len(rows) < MOST_ROWS:
        depth, name, node = waiting.pop()
        if node.bytes < LEAST_SHARE * total:
            continue
        lines = [name]
        while len(node.below) == 1 and next(iter(node.below.values())).bytes == node.bytes:
            name, node = next(iter(node.below.items()))
            lines.append(name)
        rows.append(Flame(depth, tuple(lines), node.bytes, node.bytes / total))
        waiting += [(depth + 1, below, each) for below, each in sorted(node.below.items(), key=_smallest_first)]
    return rows


def _smallest_first(item: tuple[str, _Node]) -> tuple[int, str]:
    return item[1].bytes, item[0]
