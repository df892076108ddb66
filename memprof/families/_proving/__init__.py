"""What the proving model is made of: its pictures and questions (:mod:`.drawing`), its tokenizer and its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from memprof.families import Card
    from memprof.families._proving.drawing import OwnQuestion


@runtime_checkable
class SelfContained(Protocol):
    """A family whose weights come with memprof, and which is asked questions of its own: the pictures are all it knows.

    A run of it measures on the CPU where there is no card, with the weights that come with memprof, and its label says
    that the questions are its own. Data that a user names are still the user's.
    """

    def shipped(self, card: Card) -> Path:
        """The folder of the checkpoint that comes with memprof."""

    def own_label(self, task: str) -> str:
        """How :meth:`own_questions` are to be named wherever a number from them is shown."""

    def own_questions(self, task: str, limit: int | None = None) -> Sequence[OwnQuestion]:
        """What stands in for the bundled sample of ``task``."""
