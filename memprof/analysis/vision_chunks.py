"""The vision side over a few tiles or images at a time, as a loop around ``get_image_features`` would run it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from memprof import scopes
from memprof.errors import UsageError


@contextmanager
def chunked_vision(model: nn.Module, tiles: int) -> Iterator[None]:
    """Run the vision side over ``tiles`` tiles at a time, or images where a tower takes each whole; numbers stay.

    What is kept of each are its projected features. Where tiles become one grid before they are handed on
    (LLaVA-NeXT, LLaVA-OneVision), the tower alone runs in turn, and the layer that is projected is kept of each.

    Raises:
        UsageError: The model has no ``get_image_features`` of transformers.
    """
    core: Any = getattr(model, "base_model", model)
    if not hasattr(core, "get_image_features"):
        raise UsageError(f"{type(model).__name__} has no get_image_features to call tile by tile")
    whole = core.get_image_features

    @functools.wraps(whole)
    def in_turn(pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        if kwargs.get("image_grid_thw") is not None:
            return _by_image(whole, pixel_values, tiles, **kwargs)
        if kwargs.get("image_sizes") is not None:
            with _tower_in_turn(core, tiles):
                return whole(pixel_values=pixel_values, **kwargs)
        if pixel_values.dim() == 5:
            return _by_view(whole, pixel_values, tiles, **kwargs)
        features: list[torch.Tensor] = []
        out: Any = None
        for piece in pixel_values.split(tiles):  # type: ignore[no-untyped-call]
            out = None  # let go of the images before
            out = whole(pixel_values=piece, **kwargs)
            features.extend(out.pooler_output)
            _forget(out)
        with scopes.scope("vision", "chunked vision"):
            out.pooler_output = torch.stack(features) if torch.is_tensor(out.pooler_output) else features
        return out

    core.get_image_features = in_turn
    try:
        yield
    finally:
        del core.get_image_features


def _forget(out: Any) -> None:
    """Keep nothing of a call but its features."""
    out.last_hidden_state = out.hidden_states = None


def _by_image(whole: Callable[..., Any], rows: torch.Tensor, images: int, *, image_grid_thw: Any, **kwargs: Any) -> Any:
    """Rows of patches, as many as each image's grid has; DeepStack's features by layer beside the last one's."""
    features: list[torch.Tensor] = []
    deep: list[list[torch.Tensor]] = []
    out: Any = None
    sizes = image_grid_thw.prod(-1).split(images)
    pieces = rows.split([int(some.sum()) for some in sizes])  # type: ignore[no-untyped-call]
    for piece, grids in zip(pieces, image_grid_thw.split(images), strict=True):
        out = None
        out = whole(pixel_values=piece, image_grid_thw=grids, **kwargs)
        features.extend(out.pooler_output)
        for number, some in enumerate(getattr(out, "deepstack_features", None) or ()):
            deep[number:] = [[*(deep[number] if number < len(deep) else []), *some], *deep[number + 1 :]]
        _forget(out)
    out.pooler_output = features
    if deep:
        out.deepstack_features = deep
    return out


def _by_view(whole: Callable[..., Any], pixels: torch.Tensor, views: int, **kwargs: Any) -> Any:
    """Views of each prompt, ``(prompts, views, 3, height, width)``, with the mask of their pixels."""
    mask = kwargs.pop("pixel_attention_mask", None)
    features: list[list[torch.Tensor]] = [[] for _ in pixels]
    out: Any = None
    for start in range(0, pixels.shape[1], views):
        out, some = None, slice(start, start + views)
        masked = {} if mask is None else {"pixel_attention_mask": mask[:, some]}
        out = whole(pixel_values=pixels[:, some], **masked, **kwargs)
        for own, found in zip(features, out.pooler_output, strict=True):
            own.append(found)
        _forget(out)
    with scopes.scope("vision", "chunked vision"):
        out.pooler_output = [torch.cat(own) for own in features]
    return out


@contextmanager
def _tower_in_turn(core: Any, tiles: int) -> Iterator[None]:
    """The tower over so many tiles at a time; of each, the hidden states of the layers that are projected stay."""
    tower, chosen = core.vision_tower, core.config.vision_feature_layer
    layers, whole = [chosen] if isinstance(chosen, int) else list(chosen), tower.forward

    @functools.wraps(whole)
    def forward(pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        kept: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
        out: Any = None
        for piece in pixel_values.split(tiles):  # type: ignore[no-untyped-call]
            out = None
            out = whole(piece, **kwargs)
            for layer in layers:
                kept[layer].append(out.hidden_states[layer])
            out.pooler_output = None
            _forget(out)
        out.hidden_states = {layer: torch.cat(found) for layer, found in kept.items()}
        return out

    tower.forward = forward
    try:
        yield
    finally:
        del tower.forward
