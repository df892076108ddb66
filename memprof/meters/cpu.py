"""Real tensors on the CPU, counted by the same ledger as everywhere else: bytes asked for, no rounding, no caching."""

from __future__ import annotations

from typing import ClassVar

from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

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
        """Whether the weights are real and on the CPU."""
        weight = next(model.parameters())
        return weight.device.type == "cpu" and not isinstance(weight, FakeTensor)

    @property
    def static_bytes(self) -> int:
        """Bytes of the weights' storages."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.weights)

    def read(self, trace: Trace) -> Reading:
        """Bytes as asked for."""
        return read_plain(trace, self.static_bytes)
