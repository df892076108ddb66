"""Fidelity: how far a pruned run departs from the unpruned one on the same prompt. It needs no labels.

Two generations a prompt. The unpruned model decodes greedily: its tokens and its next-token distributions are the
reference. The pruned model is then made to write those same tokens, so that at each of them both have said the same so
far and their distributions can be compared; what pruning did to the prompt is all that differs. Up to its first
difference a free pruned run writes what the forced one does, so the first divergence is the free run's too.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from memprof.bench.generate import place
from memprof.errors import MemprofError, UsageError
from memprof.prompts import Places, Prompt
from memprof.pruning import Pruner
from memprof.pruning.surgery import Surgery
from memprof.stacks import Stack

#: What a sample's record holds under ``fidelity``.
MEASURES: Mapping[str, str] = {
    "agreement": "share of tokens where the pruned model's greedy choice is the unpruned one",
    "kl": "KL divergence of the pruned from the unpruned next-token distribution, mean over tokens, nats",
    "first_divergence": "tokens before the first different choice; all of them where none differs",
    "exact": "1 where no token differs, else 0",
}


@dataclass(frozen=True)
class Reference:
    """What the unpruned model wrote.

    Attributes:
        tokens: Its greedy tokens, ``(t,)`` int64, end-of-text included where it wrote one.
        log_probabilities: Its next-token distribution before each of them, ``(t, vocabulary)`` float32, on the CPU.
    """

    tokens: torch.Tensor
    log_probabilities: torch.Tensor


def check_weights(weights: str) -> None:
    """Raise :class:`~memprof.errors.UsageError` where ``weights`` are random: fidelity would measure noise."""
    if weights == "random":
        raise UsageError(
            "fidelity compares a trained model with itself, and random weights learnt nothing that pruning could lose; "
            "give --weights hub or a checkpoint's path, or --model proving, whose weights come with memprof"
        )


def reference(model: nn.Module, inputs: Mapping[str, Any], *, new_tokens: int) -> Reference:
    """Let the unpruned model write up to ``new_tokens`` tokens, greedily.

    Args:
        model: Any transformers model with trained weights. Nothing may be pruning it.
        inputs: What ``generate()`` is given: ids ``(1, n)``, pixels, mask.
        new_tokens: At most so many tokens.
    """
    listener = _Listener(None)
    return Reference(_generate(model, inputs, listener, new_tokens), listener.heard())


def fidelity(
    model: nn.Module,
    inputs: Mapping[str, Any],
    pruner: Pruner,
    layout: Places,
    against: Reference,
    *,
    seed: int = 0,
) -> dict[str, float]:
    """Compare ``model`` under ``pruner`` with what it wrote unpruned.

    Args:
        model: As for :func:`reference`.
        inputs: The same as were given there.
        pruner: What is kept of the prompt.
        layout: Where its visual tokens are.
        against: What :func:`reference` gave.
        seed: Handed to pruners that draw; the same as in the run that is judged.

    Returns:
        :data:`MEASURES`, each a float.
    """
    listener = _Listener(against.tokens)
    with Surgery(model, pruner, layout, seed):
        _generate(model, inputs, listener, len(against.tokens))
    return compare(against, listener.heard())


def compare(against: Reference, log_probabilities: torch.Tensor) -> dict[str, float]:
    """:data:`MEASURES` of the distributions ``(t, vocabulary)`` that a model had before each reference token.

    Raises:
        MemprofError: A distribution is none, as logits were NaN or infinite; or the divergence is.
    """
    for whose, said in (("unpruned", against.log_probabilities), ("pruned", log_probabilities)):
        if bool(said.isnan().any()):
            raise MemprofError(f"the {whose} model's logits are NaN or infinite: nothing can be compared")
    total = len(against.tokens)
    p, q = against.log_probabilities.double(), log_probabilities.double()
    gap = torch.where(p == -math.inf, 0.0, p.exp() * (p - q))  # 0 log 0 = 0, and a -inf minus a -inf is no number
    kl = float(gap.sum(1).mean())
    if not math.isfinite(kl):
        raise MemprofError("the KL divergence is infinite: pruning rules out a token that the unpruned model may write")
    same = log_probabilities.argmax(1) == against.tokens
    differs = (~same).nonzero()
    return {
        "agreement": float(same.double().mean()),
        "kl": max(0.0, kl),
        "first_divergence": float(differs[0]) if len(differs) else float(total),
        "exact": float(not len(differs)),
    }


class Judge:
    """Fidelity of one sample after another, as :func:`memprof.runner.run` asks for it.

    A sample's reference is kept for the methods that follow, as long as all of them fit ``room_bytes``.
    """

    def __init__(self, room_bytes: int = 1 << 28) -> None:
        self._room = room_bytes
        self._model: weakref.ref[nn.Module] | None = None  # a bench frees one model before it builds the next
        self._known: dict[tuple[str, str, int], Reference] = {}

    def __call__(
        self, model: nn.Module, prompt: Prompt, pruner: Pruner, stack: str, *, sample: str, new_tokens: int, seed: int
    ) -> dict[str, float]:
        """:data:`MEASURES` of the sample called ``sample``; nothing may be profiling ``model`` meanwhile."""
        if self._model is None or self._model() is not model:
            self._model = weakref.ref(model)
            self._known.clear()
        assert prompt.places is not None
        inputs, key = place(prompt, model), (sample, stack, new_tokens)
        with Stack(model, stack):
            against = self._known.get(key)
            if against is None:
                against = reference(model, inputs, new_tokens=new_tokens)
                if sum(known.log_probabilities.nbytes for known in self._known.values()) < self._room:
                    self._known[key] = against
            return fidelity(model, inputs, pruner, prompt.places, against, seed=seed)


class _Listener:
    """A logits processor that notes each distribution, and puts a wanted token in its place."""

    def __init__(self, force: torch.Tensor | None) -> None:
        self._force = force
        self._heard: list[torch.Tensor] = []

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Note ``scores`` ``(1, vocabulary)``; give them back, or ones that leave a single choice."""
        said = len(self._heard)
        self._heard.append(scores[0].float().log_softmax(-1).cpu())
        if self._force is None:
            return scores
        forced = torch.full_like(scores, -math.inf)
        forced[0, int(self._force[said])] = 0.0
        return forced

    def heard(self) -> torch.Tensor:
        """What was noted: ``(t, vocabulary)`` float32."""
        return torch.stack(self._heard)


@torch.no_grad()
def _generate(model: Any, inputs: Mapping[str, Any], listener: _Listener, new_tokens: int) -> torch.Tensor:
    """New tokens ``(t,)`` of a greedy ``generate()``."""
    out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, logits_processor=[listener])
    new: torch.Tensor = out[0, inputs["input_ids"].shape[1] :].cpu()
    return new
