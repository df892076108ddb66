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

    Memory is taken not to fall as the value rises. The high end comes first, then the middle, then points where a line
    through what is known meets the budget, as memory is close to linear in the tokens kept. Each is drawn towards the
    middle as far as it takes for halving to reach ``tolerance`` within ``most`` evaluations (the projection of the ITP
    method, Oliveira and Takahashi, ACM Trans. Math. Softw. 47, 2021). The low end is evaluated only where nothing
    above it fits. The search ends when the bracket is within 0.5 % of the value that fits.

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
    if high not in over and high not in busy:
        return high
    if over.get(high, 1) <= 0 or over.get(low, 0) > 0:
        return None
    below = max((value for value, excess in over.items() if excess <= 0), default=low)
    above = min((value for value, excess in over.items() if excess > 0 and value > below), default=high)
    spare = below not in over  # then the low end itself may still have to be evaluated
    goal, left = max(step, tolerance * below) * (1 + 1e-9), most - len(over) - len(busy)
    if left <= 0 or above - below <= goal or (spare and left == 1):
        return low if spare and left > 0 and low not in busy else None
    inside = sorted(value for value in busy if below < value < above)
    if inside:
        wide, at = max((b - a, a) for a, b in pairwise([below, *inside, above]))
        point = at + wide / 2
    else:
        point = _crossing(over, below, above, goal)
        if point <= low and spare:
            return low
        reach = max(tolerance - 2 * step, step) * 2.0 ** (left - 1 - spare)
        least, most_ = max(below, above - reach), min(above, below + reach)
        point = min(max(point, least), most_) if least <= most_ else (below + above) / 2
    value = min(max(on_grid(point, low, step), on_grid(below + step, low, step)), on_grid(above - step, low, step))
    return None if value in over or value in busy else value


def _crossing(over: dict[float, float], below: float, above: float, goal: float) -> float:
    """Where a line meets the budget, moved a little past it so that the far end of the bracket comes near."""
    other = below if below in over else min((value for value in over if value > above), default=None)
    if other is None or over[other] == over.get(above):
        return (below + above) / 2
    root = above - over.get(above, 0) * (above - other) / (over[above] - over[other])
    past = max(0.4 * goal, 0.1 * min(abs(root - below), abs(above - root)))
    return root - past if above - root <= root - below else root + past


def on_grid(value: float, low: float, step: float) -> float:
    """The multiple of ``step`` above ``low`` that is nearest to ``value``."""
    return round(low + round((value - low) / step) * step, 10)
