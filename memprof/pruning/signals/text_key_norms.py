"""``text_key_norms``: how large the keys of the text behind the image are in the layer before the cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from memprof.pruning.signals import Cut, Signal, scoped

if TYPE_CHECKING:
    import torch


class TextKeyNorms(Signal):
    """The same as ``key_norms`` of the text behind the last visual token: ``(t,)`` float32."""

    leads = ("text",)
    looks_back = True

    @scoped
    def read(self, cut: Cut) -> torch.Tensor:
        """A sum over heads and channels of the text rows."""
        from memprof.pruning.attention import cached_keys, sizes_of_keys

        attention = cast("Any", self.scene.layers[cut.number - 1].self_attn)
        return sizes_of_keys(self.scene.text_rows(cached_keys(attention, cut.kwargs)[0].transpose(0, 1)))
