"""``ahead``: what the last prompt token will attend to in the layer behind the cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from memprof.pruning.signals import Cut, Signal, scoped

if TYPE_CHECKING:
    import torch


class Ahead(Signal):
    """Attention of the LAST prompt token to each visual token in the layer BEHIND the cut, mean over heads.

    ``(n,)`` float32, worked out before that layer runs: its norm and key projection run twice.
    """

    of_output = True

    @scoped
    def read(self, cut: Cut) -> torch.Tensor:
        """One row of attention."""
        from memprof.pruning.attention import attention_rows, heads_of, kind_of, tables, turned

        assert self.scene.visual is not None
        layer = self.scene.layers[cut.number]
        attention = cast("Any", layer.self_attn)
        # Not by a call: whoever hooks the layer's norm would take it for the layer's own run.
        hidden = cut.hidden if cut.added is None else cut.hidden.index_add(1, self.scene.visual, cut.added[None])
        normed = cast("Any", layer.input_layernorm).forward(hidden)
        rotary = cut.kwargs["position_embeddings"]
        if kind_of(layer) != kind_of(self.scene.layers[max(cut.number - 1, 0)]):
            rotary = tables(self.scene.anatomy.rotary, layer, cut.hidden, cut.kwargs["position_ids"])
        query = turned(heads_of(attention, "q", normed[:, -1:]), rotary)
        keys = turned(heads_of(attention, "k", normed), rotary)
        return attention_rows(attention, query, keys).mean((0, 1)).index_select(0, self.scene.visual)
