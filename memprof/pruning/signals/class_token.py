"""``class_token``: what the vision tower sums the picture up in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from memprof.errors import UsageError
from memprof.pruning.signals import Cut, Held, Scene, scoped

if TYPE_CHECKING:
    import torch


class ClassToken(Held):
    """The class token behind the vision tower's layer that features are taken from, ``(tiles, c)``.

    The layer is the pruner's ``vision_layer``. A tower that has none, or does not use it, is refused.
    """

    leads = ("tiles",)
    of_prompt = True

    def __init__(self, scene: Scene) -> None:
        from memprof.pruning.vision import has_class_token, uses_class_token, vision_attention, vision_block

        super().__init__(scene)
        tower = scene.anatomy.vision
        if not has_class_token(tower) or not uses_class_token(vision_attention(tower, scene.vision_layer)):
            raise UsageError("this model's vision tower has no class token in use; take class_token=false")
        self._block = vision_block(tower, scene.vision_layer)

    def watch(self, before: Sequence[int]) -> None:
        """Look at what the layer makes."""
        self.scene.post(self._block, scoped(self._left, "tower"))

    def _left(self, _: Any, args: Any, kwargs: Any, out: Any) -> None:
        self.held = (out[0] if isinstance(out, tuple) else out)[:, 0].clone()  # a view would keep every patch

    def read(self, cut: Cut) -> torch.Tensor:
        """One row a tile."""
        assert self.held is not None
        return self.held
