"""A program of an answer in which a sliding window fills: layers grow up to that step, and no more from there on.

Such a program is recorded from a prompt that lies shortly before the window, however short the one that is asked about:
how large a step is depends on how many tokens there are, and not on how many of them were the prompt. What was recorded
of the prompt itself says the rest, the prefill and the steps before, and both must agree about the steps they share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memprof.simulator.folding import HEAD_TOKENS, Structure
from memprof.simulator.program import Program
from memprof.simulator.sizes import Ints, Irregular, Table
from memprof.simulator.unfolding import Unfolded


@dataclass(frozen=True)
class Told:
    """A table at one point alone."""

    table: Ints

    def at(self, lengths: Sequence[int]) -> Ints:
        """The table, whatever is asked."""
        del lengths
        return self.table


def joined(
    own: Program, lengths: Sequence[int], near: Program, near_lengths: Sequence[int], *, ahead: int, depth: int,
    tokens: int, filled: int,
) -> Unfolded:  # fmt: skip
    """The program of a prompt, written out for ``tokens`` new tokens, of which the window fills in step ``filled``.

    Args:
        own: What was recorded of the prompt, before the window fills.
        lengths: The prompt's.
        near: What was recorded of the same prompt with ``ahead`` more tokens of text, and of the window filling.
        near_lengths: Those of that prompt.
        ahead: How many tokens longer it is.
        depth: Decoder layers.
        tokens: New tokens.
        filled: The step in which the window fills.

    Raises:
        Irregular: They do not agree about the steps before.
    """
    one, other = own.structure, near.structure
    assert one is not None
    assert other is not None
    if _before(one) != _before(other):
        raise Irregular("the steps before a window fills are not alike")
    first, stop = one.first_row[HEAD_TOKENS, 0], one.first_row[HEAD_TOKENS + 1, 0]
    mine, theirs = own.sizes.at(lengths), near.sizes.at(near_lengths)
    dims, growth = mine[:, first:stop]
    if (np.stack((dims + ahead * growth, growth)) != theirs[:, first:stop]).any():
        raise Irregular("a step before a window fills is not what the number of its tokens says")
    table: Table = Told(np.concatenate((mine[:, :stop], theirs[:, stop:]), axis=1))
    return Unfolded(table, other, depth, tokens, (), filled=filled)


def _before(structure: Structure) -> tuple[object, ...]:
    """What two recordings of the same prompt must share up to the steps that repeat."""
    parts = [
        {place: part for place, part in parts.items() if place[0] <= HEAD_TOKENS}
        for parts in (structure.steps, structure.slots)
    ]
    folding = structure.folded_tokens, structure.folded_layers, structure.depth, structure.head_layers
    return *folding, structure.prefix, structure.phases, structure.gaps, *parts
