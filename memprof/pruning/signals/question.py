"""``question``: the text behind the image in one direction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memprof.pruning.signals import Cut, Signal, scoped

if TYPE_CHECKING:
    import torch


class Question(Signal):
    """Mean of the unit embeddings of the text behind the image as it enters layer 0, ``(hidden,)`` float32.

    The inner product of a unit vector with it is that vector's mean cosine to the text tokens.
    """

    leads = ()
    of_prompt = True

    @scoped
    def read(self, cut: Cut) -> torch.Tensor:
        """A mean over text tokens."""
        from memprof.pruning.pairs import lengths

        text = self.scene.text_rows(cut.hidden[0])
        return (text.float() / lengths(text)[:, None]).mean(0)
