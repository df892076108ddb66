"""One profiled ``generate()``: a prompt goes where the model is, and what it took comes back as a typed record."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from memprof import scopes
from memprof.bench.outcome import Outcome
from memprof.host import on_host
from memprof.meters import Meter
from memprof.profiler import Profiler
from memprof.prompts import Input, Prompt
from memprof.pruning import Pruner
from memprof.pruning.surgery import Surgery
from memprof.stacks import Stack


def place(prompt: Prompt, model: nn.Module) -> dict[str, torch.Tensor]:
    """The prompt as tensors where ``model`` is; each is one allocation there, as when a user moves them."""
    weight, batch = next(model.parameters()), prompt.shape.batch
    with scopes.scope("inputs"):
        ids = on_host(np.asarray([prompt.ids] * batch)).to(weight.device, copy=True)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for name, given in prompt.inputs.items():
            inputs[name] = _placed(given, batch, weight)
    return inputs


def _placed(given: Input, batch: int, weight: torch.Tensor) -> torch.Tensor:
    """One input for ``batch`` prompts; numbers that are not known are drawn."""
    dtype = weight.dtype if given.dtype == "model" else getattr(torch, given.dtype)
    if given.values is None:
        first, *rest = given.shape
        empty = weight.new_empty((first * batch, *rest), dtype=dtype)
        return empty.normal_() if dtype.is_floating_point else empty.zero_()
    values = np.tile(given.values, (batch, *[1] * (given.values.ndim - 1)))
    return on_host(values, dtype).to(weight.device, copy=True)


def profile_prompt(
    model: nn.Module, meter: Meter, pruner: Pruner, stack: str, prompt: Prompt, *, new_tokens: int, seed: int = 0
) -> Outcome:
    """Generate from one prompt under ``pruner`` and ``stack``, with ``meter`` watching.

    A card that runs out of memory is an answer, as a predicted refusal is: what was done before, and where it ended.
    """
    assert prompt.ids is not None
    assert prompt.places is not None
    tokens, refused = None, None
    surgery, profiler = Surgery(model, pruner, prompt.places, seed), Profiler(model, meter)
    try:
        with Stack(model, stack), surgery, profiler:
            inputs = place(prompt, model)
            out = model.generate(  # type: ignore[operator]
                **inputs, max_new_tokens=new_tokens, do_sample=False, logits_processor=meter.logits_processors()
            )
        if meter.status != "predicted":
            tokens = [int(t) for t in out[0, len(prompt.ids) :]]
    except torch.cuda.OutOfMemoryError as error:
        if profiler.died is None:
            raise
        refused = profiler.died.words(error)
    memory = profiler.memory(surgery.visual_tokens, surgery.kv_tokens, refused)
    return Outcome(memory, tokens, None if tokens is None else surgery.kept())
