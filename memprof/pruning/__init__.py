"""Token pruning: a pruner chooses which visual tokens stay; :mod:`memprof.pruning.surgery` alone carries it out.

Adding a method is one file in ``memprof/pruning/methods``: a frozen dataclass whose fields are its hyper-parameters
and whose ``select`` returns indices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from memprof.errors import BadValue
from memprof.plugins import Registry, setting, spec_of

if TYPE_CHECKING:
    import torch

    from memprof.pruning.view import View


@dataclass(frozen=True)
class Stage:
    """One cut: from decoder layer ``layer`` on (0 is the first), ``kept`` of the visual tokens there were stay, and
    ``merged`` tokens that the pruner computes stand among them.
    """

    layer: int
    kept: int
    merged: int = 0

    @property
    def tokens(self) -> int:
        """Visual tokens behind the cut, merged ones included."""
        return self.kept + self.merged


@dataclass(frozen=True)
class Choice:
    """What a pruner wants of one cut.

    Attributes:
        kept: Tokens of the view that stay, ``(k,)`` int64, unique; they stand in prompt order, in whatever order given.
        merged: Tokens put in beside them, ``(m, hidden)``, or None.
        at: For each of those the token of the view it stands behind, ``(m,)`` int64, whether or not that one stays;
            -1 is before the first. Several behind one stand in the order given. Where positions are the original ones,
            a merged token has the position of that token (the first one's for -1).
    """

    kept: torch.Tensor
    merged: torch.Tensor | None = None
    at: torch.Tensor | None = None


@dataclass(frozen=True)
class Pruner:
    """Base of the methods.

    Class attributes:
        title: Name in figures.
        paper: Where the method was published.
        reference: The code it is held to, or None.
        departs: Where it departs from its paper or code, in one sentence.
        needs: What :class:`~memprof.pruning.view.View` must offer: names of :mod:`memprof.pruning.signals`.
        positions: ``original`` where tokens behind a cut keep their positions, ``compact`` where they are numbered anew
            from 0 in every layer behind it, and decoding goes on from each layer's own number of tokens.
        vision_layer: The vision tower's layer that signals of the tower are read from.
        sequential: Whether each token chosen asks for those before it, so that a choice takes a step a token.
    """

    title: ClassVar[str]
    paper: ClassVar[str]
    reference: ClassVar[str | None] = None
    departs: ClassVar[str] = ""
    sequential: ClassVar[bool] = False

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
        from memprof.pruning.signals import signal_kind

        return any(signal_kind(name).eager for name in self.needs)

    @property
    def positions(self) -> str:
        """Which positions tokens have behind a cut."""
        return "original"

    @property
    def vision_layer(self) -> int:
        """VisionZip's layer, and LLaVA's own for its features."""
        return -2

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

    def select(self, view: View, kept: int) -> torch.Tensor | Choice:
        """Indices of the ``kept`` tokens of ``view`` that stay: ``(kept,)`` int64, unique; order does not matter.

        Or a :class:`Choice`, with as many merged tokens as the stage says. Shapes must follow from shapes alone, so
        that the method also runs on tensors without storage.
        """
        raise NotImplementedError


def positions_setting(default: str, origin: str) -> Any:
    """The field ``positions`` of a method whose published code has ``default``, or, by ``origin``, memprof's choice."""
    return setting(
        default,
        "positions behind a cut: as in the prompt, or numbered anew in each layer",
        origin=origin,
        choices=("original", "compact"),
    )


@dataclass(frozen=True)
class OneCut(Pruner):
    """A pruner that cuts once: its share and its layer."""

    keep: float = setting(
        0.5, "share of visual tokens kept", origin="paper", gt=0, le=1, search=(0.02, 1.0), monotone=True
    )
    layer: int = setting(2, "decoder layers that still see every token", origin="paper", ge=0, search=(1, 8))
    positions: str = positions_setting("original", "memprof")

    def stages(self, n_visual: int, n_layers: int) -> Sequence[Stage]:
        """One cut before layer ``layer``; the count is ``round(n * keep)``, halves to even, as FastV's code has it."""
        from memprof.pruning.signals import needs_layer_before

        if self.layer >= n_layers:
            raise BadValue(f"layer={self.layer} is beyond the model's {n_layers} decoder layers (0 to {n_layers - 1})")
        if self.layer == 0 and needs_layer_before(self.needs):
            raise BadValue("layer=0: the method looks at the layer before its cut; take layer=1 or more")
        if not n_visual or self.keep == 1:
            return ()
        stage = self.cut(n_visual, max(1, round(n_visual * self.keep)))
        return (stage,) if stage.tokens < n_visual else ()

    def cut(self, n_visual: int, budget: int) -> Stage:
        """The cut that leaves ``budget`` of ``n_visual`` tokens."""
        del n_visual
        return Stage(self.layer, budget)


METHODS: Registry[Pruner] = Registry("memprof.pruning.methods", Pruner, "method", entry_points="memprof.methods")


def build_pruner(spec: str, stack: str = "current") -> Pruner:
    """The pruner a spec string names, with what the stack decides filled in."""
    return METHODS.build(spec).for_stack(stack)


def method_name(pruner: Pruner) -> str:
    """The registered name of a pruner's class."""
    return METHODS.name_of(type(pruner))


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
        counts[stage.layer :] = stage.tokens
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
