from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memprof.bracket import next_value

LOW, HIGH, STEP = 0.02, 1.0, 0.0005


def search(excess: Callable[[float], float]) -> tuple[float | None, list[float]]:
    """The largest value found to fit, and the values tried."""
    seen: list[tuple[float, float]] = []
    while (value := next_value(seen, LOW, HIGH, step=STEP)) is not None:
        assert value not in dict(seen)
        assert LOW <= value <= HIGH
        seen.append((value, excess(value)))
    return max((v for v, over in seen if over <= 0), default=None), [v for v, _ in seen]


@settings(deadline=None, max_examples=300)
@given(root=st.floats(0.021, 0.999), course=st.sampled_from(["line", "cube", "cliff", "bend", "shelf"]))
def test_at_most_ten_evaluations_end_within_half_a_percent(root: float, course: str) -> None:
    rises = {
        "line": lambda v: v - root,
        "cube": lambda v: v**3 - root**3,
        "cliff": lambda v: 1.0 if v > root else -1.0,
        "bend": lambda v: math.tanh(50 * (v - root)),
        "shelf": lambda v: max(v, 0.5) - max(root, 0.5) + math.copysign(1e-9, v - root),
    }[course]
    best, tried = search(rises)
    assert len(tried) <= 10
    assert best is not None
    assert best <= root < best + 0.005 + 1e-9


def test_a_line_is_known_within_half_a_percent_of_itself_after_a_few() -> None:
    best, tried = search(lambda v: v - 0.4487)
    assert best is not None
    assert 0.4487 * 0.995 <= best <= 0.4487
    assert len(tried) <= 7


def test_the_ends() -> None:
    assert search(lambda v: -1.0) == (1.0, [1.0])
    best, tried = search(lambda v: v + 5)
    assert best is None
    assert tried[-1] == LOW  # the floor is evaluated, so that it can be told
    assert search(lambda v: v - LOW)[0] == LOW


def test_whole_numbers() -> None:
    seen: list[tuple[float, float]] = []
    while (value := next_value(seen, 1, 127, step=1)) is not None:
        seen.append((value, value**1.2 - 40**1.2))
    assert max(v for v, over in seen if over <= 0) == 40
    assert len(seen) <= 10


def test_others_values_are_left_to_them() -> None:
    assert next_value([], LOW, HIGH, step=STEP, busy=[1.0]) not in (1.0, None)
    seen = [(1.0, 1.0), (0.5, 0.5), (0.25, -0.1)]
    first = next_value(seen, LOW, HIGH, step=STEP)
    assert first is not None
    second = next_value(seen, LOW, HIGH, step=STEP, busy=[first])
    assert second is not None
    assert 0.25 < second < 0.5
    assert second != first


@pytest.mark.parametrize("most", [3, 5])
def test_fewer_evaluations_are_kept_to(most: int) -> None:
    seen: list[tuple[float, float]] = []
    while (value := next_value(seen, LOW, HIGH, step=STEP, most=most)) is not None:
        seen.append((value, value - 0.123))
    assert len(seen) <= most
