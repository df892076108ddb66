"""A CUDA run predicted without CUDA: the same ``generate()`` over weights without storage."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from memprof.meters._traced import TracedMeter
from memprof.records import Status
from memprof.simulator.allocator import AllocatorSettings, CachingAllocator
from memprof.simulator.kernels import Kernels
from memprof.simulator.replay import Reading, read_cuda
from memprof.simulator.trace import Trace
from memprof.simulator.weightless import RealScores


def allocator_settings() -> AllocatorSettings:
    """The settings a CUDA run in this environment would have: ``PYTORCH_ALLOC_CONF``, or its older name."""
    text = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    return AllocatorSettings.parse(text)


class SimMeter(TracedMeter):
    """Predicts what a card would hold, from every storage's birth and death."""

    status: ClassVar[Status] = "predicted"
    about = "the same generate() over weights without storage; predicts a CUDA run anywhere"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        #: The allocator once the weights are loaded, one after another.
        self.loaded = CachingAllocator(allocator_settings())
        for weight in self.weights:
            self.loaded.malloc(weight.untyped_storage().nbytes())
        self._scores = RealScores(model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]
        self.weights.append(self._scores.scores)

    @classmethod
    def serves(cls, model: nn.Module) -> bool:
        """Whether the weights have no storage."""
        return isinstance(next(model.parameters()), FakeTensor)

    @property
    def static_bytes(self) -> int:
        """Bytes of the blocks the weights are in."""
        return self.loaded.allocated

    def kernels(self) -> Kernels:
        """What CUDA kernels take beyond their results."""
        return Kernels()

    def logits_processors(self) -> list[Any]:
        """Real scores for ``generate()`` to choose from."""
        return [self._scores]

    def read(self, trace: Trace) -> Reading:
        """Bytes as the caching allocator would hold them."""
        return read_cuda(trace, self.loaded)
