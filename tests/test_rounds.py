"""Every two values of two axes meet in what ``make test`` runs."""

from __future__ import annotations

from itertools import combinations, product

from rounds import rounds


def test_every_two_values_meet_and_none_twice() -> None:
    axes = ("abcde", "uvwxyz", (1, 2), (True, False))
    found = rounds(*axes, every=False)
    assert len(found) == len(set(found)) == 5 * 6
    for one, other in combinations(range(4), 2):
        assert {(row[one], row[other]) for row in found} == set(product(axes[one], axes[other]))
    assert rounds(*axes, every=True) == [*product(*axes)]
