"""The only writer of model behaviour: carries out a pruner's choice by hooks, and leaves nothing behind.

Tokens are dropped, not hidden: hidden states, rotary positions and masks lose their rows, so every later layer
computes and caches only what stays. Layer caches become ragged. Positions are the original ones, and decoding goes on
from the full length without being told: ``generate()`` counts positions from the prompt it was given.

A pruner slices nothing. That is why a doubled or retained KV could exist in this file only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from memprof import scopes
from memprof.anatomy import anatomy
from memprof.errors import UsageError
from memprof.pruning import Pruner, Stage, visual_tokens_per_layer
from memprof.pruning.view import View
from memprof.pruning.vision import attention_received, patches_to_tokens, vision_attention

Hook = Callable[..., Any]
#: The vision tower's layer that :attr:`View.vision` is read from: VisionZip's, and LLaVA's own for its features.
VISION_LAYER = -2

#: What FastV's first code, which masks, keeps from its cut to the end of its loop over the layers
#: (``last_layer_attention`` and ``last_layer_attention_avg`` in pkunlp-icler/FastV, ``LlamaModel.forward``).
_LOOP_HOLDS = ("ranked_map", "averaged_map")


@dataclass(frozen=True)
class Layout:
    """Where the visual tokens of a prompt are.

    Attributes:
        length: Prompt tokens, visual and text.
        index: Their places in the prompt, ``(n,)`` int64, rising.
        positions: Their centres on their image, ``(n, 2)`` float32, in units of the image's edges.
        images: Number of the image each belongs to, ``(n,)`` int64.
    """

    length: int
    index: npt.NDArray[np.int64]
    positions: npt.NDArray[np.float32]
    images: npt.NDArray[np.int64]


class Surgery:
    """Prunes one prompt's prefill while it is entered: ``with Surgery(model, pruner, layout): model.generate(...)``.

    Args:
        model: A transformers model whose decoder layers :func:`memprof.anatomy.anatomy` finds. Batch size 1.
        pruner: What to keep.
        layout: Where the visual tokens are.
        seed: Handed to pruners that draw.

    Raises:
        UsageError: The pruner reads attention maps and the language model does not run eager attention, or it reads the
            vision tower's attention and the tower has none that can be read.
        BadValue: The pruner cuts at a layer the model does not have.
    """

    def __init__(self, model: nn.Module, pruner: Pruner, layout: Layout, seed: int = 0) -> None:
        where = anatomy(model)
        self._layers = [layer for _, layer in where.layers]
        self.pruner, self.layout, self.seed = pruner, layout, seed
        self.stages: tuple[Stage, ...] = tuple(pruner.stages(len(layout.index), len(self._layers)))
        if self.stages and pruner.eager and _attention_of(self._layers[0]) != "eager":
            raise UsageError(
                f"{type(pruner).__name__} reads attention maps, which only eager attention makes; load the model with "
                "attn_implementation='eager' for its language model, or choose scores=row"
            )
        self._tower = vision_attention(where.vision, VISION_LAYER) if self.stages and "vision" in pruner.needs else None
        self._hooks: list[Any] = []
        self._vision: torch.Tensor | None = None  # patch scores, from the vision tower's run to the prefill after it
        self._reset()

    # -- what was planned and done -------------------------------------------------------------------------------------

    @property
    def visual_tokens(self) -> list[int]:
        """Visual tokens each layer is to run in prefill; a mask alone spares it none."""
        if self.pruner.mask_only:
            return [len(self.layout.index)] * len(self._layers)
        return visual_tokens_per_layer(self.stages, len(self.layout.index), len(self._layers))

    @property
    def kv_tokens(self) -> list[int]:
        """KV length each layer is to have after prefill."""
        text = self.layout.length - len(self.layout.index)
        return [text + visual for visual in self.visual_tokens]

    def kept(self) -> list[list[int]] | None:
        """For each stage carried out, the kept visual tokens (numbered in prompt order); None without real numbers."""
        if not all(type(chosen) is torch.Tensor for chosen in self._chosen):
            return None
        kept, alive = [], np.arange(len(self.layout.index))
        for chosen in self._chosen:
            alive = alive[chosen.cpu().numpy()]
            kept.append([int(i) for i in alive])
        return kept

    # -- in and out ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Surgery:
        if not self.stages:
            return self
        if self._tower is not None:
            self._watch_tower(self._tower)
        self._pre(self._layers[0], self._begin)
        if "map" in self.pruner.needs:
            # The reference's loop holds a layer's map until the next layer has made its own: that second map is part
            # of what the method costs, so every layer up to the last cut is watched. Where it only masks, it goes on
            # asking every layer for its map, and its variables hold the one it ranked by until the loop is over.
            for layer in self._layers if self.pruner.mask_only else self._layers[: self.stages[-1].layer]:
                self._post(cast(nn.Module, layer.self_attn), self._keep_map)
        for stage in self.stages:
            if stage.layer:
                self._watch(self._layers[stage.layer - 1], stage)
        for number in range(self.stages[0].layer, len(self._layers)):
            cuts = sum(stage.layer <= number for stage in self.stages)
            self._pre(self._layers[number], partial(self._adjust, cuts))
        self._post(self._layers[-1], lambda *_: self._release())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._release()
        self._vision = None

    def _pre(self, module: nn.Module, hook: Hook) -> None:
        self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _post(self, module: nn.Module, hook: Hook, *, first: bool = False) -> None:
        self._hooks.append(module.register_forward_hook(hook, with_kwargs=True, prepend=first))

    def _reset(self) -> None:
        """Forget the prompt before."""
        self._prefill = False
        self._past = 0  # tokens layer 0 has cached before this forward
        self._length = 0  # tokens of the prompt
        self._chosen: list[torch.Tensor] = []
        self._alive: list[torch.Tensor] = []  # for each cut made, the original position of each token left by it
        self._visual: torch.Tensor | None = None  # where the visual tokens stand among those
        self._visible: torch.Tensor | None = None  # masking only: which prompt positions may be looked at
        self._release()

    def _release(self) -> None:
        """Let go of every tensor held for the time of a prefill."""
        self._seen: dict[str, torch.Tensor] = {}
        self._about: dict[str, torch.Tensor] = {}  # one row a visual token still alive: positions, images, vision
        self._inputs: dict[str, Any] = {}

    # -- prefill -------------------------------------------------------------------------------------------------------

    def _begin(self, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        """Before layer 0: tell prefill from decoding, and make a cut that comes before every layer."""
        hidden = args[0] if args else kwargs["hidden_states"]
        cache = kwargs.get("past_key_values")
        if cache is None:
            raise UsageError("pruning needs the KV cache: without one, nothing remembers what was cut (use_cache=True)")
        past = cache.get_seq_length()
        if past:
            self._prefill, self._past = False, past
            return None
        self._reset()
        self._prefill = True
        self._length = hidden.shape[1]
        if hidden.shape[0] != 1:
            raise UsageError(f"pruning works on one prompt at a time, and this batch has {hidden.shape[0]}")
        if self._length != self.layout.length:
            raise UsageError(f"the prompt has {self._length} tokens and its layout was made for {self.layout.length}")
        with scopes.scope("pruner", "surgery"):
            self._visual = _placed(self.layout.index, hidden)
            self._about["positions"] = _placed(self.layout.positions, hidden)
            self._about["images"] = _placed(self.layout.images, hidden)
            if self._vision is not None:
                self._about["vision"], self._vision = patches_to_tokens(self._vision, len(self.layout.index)), None
        if self.stages[0].layer == 0:
            if "source" in self.pruner.needs:
                self._seen["source"] = hidden
            cut = self._cut(layer, hidden, self.stages[0], kwargs)
            return ((cut, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": cut})
        return None

    def _watch_tower(self, attention: Any) -> None:
        """Score the patches as soon as the vision tower's layer has made its queries and keys."""
        made: dict[str, torch.Tensor] = {}

        def projected(name: str, _: nn.Module, args: Any, kwargs: Any, out: torch.Tensor) -> None:
            made[name] = out
            if len(made) == 2:
                with scopes.scope("pruner", "surgery"):
                    self._vision = attention_received(attention, made.pop("query"), made.pop("key"))

        self._post(getattr(attention, "q_norm", attention.q_proj), partial(projected, "query"))
        self._post(getattr(attention, "k_norm", attention.k_proj), partial(projected, "key"))

    def _keep_map(self, _: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        """Hold a layer's attention map in place of the one before."""
        if self._prefill:
            self._seen["map"] = out[1]

    def _watch(self, layer: nn.Module, stage: Stage) -> None:
        """Collect what the pruner may look at in ``layer``, and cut its output."""
        attention = cast(nn.Module, layer.self_attn)

        def entering(_: nn.Module, args: Any, kwargs: Any) -> None:
            if self._prefill:
                self._seen["source"] = args[0] if args else kwargs["hidden_states"]

        def attending(_: nn.Module, args: Any, kwargs: Any) -> None:
            if self._prefill:
                with scopes.scope("pruner", "surgery"):
                    hidden = args[0] if args else kwargs["hidden_states"]
                    self._seen["query"] = hidden[:, -1:].clone()  # a view would keep every row

        def normed(_: nn.Module, args: Any, kwargs: Any, out: torch.Tensor) -> None:
            if self._prefill:
                self._seen["target"] = out

        def leaving(_: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
            if not self._prefill:
                return None
            hidden = out[0] if isinstance(out, tuple) else out
            cut = self._cut(layer, hidden, stage, kwargs)
            return (cut, *out[1:]) if isinstance(out, tuple) else cut

        if "source" in self.pruner.needs:
            self._pre(layer, entering)
        if "row" in self.pruner.needs:
            self._pre(attention, attending)
        if "target" in self.pruner.needs:
            self._post(cast(nn.Module, layer.post_attention_layernorm), normed)
        self._post(layer, leaving, first=True)

    def _cut(self, layer: nn.Module, hidden: torch.Tensor, stage: Stage, kwargs: Any) -> torch.Tensor:
        """Ask the pruner, then keep only what it chose of ``hidden`` and of what later layers are given."""
        assert self._visual is not None
        with scopes.scope("pruner", "surgery"):
            view = View(
                count=self._visual.shape[0],
                device=hidden.device,
                source=self._visual_rows("source"),
                target=self._visual_rows("target"),
                vision=self._about.get("vision"),
                positions=self._about["positions"],
                images=self._about["images"],
                row=lambda: self._row(layer, kwargs),
                map=lambda: self._map(),
                ahead=lambda: self._row_ahead(self._layers[stage.layer], hidden, kwargs),
                seed=self.seed,
            )
            chosen = self.pruner.select(view, stage.kept).sort().values
            del view
            self._seen = {name: self._seen[name] for name in _LOOP_HOLDS if name in self._seen}
            self._chosen.append(chosen)
            visual = self._visual.index_select(0, chosen)
            if self.pruner.mask_only:
                self._hide(visual, hidden)
                return hidden
            rows = self._rows_kept(visual, hidden.shape[1])
            self._alive.append(self._alive[-1].index_select(0, rows) if self._alive else rows)
            self._visual = torch.searchsorted(rows, visual)
            self._about = {name: rows_of.index_select(0, chosen) for name, rows_of in self._about.items()}
            self._inputs = {}
            return hidden.index_select(1, rows)

    def _visual_rows(self, seen: str) -> torch.Tensor | None:
        """The visual tokens' rows of what was seen: a view where they stand side by side, which needs no copy."""
        assert self._visual is not None
        if seen not in self._seen:
            return None
        rows, index = self._seen[seen][0], self.layout.index
        if index[-1] - index[0] + 1 == len(index):
            return rows[int(index[0]) : int(index[0]) + self._visual.shape[0]]
        return rows.index_select(0, self._visual)

    def _rows_kept(self, visual: torch.Tensor, length: int) -> torch.Tensor:
        """Rows of the present sequence that stay: all text, and ``visual``; rising."""
        assert self._visual is not None
        # A row is text unless it is one of the visual ones. Counted this way the result's size follows from shapes
        # alone.
        order = torch.zeros(length, dtype=torch.int8, device=visual.device)
        order.index_fill_(0, self._visual, 1)
        order.index_fill_(0, visual, 0)
        gone = self._visual.shape[0] - visual.shape[0]
        return order.argsort(stable=True)[: length - gone].sort().values

    def _row(self, layer: nn.Module, kwargs: Any) -> torch.Tensor:
        """Attention of the last token to each visual token in ``layer``, which has run: ``(n,)`` float32."""
        attention = cast(Any, layer.self_attn)
        query = _turned(_heads(attention, "q", self._seen["query"]), kwargs["position_embeddings"])
        keys = kwargs["past_key_values"].layers[attention.layer_idx].keys
        return self._attention_to_visual(attention, query, keys)

    def _row_ahead(self, layer: nn.Module, hidden: torch.Tensor, kwargs: Any) -> torch.Tensor:
        """The same in ``layer``, which is yet to run on ``hidden``: its norm and key projection run twice."""
        attention = cast(Any, layer.self_attn)
        # Not by a call: whoever hooks the layer's norm would take it for the layer's own run.
        normed = cast(Any, layer.input_layernorm).forward(hidden)
        query = _turned(_heads(attention, "q", normed[:, -1:]), kwargs["position_embeddings"])
        keys = _turned(_heads(attention, "k", normed), kwargs["position_embeddings"])
        return self._attention_to_visual(attention, query, keys)

    def _attention_to_visual(self, attention: Any, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Mean over heads of one query's attention to the visual tokens: ``(n,)`` float32."""
        assert self._visual is not None
        grouped = query[0, :, 0].view(keys.shape[1], -1, attention.head_dim)
        scores = torch.matmul(grouped, keys[0].transpose(1, 2)) * attention.scaling
        mean: torch.Tensor = scores.softmax(-1, dtype=torch.float32).mean((0, 1))
        return mean.index_select(0, self._visual)

    def _map(self) -> torch.Tensor:
        """The same read off the kept map, averaged over heads as a whole first, as FastV's reference does."""
        assert self._visual is not None
        averaged = self._seen["map"].mean(1)
        if self.pruner.mask_only:
            self._seen |= {"ranked_map": self._seen["map"], "averaged_map": averaged}
        return averaged[0, -1].index_select(0, self._visual).float()

    # -- what layers behind a cut are given ----------------------------------------------------------------------------

    def _adjust(self, cuts: int, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        """Give a layer behind ``cuts`` cuts the positions and mask of the tokens that are left."""
        if self.pruner.mask_only:
            return self._mask(args, kwargs) if self._visible is not None else None
        if len(self._alive) < cuts:
            return None
        alive = self._alive[cuts - 1]
        with scopes.scope("pruner", "surgery"):
            given = self._prefill_inputs(kwargs, alive) if self._prefill else self._step_inputs(kwargs, alive)
            return args, {**kwargs, **given}

    def _prefill_inputs(self, kwargs: Any, alive: torch.Tensor) -> dict[str, Any]:
        """Positions and mask of the rows left, made once for all layers behind a cut."""
        if not self._inputs:
            self._inputs["position_embeddings"] = tuple(t.index_select(1, alive) for t in kwargs["position_embeddings"])
            if kwargs.get("position_ids") is not None:
                self._inputs["position_ids"] = kwargs["position_ids"].index_select(-1, alive)
            if kwargs.get("attention_mask") is not None:
                self._inputs["attention_mask"] = (
                    kwargs["attention_mask"].index_select(-2, alive).index_select(-1, alive)
                )
        return self._inputs

    def _step_inputs(self, kwargs: Any, alive: torch.Tensor) -> dict[str, Any]:
        """A decode step's mask, if there is one, cut to the columns this layer's cache still has."""
        mask = kwargs.get("attention_mask")
        if mask is None:
            return {}
        prompt = self._length
        if self.stages[0].layer == 0:
            # generate() made the mask for layer 0's cache, which never had the columns of the first cut.
            alive, prompt = torch.searchsorted(self._alive[0], alive), self._alive[0].shape[0]
        new = torch.arange(prompt, mask.shape[-1], device=mask.device)
        return {"attention_mask": mask.index_select(-1, torch.cat((alive, new)))}

    # -- masking instead of dropping -----------------------------------------------------------------------------------

    def _hide(self, visual: torch.Tensor, hidden: torch.Tensor) -> None:
        """Remember which prompt positions stay visible: ``(length,)`` bool."""
        assert self._visual is not None
        visible = torch.ones(hidden.shape[1], dtype=torch.bool, device=hidden.device)
        self._visible = visible.index_fill(0, self._visual, False).index_fill(0, visual, True)

    def _mask(self, args: Any, kwargs: Any) -> Any:
        """Forbid every query to look at hidden positions; nothing gets shorter."""
        assert self._visible is not None
        hidden = args[0] if args else kwargs["hidden_states"]
        with scopes.scope("pruner", "surgery"):
            columns = torch.arange(self._past + hidden.shape[1], device=hidden.device)
            rows = columns[self._past :, None]
            visible = torch.ones(len(columns), dtype=torch.bool, device=hidden.device)
            visible[: self._length] = self._visible
            allowed = ((columns <= rows) & visible)[None, None]
            mask = kwargs.get("attention_mask")
            if mask is None:
                mask = allowed if _attention_of(self._layers[0]) != "eager" else _additive(allowed, hidden.dtype)
            else:
                mask = (
                    mask & allowed
                    if mask.dtype == torch.bool
                    else mask.masked_fill(~allowed, torch.finfo(mask.dtype).min)
                )
            return args, {**kwargs, "attention_mask": mask}


def _placed(values: npt.NDArray[Any], like: torch.Tensor) -> torch.Tensor:
    """``values`` where ``like`` is, without storage if ``like`` has none."""
    host = torch.from_numpy(values)
    return like.new_empty(host.shape, dtype=host.dtype).copy_(host)


def _heads(attention: Any, which: str, hidden: torch.Tensor) -> torch.Tensor:
    """Queries (``q``) or keys (``k``) of ``(1, r, hidden)`` by head, before rotary: ``(1, heads, r, dim)``."""
    made = getattr(attention, f"{which}_proj")(hidden).view(1, hidden.shape[1], -1, attention.head_dim)
    norm = getattr(attention, f"{which}_norm", None)
    return cast(torch.Tensor, made if norm is None else norm(made)).transpose(1, 2)


def _turned(by_head: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """``by_head`` ``(1, heads, r, dim)`` with the rotary positions of the last r rows of ``rotary``, split halves."""
    cos, sin = (t[:, -by_head.shape[2] :].unsqueeze(1) for t in rotary)
    first, second = by_head.chunk(2, dim=-1)
    return by_head * cos + torch.cat((-second, first), dim=-1) * sin


def _additive(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask as numbers to add to scores."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min)


def _attention_of(layer: nn.Module) -> str:
    """The attention implementation a decoder layer runs."""
    return str(cast(Any, layer.self_attn).config._attn_implementation)
