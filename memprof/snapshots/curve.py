"""A recording as a curve: what was allocated over its events, by who held it, thinned out without losing a peak."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import pairwise

import numpy as np

from memprof.snapshots.columns import highest, stretches
from memprof.snapshots.holding import Way, labeller
from memprof.snapshots.lives import Lives
from memprof.snapshots.recording import ALLOC, OOM, Ints
from memprof.snapshots.replay import Replayed
from memprof.snapshots.sites import call_site

#: Groups that have a colour of their own; the rest is one more.
GROUPS = 8
REST = "everything else"
#: How many blocks are named at one instant.
LARGEST = 6
#: How many out-of-memory events are marked: the last.
MOST_OOMS = 64
#: How many blocks that are gone may wait in the ranking beside as many as are there.
LEAST_RANKED = 1024


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
        ooms: The last events that were out of memory.
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
    ooms = list(deque((event for found in recording.events_of(OOM) for event in found.tolist()), MOST_OOMS))
    at = _instants(allocated, ooms, points)
    groups, levels = _levels(replayed, at, way)
    times = recording.times[at] if len(recording.times) else np.zeros(len(at), dtype=np.int64)
    return Curve(
        events=at,
        times=times,
        allocated=allocated[at],
        reserved=lives.reserved[at],
        groups=groups,
        levels=levels,
        largest=_largest(replayed, at),
        ooms=np.array(ooms, dtype=np.int64),
    )


def _instants(allocated: Ints, ooms: list[int], points: int) -> Ints:
    """Of each of ``points`` stretches the highest instant; the out-of-memory events; the first and the last."""
    edges = np.unique(np.linspace(0, len(allocated), points + 1).astype(np.int64))
    parts = (stretches(allocated, start=start, stop=stop) for start, stop in pairwise(edges.tolist()))
    tops = [highest((begin, part) for begin, (part,) in each)[1] for each in parts]
    return np.unique(np.array([0, *tops, *ooms, len(allocated) - 1], dtype=np.int64))


def _levels(replayed: Replayed, at: Ints, way: Way) -> tuple[tuple[str, ...], Ints]:
    """What each group held at the instants ``at``."""
    lives, granted, recording = replayed.lives, replayed.granted, replayed.lives.recording
    order, group = _groups(lives, way)
    change = np.zeros((len(order), len(at) + 1), dtype=np.int64)
    np.add.at(change[:, 0], group[lives.stacks(lives.older_numbers)], granted[lives.made :])
    number = 0
    for begin, (actions, stack_ids, ended) in stretches(recording.actions, recording.stack_ids, lives.ended):
        (allocs,), (ends,) = np.nonzero(actions == ALLOC), np.nonzero(ended >= 0)
        after, gone = number + len(allocs), ended[ends].astype(np.int64)
        np.add.at(change, (group[stack_ids[allocs]], np.searchsorted(at, begin + allocs)), granted[number:after])
        np.subtract.at(change, (group[lives.stacks(gone)], np.searchsorted(at, begin + ends)), granted[gone])
        number = after
    levels = change[:, :-1].cumsum(axis=1)
    rank = np.argsort(-levels.max(axis=1), kind="stable")
    # Those at the highest instant first; a group that is never high goes with the rest.
    if len(rank) <= GROUPS + 1:
        return tuple(order[i] for i in rank.tolist()), levels[rank]
    kept, rest = rank[:GROUPS], rank[GROUPS:]
    names = [*(order[i] for i in kept.tolist()), REST]
    return tuple(names), np.concatenate([levels[kept], levels[rest].sum(axis=0, keepdims=True)])


def _groups(lives: Lives, way: Way) -> tuple[list[str], Ints]:
    """The labels of all blocks, and by stack the place of its label; the last place is that of stack -1."""
    used = np.zeros(len(lives.recording.stacks) + 1, dtype=bool)
    used[lives.stacks(lives.older_numbers)] = True
    for _, (actions, stack_ids) in stretches(lives.recording.actions, lives.recording.stack_ids):
        used[stack_ids[actions == ALLOC]] = True
    label, places, group = labeller(lives.recording, way), dict[str, int](), np.zeros(len(used), dtype=np.int64)
    for number in [*([-1] if used[-1] else []), *np.nonzero(used[:-1])[0].tolist()]:
        group[number] = places.setdefault(label(number), len(places))
    return list(places), group


def _largest(replayed: Replayed, at: Ints) -> list[list[tuple[int, str]]]:
    """At each instant, the largest blocks and the lines that made them."""
    lives, granted = replayed.lives, replayed.granted
    label = labeller(lives.recording, call_site)
    there = set(lives.older_numbers.tolist())
    ranked = [(-n_bytes, number) for n_bytes, number in zip(granted[lives.made :].tolist(), sorted(there), strict=True)]
    heapify(ranked)
    found, start = [], 0
    for event in at.tolist():
        for born, gone in lives.changes(lives.ended, start, event + 1):
            there.update(born)
            there.difference_update(gone)
            for number in set(born).difference(gone):
                heappush(ranked, (-int(granted[number]), number))
        start = event + 1
        here = _highest(ranked, there)
        if len(ranked) > 2 * len(there) + LEAST_RANKED:
            ranked = [entry for entry in ranked if entry[1] in there]
            heapify(ranked)
        stacks = lives.stacks(np.array([number for _, number in here], dtype=np.int64)).tolist()
        found.append([(-negated, label(stack)) for (negated, _), stack in zip(here, stacks, strict=True)])
    return found


def _highest(ranked: list[tuple[int, int]], there: set[int]) -> list[tuple[int, int]]:
    """The first entries of a heap that are about blocks still there; what comes up and is not goes for good."""
    here: list[tuple[int, int]] = []
    while ranked and len(here) < LARGEST:
        entry = heappop(ranked)
        if entry[1] in there:
            here.append(entry)
    for entry in here:
        heappush(ranked, entry)
    return here
