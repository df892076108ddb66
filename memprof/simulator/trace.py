"""What happened to memory during one ``generate()``: every storage's birth and death, in order. Plain data, no torch.

Storages are numbered by birth; a number is called a *slot*. The event list holds ``slot`` for a birth and ``~slot``
for a death, which makes it one array of integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

from memprof.simulator.rules import RULES

#: Bytes of one entry of each dtype.
ITEM_BYTES = {
    "float64": 8, "int64": 8, "uint64": 8, "complex64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2,
    "int16": 2, "int8": 1, "uint8": 1, "bool": 1, "float8_e4m3fn": 1, "float8_e5m2": 1,
}  # fmt: skip


def bytes_of(op: str, shape: Sequence[int], dtype: str) -> int:
    """Bytes that follow from a shape: by the rule of ``op`` where it has one, else of a dense tensor.

    -1 for a dtype that is not known.
    """
    if op in RULES:
        return RULES[op](shape)
    return ITEM_BYTES[dtype] * prod(shape) if dtype in ITEM_BYTES else -1


@dataclass
class Trace:
    """Births and deaths of storages, and where tokens and phases begin and end among them.

    Attributes:
        events: ``slot`` for a birth, ``~slot`` for a death, in order.
        nbytes: Bytes asked for, one entry a slot, not rounded.
        parts: The part each slot belongs to, one of :data:`memprof.records.PARTS`.
        sites: Module path and operator that made each slot.
        shapes: Shape of the first tensor seen on each slot.
        dtypes: Its dtype, without ``torch.``.
        marks: For each token, the number of events when it was done.
        phases: ``(number of events, name)`` at each change of phase.
        lines: The line of code behind a slot, where it was noted.
        held: How many slots, the first ones, were born before the first event: those that a stretch of a longer trace
            finds.
    """

    events: list[int] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    sites: list[tuple[str, str]] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    phases: list[tuple[int, str]] = field(default_factory=list)
    lines: dict[int, str] = field(default_factory=dict)
    held: int = 0

    def birth(
        self, nbytes: int, part: str, site: tuple[str, str], shape: tuple[int, ...] = (), dtype: str = "uint8"
    ) -> int:
        """Record a new storage and return its slot."""
        slot = len(self.nbytes)
        self.nbytes.append(nbytes)
        self.parts.append(part)
        self.sites.append(site)
        self.shapes.append(shape)
        self.dtypes.append(dtype)
        self.events.append(slot)
        return slot

    def death(self, slot: int) -> None:
        """Record the end of a storage."""
        self.events.append(~slot)

    def phase(self, name: str) -> None:
        """What follows belongs to phase ``name`` (``vision``, ``prefill``, ``decode``)."""
        self.phases.append((len(self.events), name))

    def mark(self) -> None:
        """A token is done."""
        self.marks.append(len(self.events))

    def phase_at(self, event: int) -> str:
        """The phase in which event number ``event`` fell."""
        name = "prefill"
        for start, phase in self.phases:
            if start > event:
                break
            name = phase
        return name

    def live_after(self, count: int) -> list[int]:
        """Slots alive after the first ``count`` events, in order of birth."""
        live: dict[int, None] = dict.fromkeys(range(self.held))
        for event in self.events[:count]:
            if event >= 0:
                live[event] = None
            else:
                live.pop(~event, None)
        return list(live)
