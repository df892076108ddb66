"""What a pruner's selection does by itself, at whatever counts it is shown. Plain data and arithmetic, no torch.

A selection may do anything with the number of tokens: go through them in blocks, or in a step for each that stays. So
recordings are told apart by what happened (:class:`Course`); among those where the same happened, sizes are combined as
those of programs are (:mod:`memprof.simulator.sizes`), between the least and the greatest counts recorded, and only
from recordings that one more, which the combination did not need, has put to the test. Where that one contradicts them,
those of each number of tokens stand by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Self

import numpy as np

from memprof.simulator.sizes import AXES, Ints, Irregular, Sizes, Slot, packed, row_of, slot_of, unpacked
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

    Args:
        course: What happens in each.
        among: What their counts begin with; nothing, where they may be any.
    """

    def __init__(self, course: Course, among: Counts = ()) -> None:
        self.course, self.among = course, among
        self.sizes = Sizes()
        self._tried: set[int] = set()  # the points of which a test was combined

    def add(self, counts: Counts, rows: Ints) -> None:
        """Take a recording in; raises Irregular if its sizes are not those that the others give."""
        weights = self.sizes.reach.span.weights(_point(counts))
        self.sizes.add(_point(counts), rows)
        self._tried |= {i for i, weight in enumerate(weights or ()) if weight}

    def at(self, counts: Counts) -> Passage | None:
        """The selection at ``counts``, or None where these recordings do not answer for it."""
        point, reach = _point(counts), self.sizes.reach
        if counts[: len(self.among)] != self.among:
            return None
        if point not in reach.seen:
            weights = None if reach.excess(point) else reach.span.weights(point)
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
        """As plain lists and numbers, but for the course."""
        return {"among": self.among, "seen": self.seen, **packed(self.sizes.tables)}

    @classmethod
    def from_json(cls, course: Course, data: Mapping[str, Any]) -> Self:
        """The selection of ``course`` in ``data``; raises as :meth:`Selections.from_json`."""
        one = cls(course, tuple(data["among"]))
        for counts in data["seen"]:
            weights = one.sizes.reach.span.weights(_point(counts))
            one._tried |= {i for i, weight in enumerate(weights or ()) if weight}
            one.sizes.reach.add(_point(counts))
        one.sizes.tables = unpacked(data, len(one.sizes.reach.span.vectors), (len(course.slots), AXES))
        return one


class Selections:
    """The selections of a model under one method, by what happens in them.

    Where recordings of one course are no combinations of each other, as where blocks are no equal parts of the tokens,
    they are told apart by the visual tokens that they are shown, and then by all counts.
    """

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
        """Take a recording in; raises Irregular where another of the same counts had other sizes."""
        home = self._home(passage.course, counts)
        try:
            home.add(counts, passage.rows)
        except Irregular:
            if home.among == counts:
                raise
            self._found.clear()
            self._part(home)
            self.add(counts, passage)

    def _home(self, course: Course, counts: Counts) -> Selection:
        """The recordings that one of ``counts`` belongs to."""
        own = [one for one in self.known if one.course == course]
        for among in ((), counts[:1], counts):
            inside = [one for one in own if one.among[: len(among)] == among]
            if not inside:
                self.known.append(Selection(course, among))
                return self.known[-1]
            if inside[0].among == among:
                return inside[0]
        raise AssertionError(f"{counts} are fewer counts than those recorded")

    def _part(self, one: Selection) -> None:
        """Tell the recordings of ``one`` apart by more of their counts."""
        self.known.remove(one)
        finer = dict[Counts, Selection]()
        for counts in one.seen:
            among = counts if one.among else counts[:1]
            finer.setdefault(among, Selection(one.course, among)).add(counts, one.sizes.at(_point(counts)))
        self.known += finer.values()

    def join(self, others: Selections) -> None:
        """Take in the recordings of ``others`` that tell something new."""
        seen = {counts for one in self.known for counts in one.seen}
        self.known += [
            one for one in others.known if any(n not in seen and self.at(n) is None for n in one.seen)
        ]  # fmt: skip

    def to_json(self) -> list[dict[str, Any]]:
        """As plain lists and numbers, course by course."""
        courses = dict[Course, list[Selection]]()
        for one in self.known:
            courses.setdefault(one.course, []).append(one)
        return [{**course._asdict(), "of": [one.to_json() for one in own]} for course, own in courses.items()]

    @classmethod
    def from_json(cls, data: Sequence[Mapping[str, Any]]) -> Self:
        """The selections in ``data``; raises ValueError, KeyError, TypeError or IndexError where it has none."""
        found = cls()
        for each in data:
            slots = tuple(Slot(*slot) for slot in each["slots"])
            course = Course(tuple(each["events"]), tuple(each["survivors"]), slots)
            found.known += [Selection.from_json(course, one) for one in each["of"]]
        return found


def _point(counts: Sequence[int]) -> tuple[int, ...]:
    """As a :class:`~memprof.simulator.reach.Reach` has it, whose last entry is a number of new tokens."""
    return *counts, 1
