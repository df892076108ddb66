"""Questions that a model brings along: what those asked that know nothing but the pictures they were trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from memprof.errors import BadValue

if TYPE_CHECKING:
    from memprof.families import Model


class AsksItself:
    """For a family of one trained model, beside what it is built like.

    Attributes:
        folder: Where its weights and tokenizer are, beside this file.
        own_question: Question ``number``; its second argument says whether one token is to answer it.
        own_kinds: What is asked in place of a task that one token answers (AI2D), and in place of any other.
    """

    folder: ClassVar[str]
    own_question: ClassVar[type[Any]]
    own_kinds: ClassVar[tuple[str, str]]
    #: Questions asked unless told otherwise.
    most_questions: ClassVar[int] = 64

    def shipped(self, model: Model) -> Path:
        """The checkpoint that comes with memprof: weights and tokenizer."""
        del model
        return Path(__file__).parent / self.folder

    def own_label(self, task: str) -> str:
        """How :meth:`own_questions` are to be named wherever a number from them is shown."""
        return f"its own drawn questions ({self.own_kinds[task != 'ai2d']}), in place of {task}'s"

    def own_questions(self, task: str, limit: int | None = None) -> Sequence[Any]:
        """What the model can be asked in place of the bundled sample of ``task``, whose pictures it knows nothing of.

        Args:
            task: ``ai2d`` gives questions that one token answers.
            limit: How many; 64 by default.

        Raises:
            BadValue: ``limit`` is below 1.
        """
        if limit is not None and limit < 1:
            raise BadValue(f"limit={limit} is below 1")
        return [self.own_question(number, task == "ai2d") for number in range(limit or self.most_questions)]
