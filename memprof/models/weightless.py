"""Models without weights: every parameter has its shape, dtype and size, and no storage behind it.

Parameters are fake tensors, built while the fake mode is active; during ``generate()`` the mode is NOT active. The
tensor subclass alone carries it on, so token ids, masks and counts stay real and every check on data passes, while
whatever meets a weight becomes fake. That lets an unmodified ``generate()`` run at full scale on a laptop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import LogitsProcessor

from memprof import scopes
from memprof.anatomy import anatomy
from memprof.gpus import Card
from memprof.models.faults import runs

M = TypeVar("M", bound=torch.nn.Module)


def build_weightless(build: Callable[[], M]) -> M:
    """Call ``build`` so that every tensor it makes has no storage.

    Some constructors read a number back from a tensor (rates of dropped paths, say), which a fake one does not have:
    those are built on the meta device, where such tensors are real, and weights are made without storage afterwards.
    """
    from transformers.initialization import no_init_weights

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with no_init_weights():
        try:
            with mode:
                return build().eval()
        except DataDependentOutputException:
            with torch.device("meta"):
                module = build().eval()
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # one for each, which lives on: what is tied stays tied
    with mode:
        for owner in module.modules():
            for held in (owner._parameters, owner._buffers):
                fields = cast(dict[str, torch.Tensor | None], held)
                for name, tensor in fields.items():
                    if tensor is not None:
                        fields[name] = made.setdefault(id(tensor), (tensor, _without_storage(tensor)))[1]
    return module


def _without_storage(tensor: torch.Tensor) -> torch.Tensor:
    """One of the same form, as the fake mode makes it that is active."""
    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
    return torch.nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else empty


class RealScores(LogitsProcessor):  # type: ignore[misc]
    """Hands ``generate()`` real scores in place of fake ones, so that it can pick a token.

    The scores are made once and stand for no byte of the run: on a card, the fake ones would have been used themselves.
    """

    def __init__(self, vocabulary: int) -> None:
        self.scores = torch.zeros(1, vocabulary)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Real zeros, ``(batch, vocabulary)`` float32: token 0 is always next."""
        del input_ids
        return self.scores.expand(scores.shape[0], -1)  # type: ignore[return-value]


#: The cards that models were given for, where they were (:func:`lent`).
CARD_OF: WeakKeyDictionary[torch.nn.Module, Card] = WeakKeyDictionary()


@contextmanager
def lent(model: Any, card: Card) -> Iterator[Any]:
    """``model`` as its user would have it on ``card``: its ``generate()`` takes ordinary tensors and picks real tokens.

    What it is given is copied first, each tensor one allocation, as when it is moved to a card, and is held for as long
    as the user holds theirs: until the next call, or the end.
    """
    scores, generate, given = RealScores(vocabulary(model)), model.generate, list[Any]()

    def place(value: Any) -> Any:
        return value.to(value.device, copy=True) if type(value) is torch.Tensor else value

    def generated(*args: Any, **kwargs: Any) -> Any:
        with scopes.scope("inputs"):
            given[:] = [[place(value) for value in args], {name: place(value) for name, value in kwargs.items()}]
        placed, named = given
        asked = [*(named.pop("logits_processor", None) or ()), scores]
        with runs(f"this generate() of a {type(model).__name__}", "correct its inputs, or its configuration"):
            return generate(*placed, **named, logits_processor=asked)

    CARD_OF[model], model.generate = card, generated
    try:
        yield model
    finally:
        del model.generate, CARD_OF[model]
        given.clear()


def vocabulary(model: Any) -> int:
    """Numbers in a row of its scores."""
    return int(cast(torch.Tensor, anatomy(model).head[1].weight).shape[0])
