"""What a pickle may ask for again, by its place: most of it is marks of events and their stacks, of which few differ.

So a place holds the number of a thing, in a column (:mod:`memprof.snapshots.columns`), and each thing is kept once.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from memprof.snapshots.columns import Column

#: So many places are also kept as what they hold: instructions name the first ones most.
MOST_FIRST = 2**12


class Memo:
    """The places that an unpickler has filled.

    Args:
        kept_once: The classes of which equal things are one object that stays.

    Attributes:
        first: What the first places hold.
        numbers: The number of the thing at each place; who appends to it calls :meth:`settle`.
    """

    def __init__(self, *kept_once: type) -> None:
        self.first: list[Any] = []
        self.numbers = Column("i")
        self._once = frozenset(kept_once)
        self._things: list[Any] = []
        self._known: dict[Hashable, int] = {}
        self._unused: list[int] = []

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> Any:
        return self.first[place] if place < len(self.first) else self._things[self.numbers[place]]

    def __setitem__(self, place: int, thing: Any) -> None:
        before = self.numbers[place]
        if self._key(self._things[before]) is None:
            self._things[before] = None
            self._unused.append(before)
        self.numbers[place] = self.number(thing)
        if place < len(self.first):
            self.first[place] = thing

    def append(self, thing: Any) -> None:
        """Fill the next place."""
        self.numbers.tail.append(self.number(thing))
        if len(self.first) < MOST_FIRST:
            self.settle()

    def settle(self) -> None:
        """Take note of numbers that were appended."""
        for place in range(len(self.first), min(len(self.numbers), MOST_FIRST)):
            self.first.append(self._things[self.numbers[place]])
        self.numbers.settle()

    def number(self, thing: Any) -> int:
        """The number of a thing: its own, or that of an equal one."""
        key = self._key(thing)
        known = None if key is None else self._known.get(key)
        if known is not None:
            return known
        if self._unused:
            number = self._unused.pop()
            self._things[number] = thing
        else:
            number = len(self._things)
            self._things.append(thing)
        if key is not None:
            self._known[key] = number
        return number

    def _key(self, thing: Any) -> Hashable | None:
        """What equal things have in common; None for what may still change."""
        kind = type(thing)
        if kind is str:
            return str(thing)
        if kind in self._once:
            return id(thing)
        if kind is tuple and len(thing) == 2 and type(thing[0]) is type(thing[1]) is int:
            return tuple(thing)
        return None
