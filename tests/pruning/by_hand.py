"""What a pruned model computes, worked out the long way: the whole sequence at once, no cache, no hooks."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np
import torch

from memprof.anatomy import anatomy
from memprof.bench.generate import place
from memprof.prompts import Prompt
from memprof.pruning import Choice, Pruner
from memprof.pruning.surgery import Surgery


def recorded(pruner: Pruner) -> tuple[Pruner, list[Choice]]:
    """``pruner`` with what it chooses noted, cut by cut."""
    twin, choices, select = copy.copy(pruner), list[Choice](), pruner.select

    def watched(view: Any, kept: int) -> Any:
        out = select(view, kept)
        choices.append(out if isinstance(out, Choice) else Choice(out))
        return out

    object.__setattr__(twin, "select", watched)
    return twin, choices


@torch.no_grad()
def embedded(model: Any, prompt: Prompt, tokens: torch.Tensor) -> torch.Tensor:
    """What enters layer 0 for ``tokens``: ``(1, n, hidden)``."""
    core = model.model
    embeds = core.get_input_embeddings()(tokens[None])
    if len(prompt.places.index):
        features = seen(model, prompt).pooler_output
        features = torch.cat(list(features)) if isinstance(features, list | tuple) else features
        embeds[0, torch.tensor(prompt.places.index)] = features.reshape(-1, embeds.shape[-1])
    return embeds


def seen(model: Any, prompt: Prompt) -> Any:
    """What the vision tower makes of the prompt's images."""
    given = {name: tensor for name, tensor in place(prompt, model).items() if name.startswith(("pixel_", "image_"))}
    return model.model.get_image_features(**given, return_dict=True)


@torch.no_grad()
def stacked(model: Any, prompt: Prompt) -> list[torch.Tensor]:
    """What is added to the visual tokens behind the first layers, one ``(tokens, hidden)`` each."""
    if not len(prompt.places.index):
        return []
    found = getattr(seen(model, prompt), "deepstack_features", None) or []
    return [torch.cat(list(one)) if isinstance(one, list | tuple) else one for one in found]


def positions_of(model: Any, prompt: Prompt, tokens: torch.Tensor) -> torch.Tensor:
    """Positions of ``tokens``, ``(axes, n)``: along time, height and width where the model has these."""
    n, core = len(tokens), model.model
    if not hasattr(core, "get_rope_index"):
        return torch.arange(n)[None]
    inputs, length = place(prompt, model), prompt.shape.length
    if not len(prompt.places.index):
        return torch.arange(n).expand(3, -1)
    found = core.get_rope_index(inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"])[0][:, 0]
    return torch.cat((found, int(found.max()) + 1 + torch.arange(n - length).expand(3, -1)), dim=1)


def rotary_of(decoder: Any, layer: Any, hidden: torch.Tensor, ids: torch.Tensor) -> Any:
    """Rotary tables of ``ids``, ``(axes, n)``, for ``layer``: some models have two kinds."""
    kinds = "layer_type" in inspect.signature(decoder.rotary_emb.forward).parameters
    kind = {"layer_type": layer.self_attn.layer_type} if kinds else {}
    return decoder.rotary_emb(hidden, ids if len(ids) == 1 else ids[:, None], **kind)


def window_of(layer: Any) -> int:
    """How many tokens a layer looks back at, itself included."""
    attention = layer.self_attn
    kinds = getattr(attention.config, "layer_types", None)
    if kinds is not None and kinds[attention.layer_idx] != "sliding_attention":
        return 10**9
    return getattr(attention.config, "sliding_window", None) or 10**9


def visible(prompt: Prompt, positions: list[int], window: int) -> torch.Tensor:
    """Who looks at whom, ``(n, n)``: at so many before, and where a model is told, at all of the same image."""
    allowed = torch.ones(len(positions), len(positions), dtype=torch.bool).tril()
    places = torch.tensor(positions)
    allowed &= places[:, None] - places < window
    if "token_type_ids" in prompt.inputs:
        whose = dict(zip(prompt.places.index.tolist(), prompt.places.images.tolist(), strict=True))
        of = torch.tensor([whose.get(position, -1) for position in positions])
        at = torch.tensor(positions)
        later = (at[:, None] == at).triu(1)  # merged tokens that share a position look back alone
        allowed |= (of[:, None] == of) & (of >= 0) & ~later
    return allowed


@torch.no_grad()
def masked(model: Any, prompt: Prompt, surgery: Surgery, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Nothing is dropped; from a cut on, nobody looks at what was cut. Original positions, nothing merged."""
    decoder, hidden = anatomy(model).decoder, embedded(model, prompt, tokens)
    image, n = torch.tensor(prompt.places.index), hidden.shape[1]
    ids, deep = positions_of(model, prompt, tokens), stacked(model, prompt)
    kept = surgery.kept()
    assert kept is not None
    for number, layer in enumerate(decoder.layers):
        allowed = visible(prompt, list(range(n)), window_of(layer))
        rotary = rotary_of(decoder, layer, hidden, ids)
        for stage, chosen in zip(surgery.stages, kept, strict=True):
            if number >= stage.layer:
                gone = np.setdiff1d(np.arange(len(image)), chosen)
                allowed[:, image[gone]] = False
        allowed |= torch.eye(n, dtype=torch.bool)  # a row that sees nothing is no number; nobody looks at these rows
        hidden = layer(hidden, attention_mask=_additive(allowed), position_embeddings=rotary, past_key_values=None)
        if number < len(deep):
            hidden[:, image] += deep[number]
    logits = model.lm_head(decoder.norm(hidden))[0]
    return list(logits[prompt.shape.length - 1 : n - 1])


@torch.no_grad()
def rebuilt(
    model: Any, prompt: Prompt, surgery: Surgery, choices: list[Choice], tokens: torch.Tensor
) -> list[torch.Tensor]:
    """Rows are left out and put in one at a time, and each layer's positions are written down anew."""
    decoder, hidden = anatomy(model).decoder, embedded(model, prompt, tokens)
    asked, positions = len(tokens) - prompt.shape.length, list(range(len(tokens)))
    visual = [row in set(prompt.places.index.tolist()) for row in positions]
    table, deep = positions_of(model, prompt, tokens), stacked(model, prompt)
    own = {row: number for number, row in enumerate(prompt.places.index.tolist())}
    merged = [False] * len(positions)
    cuts = dict(zip((stage.layer for stage in surgery.stages), choices, strict=True))
    for number, layer in enumerate(decoder.layers):
        if number in cuts:
            hidden, positions, visual, merged = _cut(hidden, positions, visual, merged, cuts[number])
        ids = table[:, positions]
        if number >= min(cuts, default=99) and surgery.pruner.positions == "compact":
            ids = torch.arange(len(positions)).expand(len(table), -1)
        rotary = rotary_of(decoder, layer, hidden, ids)
        allowed = _additive(visible(prompt, positions, window_of(layer)))
        hidden = layer(hidden, attention_mask=allowed, position_embeddings=rotary, past_key_values=None)
        for row, position in enumerate(positions):
            if number < len(deep) and visual[row] and not merged[row]:
                hidden[0, row] += deep[number][own[position]]
    logits = model.lm_head(decoder.norm(hidden))[0]
    return list(logits[-asked - 1 : -1])


def _cut(
    hidden: torch.Tensor, positions: list[int], visual: list[bool], put_in: list[bool], choice: Choice
) -> tuple[torch.Tensor, list[int], list[bool], list[bool]]:
    kept = set(choice.kept.tolist())
    merged = list[tuple[int, torch.Tensor]]()
    if choice.merged is not None and choice.at is not None:
        merged = list(zip(choice.at.tolist(), choice.merged, strict=True))
    rows, places, kinds, made, number = [], [], [], [], -1
    for row, (position, is_visual) in enumerate(zip(positions, visual, strict=True)):
        if is_visual:
            number += 1
        before = [m for at, m in merged if is_visual and at == -1 and number == 0]
        behind = [m for at, m in merged if is_visual and at == number]
        stays = [hidden[0, row]] if not is_visual or number in kept else []
        for new in (*before, *stays, *behind):
            rows.append(new)
            places.append(position)
            kinds.append(is_visual)
        made += [True] * len(before) + [put_in[row]] * len(stays) + [True] * len(behind)
    return torch.stack(rows)[None], places, kinds, made


def _additive(allowed: torch.Tensor) -> torch.Tensor:
    return torch.zeros(1, 1, *allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
