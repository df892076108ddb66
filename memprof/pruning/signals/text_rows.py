"""``text_rows``: what the text behind the image attends to in the layer before the cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from memprof.pruning.signals import Cut, Held, entering, scoped

if TYPE_CHECKING:
    import torch
    from torch import nn


class TextRows(Held):
    """Attention of each text token behind the image to each visual token in the layer before the cut.

    ``(heads, t, n)`` float32, after a softmax over all that a token may look at; worked out from the cached keys beside
    any attention kernel.
    """

    leads = (None, "text", "visual")
    looks_back = True

    def watch(self, before: Sequence[int]) -> None:
        """Look at what those layers' attention is given."""
        for number in before:
            self.scene.pre(cast("nn.Module", self.scene.layers[number].self_attn), scoped(self._attending))

    def _attending(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        if self.scene.prefill:
            self.keep(self.scene.text_rows(entering(args, kwargs)[0])[None].clone())  # a view would keep every row

    @scoped
    def read(self, cut: Cut) -> torch.Tensor:
        """All rows of attention."""
        from memprof.pruning.attention import attention_rows, cached_keys, heads_of, turned

        assert self.held is not None
        assert self.scene.visual is not None
        attention = cast("Any", self.scene.layers[cut.number - 1].self_attn)
        query = turned(heads_of(attention, "q", self.held), cut.kwargs["position_embeddings"])
        rows = attention_rows(attention, query, cached_keys(attention, cut.kwargs))
        return rows.index_select(2, self.scene.visual)
