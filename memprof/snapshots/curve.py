"""A recording as a curve: what was allocated over its events, by who held it, thinned out without losing a peak."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from memprof.snapshots.holding import Way, labeller
from memprof.snapshots.recording import OOM, Ints
from memprof.snapshots.replay import Replayed
from memprof.snapshots.sites import call_site

#: Groups that have a colour of their own; the rest is one more.
GROUPS = 8
REST = "everything else"
#: How many blocks are named at one instant.
LARGEST = 6


@dataclass(frozen=True)
class Curve:
    """The curve. All sizes in bytes.

    Attributes:
        events: The event of each point, rising: of each of as many stretches its highest instant.
        times: Microseconds at each point; zeros where the file says none.
        allocated: After that event.
        reserved: The same.
        groups: Labels, those that held most at their highest first; the last may be :data:`REST`.
        levels: Shape (groups, points): what each group held.
        largest: At each point, ``(bytes, call site)`` of the largest blocks.
        ooms: Which events were out of memory.
    """

    events: Ints
    times: Ints
    allocated: Ints
    reserved: Ints
    groups: tuple[str, ...]
    levels: Ints
    largest: list[list[tuple[int, str]]]
    ooms: Ints


def curve(replayed: Replayed, allocated: Ints, way: Way, points: int = 800) -> Curve:
    """The curve of a recording with events.

    Args:
        replayed: The recording's blocks.
        allocated: Bytes allocated after each event.
        way: How blocks are added up.
        points: At most how many instants to keep beside out-of-memory events.
    """
    lives, recording = replayed.lives, replayed.lives.recording
    (ooms,) = np.nonzero(recording.actions == OOM)
    at = _instants(allocated, ooms, points)
    groups, levels = _levels(replayed, at, way)
    times = recording.times[at] if len(recording.times) else np.zeros(len(at), dtype=np.int64)
    return Curve(
        at, times, allocated[at], lives.reserved[at], groups, levels, _largest(replayed, at), ooms.astype(np.int64)
    )


def _instants(allocated: Ints, ooms: Ints, points: int) -> Ints:
    """Of each of ``points`` stretches the highest instant; every out-of-memory event; the first and the last."""
    edges = np.unique(np.linspace(0, len(allocated), points + 1).astype(np.int64))
    tops = [int(b + allocated[b:e].argmax()) for b, e in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)]
    return np.unique(np.array([0, *tops, *ooms[-64:].tolist(), len(allocated) - 1], dtype=np.int64))


def _levels(replayed: Replayed, at: Ints, way: Way) -> tuple[tuple[str, ...], Ints]:
    """What each group held at the instants ``at``."""
    lives, granted = replayed.lives, replayed.granted
    made = len(lives.born) - len(lives.older)
    stacks = lives.stacks.astype(np.int64)
    stacks[made:][stacks[made:] == 0] = -1
    label = labeller(lives.recording, way)
    numbers, place = np.unique(stacks, return_inverse=True)
    names = [label(number) for number in numbers.tolist()]
    order = list(dict.fromkeys(names))
    group = np.array([order.index(name) for name in names], dtype=np.int64)[place.reshape(-1)]
    change = np.zeros((len(order), len(at) + 1), dtype=np.int64)
    np.add.at(change, (group, np.searchsorted(at, lives.born)), granted)
    np.subtract.at(change, (group, np.searchsorted(at, lives.ends)), granted)
    levels = change[:, :-1].cumsum(axis=1)
    rank = np.argsort(-levels.max(axis=1), kind="stable")
    # Those at the highest instant first; a group that is never high goes with the rest.
    if len(rank) <= GROUPS + 1:
        return tuple(order[i] for i in rank.tolist()), levels[rank]
    kept, rest = rank[:GROUPS], rank[GROUPS:]
    names = [*(order[i] for i in kept.tolist()), REST]
    return tuple(names), np.concatenate([levels[kept], levels[rest].sum(axis=0, keepdims=True)])


def _largest(replayed: Replayed, at: Ints) -> list[list[tuple[int, str]]]:
    """At each instant, the largest blocks and the lines that made them."""
    lives, granted = replayed.lives, replayed.granted
    made = len(lives.born) - len(lives.older)
    label = labeller(lives.recording, call_site)
    order = np.argsort(-granted, kind="stable")
    found = []
    for event in at.tolist():
        here, begin = list[int](), 0
        while len(here) < LARGEST and begin < len(order):
            part = order[begin : begin + 4096 + begin]
            there = part[(lives.born[part] <= event) & (lives.ends[part] > event)]
            here += there[: LARGEST - len(here)].tolist()
            begin += len(part)
        stacks = [int(lives.stacks[i]) if i < made or lives.stacks[i] else -1 for i in here]
        found.append([(int(granted[i]), label(stack)) for i, stack in zip(here, stacks, strict=True)])
    return found
