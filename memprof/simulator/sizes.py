"""Sizes of tensors at lengths that were never recorded: combinations of those that were, in whole numbers. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import lcm
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from memprof.simulator.reach import Reach
from memprof.simulator.trace import Trace, bytes_of

Ints = npt.NDArray[np.int64]

#: Entries in a row of a table of shapes; a shape has fewer.
AXES = 12


class Irregular(Exception):
    """A recording that does not repeat, or not as another of its kind: trace directly."""


class Slot(NamedTuple):
    """What a tensor of the program is, whatever its size. ``plain``: its bytes follow from its shape."""

    part: str
    module: str
    op: str
    dtype: str
    rank: int
    plain: bool


def slot_of(trace: Trace, slot: int) -> Slot:
    """What a tensor of ``trace`` is, whatever its size."""
    shape, dtype, site = trace.shapes[slot], trace.dtypes[slot], trace.sites[slot]
    plain = bytes_of(site[1], shape, dtype) == trace.nbytes[slot]
    return Slot(trace.parts[slot], *site, dtype, len(shape), plain)


def row_of(trace: Trace, slot: int) -> Ints:
    """A tensor's shape, ``(AXES,)``; the first entry behind it is its bytes where they do not follow from it."""
    shape = trace.shapes[slot]
    if len(shape) >= AXES:
        raise Irregular(f"a tensor has {len(shape)} axes")
    own = [] if slot_of(trace, slot).plain else [trace.nbytes[slot]]
    return np.array([*shape, *own] + [1] * AXES, dtype=np.int64)[:AXES]


class Table(Protocol):
    """What says how large a program's tensors are at some lengths."""

    def at(self, lengths: Sequence[int]) -> Ints:
        """The table of a point."""


class Sizes:
    """Tables of shapes, one a point that was recorded, and every combination of them.

    Attributes:
        reach: The points.
        tables: The table of each point that is combined from; all have the same shape.
    """

    def __init__(self) -> None:
        self.reach = Reach()
        self.tables: list[Ints] = []
        self._unique: tuple[int, Ints, Ints] | None = None

    def add(self, lengths: Sequence[int], table: Ints) -> None:
        """Take a recording in: as one more point to combine from, or as a test of what the others say.

        Raises:
            Irregular: It has other sizes than they say; it is not taken in.
        """
        weights = self.reach.span.weights(lengths)
        if weights is None:
            self.tables.append(table)
        elif (self._spread(self._combined(weights, lengths)) != table).any():
            raise Irregular(f"the program is wrong about {tuple(lengths)}")
        self.reach.add(lengths)

    def at(self, lengths: Sequence[int]) -> Ints:
        """The table of a point; raises Irregular where it is no combination, or one of no whole numbers."""
        return self._spread(self._rows_at(lengths))

    def whole(self, lengths: Sequence[int]) -> bool:
        """Whether :meth:`at` has a table of a point: else sizes are no such combinations, whatever tests they stood."""
        try:
            self._rows_at(lengths)
        except Irregular:
            return False
        return True

    def _rows_at(self, lengths: Sequence[int]) -> Ints:
        weights = self.reach.span.weights(lengths)
        if weights is None:
            raise Irregular(f"{tuple(lengths)} is no combination of what was recorded")
        return self._combined(weights, lengths)

    def _combined(self, weights: Sequence[Fraction], lengths: Sequence[int]) -> Ints:
        """The rows that differ, combined: ``(rows, ...)``."""
        scale = lcm(*(w.denominator for w in weights))
        whole = np.array([int(w * scale) for w in weights], dtype=np.int64)
        total: Ints = np.tensordot(self._rows[0], whole, axes=(1, 0))
        if (total % scale).any():
            raise Irregular(f"{tuple(lengths)} gives lengths that are no whole numbers")
        return total // scale

    def _spread(self, rows: Ints) -> Ints:
        """The table of such rows."""
        table: Ints = np.moveaxis(rows[self._rows[1]], 0, -2)
        return table

    @property
    def _rows(self) -> tuple[Ints, Ints]:
        """What differs from tensor to tensor, ``(rows, points, ..., AXES)``, and the row of each: most have the sizes
        of others.
        """
        if self._unique is None or self._unique[0] != len(self.tables):
            stacked = np.moveaxis(np.stack(self.tables), -2, 0)
            first, place = _distinct(stacked)
            self._unique = len(self.tables), stacked[first], place
        return self._unique[1:]


def _distinct(rows: Ints) -> tuple[Ints, Ints]:
    """The first of each that differ along the first axis, in order, and the number of each row among them."""
    number, first = dict[bytes, int](), list[int]()
    place = np.empty(len(rows), dtype=np.int64)
    for i, row in enumerate(rows):
        place[i] = number.setdefault(row.tobytes(), len(number))
        if len(number) > len(first):
            first.append(i)
    return np.array(first, dtype=np.int64), place


def packed(tables: Sequence[Ints]) -> dict[str, Any]:
    """Tables, one or more and all of one shape ``(..., tensors, AXES)``, as plain lists: many tensors have the same
    sizes in all of them, and those are written once.
    """
    stacked = np.moveaxis(np.stack(tables), -2, 0)
    first, place = _distinct(stacked)
    width = stacked[0].size if len(stacked) else 0
    return {"sizes": stacked[first].reshape(len(first), width).tolist(), "size": place.tolist()}


def unpacked(data: Mapping[str, Any], count: int, shape: tuple[int, ...]) -> list[Ints]:
    """The ``count`` tables of ``shape`` that :func:`packed` wrote; ValueError, IndexError or KeyError if it did not."""
    tensors = shape[-2]
    unique = np.array(data["sizes"], dtype=np.int64).reshape(-1, count, *shape[:-2], AXES)
    place = np.array(data["size"], dtype=np.int64)
    if place.shape != (tensors,) or (place < 0).any():
        raise ValueError("sizes and tensors do not match")
    return list(np.moveaxis(unique[place], 0, -2))
