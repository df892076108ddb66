"""The caching allocator once a model is loaded on a card: the state that every prediction begins from."""

from __future__ import annotations

import os
from collections.abc import Iterable

from memprof.errors import DoesNotFit, OutOfMemory
from memprof.gpus import ANY, Card, cublas_workspace_bytes, cublaslt_workspace_bytes
from memprof.simulator.allocator import AllocatorSettings, CachingAllocator
from memprof.simulator.driver import Downwards
from memprof.simulator.small_pool import Known


def allocator_settings() -> AllocatorSettings:
    """The settings a CUDA run in this environment would have: ``PYTORCH_ALLOC_CONF``, or its older name."""
    text = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    return AllocatorSettings.parse(text)


class Loaded:
    """Weights loaded one after another, and the first matrix products done.

    Args:
        weights: Name and bytes of each storage, in the model's order.
        biased: Whether a linear layer has a bias, for which cuBLASLt keeps a workspace.
        card: Where.

    Attributes:
        allocator: Its state then.
        lasting: What lasts, by address: its name, and the bytes asked for.
        weights_bytes: What was asked for to hold the weights.
        workspace_bytes: What the libraries' workspaces take.
        known: What readings that begin here learn from each other.

    Raises:
        DoesNotFit: The card is too small for it.
    """

    def __init__(self, weights: Iterable[tuple[str, int]], *, biased: bool, card: Card = ANY) -> None:
        self.card = card
        self.allocator = CachingAllocator(
            allocator_settings(), card.memory_bytes, card.context_bytes, place=Downwards()
        )
        self.lasting: dict[int, tuple[str, int]] = {}
        for name, n_bytes in weights:
            self._load("the weights", n_bytes, name)
        self.weights_bytes = sum(n_bytes for _, n_bytes in self.lasting.values())
        before = self.allocator.allocated
        self._load("cuBLAS' workspace", cublas_workspace_bytes(card))
        if biased:
            self._load("cuBLASLt's workspace", cublaslt_workspace_bytes(card))
        self.workspace_bytes = self.allocator.allocated - before
        self.known = Known(self.allocator)

    def _load(self, what: str, n_bytes: int, name: str = "") -> None:
        """Allocate what lasts."""
        try:
            self.lasting[self.allocator.malloc(n_bytes)] = name or what, n_bytes
        except OutOfMemory as error:
            raise DoesNotFit(f"{what} do not fit on {self.card.name}: {error}") from None
