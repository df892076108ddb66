"""``text_rotation``: what rotary positions alone make of the distance from the text to each visual token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from memprof.pruning.signals import Cut, Signal, scoped

if TYPE_CHECKING:
    import torch


class TextRotation(Signal):
    """Inner product of two vectors of ones, turned to the positions of a text token and a visual one.

    Over the root of their length, ``(t, n)`` float32, for the text behind the image and the positions that the layer
    before the cut is given (SparseVLM+; code, version 2_0).
    """

    leads = ("text", "visual")
    looks_back = True

    @scoped
    def read(self, cut: Cut) -> torch.Tensor:
        """One row a text token."""
        import torch

        from memprof.pruning.attention import turned

        attention = cast("Any", self.scene.layers[cut.number - 1].self_attn)
        length, dim = cut.hidden.shape[1], attention.head_dim
        rotary = tuple(table.float() for table in cut.kwargs["position_embeddings"])
        ones = torch.ones((1, 1, length, dim), dtype=torch.float32, device=cut.hidden.device)
        row = turned(ones, cast("tuple[torch.Tensor, torch.Tensor]", rotary))[0, 0]
        return (self.scene.text_rows(row) @ self.scene.visual_rows(row).T).div_(dim**0.5)
