"""The largest value of one number that fits: interpolation between what fits and what does not, at worst bisection."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise

#: Evaluations that a search over one number may take, and how near to the truth they end, in units of that number.
MOST_EVALUATIONS, TOLERANCE = 10, 0.005


def next_value(
    seen: Sequence[tuple[float, float]],
    low: float,
    high: float,
    *,
    step: float,
    busy: Collection[float] = (),
    tolerance: float = TOLERANCE,
    most: int = MOST_EVALUATIONS,
) -> float | None:
    """The value to evaluate next, or None where nothing is left to learn (or only others' evaluations are awaited).

    Memory is taken not to fall as the value rises. Both ends come first, the high one sooner. Between them the point is
    interpolated, as memory is close to linear in the tokens kept, and drawn towards the middle as far as it takes
    for halving to reach ``tolerance`` within ``most`` evaluations (the projection of the ITP method, Oliveira and
    Takahashi, ACM Trans. Math. Softw. 47, 2021). It ends when the bracket is within 0.5 % of the value that fits.

    Args:
        seen: Values evaluated and bytes above the budget (0 or less: fits), in the order of their evaluation.
        low: Least value allowed.
        high: Largest value allowed.
        step: Values are ``low`` plus multiples of this.
        busy: Values that other workers are evaluating.
        tolerance: How near, at worst, for any course of memory that rises.
        most: Evaluations allowed.
    """
    over = dict(seen)
    for end in (high, low):
        if end not in over and end not in busy:
            return end
    if over.get(high, 1) <= 0 or over.get(low, 1) > 0 or high not in over:
        return None
    below = max(value for value, excess in seen if excess <= 0)
    above = min(value for value, excess in seen if excess > 0 and value > below)
    goal, left = max(step, tolerance * below), most - len(over) - len(busy)
    inside = sorted(value for value in busy if below < value < above)
    if left <= 0 or above - below <= goal * (1 + 1e-9):
        return None
    if inside:
        edges = [below, *inside, above]
        wide, at = max((b - a, a) for a, b in pairwise(edges))
        point = at + wide / 2
    else:
        reach = max(tolerance - 2 * step, step) * 2.0 ** (left - 1)
        aim = below - over[below] * (above - below) / (over[above] - over[below])
        aim += 0.4 * goal if seen[-1][1] <= 0 else -0.4 * goal  # just past the root, from the side not tried last
        least, greatest = max(below, above - reach), min(above, below + reach)
        point = min(max(aim, least), greatest) if least <= greatest else (below + above) / 2
    value = on_grid(point, low, step)
    value = min(max(value, on_grid(below + step, low, step)), on_grid(above - step, low, step))
    return None if value in over or value in busy else value


def on_grid(value: float, low: float, step: float) -> float:
    """The multiple of ``step`` above ``low`` that is nearest to ``value``."""
    return round(low + round((value - low) / step) * step, 10)
