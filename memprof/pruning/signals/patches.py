"""``patches``: the tokens before the projector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from memprof.pruning.signals import Cut, Held, Scene

if TYPE_CHECKING:
    import torch


class Patches(Held):
    """What the projector was given for each token, ``(n, c)`` in the model's dtype.

    For LLaVA's CLIP the patch features of its select layer; for InternVL the four patches of a pixel shuffle.
    """

    of_prompt = True
    of_tower = True

    def __init__(self, scene: Scene) -> None:
        from memprof.pruning.vision import projector

        super().__init__(scene)
        self._projector = projector(scene.anatomy.vision)

    def watch(self, before: Sequence[int]) -> None:
        """Look at what the projector is given."""
        self.scene.pre(self._projector, self._given)

    def _given(self, _: Any, args: Any, kwargs: Any) -> None:
        self.held = args[0] if args else next(iter(kwargs.values()))

    def read(self, cut: Cut) -> torch.Tensor:
        """One row a token, tile after tile."""
        assert self.held is not None
        return self.held.flatten(0, 1)
