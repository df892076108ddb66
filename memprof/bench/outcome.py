"""What a prompt left behind, and what its device is left with. Nothing here loads torch."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

from memprof.records import Memory


@dataclass
class Outcome:
    """What one profiled prompt left: the memory half of a sample's record, and the tokens it made.

    ``kept`` has the visual tokens each cut left (:meth:`~memprof.pruning.surgery.Surgery.kept`); None in a prediction.
    """

    memory: Memory
    tokens: list[int] | None
    kept: list[list[int]] | None = None

    @property
    def refused(self) -> str | None:
        """The allocation a card would have refused, in words, or None."""
        return self.memory.refused


@dataclass(frozen=True)
class Standing:
    """What stands before the first prompt.

    Attributes:
        static_bytes: Allocated once the model is loaded.
        static_parts: The same by what it is for (:attr:`memprof.records.RunRecord.static_parts`).
        attention: Attention that the language model runs.
        device: What is known of the device, as a run's environment has it.
    """

    static_bytes: int
    static_parts: dict[str, int]
    attention: str
    device: dict[str, Any]


def release(device: str) -> None:
    """Give unused memory back, so that a sample's reserved bytes do not depend on the samples before it.

    Predictions begin from the same state in any case, and hold much that a collection would go through.
    """
    if device == "sim":
        return
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()
