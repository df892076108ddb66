"""``key_norms``: how large each visual token's keys are in the layer before the cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from memprof.pruning.signals import Cut, Signal, scoped

if TYPE_CHECKING:
    import torch


class KeyNorms(Signal):
    """L1 norm of each visual token's cached keys, rotary applied, all heads together: ``(n,)`` float32."""

    looks_back = True

    @scoped
    def read(self, cut: Cut) -> torch.Tensor:
        """A sum over heads and channels of the visual rows."""
        from memprof.pruning.attention import cached_keys, sizes_of_keys

        attention = cast("Any", self.scene.layers[cut.number - 1].self_attn)
        return sizes_of_keys(self.scene.visual_rows(cached_keys(attention, cut.kwargs)[0].transpose(0, 1)))
