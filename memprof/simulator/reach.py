"""Which shapes recordings answer for: those that are combinations of theirs, and were put to the test."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Self


class Span:
    """Vectors of whole numbers and what they span affinely: every combination of them whose weights sum to 1."""

    def __init__(self) -> None:
        self.vectors: list[tuple[int, ...]] = []
        # Row echelon form of the vectors (with a leading 1), and each of its rows as a combination of the vectors.
        self._rows: list[tuple[int, list[Fraction], list[Fraction]]] = []

    def add(self, vector: Sequence[int]) -> bool:
        """Take ``vector`` in if it is no combination of those already in; says whether."""
        rest, made = self._reduce(vector)
        pivot = next((i for i, value in enumerate(rest) if value), None)
        if pivot is None:
            return False
        self.vectors.append(tuple(vector))
        made = [-w for w in made] + [Fraction(1)]
        scale = rest[pivot]
        self._rows = [(p, row, [*w, Fraction(0)]) for p, row, w in self._rows]
        self._rows.append((pivot, [v / scale for v in rest], [w / scale for w in made]))
        return True

    def weights(self, vector: Sequence[int]) -> list[Fraction] | None:
        """The weights that make ``vector``, one for each vector, or None where none do."""
        rest, made = self._reduce(vector)
        return None if any(rest) else made

    def _reduce(self, vector: Sequence[int]) -> tuple[list[Fraction], list[Fraction]]:
        rest = [Fraction(1), *map(Fraction, vector)]
        made = [Fraction(0)] * len(self.vectors)
        for pivot, row, weights in self._rows:
            factor = rest[pivot]
            if factor:
                rest = [a - factor * b for a, b in zip(rest, row, strict=True)]
                made = [a + factor * b for a, b in zip(made, weights, strict=True)]
        return rest, made


class Reach:
    """Which shapes recordings answer for.

    Shapes are vectors of lengths; the last entry is the number of new tokens. A shape is answered for if it was itself
    recorded, or if it is a combination of those recorded, and a recording that combinations do not need has put them to
    the test. Where that
    was a recording of other tokens alone, only prompts that were recorded are answered for; where it was one of
    another prompt, all that lie between the least and the greatest recorded in every length.

    Attributes:
        span: What is combined.
        seen: Every shape recorded.
    """

    def __init__(self) -> None:
        self.span = Span()
        self.seen: list[tuple[int, ...]] = []
        self._prompts = Span()
        self._met: set[tuple[int, ...]] = set()

    @classmethod
    def of(cls, points: Sequence[Sequence[int]], seen: Sequence[Sequence[int]]) -> Self:
        """The reach whose shapes to combine from are ``points``, of all that were seen; ValueError if they are not."""
        reach = cls()
        found = [tuple(lengths) for lengths in seen if reach.add(lengths)]
        if found != [tuple(point) for point in points]:
            raise ValueError("these are not the points that those shapes give")
        return reach

    def add(self, lengths: Sequence[int]) -> bool:
        """A shape was recorded; says whether it is one more to combine from, else it is a test."""
        self.seen.append(tuple(lengths))
        if not self.met(lengths):
            self._met.add(tuple(lengths[:-1]))
            self._prompts.add(lengths[:-1])
        return self.span.add(lengths)

    def met(self, lengths: Sequence[int]) -> bool:
        """Whether the same prompt was recorded, maybe of another number of new tokens."""
        return tuple(lengths[:-1]) in self._met

    @property
    def tested(self) -> bool:
        """Whether a recording that the combinations did not need has put them to the test."""
        return len(self.seen) > len(self.span.vectors)

    def excess(self, lengths: Sequence[int]) -> float:
        """How far a shape lies outside what was recorded, in shares of each length; the new tokens do not count."""
        total = 0.0
        for i, value in enumerate(lengths[:-1]):
            known = [one[i] for one in self.seen]
            if not known:
                total += value
            else:
                total += max(0, value - max(known), min(known) - value) / (1 + value)
        return total

    def covers(self, lengths: Sequence[int]) -> bool:
        """Whether a shape is answered for; one that was itself recorded, number of tokens and all, needs no test."""
        if tuple(lengths) in self.seen:
            return True
        if not self.tested or self.span.weights(lengths) is None:
            return False
        return self.met(lengths) or (len(self._met) > len(self._prompts.vectors) and not self.excess(lengths))
