"""A CUDA run predicted without CUDA: the same ``generate()`` over weights without storage."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from memprof.errors import DoesNotFit, OutOfMemory
from memprof.meters import weights_of
from memprof.meters._traced import TracedMeter
from memprof.records import Status
from memprof.simulator.allocator import AllocatorSettings, CachingAllocator
from memprof.simulator.cards import (
    ANY,
    Card,
    calibrated,
    cublas_workspace_bytes,
    cublaslt_workspace_bytes,
    find_card,
)
from memprof.simulator.kernels import Kernels
from memprof.simulator.replay import Reading, read_cuda
from memprof.simulator.small_pool import Known
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

    def __init__(self, model: nn.Module, card: Card = ANY) -> None:
        super().__init__(model)
        self.card = card
        #: The allocator once the weights are loaded, one after another, and the first matrix products are done.
        self.loaded = CachingAllocator(allocator_settings(), card.memory_bytes, card.context_bytes)
        #: What lasts, by address: its name, and the bytes asked for.
        self.lasting: dict[int, tuple[str, int]] = {}
        for name, weight in weights_of(model):
            self._load("the weights", weight.untyped_storage().nbytes(), name)
        before = self.loaded.allocated
        self._load("cuBLAS' workspace", cublas_workspace_bytes(card))
        if any(isinstance(module, nn.Linear) and module.bias is not None for module in model.modules()):
            self._load("cuBLASLt's workspace", cublaslt_workspace_bytes(card))
        self.workspace_bytes = self.loaded.allocated - before
        #: What readings learn from each other.
        self.known = Known(self.loaded)
        self._scores = RealScores(model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]
        self.weights.append(self._scores.scores)

    def _load(self, what: str, n_bytes: int, name: str = "") -> None:
        """Allocate what lasts; raises DoesNotFit where the card is too small for it."""
        try:
            self.lasting[self.loaded.malloc(n_bytes)] = name or what, n_bytes
        except OutOfMemory as error:
            raise DoesNotFit(f"{what} do not fit on {self.card.name}: {error}") from None

    @classmethod
    def on(cls, model: nn.Module, gpu: str | None) -> SimMeter:
        """The meter of ``model`` on the card ``gpu`` names, or the memory it gives."""
        return cls(model, calibrated(find_card(gpu)))

    @classmethod
    def serves(cls, model: nn.Module) -> bool:
        """Whether the weights have no storage."""
        return isinstance(next(model.parameters()), FakeTensor)

    @property
    def static_bytes(self) -> int:
        """Bytes of the blocks the weights are in."""
        return self.loaded.allocated

    def environment(self) -> dict[str, Any]:
        """The card that is predicted for, and where its numbers come from."""
        if self.card is ANY:
            return {}
        return {
            "gpu": self.card.name,
            "gpu_memory_bytes": self.card.memory_bytes,
            "gpu_context_bytes": self.card.context_bytes,
            "compute_capability": ".".join(map(str, self.card.capability)),
            "gpu_source": self.card.source,
        }

    def kernels(self) -> Kernels:
        """What CUDA kernels take beyond their results."""
        return Kernels(self.card)

    def open(self) -> None:
        """Enter a fresh ledger, and choose kernels as the card would."""
        super().open()
        self._dispatch = self.kernels().dispatch()
        self._dispatch.__enter__()  # type: ignore[no-untyped-call]

    def close(self) -> Reading:
        """Leave both, and read the trace."""
        self._dispatch.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        return super().close()

    def logits_processors(self) -> list[Any]:
        """Real scores for ``generate()`` to choose from."""
        return [self._scores]

    def read(self, trace: Trace) -> Reading:
        """Bytes as the caching allocator would hold them."""
        return read_cuda(trace, self.loaded, known=self.known)
