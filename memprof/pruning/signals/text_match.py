"""``text_match``: how much the picture has to do with each word of the question."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memprof.pruning.signals import Cut, Signal, scoped

if TYPE_CHECKING:
    import torch


class TextMatch(Signal):
    """For each text token behind the image, the visual tokens' mean softmax over text: ``(t,)`` float32, summing to 1.

    Of the embeddings that enter layer 0, by their inner products, unscaled (SparseVLM, arXiv:2410.04417, section 3.2;
    code, ``LlamaDynamicvitModel.forward``, at whose model dtype memprof computes in float32).
    """

    leads = ("text",)
    of_prompt = True

    @scoped
    def read(self, cut: Cut) -> torch.Tensor:
        """A mean over visual tokens of a softmax over text."""
        from memprof.pruning.pairs import dots

        visual, text = self.scene.visual_rows(cut.hidden[0]), self.scene.text_rows(cut.hidden[0])
        return dots(visual, text).softmax(1).mean(0)
