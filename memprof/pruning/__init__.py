"""Token pruning: a pruner chooses which visual tokens stay; :mod:`memprof.pruning.surgery` alone carries it out.

Adding a method is one file in ``memprof/pruning/methods``: a frozen dataclass whose fields are its hyper-parameters
and whose ``select`` returns indices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from memprof.errors import BadValue
from memprof.plugins import Registry, setting, spec_of

if TYPE_CHECKING:
    import torch

    from memprof.pruning.view import View


@dataclass(frozen=True)
class Stage:
    """One cut: from decoder layer ``layer`` on (0 is the first), ``kept`` visual tokens of the prompt stay."""

    layer: int
    kept: int


@dataclass(frozen=True)
class Pruner:
    """Base of the methods.

    Class attributes:
        title: Name in figures.
        paper: Where the method was published.
        reference: The code it is held to, or None.
        departs: Where it departs from its paper or code, in one sentence.
        needs: What :class:`~memprof.pruning.view.View` must offer: any of ``source``, ``target``, ``vision``, ``row``,
            ``map``, ``ahead``.
    """

    title: ClassVar[str]
    paper: ClassVar[str]
    reference: ClassVar[str | None] = None
    departs: ClassVar[str] = ""

    @property
    def needs(self) -> frozenset[str]:
        """What the view must offer beside positions."""
        return frozenset()

    @property
    def mask_only(self) -> bool:
        """Whether pruned tokens are hidden by a mask and keep their memory; such a pruner cuts once."""
        return False

    @property
    def eager(self) -> bool:
        """Whether the language model must run eager attention."""
        return "map" in self.needs

    @property
    def like(self) -> Pruner:
        """The same method with the default share: how many tokens are kept changes sizes, not what is done."""
        share = next((f for f in dataclasses.fields(self) if f.metadata.get("monotone")), None)
        return self if share is None else dataclasses.replace(self, **{share.name: share.default})

    def for_stack(self, stack: str) -> Pruner:
        """This pruner with settings left to the stack filled in."""
        del stack
        return self

    def stages(self, n_visual: int, n_layers: int) -> Sequence[Stage]:
        """The cuts for a prompt of ``n_visual`` visual tokens, by rising layer; raises BadValue beyond the model."""
        raise NotImplementedError

    def select(self, view: View, kept: int) -> torch.Tensor:
        """Indices of the ``kept`` tokens of ``view`` that stay: ``(kept,)`` int64, unique; order does not matter.

        Shapes must follow from shapes alone, so that the method also runs on tensors without storage.
        """
        raise NotImplementedError


#: What a pruner can look at only where a decoder layer runs before its cut.
_OF_THE_LAYER_BEFORE = frozenset({"target", "row", "map"})


@dataclass(frozen=True)
class OneCut(Pruner):
    """A pruner that cuts once: its share and its layer."""

    keep: float = setting(
        0.5, "share of visual tokens kept", origin="paper", gt=0, le=1, search=(0.02, 1.0), monotone=True
    )
    layer: int = setting(2, "decoder layers that still see every token", origin="paper", ge=0, search=(1, 8))

    def stages(self, n_visual: int, n_layers: int) -> Sequence[Stage]:
        """One cut before layer ``layer``; the count is ``round(n * keep)``, halves to even, as FastV's code has it."""
        if self.layer >= n_layers:
            raise BadValue(f"layer={self.layer} is beyond the model's {n_layers} decoder layers (0 to {n_layers - 1})")
        if self.layer == 0 and self.needs & _OF_THE_LAYER_BEFORE:
            raise BadValue("layer=0: the method looks at the layer before its cut; take layer=1 or more")
        kept = n_visual if self.keep == 1 else max(1, round(n_visual * self.keep)) if n_visual else 0
        return (Stage(self.layer, kept),) if kept < n_visual else ()


METHODS: Registry[Pruner] = Registry("memprof.pruning.methods", Pruner, "method")


def build_pruner(spec: str, stack: str = "current") -> Pruner:
    """The pruner a spec string names, with what the stack decides filled in."""
    return METHODS.build(spec).for_stack(stack)


def method_name(pruner: Pruner) -> str:
    """The registered name of a pruner's class."""
    return type(pruner).__module__.rpartition(".")[2].replace("_", "-")


def method_spec(pruner: Pruner) -> str:
    """The canonical spec string: keep and layer always, other fields where they differ from their defaults."""
    return spec_of(method_name(pruner), pruner, always=("keep", "layer"))


def kept_share(pruner: Pruner) -> float | None:
    """The share kept, where the method has one."""
    return getattr(pruner, "keep", None) if dataclasses.is_dataclass(pruner) else None


def visual_tokens_per_layer(stages: Sequence[Stage], n_visual: int, n_layers: int) -> list[int]:
    """Visual tokens each decoder layer sees in prefill, one entry a layer."""
    counts = np.full(n_layers, n_visual, dtype=np.int64)
    for stage in stages:
        counts[stage.layer :] = stage.kept
    return [int(c) for c in counts]


def layer_flops(tokens: npt.ArrayLike, hidden: int, ffn: int) -> npt.NDArray[np.float64]:
    """FLOPs of one decoder layer over ``tokens``: ``4 n d^2 + 2 n^2 d + 2 n d m`` (FastV, arXiv:2403.06764).

    The published figures use ``2 n d m`` for the feed-forward; SwiGLU has three matrices. memprof follows the
    published form, so that its shares can be held against theirs.
    """
    n = np.asarray(tokens, dtype=np.float64)
    return 4 * n * hidden**2 + 2 * n**2 * hidden + 2 * n * hidden * ffn


def visual_flops_cut(per_layer: Sequence[int], n_visual: int, hidden: int, ffn: int) -> float:
    """Share of visual-token FLOPs removed, in [0, 1], given each layer's visual tokens."""
    if not n_visual or not per_layer:
        return 0.0
    full = len(per_layer) * float(layer_flops(n_visual, hidden, ffn))
    return 1 - float(layer_flops(per_layer, hidden, ffn).sum()) / full
