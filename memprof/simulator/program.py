"""Allocation programs: traced a few times, evaluated at any shape, to the byte. Plain data and arithmetic, no torch.

Three facts make a trace short to write down.

* **Sizes are products of lengths.** A tensor's bytes are its dtype's times its shape, and every entry of a shape is an
  affine function of the prompt's lengths (tiles, visual tokens, text tokens before and after, kept tokens of each cut)
  and of the number of new tokens. So where a shape is an affine combination of shapes that were traced, each entry is
  the same combination of theirs: whole numbers, exact, nothing fitted in the sense of approximated. Bytes come out as
  polynomials without anybody writing one.
* **Decode steps repeat.** From the second step on, each step's events are those of the step before, about the tensors
  of one step later, and every entry of a shape grows by a constant.
* **Layers repeat.** So do decoder layers behind the last cut, which is why a few of them are traced, not eighty.

A reference from one event to a tensor born elsewhere is therefore kept relative to the step and layer it is made in
(:class:`~memprof.simulator.folding.Ref`); :mod:`memprof.simulator.folding` finds the repetition in a recording and
refuses what does not repeat, and :mod:`memprof.simulator.unfolding` writes it out again at full depth and length.

What a pruner's selection does may depend on the number of tokens in any way (loops over blocks, or over what is kept).
Where it sees nothing but the visual tokens themselves, it is recorded by itself
(:mod:`memprof.simulator.selection`), and the program has a gap there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from memprof.simulator.folding import Folded, Place, Ref, Structure
from memprof.simulator.reach import Reach
from memprof.simulator.selection import Course
from memprof.simulator.sizes import AXES, Irregular, Sizes, Slot, packed, unpacked
from memprof.simulator.unfolding import Segment, Unfolded


class Program:
    """One structure, and its sizes at every shape within reach of the recordings it was seen in."""

    def __init__(self) -> None:
        self._structure: Structure | None = None
        self._sizes = Sizes()
        self._written: dict[Place, Segment] = {}
        self._told: Mapping[str, Any] | None = None  # plain data that nobody has looked into yet

    @property
    def structure(self) -> Structure | None:
        """None before the first recording."""
        self._look()
        return self._structure

    @property
    def sizes(self) -> Sizes:
        """Shapes and what a further step adds to them: tables ``(2, tensors, axes)``."""
        self._look()
        return self._sizes

    @property
    def reach(self) -> Reach:
        """Which shapes it answers for."""
        return self.sizes.reach

    def covers(self, lengths: Sequence[int]) -> bool:
        """Whether it answers for a shape: one within reach, whose sizes come out as whole numbers."""
        return self.reach.covers(lengths) and self.sizes.whole(lengths)

    @property
    def recordings(self) -> int:
        """How many it was seen in."""
        return len(self._sizes.reach.seen if self._told is None else self._told["seen"])

    def add(self, lengths: Sequence[int], folded: Folded) -> None:
        """Take a recording in: as one more point to combine from, or as a test of what the others say.

        Raises:
            Irregular: It has another structure, or other sizes than the program says.
        """
        if self.structure is None:
            self._structure = folded.structure
        elif self.structure != folded.structure:
            raise Irregular("two recordings have different events")
        self.sizes.add(lengths, np.stack((folded.dims, folded.growth)))

    def unfold(
        self, depth: int, tokens: int, courses: Sequence[Course] = (), at_once: int | None = None,
        filled: int | None = None,
    ) -> Unfolded:
        """The program written out for ``depth`` layers and ``tokens`` new tokens.

        ``courses``: what happens in each gap; ``at_once`` tokens make a stretch (:data:`AT_ONCE`); ``filled``: the step
        in which a sliding window fills.
        """
        assert self.structure is not None
        return Unfolded(self.sizes, self.structure, depth, tokens, courses, at_once, filled, self._written)

    # -- on disk -------------------------------------------------------------------------------------------------------

    def to_json(self) -> Mapping[str, Any]:
        """As plain lists and numbers."""
        if self._told is not None:
            return self._told
        s = self._structure
        assert s is not None
        kinds = list(dict.fromkeys(s.all_slots))
        number = {kind: i for i, kind in enumerate(kinds)}
        return {
            "tokens": s.tokens, "folded_tokens": s.folded_tokens, "folded_layers": s.folded_layers, "depth": s.depth,
            "head_layers": s.head_layers, "prefix": s.prefix,
            "phases": [[*place, at, name] for place, at, name in s.phases],
            "kinds": kinds,
            "segments": [
                [*place, s.steps[place], [number[slot] for slot in s.slots[place]]] for place in s.steps
            ],
            "points": self.reach.span.vectors, "seen": self.reach.seen, **packed(self._sizes.tables),
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The program in ``data``, which is looked into when it is asked for something: an entry has many programs,
        and one prompt needs one of them.
        """
        program = cls()
        program._told = data
        return program

    def _look(self) -> None:
        """Look into plain data; raises ValueError, KeyError, TypeError or IndexError where it is no program."""
        if self._told is None:
            return
        data, self._told = self._told, None
        kinds = [Slot(*kind) for kind in data["kinds"]]
        self._structure = Structure(
            tokens=data["tokens"], folded_tokens=data["folded_tokens"], folded_layers=data["folded_layers"],
            depth=data["depth"], head_layers=data["head_layers"], prefix=data["prefix"],
            phases=tuple(((t, layer), at, name) for t, layer, at, name in data["phases"]),
            steps={
                (t, layer): tuple(Ref(*step) if isinstance(step, list) else step for step in steps)
                for t, layer, steps, _ in data["segments"]
            },
            slots={(t, layer): tuple(kinds[i] for i in numbers) for t, layer, _, numbers in data["segments"]},
        )  # fmt: skip
        self._sizes.reach = Reach.of(data["points"], data["seen"])
        shape = (2, len(self._structure.all_slots), AXES)
        self._sizes.tables = unpacked(data, len(self._sizes.reach.span.vectors), shape)
