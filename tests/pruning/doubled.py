"""The bug that stands in three public codebases: to rank, they run the layer before the cut again, and its KV doubles.

It lives in the tests alone. A prefill accuracy check misses it; the lengths of the layers' caches show it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from memprof.pruning.surgery import Surgery


class DoubledKv(Surgery):
    """Surgery that runs the attention before each cut once more, on the same cache; its choice is made before."""

    def _cut(self, layer: nn.Module, hidden: Any, stage: Any, kwargs: Any) -> Any:
        self._choice = self._choice or self._choose(layer, hidden, stage, kwargs)
        attention: Any = layer.self_attn
        attention.forward(
            hidden,
            position_embeddings=kwargs["position_embeddings"],
            attention_mask=None,
            past_key_values=kwargs["past_key_values"],
        )
        return super()._cut(layer, hidden, stage, kwargs)
