"""Signals: what a pruner may look at, one file each; the file's name is the name in :attr:`Pruner.needs`.

A signal places the hooks it needs on a :class:`Scene` and is read when a cut is made, or, if it is of the prompt, once
before layer 0. It changes nothing, and holds nothing longer than until it was read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, ParamSpec, TypeVar, cast

from memprof import scopes
from memprof.plugins import Registry

if TYPE_CHECKING:
    import torch
    from torch import nn

    from memprof.anatomy import Anatomy

Hook = Callable[..., Any]
P = ParamSpec("P")
R = TypeVar("R")
#: What can lead a signal's shape; a number that follows from none of these is None.
Lead = Literal["visual", "text", "tiles"] | None


class Scene:
    """A model that is being pruned, as signals see it.

    Attributes:
        anatomy: Where the model's parts are.
        layers: Its decoder layers.
        vision_layer: Number of the vision tower's layer that signals of the tower are read from.
        loop: Whether a layer's attention map is held as FastV's masking code holds it.
        index: Places of the visual tokens in the prompt: a list of rising numbers.
        prefill: Whether the forward under way is a prefill.
        visual: Rows of the visual tokens in the sequence at present, ``(n,)`` int64; None before the first prefill.
        after: Text tokens behind the last visual one: t.
    """

    def __init__(self, anatomy: Anatomy, index: Sequence[int], length: int, vision_layer: int, *, loop: bool) -> None:
        self.anatomy, self.vision_layer, self.loop = anatomy, vision_layer, loop
        self.layers = [layer for _, layer in anatomy.layers]
        self.first = int(index[0]) if len(index) else 0
        self.together = len(index) > 0 and int(index[-1]) - self.first + 1 == len(index)
        self.after = length - 1 - int(index[-1]) if len(index) else length
        self.prefill = False
        self.visual: torch.Tensor | None = None
        self._hooks: list[Any] = []

    def pre(self, module: nn.Module, hook: Hook) -> None:
        """Call ``hook(module, args, kwargs)`` before ``module`` runs."""
        self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def post(self, module: nn.Module, hook: Hook, *, first: bool = False) -> None:
        """Call ``hook(module, args, kwargs, out)`` after ``module`` ran."""
        self._hooks.append(module.register_forward_hook(hook, with_kwargs=True, prepend=first))

    def leave(self) -> None:
        """Take every hook back."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def visual_rows(self, sequence: torch.Tensor) -> torch.Tensor:
        """The visual tokens' rows of ``(length, ...)``: a view where they stand side by side, which needs no copy."""
        assert self.visual is not None
        if self.together:
            return sequence[self.first : self.first + self.visual.shape[0]]
        return sequence.index_select(0, self.visual)

    def text_rows(self, sequence: torch.Tensor) -> torch.Tensor:
        """The rows of ``(length, ...)`` of the text behind the last visual token, ``(t, ...)``: a view."""
        return sequence[sequence.shape[0] - self.after :]


@dataclass(frozen=True)
class Cut:
    """A cut that is about to be made.

    Attributes:
        number: Number of the layer behind it.
        hidden: What is cut, ``(1, length, hidden)``: the output of the layer before it, or the merged embeddings.
        kwargs: What the layer before it was given, or layer 0 is to be given.
        added: What the decoder is to add to each visual token on its way to the layer behind the cut, ``(n, hidden)``;
            None where layers follow each other directly.
    """

    number: int
    hidden: torch.Tensor
    kwargs: Any
    added: torch.Tensor | None = None


class Signal:
    """Base of the signals.

    Class attributes:
        leads: What leads its shape: numbers of which tokens.
        of_prompt: Whether it is read once, before layer 0; its rows are then cut as the visual tokens are.
        looks_back: Whether it needs a decoder layer before the cut.
        of_output: Whether it needs what is cut, so that it is there only once the layer before the cut has ended.
        eager: Whether the language model must run eager attention.
        of_tower: Whether it is what the vision tower knows of each token's patches.
    """

    leads: ClassVar[tuple[Lead, ...]] = ("visual",)
    of_prompt: ClassVar[bool] = False
    looks_back: ClassVar[bool] = False
    of_output: ClassVar[bool] = False
    eager: ClassVar[bool] = False
    of_tower: ClassVar[bool] = False

    def __init__(self, scene: Scene) -> None:
        """Find what is needed; raises UsageError where the model does not have it."""
        self.scene = scene

    def watch(self, before: Sequence[int]) -> None:
        """Place hooks; ``before`` are the numbers of the layers before each cut, rising."""

    def read(self, cut: Cut) -> torch.Tensor:
        """The signal, of the shape that :attr:`leads` begins."""
        raise NotImplementedError

    def forget(self) -> None:
        """Let go of what was held for the next cut."""

    def end(self) -> None:
        """Let go of everything: the prefill is over."""
        self.forget()


class Held(Signal):
    """A signal that is one tensor caught on its way until it is read."""

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self.held: torch.Tensor | None = None

    def keep(self, tensor: torch.Tensor) -> None:
        """Hold ``tensor`` if this is a prefill."""
        if self.scene.prefill:
            self.held = tensor

    def forget(self) -> None:
        """Let go of it."""
        self.held = None


SIGNALS: Registry[Signal] = Registry("memprof.pruning.signals", Signal, "signal")


def signal_kind(name: str) -> type[Signal]:
    """The signal that a pruner's ``needs`` call ``name``; raises UnknownName."""
    return SIGNALS.load(name.replace("_", "-"))


def needs_layer_before(needs: Iterable[str]) -> bool:
    """Whether one of the signals called ``needs`` looks at the layer before the cut."""
    return any(signal_kind(name).looks_back for name in needs)


def entering(args: Any, kwargs: Any) -> torch.Tensor:
    """The hidden states a decoder layer, or its attention, is called with."""
    return cast("torch.Tensor", args[0] if args else kwargs["hidden_states"])


def scoped(work: Callable[P, R], module: str = "signals") -> Callable[P, R]:
    """``work``, with what it allocates counted to the pruner."""

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with scopes.scope("pruner", module):
            return work(*args, **kwargs)

    return call
