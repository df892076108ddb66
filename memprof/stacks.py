"""How a model is run: ``current`` as transformers does it today, ``paper`` as the reference codes of 2024 did.

The stack moves the peak more than any pruning method does, so it is one flag and is part of every record.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import nn

from memprof.anatomy import anatomy
from memprof.errors import UnknownName
from memprof.records import STACKS


class Stack:
    """Runs ``model`` as ``name`` says while it is entered; by hooks, all taken back at the end.

    ``current`` changes nothing: logits of the last position only. ``paper`` computes logits of ALL positions and
    makes an fp32 copy of them, as ``InternLM2ForCausalLM.forward`` and ``LlamaForCausalLM.forward`` did in the
    reference codes (``logits = self.output(hidden_states); logits = logits.float()``); both really happen, on every
    device.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        if name not in STACKS:
            raise UnknownName("stack", name, STACKS)
        self.model, self.name = model, name
        self._hooks: list[Any] = []

    def __enter__(self) -> Stack:
        if self.name == "paper":
            head = anatomy(self.model).head[1]
            self._hooks.append(self.model.register_forward_pre_hook(_every_position, with_kwargs=True))
            # Before the profiler's own hook on the head, so that the copy counts to the logits.
            self._hooks.append(head.register_forward_hook(_widen, prepend=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def _every_position(model: nn.Module, args: Any, kwargs: Any) -> Any:
    return args, {**kwargs, "logits_to_keep": 0}


def _widen(head: nn.Module, args: Any, logits: torch.Tensor) -> torch.Tensor:
    return logits.float()
