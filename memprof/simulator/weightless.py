"""Models without weights: every parameter has its shape, dtype and size, and no storage behind it.

Parameters are fake tensors, built while the fake mode is active; during ``generate()`` the mode is NOT active. The
tensor subclass alone carries it on, so token ids, masks and counts stay real and every check on data passes, while
whatever meets a weight becomes fake. That lets an unmodified ``generate()`` run at full scale on a laptop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LogitsProcessor

M = TypeVar("M", bound=torch.nn.Module)


def build_weightless(build: Callable[[], M]) -> M:
    """Call ``build`` so that every tensor it makes has no storage."""
    from transformers.initialization import no_init_weights

    with FakeTensorMode(allow_non_fake_inputs=True), no_init_weights():
        return build().eval()


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
