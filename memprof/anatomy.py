"""Where things are in a transformers vision-language model, found by structure: any such model can be profiled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from memprof.errors import UsageError

#: What the vision side is called across transformers' models.
_VISION = ("vision_tower", "vision_model", "visual", "multi_modal_projector", "mm_projector", "connector")
_ATTENTION = ("self_attn", "attention", "attn")
_MLP = ("mlp", "feed_forward")


@dataclass(frozen=True)
class Anatomy:
    """Named modules of a model.

    Attributes:
        vision: Vision tower and projector, in the order they run; empty for a language model.
        layers: Decoder layers of the language model, in order.
        head: The output embedding.
        embeddings: The input embedding.
    """

    vision: tuple[tuple[str, nn.Module], ...]
    layers: tuple[tuple[str, nn.Module], ...]
    head: tuple[str, nn.Module]
    embeddings: tuple[str, nn.Module]

    def part_of(self, name: str) -> str:
        """The part that weights and activations of the module called ``name`` count to."""
        if any(name == v or name.startswith(v + ".") for v, _ in self.vision):
            return "vision"
        if name == self.head[0]:
            return "logits"
        leaf = name.rpartition(".")[2]
        return "attention" if leaf in _ATTENTION else "mlp" if leaf in _MLP else "other"

    def scoped(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The modules whose allocations are told apart.

        They are vision as a whole and its blocks' attention and MLP, each decoder layer and its children, and the head.
        """
        layers = {name for name, _ in self.layers}
        vision = {name for name, _ in self.vision}
        for name, module in model.named_modules():
            above, _, leaf = name.rpartition(".")
            in_vision = any(name.startswith(v + ".") for v in vision)
            if in_vision:
                wanted = leaf in _ATTENTION or leaf in _MLP
            else:
                wanted = name in layers or above in layers or name in vision or name == self.head[0]
            if wanted:
                yield name, module

    def weight_group(self, name: str) -> str:
        """What the weight called ``name`` counts to in a run's static parts."""
        for group, holds in (("head", self.head[0]), ("embeddings", self.embeddings[0])):
            if name.startswith(holds + "."):
                return group
        return "vision" if any(name.startswith(v + ".") for v, _ in self.vision) else "language"


def anatomy(model: Any) -> Anatomy:
    """Find the parts of ``model``.

    Raises:
        UsageError: ``model`` has no decoder layers or no output embedding to be found.
    """
    names = {id(module): name for name, module in model.named_modules()}
    vision = tuple((n, m) for n, m in model.named_modules() if n.rpartition(".")[2] in _VISION and "." in n)
    outer = tuple((n, m) for n, m in vision if not any(n.startswith(v + ".") for v, _ in vision))
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    stacks = [
        (n, m)
        for n, m in model.named_modules()
        if isinstance(m, nn.ModuleList)
        and n.rpartition(".")[2] in ("layers", "h", "blocks")
        and not any(n.startswith(v + ".") for v, _ in outer)
    ]
    if head is None or embeddings is None or not stacks:
        raise UsageError(f"{type(model).__name__} has no decoder layers or no output embedding that memprof can find")
    name, layers = max(stacks, key=lambda s: len(s[1]))
    return Anatomy(
        vision=outer,
        layers=tuple((f"{name}.{i}", layer) for i, layer in enumerate(layers)),
        head=(names[id(head)], head),
        embeddings=(names[id(embeddings)], embeddings),
    )
