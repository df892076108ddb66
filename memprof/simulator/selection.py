"""What a pruner's selection does by itself, at whatever counts it is shown. Plain data and arithmetic, no torch.

A selection may do anything with the number of tokens: go through them in blocks, or in a step for each that stays. So
recordings are told apart by what happened (:class:`Course`); among those where the same happened, sizes are combined as
those of programs are (:mod:`memprof.simulator.sizes`), between the least and the greatest counts recorded, and only
from recordings that one more, which the combination did not need, has put to the test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Self

import numpy as np

from memprof.simulator.sizes import AXES, Ints, Irregular, Sizes, Slot, row_of, slot_of
from memprof.simulator.trace import Trace, bytes_of

#: Visual tokens, kept and merged ones, and what else leads the signals that are looked at.
Counts = tuple[int, ...]


class Course(NamedTuple):
    """What happens in a selection, whatever its sizes.

    Attributes:
        events: Births and deaths; tensors numbered by birth inside.
        survivors: The numbers of those that outlive it.
        slots: What each of them is.
    """

    events: tuple[int, ...]
    survivors: tuple[int, ...]
    slots: tuple[Slot, ...]


@dataclass(frozen=True)
class Passage:
    """One selection: its course, and its tensors' shapes, a row each (:func:`~memprof.simulator.sizes.row_of`)."""

    course: Course
    rows: Ints

    @classmethod
    def of(cls, trace: Trace, start: int, stop: int) -> Passage:
        """The events from ``start`` to ``stop``; raises Irregular if they end a tensor born before."""
        born = [event for event in trace.events[start:stop] if event >= 0]
        number = {slot: i for i, slot in enumerate(born)}
        ended = {~event for event in trace.events[start:stop] if event < 0}
        if any(slot not in number for slot in ended):
            raise Irregular("a selection frees what it was given")
        course = Course(
            tuple(number[e] if e >= 0 else ~number[~e] for e in trace.events[start:stop]),
            tuple(number[slot] for slot in born if slot not in ended),
            tuple(slot_of(trace, slot) for slot in born),
        )
        return cls(course, np.array([row_of(trace, slot) for slot in born], dtype=np.int64).reshape(-1, AXES))

    @cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        """Each tensor's shape."""
        rows = self.rows.tolist()
        return [tuple(row[: slot.rank]) for slot, row in zip(self.course.slots, rows, strict=True)]

    @cached_property
    def nbytes(self) -> list[int]:
        """Each tensor's bytes."""
        return [
            bytes_of(slot.op, shape, slot.dtype) if slot.plain else int(row[slot.rank])
            for slot, shape, row in zip(self.course.slots, self.shapes, self.rows, strict=True)
        ]


class Selection:
    """All recordings of one course whose sizes are combinations of each other.

    Attributes:
        wrong: Whether a recording of the same course had other sizes: then only what was recorded is answered for.
    """

    def __init__(self, course: Course) -> None:
        self.course, self.wrong = course, False
        self.sizes = Sizes()
        self._tried: set[int] = set()  # the points of which a test was combined

    def add(self, counts: Counts, rows: Ints) -> None:
        """Take a recording in; raises Irregular if its sizes are not those that the others give."""
        weights = self.sizes.reach.span.weights(_point(counts))
        try:
            self.sizes.add(_point(counts), rows)
        except Irregular:
            self.wrong = True
            raise
        self._tried |= {i for i, weight in enumerate(weights or ()) if weight}

    def at(self, counts: Counts) -> Passage | None:
        """The selection at ``counts``, or None where these recordings do not answer for it."""
        point, reach = _point(counts), self.sizes.reach
        if point not in reach.seen:
            weights = None if self.wrong or reach.excess(point) else reach.span.weights(point)
            if weights is None or not all(i in self._tried for i, weight in enumerate(weights) if weight):
                return None
        try:
            return Passage(self.course, self.sizes.at(point))
        except Irregular:
            return None

    @property
    def seen(self) -> list[Counts]:
        """The counts recorded."""
        return [point[:-1] for point in self.sizes.reach.seen]

    def to_json(self) -> dict[str, Any]:
        """As plain lists and numbers."""
        return {
            "events": self.course.events, "survivors": self.course.survivors, "slots": self.course.slots,
            "seen": self.seen, "rows": [t.tolist() for t in self.sizes.tables],
            "wrong": self.wrong,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The selection in ``data``; raises ValueError, KeyError, TypeError or IndexError where it is none."""
        slots = tuple(Slot(*slot) for slot in data["slots"])
        one = cls(Course(tuple(data["events"]), tuple(data["survivors"]), slots))
        tables = [np.array(rows, dtype=np.int64).reshape(len(slots), AXES) for rows in data["rows"]]
        for counts in data["seen"]:
            weights = one.sizes.reach.span.weights(_point(counts))
            one._tried |= {i for i, weight in enumerate(weights or ()) if weight}
            one.sizes.reach.add(_point(counts))
        if len(tables) != len(one.sizes.reach.span.vectors):
            raise ValueError("counts and shapes do not match")
        one.sizes.tables, one.wrong = tables, bool(data["wrong"])
        return one


class Selections:
    """The selections of a model under one method, by what happens in them."""

    def __init__(self) -> None:
        self.known: list[Selection] = []
        self._found: dict[Counts, Passage] = {}

    def at(self, counts: Counts) -> Passage | None:
        """The selection at ``counts``, or None where no recordings answer for it."""
        if counts not in self._found:
            found = next((passage for one in self.known if (passage := one.at(counts)) is not None), None)
            if found is None:
                return None
            self._found[counts] = found
        return self._found[counts]

    def add(self, counts: Counts, passage: Passage) -> None:
        """Take a recording in."""
        for one in self.known:
            if one.course == passage.course:
                try:
                    return one.add(counts, passage.rows)
                except Irregular:
                    self._found.clear()
        fresh = Selection(passage.course)
        fresh.add(counts, passage.rows)
        self.known.append(fresh)
        return None


    def join(self, others: Selections) -> None:
        """Take in the recordings of ``others`` that tell something new."""
        self.known += [one for one in others.known if any(self.at(counts) is None for counts in one.seen)]


def _point(counts: Sequence[int]) -> tuple[int, ...]:
    """As a :class:`~memprof.simulator.reach.Reach` has it, whose last entry is a number of new tokens."""
    return *counts, 1
