"""A CUDA run predicted without CUDA: the same ``generate()`` over weights without storage, through the caching allocator."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from memprof.meters._traced import TracedMeter
from memprof.records import Status
from memprof.simulator.kernels import Kernels
from memprof.simulator.replay import CUDA_ROUNDING, Reading, read_trace, rounded
from memprof.simulator.trace import Trace
from memprof.simulator.weightless import RealScores


class SimMeter(TracedMeter):
    """Predicts what a card would hold, from every storage's birth and death."""

    status: ClassVar[Status] = "predicted"
    about = "the same generate() over weights without storage; predicts a CUDA run anywhere"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._static = int(rounded([w.untyped_storage().nbytes() for w in self.weights], CUDA_ROUNDING).sum())
        self._scores = RealScores(model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]
        self.weights.append(self._scores.scores)

    @classmethod
    def serves(cls, model: nn.Module) -> bool:
        """Whether the weights have no storage."""
        return isinstance(next(model.parameters()), FakeTensor)

    @property
    def static_bytes(self) -> int:
        """Bytes of the weights, each rounded as the caching allocator does."""
        return self._static

    def kernels(self) -> Kernels:
        """What CUDA kernels take beyond their results."""
        return Kernels()

    def logits_processors(self) -> list[Any]:
        """Real scores for ``generate()`` to choose from."""
        return [self._scores]

    def read(self, trace: Trace) -> Reading:
        """Bytes as the caching allocator would hold them."""
        reading = read_trace(trace, self._static, CUDA_ROUNDING)
        reading.reserved_bytes = list(reading.peak_allocated_bytes)
        return reading
