"""``vision``: how much the vision tower itself attends to each token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from memprof.pruning.signals import Cut, Held, Scene, scoped

if TYPE_CHECKING:
    import torch


class Vision(Held):
    """Attention each token's patches received in one layer of the vision tower, ``(n,)`` float32.

    From the class token where the tower uses one (:func:`memprof.pruning.vision.attention_received`). The layer is the
    pruner's ``vision_layer``, the second last unless it says otherwise.
    """

    of_prompt = True
    of_tower = True

    def __init__(self, scene: Scene) -> None:
        from memprof.pruning.vision import vision_attention

        super().__init__(scene)
        self._attention = vision_attention(scene.anatomy.vision, scene.vision_layer)
        self._made: dict[str, torch.Tensor] = {}

    def watch(self, before: Sequence[int]) -> None:
        """Score the patches as soon as the vision tower's layer has made its queries and keys."""
        for name, letter in (("query", "q"), ("key", "k")):
            made_by = getattr(self._attention, f"{letter}_norm", getattr(self._attention, f"{letter}_proj"))
            self.scene.post(made_by, scoped(partial(self._projected, name), "tower"))

    def _projected(self, name: str, _: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:
        from memprof.pruning.vision import attention_received

        self._made[name] = out
        if len(self._made) == 2:
            self.held = attention_received(self._attention, self._made.pop("query"), self._made.pop("key"))

    def read(self, cut: Cut) -> torch.Tensor:
        """Scores of patches as scores of the tokens they went into."""
        from memprof.pruning.vision import patches_to_tokens

        assert self.held is not None
        assert self.scene.visual is not None
        return patches_to_tokens(self.held, self.scene.visual.shape[0])
