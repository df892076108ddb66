"""Where things are in a transformers vision-language model, found by structure: any such model can be profiled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from memprof.errors import UsageError

#: What the vision side is called across transformers' models: towers, then what stands between them and the language.
_VISION = (
    "vision_tower", "vision_model", "vision_encoder", "image_encoder", "visual", "vqmodel", "vision_embed_tokens",
    "multi_modal_projector", "mm_projector", "connector", "aligner", "qformer", "language_projection",
    "image_to_text_projection", "visual_projection", "perceiver_resampler",
)  # fmt: skip
_ATTENTION = ("self_attn", "attention", "attn", "self_attention")
_MLP = ("mlp", "feed_forward")
#: What the list of decoder layers is called.
_LAYERS = ("layers", "h", "blocks", "block", "layer")


@dataclass(frozen=True)
class Anatomy:
    """Named modules of a model.

    Attributes:
        vision: Vision tower and projector, in the order they run; empty for a language model.
        layers: Decoder layers of the language model, in order.
        head: The output embedding.
        embeddings: The input embedding.
        decoder: What holds the layers.
    """

    vision: tuple[tuple[str, nn.Module], ...]
    layers: tuple[tuple[str, nn.Module], ...]
    head: tuple[str, nn.Module]
    embeddings: tuple[str, nn.Module]
    decoder: nn.Module

    @property
    def final_norm(self) -> nn.Module:
        """The norm behind the last decoder layer; raises UsageError where it is not to be found."""
        return self._beside("norm", "final norm")

    @property
    def rotary(self) -> nn.Module:
        """What makes rotary tables of positions; raises UsageError where it is not to be found."""
        return self._beside("rotary_emb", "rotary embedding")

    def _beside(self, name: str, what: str) -> nn.Module:
        found = getattr(self.decoder, name, None)
        if not isinstance(found, nn.Module):
            raise UsageError(f"{type(self.decoder).__name__} has no {what} called {name!r}, which the method needs")
        return found

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


def has_attention(layer: nn.Module) -> bool:
    """Whether a decoder layer attends; layers of hybrids (Mamba, convolutions) keep a state instead."""
    return any(getattr(layer, name, None) is not None for name in _ATTENTION)


def attention_in(layer: nn.Module) -> Any:
    """The attention module of a decoder layer; raises UsageError where it has none."""
    found = next((part for name in _ATTENTION if (part := getattr(layer, name, None)) is not None), None)
    if found is None:
        raise UsageError(f"{type(layer).__name__} has no attention that memprof can find ({', '.join(_ATTENTION)})")
    return found


def same_form(layers: Sequence[nn.Module]) -> bool:
    """Whether decoder layers are made of the same parts of the same sizes, as far as their modules tell."""

    def form(layer: nn.Module) -> list[Any]:
        return [
            (name, type(module), [p.shape for p in module.parameters(recurse=False)])
            for name, module in layer.named_modules()
        ]

    first = form(layers[0])
    return all(form(layer) == first for layer in layers[1:])


def anatomy(model: Any) -> Anatomy:
    """Find the parts of ``model``.

    Raises:
        UsageError: ``model`` has no decoder layers or no output embedding to be found.
    """
    names = {id(module): name for name, module in model.named_modules()}
    vision = tuple((n, m) for n, m in model.named_modules() if n.rpartition(".")[2] in _VISION) + _seeing_encoder(model)
    outer = tuple((n, m) for n, m in vision if not any(n.startswith(v + ".") for v, _ in vision))
    says = next((m for m in model.modules() if _asked(m, "get_output_embeddings") is not None), model)  # in a wrapper
    head, embeddings = (_asked(says, f"get_{which}_embeddings") for which in ("output", "input"))
    found = _layers_in(_decoder_of(says), outer)
    if head is None or embeddings is None or found is None or id(head) not in names:
        raise UsageError(f"{type(model).__name__} has no decoder layers or no output embedding that memprof can find")
    name, layers = names[id(found)], found
    return Anatomy(
        vision=outer,
        layers=tuple((f"{name}.{i}", layer) for i, layer in enumerate(layers)),
        head=(names[id(head)], head),
        embeddings=(names[id(embeddings)], embeddings),
        decoder=model.get_submodule(name.rpartition(".")[0]),
    )


def _asked(model: Any, name: str) -> Any:
    """What ``model`` says of itself; None where it says nothing, as models do that transformers gave no such rule."""
    try:
        return getattr(model, name)()
    except (AttributeError, NotImplementedError, TypeError):
        return None


def _decoder_of(model: Any) -> Any:
    """The decoder as transformers names it, down to the innermost; ``model`` where nothing is said."""
    found, seen = model, set[int]()
    while id(found) not in seen:
        seen.add(id(found))
        inner = _asked(found, "get_decoder")
        found = inner if isinstance(inner, nn.Module) else found
    return found


def _seeing_encoder(model: Any) -> tuple[tuple[str, nn.Module], ...]:
    """The encoder of a model that reads pictures with it and writes with a decoder (Donut, Pix2Struct)."""
    if getattr(model, "main_input_name", None) not in ("pixel_values", "flattened_patches"):
        return ()
    return tuple((n, m) for n, m in model.named_modules() if n == "encoder")


def _layers_in(decoder: nn.Module, vision: Sequence[tuple[str, nn.Module]]) -> nn.ModuleList | None:
    """The list of a decoder's layers: the longest that is in no other, of those usually called so if any."""
    seeing = {id(module) for _, tower in vision for module in tower.modules()}
    lists = [
        (n, m) for n, m in decoder.named_modules()
        if isinstance(m, nn.ModuleList) and len(m) and id(m) not in seeing
    ]  # fmt: skip
    inside = {id(deeper) for _, m in lists for deeper in m.modules() if deeper is not m}
    outer = [(n, m) for n, m in lists if id(m) not in inside]
    usual = [(n, m) for n, m in outer if n.rpartition(".")[2] in _LAYERS]
    return max((m for _, m in usual or outer), key=len, default=None)
