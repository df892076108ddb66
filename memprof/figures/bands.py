"""Many samples as a band: where a line a token would be a blob, the spread of neighbours is drawn instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import quantiles
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memprof.figures.style import Look

#: From so many samples on, a line is a band.
MANY = 400
#: Columns that a band has.
COLUMNS = 60


@dataclass(frozen=True)
class Band:
    """Of each column of neighbouring values the extremes, the quartiles and the median, in what the values are."""

    edges: list[float]
    low: list[float]
    first: list[float]
    median: list[float]
    third: list[float]
    high: list[float]


def band(values: Sequence[float | None], columns: int = COLUMNS) -> Band:
    """``values`` in at most ``columns`` columns of neighbours; missing ones (None) are no part of any."""
    count = len(values)
    edges = (
        [count * i / columns for i in range(columns + 1)] if count > columns else [float(i) for i in range(count + 1)]
    )
    rows: list[tuple[float, ...]] = []
    for left, right in pairwise(edges):
        own = [v for v in values[round(left) : max(round(right), round(left) + 1)] if v is not None]
        if not own:
            rows.append((float("nan"),) * 5)
            continue
        first, median, third = quantiles(own, n=4, method="inclusive") if len(own) > 1 else own * 3
        rows.append((min(own), first, median, third, max(own)))
    low, first_, median_, third_, high = (list(column) for column in zip(*rows, strict=True))
    return Band(edges, low, first_, median_, third_, high)


def draw(axes: Any, found: Band, colour: str, tints: tuple[str, str], look: Look, *, scale: float = 1.0) -> None:
    """The extremes palest, the quartiles on them, the median as a line; x times ``scale``."""
    edges = [x * scale for x in found.edges]
    for low, high, tint in ((found.low, found.high, tints[0]), (found.first, found.third, tints[1])):
        axes.stairs(look.scaled(high), edges, baseline=look.scaled(low), fill=True, color=tint, linewidth=0)
    axes.stairs(look.scaled(found.median), edges, baseline=None, color=colour, linewidth=look.pt(1.1), zorder=3)
