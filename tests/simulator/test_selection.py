"""Selections are told apart by what happens in them, and answer for counts between those that stood a test."""

from __future__ import annotations

import json

import pytest

from memprof.simulator.selection import Passage, Selections
from memprof.simulator.sizes import Irregular
from memprof.simulator.trace import Trace


def made_up(n: int, kept: int, *, most: int = 1000, step: int = 1) -> Passage:
    """Scores of all pairs in blocks of at most ``most`` rows, then as many indices as are kept, which stay."""
    trace = Trace()
    count = -(-n // most)
    for _ in range(count):
        block = trace.birth(4 * n * n // count, "pruner", ("select", "mm"), (n // count, n), "float32")
        trace.death(block)
    odd = trace.birth(n % step + 1, "pruner", ("select", "scratch"), (), "odd")
    trace.birth(8 * kept, "pruner", ("select", "topk"), (kept,), "int64")
    trace.death(odd)
    return Passage.of(trace, 0, len(trace.events))


def recorded(*counts: tuple[int, int], most: int = 1000, step: int = 1) -> Selections:
    found = Selections()
    for n, kept in counts:
        found.add((n, kept), made_up(n, kept, most=most, step=step))
    return found


def same(one: Passage | None, other: Passage) -> bool:
    return one is not None and one.course == other.course and (one.nbytes, one.shapes) == (other.nbytes, other.shapes)


def test_what_lies_between_is_combined_once_it_was_put_to_the_test() -> None:
    found = recorded((100, 50), (400, 200))
    assert same(found.at((100, 50)), made_up(100, 50))
    assert found.at((200, 100)) is None, "nothing has tested it"
    found.add((200, 100), made_up(200, 100))
    assert same(found.at((300, 150)), made_up(300, 150))
    assert found.at((500, 250)) is None, "beyond what was recorded"
    assert found.at((300, 100)) is None, "another share is no combination"


def test_each_recording_that_is_combined_from_stood_a_test() -> None:
    found = recorded((100, 50), (400, 200), (200, 100), (400, 10))
    assert found.at((300, 100)) is None, "the last of them was never tested"
    found.add((300, 30), made_up(300, 30))
    assert same(found.at((300, 100)), made_up(300, 100))
    read = Selections.from_json(json.loads(json.dumps(found.to_json())))
    assert same(read.at((300, 100)), made_up(300, 100))


def test_other_blocks_are_another_course() -> None:
    found = recorded((200, 9), (800, 9), (400, 9), (1200, 9), (2000, 9), (1600, 9))
    assert len(found.known) == 2
    assert same(found.at((600, 9)), made_up(600, 9))
    assert same(found.at((1800, 9)), made_up(1800, 9))
    assert found.at((1000, 9)) is None
    assert found.at((1201, 9)) is None, "half a row is no length"


def test_what_is_no_combination_is_told_apart_by_the_tokens_shown() -> None:
    found = recorded((100, 50), (400, 200), (250, 125), step=7)
    assert [one.among for one in found.known] == [(100,), (400,), (250,)]
    for n in (100, 400, 250):
        assert same(found.at((n, n // 2)), made_up(n, n // 2, step=7))
        assert found.at((n, n // 4)) is None, "nothing tells of other shares"
    assert found.at((300, 150)) is None
    for kept in (250, 1):
        found.add((250, kept), made_up(250, kept, step=7))
    assert same(found.at((250, 60)), made_up(250, 60, step=7)), "a share of tokens whose shares were put to the test"
    assert found.at((400, 60)) is None
    found.add((300, 150), made_up(300, 150, step=7))
    assert same(found.at((300, 150)), made_up(300, 150, step=7))
    read = Selections.from_json(json.loads(json.dumps(found.to_json())))
    assert [(one.among, one.seen) for one in read.known] == [(one.among, one.seen) for one in found.known]
    assert same(read.at((250, 60)), made_up(250, 60, step=7))
    assert len(found.to_json()) == 1, "one course"


def test_what_is_no_combination_at_one_number_of_tokens_is_as_it_was_recorded() -> None:
    found = Selections()
    for n, kept in ((100, 50), (400, 200), (250, 125), (250, 1), (250, 2), (250, 90)):
        found.add((n, kept), made_up(n, kept, step=7 * kept if n == 250 else 7))
    assert [one.among for one in found.known] == [(100,), (400,), *((250, kept) for kept in (125, 1, 2, 90))]
    for kept in (125, 1, 2, 90):
        assert same(found.at((250, kept)), made_up(250, kept, step=7 * kept))
    assert found.at((250, 60)) is None
    with pytest.raises(Irregular):
        found.add((250, 90), made_up(250, 91, step=7 * 90))


def test_recordings_of_two_are_joined() -> None:
    one, other = recorded((100, 50), (400, 200)), recorded((100, 50), (2000, 3))
    one.join(other)
    assert same(one.at((2000, 3)), made_up(2000, 3))
    before = len(one.known)
    one.join(other)
    assert len(one.known) == before
