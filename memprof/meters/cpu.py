"""Real tensors on the CPU, counted by the same ledger as everywhere else: bytes asked for, no rounding, no caching."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import nn

from memprof import scopes
from memprof.meters import devices_of
from memprof.meters._traced import TracedMeter
from memprof.records import Status
from memprof.simulator.replay import Reading, read_plain
from memprof.simulator.trace import Trace


class CpuMeter(TracedMeter):
    """Measures what tensors hold on the CPU. ``reserved`` equals ``allocated``: the CPU allocator keeps no cache.

    What operators take for themselves inside (thread buffers of a matrix product) is not seen.
    """

    status: ClassVar[Status] = "measured"
    about = "real tensors on the CPU, every storage counted"

    @classmethod
    def serves(cls, model: nn.Module) -> bool:
        """Whether the weights are real and on the CPU, all that are anywhere."""
        return devices_of(model) == {"cpu"}

    @property
    def static_bytes(self) -> int:
        """Bytes of the weights' storages."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.weights)

    def given(self, tensors: Iterable[torch.Tensor]) -> None:
        """What was given has a slot from now on."""
        assert self.ledger is not None
        with scopes.scope("inputs"):
            for tensor in tensors:
                if tensor.device.type == "cpu":
                    self.ledger.adopt(tensor, "given")

    def read(self, trace: Trace) -> Reading:
        """Bytes as asked for."""
        return read_plain(trace, self.static_bytes)
