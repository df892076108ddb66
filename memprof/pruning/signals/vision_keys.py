"""``vision_keys``: the keys that the vision tower's own attention knows each token by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from memprof.pruning.signals import Cut, Held, Scene, scoped

if TYPE_CHECKING:
    import torch


class VisionKeys(Held):
    """Keys of each token's patches in one layer of the vision tower, mean over heads: ``(n, head dim)``.

    The layer is the pruner's ``vision_layer``. Of several patches that went into one token, the mean.
    """

    of_prompt = True
    of_tower = True

    def __init__(self, scene: Scene) -> None:
        from memprof.pruning.vision import vision_attention

        super().__init__(scene)
        self._attention = vision_attention(scene.anatomy.vision, scene.vision_layer)

    def watch(self, before: Sequence[int]) -> None:
        """Look at what the layer's key projection makes."""
        attention = self._attention
        self.scene.post(getattr(attention, "k_norm", attention.k_proj), scoped(self._projected, "tower"))

    def _projected(self, _: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:
        self.held = out.view(*out.shape[:2], self._attention.num_heads, -1).mean(2)

    def read(self, cut: Cut) -> torch.Tensor:
        """Keys of patches as keys of the tokens they went into."""
        from memprof.pruning.vision import patches_only, patches_to_tokens

        assert self.held is not None
        assert self.scene.visual is not None
        return patches_to_tokens(patches_only(self.held), self.scene.visual.shape[0])
