"""Predictions: what is asked, and the book of recorded programs that answers. Nothing here loads torch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

from memprof.families import Model
from memprof.models.find import weights_of
from memprof.prompts import Prompt, Shape
from memprof.pruning import Pruner
from memprof.records import RunSpec

#: A program is made for several shapes at once; where one is asked for these lie beside it, in tokens of text.
BESIDE = range(0, 24, 4)


@dataclass(frozen=True)
class Setup:
    """What a bench is made for: all that decides what its model is and where.

    Attributes:
        model: The model, with the configuration of its weights.
        device: ``sim``, ``cpu`` or ``cuda``.
        dtype: Name of the dtype of all weights.
        attention: Attention of the language model.
        weights: ``random``, ``hub`` or a path.
        seed: Of random weights.
        gpu: The card a prediction is for, or None.
    """

    model: Model
    device: str
    dtype: str
    attention: str = "sdpa"
    weights: str = "random"
    seed: int = 0
    gpu: str | None = None

    @classmethod
    def of(cls, spec: RunSpec, model: Model, *, eager: bool = False) -> Setup:
        """The set-up that ``spec`` asks for; ``eager``: of a method that reads attention maps."""
        weights, attention = weights_of(model, spec.weights), "eager" if eager else spec.attention
        return cls(model, spec.device, spec.dtype, attention, weights, spec.seed, spec.gpu)


@dataclass(frozen=True)
class Around:
    """Something entered on the model for the time of one ``generate()``.

    Attributes:
        name: What it is and with which settings: a prediction with it is told by its name from one without.
        enter: Gives the context, for a model.
    """

    name: str
    enter: Callable[[Any], AbstractContextManager[Any]] = field(compare=False)


def manner_of(stack: str, around: tuple[Around, ...]) -> str:
    """How a prompt is generated, in a word: the stack, and what is entered on the model."""
    return "+".join((stack, *(each.name for each in around)))


@dataclass(frozen=True)
class Ask:
    """What is asked of a bench.

    Attributes:
        pruner: The method.
        stack: Which logits are made: ``current`` or ``paper``.
        prompt: What is generated from; its sizes alone will do, as bytes follow from them.
        new_tokens: How many tokens are made.
        seed: Of random text, and of methods that draw.
        around: What is entered on the model meanwhile, the outermost first.
    """

    pruner: Pruner
    stack: str
    prompt: Prompt
    new_tokens: int
    seed: int = 0
    around: tuple[Around, ...] = ()

    @property
    def manner(self) -> str:
        """How it is generated (:func:`manner_of`)."""
        return manner_of(self.stack, self.around)

    @property
    def shape(self) -> Shape:
        """The prompt's sizes."""
        return self.prompt.shape

    @property
    def key(self) -> tuple[Any, ...]:
        """All that a prediction depends on."""
        return self.pruner, self.manner, self.new_tokens, self.shape.like()

    def about(self, prompt: Prompt | Shape) -> Ask:
        """The same asked about another prompt."""
        return replace(self, prompt=prompt if isinstance(prompt, Prompt) else Prompt(prompt))
