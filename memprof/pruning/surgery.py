"""The only writer of model behaviour: carries out a pruner's choice by hooks, and leaves nothing behind.

Tokens are dropped, not hidden: hidden states, rotary positions and masks lose their rows, so every later layer
computes and caches only what stays. Layer caches become ragged. Positions are the original ones. ``generate()`` reads
the sequence length from layer 0, which sees every token, so decoding goes on from the full length without being told.

A pruner slices nothing. That is why a doubled or retained KV could exist in this file only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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

Hook = Callable[..., Any]

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
        UsageError: The pruner reads attention maps and the language model does not run eager attention.
        BadValue: The pruner cuts at a layer the model does not have.
    """

    def __init__(self, model: nn.Module, pruner: Pruner, layout: Layout, seed: int = 0) -> None:
        self._layers = [layer for _, layer in anatomy(model).layers]
        self.pruner, self.layout, self.seed = pruner, layout, seed
        self.stages: tuple[Stage, ...] = tuple(pruner.stages(len(layout.index), len(self._layers)))
        if self.stages and pruner.eager and _attention_of(self._layers[0]) != "eager":
            raise UsageError(
                f"{type(pruner).__name__} reads attention maps, which only eager attention makes; load the model with "
                "attn_implementation='eager' for its language model, or choose scores=row"
            )
        self._hooks: list[Any] = []
        self._reset()

    # -- what was planned and done -------------------------------------------------------------------------------------

    @property
    def visual_tokens(self) -> list[int]:
        """Visual tokens each layer is to see in prefill."""
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
        first = self.stages[0].layer
        self._pre(self._layers[0], self._begin)
        for stage in self.stages:
            if stage.layer:
                self._watch(self._layers[stage.layer - 1], stage)
        for number in range(first, len(self._layers)):
            self._pre(self._layers[number], self._adjust)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._release()

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
        self._sequence: torch.Tensor | None = None  # original position of each token still alive; None before a cut
        self._visual: torch.Tensor | None = None  # where the visual tokens stand among them
        self._release()

    def _release(self) -> None:
        """Let go of every tensor held for the time of a prefill."""
        self._seen: dict[str, torch.Tensor] = {}
        self._places: torch.Tensor | None = None
        self._images: torch.Tensor | None = None
        self._inputs: dict[str, Any] = {}

    # -- prefill -------------------------------------------------------------------------------------------------------

    def _begin(self, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        """Before layer 0: tell prefill from decoding, and make a cut that comes before every layer."""
        hidden = args[0] if args else kwargs["hidden_states"]
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        if past:
            self._prefill, self._past = False, past
            self._release()
            return None
        self._reset()
        self._prefill = True
        self._length = hidden.shape[1]
        if hidden.shape[0] != 1:
            raise UsageError(f"pruning works on one prompt at a time, and this batch has {hidden.shape[0]}")
        if self._length != self.layout.length:
            raise UsageError(f"the prompt has {self._length} tokens and its layout was made for {self.layout.length}")
        with scopes.scope("pruner", "surgery"):
            device = hidden.device
            self._visual = torch.tensor(self.layout.index, device=device)
            self._places = torch.tensor(self.layout.positions, device=device)
            self._images = torch.tensor(self.layout.images, device=device)
        if self.stages[0].layer == 0:
            self._seen["source"] = hidden
            return (self._cut(layer, hidden, self.stages[0], kwargs), *args[1:]), kwargs
        return None

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
                    self._seen["cos"], self._seen["sin"] = (t[:, -1:] for t in kwargs["position_embeddings"])

        def attended(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            if self._prefill:
                self._seen["map"] = out[1]

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
        if "map" in self.pruner.needs:
            # The reference's loop holds a layer's map until the next layer has made its own: that second map is part
            # of what the method costs, so every layer up to the cut is watched. Where it only masks, it goes on asking
            # every layer for its map, and its variables hold the one it ranked by until the loop is over.
            for each in self._layers if self.pruner.mask_only else self._layers[: stage.layer]:
                self._post(cast(nn.Module, each.self_attn), attended)
            if self.pruner.mask_only:
                self._post(self._layers[-1], lambda *_: self._seen.clear())
        if "target" in self.pruner.needs:
            self._post(cast(nn.Module, layer.post_attention_layernorm), normed)
        self._post(layer, leaving, first=True)

    def _cut(self, layer: nn.Module, hidden: torch.Tensor, stage: Stage, kwargs: Any) -> torch.Tensor:
        """Ask the pruner, then keep only what it chose of ``hidden`` and of what later layers are given."""
        assert self._visual is not None
        assert self._places is not None
        assert self._images is not None
        with scopes.scope("pruner", "surgery"):
            cache = kwargs.get("past_key_values")
            view = View(
                count=self._visual.shape[0],
                device=hidden.device,
                source=self._visual_rows("source"),
                target=self._visual_rows("target"),
                positions=self._places,
                images=self._images,
                row=lambda: self._row(layer, cache),
                map=lambda: self._map(),
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
            self._sequence = rows if self._sequence is None else self._sequence.index_select(0, rows)
            self._visual = torch.searchsorted(rows, visual)
            self._places = self._places.index_select(0, chosen)
            self._images = self._images.index_select(0, chosen)
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

    def _row(self, layer: nn.Module, cache: Any) -> torch.Tensor:
        """Attention of the last token to each visual token in ``layer``: ``(n,)`` float32, mean over heads."""
        attention = cast(Any, layer.self_attn)
        assert self._visual is not None
        query = attention.q_proj(self._seen["query"]).view(1, 1, -1, attention.head_dim).transpose(1, 2)
        if hasattr(attention, "q_norm"):
            query = attention.q_norm(query)
        cos, sin = self._seen["cos"].unsqueeze(1), self._seen["sin"].unsqueeze(1)
        half = attention.head_dim // 2
        query = query * cos + torch.cat((-query[..., half:], query[..., :half]), dim=-1) * sin
        keys = cache.layers[attention.layer_idx].keys[0]
        grouped = query[0, :, 0].view(keys.shape[0], -1, attention.head_dim)
        scores = torch.matmul(grouped, keys.transpose(1, 2)) * attention.scaling
        mean: torch.Tensor = scores.softmax(-1, dtype=torch.float32).mean((0, 1))
        return mean.index_select(0, self._visual)

    def _map(self) -> torch.Tensor:
        """The same read off the kept map, averaged over heads as a whole first, as FastV's reference does."""
        assert self._visual is not None
        averaged = self._seen["map"].mean(1)
        if self.pruner.mask_only:
            self._seen |= {"ranked_map": self._seen["map"], "averaged_map": averaged}
        return averaged[0, -1].index_select(0, self._visual).float()

    # -- what layers behind the cut are given --------------------------------------------------------------------------

    def _adjust(self, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        """Give a layer behind a cut the positions and mask of the tokens that are left."""
        if self.pruner.mask_only:
            return self._mask(args, kwargs) if self._chosen else None
        if self._sequence is None:
            return None
        with scopes.scope("pruner", "surgery"):
            return args, {**kwargs, **(self._prefill_inputs(kwargs) if self._prefill else self._step_inputs(kwargs))}

    def _prefill_inputs(self, kwargs: Any) -> dict[str, Any]:
        """Positions and mask of the kept rows, made once for all layers behind a cut."""
        if not self._inputs:
            rows = self._sequence
            assert rows is not None
            self._inputs["position_embeddings"] = tuple(t.index_select(1, rows) for t in kwargs["position_embeddings"])
            if kwargs.get("position_ids") is not None:
                self._inputs["position_ids"] = kwargs["position_ids"].index_select(-1, rows)
            if kwargs.get("attention_mask") is not None:
                self._inputs["attention_mask"] = kwargs["attention_mask"].index_select(-2, rows).index_select(-1, rows)
        return self._inputs

    def _step_inputs(self, kwargs: Any) -> dict[str, Any]:
        """A decode step's mask, if there is one, cut to the columns this layer's cache still has."""
        mask = kwargs.get("attention_mask")
        if mask is None or self._sequence is None:
            return {}
        new = torch.arange(self._length, mask.shape[-1], device=mask.device)
        return {"attention_mask": mask.index_select(-1, torch.cat((self._sequence, new)))}

    # -- masking instead of dropping -----------------------------------------------------------------------------------

    def _hide(self, visual: torch.Tensor, hidden: torch.Tensor) -> None:
        """Remember which prompt positions stay visible: ``(length,)`` bool."""
        assert self._visual is not None
        visible = torch.ones(hidden.shape[1], dtype=torch.bool, device=hidden.device)
        self._sequence = visible.index_fill(0, self._visual, False).index_fill(0, visual, True)

    def _mask(self, args: Any, kwargs: Any) -> Any:
        """Forbid every query to look at hidden positions; nothing gets shorter."""
        assert self._sequence is not None
        hidden = args[0] if args else kwargs["hidden_states"]
        with scopes.scope("pruner", "surgery"):
            columns = torch.arange(self._past + hidden.shape[1], device=hidden.device)
            rows = columns[self._past :, None]
            visible = torch.ones(len(columns), dtype=torch.bool, device=hidden.device)
            visible[: self._length] = self._sequence
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


def _additive(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask as numbers to add to scores."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min)


def _attention_of(layer: nn.Module) -> str:
    """The attention implementation a decoder layer runs."""
    return str(cast(Any, layer.self_attn).config._attn_implementation)
