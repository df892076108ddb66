"""The only writer of model behaviour: carries out a pruner's choice by hooks, and leaves nothing behind.

Tokens are dropped, not hidden: hidden states, rotary positions and masks lose their rows, so every later layer
computes and caches only what stays. Layer caches become ragged. Tokens a pruner merged are put in as further rows.
Positions are the original ones, where decoding goes on from the full length without being told (``generate()`` counts
positions from the prompt it was given), or compact: each layer's rows are numbered from 0, and decoding goes on from
that layer's own number of tokens.

A pruner slices nothing. That is why a doubled or retained KV could exist in this file only.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from memprof import scopes
from memprof.anatomy import Anatomy, anatomy, attention_in, has_attention
from memprof.errors import UsageError
from memprof.host import on_host
from memprof.prompts import Places
from memprof.pruning import Choice, Pruner, Stage, method_spec, visual_tokens_per_layer
from memprof.pruning.attention import additive, kind_of, tables, window_of
from memprof.pruning.readable import WORKED_OUT, unreadable
from memprof.pruning.signals import Cut, Scene, Signal, entering, signal_kind
from memprof.pruning.view import View
from memprof.pruning.vision import projected

#: The method of a decoder that adds what the tower's middle layers saw behind its own early layers (Qwen3-VL).
_DEEPSTACK = "_deepstack_process"

#: Signals for which all keys of the prompt must be there, or a layer must look at all of them.
_OF_ALL_KEYS = frozenset({"ahead", "key_norms", "row", "text_key_norms", "text_rows"})

#: What is entered on each model now.
_ENTERED: WeakKeyDictionary[nn.Module, Surgery] = WeakKeyDictionary()


def entered_on(model: nn.Module) -> Surgery | None:
    """What prunes ``model`` now, or None."""
    return _ENTERED.get(model)


class Surgery:
    """Prunes one prompt's prefill while it is entered: ``with Surgery(model, pruner, layout): model.generate(...)``.

    Args:
        model: A transformers model whose decoder layers :func:`memprof.anatomy.anatomy` finds. Batch size 1.
        pruner: What to keep.
        layout: Where the visual tokens are.
        seed: Handed to pruners that draw.

    Raises:
        UsageError: The pruner reads attention maps and the language model does not run eager attention, or it looks at
            something else that the model does not have.
        BadValue: The pruner cuts at a layer the model does not have.
    """

    def __init__(self, model: nn.Module, pruner: Pruner, layout: Places, seed: int = 0) -> None:
        where, self._model = anatomy(model), model
        self.pruner, self.layout, self.seed = pruner, layout, seed
        self._scene = Scene(where, layout.index.tolist(), layout.length, pruner.vision_layer, loop=pruner.mask_only)
        self._layers = self._scene.layers
        self.stages: tuple[Stage, ...] = tuple(pruner.stages(len(layout.index), len(self._layers)))
        if self.stages:
            self._refuse_stateful()
        if self.stages and pruner.eager and _attention_of(self._layers[0]) != "eager":
            raise UsageError(
                f"{type(pruner).__name__} reads attention maps, which only eager attention makes; load the model with "
                "attn_implementation='eager' for its language model, or choose scores=row"
            )
        names = sorted(pruner.needs) if self.stages else []
        if not layout.by_view and any(signal_kind(name).of_tower for name in names):
            raise UsageError(
                f"{type(pruner).__name__} reads the vision tower, and this prompt's visual tokens are not its patches "
                "one by one: tiles are joined, padding is cut away, rows end in a token of their own; take a method "
                "that looks at the language model alone, such as topv, fastv or divprune"
            )
        self._refuse_unreadable(names, where)
        self._signals: dict[str, Signal] = {name: signal_kind(name)(self._scene) for name in names}
        self._rotary: Any = where.rotary if self.stages and pruner.positions == "compact" else None
        made = getattr(model, "create_masks_for_generate", None)
        #: Whether tokens of an image look at each other both ways (Gemma 3).
        self._both_ways = made is not None and "token_type_ids" in inspect.signature(made).parameters
        self._vision, self._decoder = where.vision, cast(Any, where.decoder)
        self._deep: Sequence[torch.Tensor] = ()  # what the decoder adds to the visual tokens behind its first layers
        self._reset()

    def _refuse_stateful(self) -> None:
        """Raise UsageError where a layer keeps a state and no keys: nothing can be taken out of a state."""
        stateful = next((layer for layer in self._layers if not has_attention(layer)), None)
        if stateful is not None:
            raise UsageError(
                f"pruning works where every decoder layer attends, and {type(stateful).__name__} of this model does not"
            )

    def _refuse_unreadable(self, names: list[str], where: Anatomy) -> None:
        """Raise UsageError where what a signal works out would not be the layer's own."""
        rotary = where.rotary if WORKED_OUT.intersection(names) else None
        for name in names:
            for stage in self.stages:
                layer = self._layers[stage.layer if name == "ahead" else max(stage.layer - 1, 0)]
                if reason := unreadable(name, layer, rotary):
                    raise UsageError(
                        f"{method_spec(self.pruner)} reads {name!r} of {type(layer).__name__}, which {reason}; take a "
                        f"method that does not look there{', or scores=map' if name == 'row' else ''}"
                    )

    # -- what was planned and done -------------------------------------------------------------------------------------

    @property
    def visual_tokens(self) -> list[int]:
        """Visual tokens each layer is to run in prefill, merged ones included; a mask alone spares it none."""
        if self.pruner.mask_only:
            return [len(self.layout.index)] * len(self._layers)
        return visual_tokens_per_layer(self.stages, len(self.layout.index), len(self._layers))

    @property
    def kv_tokens(self) -> list[int]:
        """KV length each layer is to have after prefill."""
        text = self.layout.length - len(self.layout.index)
        full = [text + visual for visual in self.visual_tokens]
        return [min(n, w - 1) if (w := window_of(layer)) else n for n, layer in zip(full, self._layers, strict=True)]

    def kept(self) -> list[list[int]] | None:
        """For each stage carried out, the prompt's own visual tokens that stay (numbered in prompt order).

        Merged tokens are none of them. None without real numbers.
        """
        if not all(type(order) is torch.Tensor for order in self._chosen):
            return None
        kept, alive = [], np.arange(len(self.layout.index))
        for order in self._chosen:
            chosen = order.cpu().numpy()
            alive = np.append(alive, -1)[np.where(chosen < len(alive), chosen, -1)]
            kept.append([int(i) for i in alive if i >= 0])
        return kept

    # -- in and out ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Surgery:
        if self._model in _ENTERED:
            raise UsageError("this model is pruned already: leave that window first, or name one method")
        _ENTERED[self._model] = self
        try:
            self._watch_all()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _watch_all(self) -> None:
        """Place every hook."""
        if not self.stages:
            return
        self._scene.pre(self._layers[0], self._begin)
        for signal in self._signals.values():
            signal.watch([stage.layer - 1 for stage in self.stages])
        for stage in self.stages:
            if stage.layer:
                self._watch(self._layers[stage.layer - 1], stage)
        for number in range(self.stages[0].layer, len(self._layers)):
            cuts = sum(stage.layer <= number for stage in self.stages)
            self._scene.pre(self._layers[number], partial(self._adjust, cuts))
        self._scene.post(self._layers[-1], lambda *_: self._release())
        if hasattr(self._decoder, _DEEPSTACK):
            self._scene.pre(self._decoder, self._deepens)
            setattr(self._decoder, _DEEPSTACK, self._deepened)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _ENTERED.pop(self._model, None)
        self._scene.leave()
        self._release()
        vars(self._decoder).pop(_DEEPSTACK, None)

    def _reset(self) -> None:
        """Forget the prompt before."""
        self._scene.prefill = False
        self._past = 0  # tokens layer 0 has cached before this forward
        self._forgetful = False  # whether layers that slide have begun to forget
        self._length = 0  # tokens of the prompt
        #: For each cut made, the visual tokens behind it as numbers of those before it; merged ones count from n on.
        self._chosen: list[torch.Tensor] = []
        self._alive: list[torch.Tensor] = []  # for each cut made, the original position of each token left by it
        self._own: torch.Tensor | None = None  # for each visual token left its number in the prompt; merged ones: -1
        self._visible: torch.Tensor | None = None  # masking only: which prompt positions may be looked at
        self._about: dict[str, torch.Tensor] = {}  # what was read of the prompt
        self._inputs: dict[Any, Any] = {}
        self._given: Any = None  # what the layer before a cut was given
        self._choice: Choice | None = None  # what was chosen inside that layer, until it ends

    def _release(self) -> None:
        """Let go of every tensor held for the time of a prefill."""
        for signal in self._signals.values():
            signal.end()
        self._about, self._inputs, self._own, self._deep = {}, {}, None, ()
        self._given = self._choice = None
        self._scene.prefill = False

    # -- prefill -------------------------------------------------------------------------------------------------------

    def _begin(self, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        """Before layer 0: tell prefill from decoding, and make a cut that comes before every layer."""
        hidden = entering(args, kwargs)
        cache = kwargs.get("past_key_values")
        if cache is None:
            raise UsageError(
                "pruning needs the KV cache, or nothing remembers what was cut: use_cache=True, and decoder layers "
                "that are given it as past_key_values"
            )
        if getattr(cache, "is_compileable", False):
            raise UsageError("pruning needs a cache that grows: this one has its full size from the start (static)")
        past = cache.get_seq_length()
        self._mind_windows(cache, past, past + hidden.shape[1])
        if past:
            if hidden.shape[1] > 1 and self.stages[0].layer == 0 and not self.pruner.mask_only:
                # generate() hands on as many ids of the prompt as the first layer has forgotten, as if they were new.
                raise UsageError(
                    f"{method_spec(self.pruner)} cuts before every layer, and a cache cut there cannot be gone on "
                    "with; give the whole prompt, without past_key_values, or cut behind a layer, as topv does"
                )
            self._scene.prefill, self._past, self._inputs = False, past, {}
            return None
        self._reset()
        self._scene.prefill = True
        self._length = hidden.shape[1]
        if hidden.shape[0] != 1:
            raise UsageError(f"pruning works on one prompt at a time, and this batch has {hidden.shape[0]}")
        if self._length != self.layout.length:
            raise UsageError(f"the prompt has {self._length} tokens and its layout was made for {self.layout.length}")
        with scopes.scope("pruner", "surgery"):
            self._scene.visual = _placed(self.layout.index, hidden)
            if self.layout.positions is not None:
                self._about["positions"] = _placed(self.layout.positions, hidden)
            self._about["images"] = _placed(self.layout.images, hidden)
            for name, signal in self._signals.items():
                if signal.of_prompt:
                    self._about[name] = signal.read(Cut(0, hidden, kwargs))
                    signal.forget()
        if self.stages[0].layer == 0:
            cut = self._cut(layer, hidden, self.stages[0], kwargs)
            return ((cut, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": cut})
        return None

    def _mind_windows(self, cache: Any, past: int, tokens: int) -> None:
        """Note whether layers that slide have begun to forget; raise UsageError for what cannot be kept apart then."""
        sliding = [one for one in getattr(cache, "layers", ()) if getattr(one, "is_sliding", False)]
        window = min((one.sliding_window for one in sliding), default=tokens + 1)
        self._forgetful = tokens >= window
        if not self._forgetful:
            return
        if any(one.sliding_window not in map(window_of, self._layers) for one in sliding):
            raise UsageError(f"pruning cannot tell what layers forget beyond {window} tokens, and {tokens} are reached")
        reads = sorted(_OF_ALL_KEYS.intersection(self._signals)) if not past else []
        if reads or self.pruner.mask_only or self.pruner.positions == "compact":
            does = f"reads {reads[0]!r}" if reads else "hides tokens" if self.pruner.mask_only else "renumbers tokens"
            raise UsageError(
                f"{method_spec(self.pruner)} {does}, which works until a sliding window is full: it has {window} "
                f"tokens, and {tokens} are reached; shorten the prompt or the answer, or take another method, such as "
                "topv or random:positions=original"
            )

    def _watch(self, layer: nn.Module, stage: Stage) -> None:
        """Choose in the layer before a cut, or behind it, and cut its output."""
        if "target" in self._signals and not any(signal.of_output for signal in self._signals.values()):
            # Chosen at the end of the MLP, which still holds the target and has given back all else: held on to until
            # the layer's end, the target would move what is allocated there, and with it a peak to come.
            self._scene.pre(layer, self._entered)
            self._scene.post(cast(nn.Module, layer.mlp), partial(self._fed, stage, layer))
        self._scene.post(layer, partial(self._leaving, stage), first=True)

    def _entered(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        self._given = kwargs

    def _fed(self, stage: Stage, layer: nn.Module, _: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if self._scene.prefill:
            self._choice = self._choose(layer, out[0] if isinstance(out, tuple) else out, stage, self._given)
        self._given = None

    def _leaving(self, stage: Stage, layer: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        """Cut what the layer before a cut makes."""
        if not self._scene.prefill:
            return None
        hidden = out[0] if isinstance(out, tuple) else out
        cut = self._cut(layer, hidden, stage, kwargs)
        return (cut, *out[1:]) if isinstance(out, tuple) else cut

    def _choose(self, layer: nn.Module, hidden: torch.Tensor, stage: Stage, kwargs: Any) -> Choice:
        """What the pruner wants; what it was shown is let go of.

        ``layer`` is the one before the cut, or layer 0, and ``kwargs`` what it is given.
        """
        with scopes.scope("pruner", "surgery"):
            room = _widest(layer) * 2 * hidden.element_size() if stage.layer else 0
            view = self._view(Cut(stage.layer, hidden, kwargs, self._added(stage.layer, hidden)), stage.merged, room)
            choice = self.pruner.select(view, stage.kept)
            choice = choice if isinstance(choice, Choice) else Choice(choice)
            choice = dataclasses.replace(choice, kept=choice.kept.sort().values)
        for signal in self._signals.values():
            signal.forget()
        return choice

    def _cut(self, layer: nn.Module, hidden: torch.Tensor, stage: Stage, kwargs: Any) -> torch.Tensor:
        """Keep only what the pruner chose of ``hidden`` and of what later layers are given."""
        choice, self._choice = self._choice, None
        choice = choice or self._choose(layer, hidden, stage, kwargs)
        kept = choice.kept
        with scopes.scope("pruner", "surgery"):
            if self.pruner.mask_only:
                self._chosen.append(kept)
                self._hide(kept, hidden)
                return hidden
            assert self._scene.visual is not None
            visual = self._scene.visual.index_select(0, kept)
            rows = self._rows_kept(visual, hidden.shape[1])
            self._inputs = {}
            if choice.merged is None:
                return self._drop(hidden, kept, visual, rows)
            assert choice.at is not None
            return self._drop_and_merge(hidden, kept, visual, rows, choice.merged, choice.at)

    def _view(self, cut: Cut, merged: int, room: int) -> View:
        """What the pruner is shown."""
        assert self._scene.visual is not None
        seen = {name: signal.read(cut) for name, signal in self._signals.items() if not signal.of_prompt}
        count, device = self._scene.visual.shape[0], cut.hidden.device
        return View(count, device, self.seed, merged, room, {**self._about, **seen}, partial(projected, self._vision))

    def _rows_kept(self, visual: torch.Tensor, length: int) -> torch.Tensor:
        """Rows of the present sequence that stay: all text, and ``visual``; rising."""
        assert self._scene.visual is not None
        # A row is text unless it is one of the visual ones. Counted this way the result's size follows from shapes
        # alone.
        order = torch.zeros(length, dtype=torch.int8, device=visual.device)
        order.index_fill_(0, self._scene.visual, 1)
        order.index_fill_(0, visual, 0)
        gone = self._scene.visual.shape[0] - visual.shape[0]
        return order.argsort(stable=True)[: length - gone].sort().values

    def _drop(self, hidden: torch.Tensor, kept: torch.Tensor, visual: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """``hidden`` without what was not kept."""
        self._chosen.append(kept)
        self._alive.append(self._alive[-1].index_select(0, rows) if self._alive else rows)
        self._scene.visual = torch.searchsorted(rows, visual)
        self._about = self._of_tokens(kept)
        self._own = self._own_left(kept)
        return hidden.index_select(1, rows)

    def _drop_and_merge(
        self,
        hidden: torch.Tensor,
        kept: torch.Tensor,
        visual: torch.Tensor,
        rows: torch.Tensor,
        merged: torch.Tensor,
        at: torch.Tensor,
    ) -> torch.Tensor:
        """The same with ``merged`` put in, each behind the token ``at`` says."""
        assert self._scene.visual is not None
        count, added = self._scene.visual.shape[0], merged.shape[0]
        behind = at.clamp(min=0)
        # Twice the number, so that there is a place behind each token, and one before the first.
        among = torch.cat((2 * kept, 2 * at + 1)).argsort(stable=True)
        new = torch.arange(count, count + added, device=kept.device)
        self._chosen.append(torch.cat((kept, new)).index_select(0, among))
        self._about = self._of_tokens(torch.cat((kept, behind)).index_select(0, among))
        self._own = self._own_left(self._chosen[-1], added)
        places = self._scene.visual.index_select(0, behind)
        order = torch.cat((2 * rows, torch.where(at < 0, 2 * places - 1, 2 * places + 1))).argsort(stable=True)
        sources = torch.cat((rows, places)).index_select(0, order)
        self._alive.append(self._alive[-1].index_select(0, sources) if self._alive else sources)
        seen = torch.zeros(rows.shape[0] + added, dtype=torch.int8, device=kept.device)
        seen.index_fill_(0, torch.searchsorted(rows, visual), 1)
        seen[rows.shape[0] :] = 1
        # Sorted, the text comes first.
        by_kind = seen.index_select(0, order).argsort(stable=True)
        self._scene.visual = by_kind[rows.shape[0] - kept.shape[0] :].sort().values
        return torch.cat((hidden.index_select(1, rows), merged[None].to(hidden.dtype)), 1).index_select(1, order)

    def _of_tokens(self, order: torch.Tensor) -> dict[str, torch.Tensor]:
        """What was read of the prompt, of the visual tokens ``order`` alone."""
        return {
            name: about.index_select(0, order) if signal_kind(name).leads[:1] == ("visual",) else about
            for name, about in self._about.items()
        }

    def _own_left(self, order: torch.Tensor, merged: int = 0) -> torch.Tensor | None:
        """:attr:`_own` of the visual tokens ``order``, where a model asks for it."""
        if not hasattr(self._decoder, _DEEPSTACK):
            return None
        own = torch.arange(len(self.layout.index), device=order.device) if self._own is None else self._own
        return torch.cat((own, own.new_full((merged,), -1))).index_select(0, order)

    def _deepened(self, hidden: torch.Tensor, mask: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        """DeepStack: what the vision tower adds to the visual tokens behind a layer, to those that are left.

        In place of the decoder's own method, which goes by the prompt's mask: no hook comes between the two. Merged
        tokens get nothing, as nobody saw them.
        """
        if self._own is None:
            return cast(torch.Tensor, getattr(type(self._decoder), _DEEPSTACK)(self._decoder, hidden, mask, added))
        assert self._scene.visual is not None
        with scopes.scope("pruner", "surgery"):
            return hidden.index_add(1, self._scene.visual, self._of_own(added, hidden)[None])

    def _deepens(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        self._deep = kwargs.get("deepstack_visual_embeds") or ()

    def _added(self, number: int, hidden: torch.Tensor) -> torch.Tensor | None:
        """What DeepStack will add to the visual tokens between the layer before cut ``number`` and the one behind."""
        return self._of_own(self._deep[number - 1], hidden) if 0 < number <= len(self._deep) else None

    def _of_own(self, added: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The rows of ``added``, one for each token of the prompt's, of those that are left; zeros for merged ones."""
        rows = added.to(hidden.dtype)
        if self._own is None:
            return rows
        rows = rows.index_select(0, self._own.clamp(min=0))
        return rows.masked_fill_((self._own < 0)[:, None], 0.0)

    # -- what layers behind a cut are given ----------------------------------------------------------------------------

    def _adjust(self, cuts: int, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        """Give a layer behind ``cuts`` cuts the positions and mask of the tokens that are left."""
        if self.pruner.mask_only:
            return self._mask(args, kwargs) if self._visible is not None else None
        compact = self.pruner.positions == "compact"
        told = compact or kwargs.get("attention_mask") is not None or self._forgets(layer)
        if len(self._alive) < cuts or not (self._scene.prefill or told):
            return None  # a decode step without a mask is as it should be
        with scopes.scope("pruner", "surgery"):
            if self._scene.prefill:
                given = self._prefill_inputs(layer, kwargs, self._alive[cuts - 1], entering(args, kwargs))
            else:
                given = self._step_inputs(layer, kwargs, cuts, entering(args, kwargs))
            return args, {**kwargs, **given}

    def _prefill_inputs(
        self, layer: nn.Module, kwargs: Any, alive: torch.Tensor, hidden: torch.Tensor
    ) -> dict[str, Any]:
        """Positions and mask of the rows left, made once for all layers of a kind behind a cut."""
        inputs: dict[str, Any] = self._inputs.setdefault(_kind(layer), {})
        if not inputs:
            compact, left = self.pruner.positions == "compact", alive.shape[0]
            for name, axis in (("position_embeddings", 1), ("position_ids", -1)):
                whole = kwargs.get(name)
                if whole is None:
                    continue
                parts = whole if isinstance(whole, tuple) else (whole,)
                cut = tuple(t.narrow(axis, 0, left) if compact else t.index_select(axis, alive) for t in parts)
                inputs[name] = cut if isinstance(whole, tuple) else cut[0]
            if compact and self._axes > 1:  # the prompt's own first rows are not numbered from 0 one by one
                ids = torch.arange(left, device=alive.device)[None]
                inputs["position_embeddings"] = self._tables(layer, hidden, ids)
            if kwargs.get("attention_mask") is not None:
                mask = kwargs["attention_mask"].index_select(-2, alive).index_select(-1, alive)
                inputs["attention_mask"] = self._causal(mask, alive)
        return inputs

    def _causal(self, mask: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
        """``mask`` ``(1, 1, n, n)``, where merged tokens that share a position do not see those behind them."""
        if not any(stage.merged for stage in self.stages):
            return mask
        later = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).triu_(1)
        if self._both_ways:
            later = later.logical_and_(alive[:, None] == alive)
        return mask.masked_fill(later, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)

    def _step_inputs(self, layer: nn.Module, kwargs: Any, cuts: int, hidden: torch.Tensor) -> dict[str, Any]:
        """A decode step's mask cut to the columns this layer's cache still has, and its compact positions."""
        key = cuts, _kind(layer)
        if key not in self._inputs:
            forgets, positions = self._forgets(layer), self._step_positions(layer, kwargs, cuts, hidden)
            mask = self._in_window(layer, cuts, hidden) if forgets else self._step_mask(layer, kwargs, cuts)
            self._inputs[key] = {**mask, **positions}
        return cast("dict[str, Any]", self._inputs[key])

    def _step_mask(self, layer: nn.Module, kwargs: Any, cuts: int) -> dict[str, Any]:
        mask, alive = kwargs.get("attention_mask"), self._alive[cuts - 1]
        if mask is None:
            return {}
        prompt, first = self._length, next(n for n, one in enumerate(self._layers) if _kind(one) == _kind(layer))
        before = sum(stage.layer <= first for stage in self.stages)
        if before:
            # The mask was made for the cache of the first layer of this kind, which never had the columns of these.
            alive, prompt = torch.searchsorted(self._alive[before - 1], alive), self._alive[before - 1].shape[0]
        new = torch.arange(prompt, mask.shape[-1], device=mask.device)
        return {"attention_mask": mask.index_select(-1, torch.cat((alive, new)))}

    def _forgets(self, layer: nn.Module) -> bool:
        """Whether a layer slides, and its window is full."""
        return self._forgetful and window_of(layer) is not None

    def _in_window(self, layer: nn.Module, cuts: int, hidden: torch.Tensor) -> dict[str, Any]:
        """A decode step's mask for a layer that forgets: it keeps so many rows, and those may lie outside its window.

        Where tokens were cut, the rows that it has left reach further back than the window, which goes by positions.
        """
        window, new = window_of(layer), hidden.shape[1]
        assert window is not None
        later = torch.arange(self._length, self._past + new, device=hidden.device)
        positions = torch.cat((self._alive[cuts - 1], later))
        rows, columns = positions[-new:, None], positions[-(window - 1 + new) :]
        allowed = ((columns <= rows) & (columns > rows - window))[None, None]
        eager = _attention_of(layer) == "eager"
        return {"attention_mask": additive(allowed, hidden.dtype) if eager else allowed}

    def _step_positions(self, layer: nn.Module, kwargs: Any, cuts: int, hidden: torch.Tensor) -> dict[str, Any]:
        if self.pruner.positions != "compact":
            return {}
        ids = kwargs.get("position_ids")
        if ids is None:
            raise UsageError("positions=compact needs decoder layers that are given position_ids; take original")
        ids = ids - (self._length - self._alive[cuts - 1].shape[0])
        return {"position_ids": ids, "position_embeddings": self._tables(layer, hidden, ids)}

    @property
    def _axes(self) -> int:
        """Along how many axes a token has a position: time, height, width where rotary tables are made of sections."""
        return 3 if hasattr(self._rotary, "mrope_section") else 1

    def _tables(self, layer: nn.Module, hidden: torch.Tensor, ids: torch.Tensor) -> Any:
        """Rotary tables of the positions ``ids``, ``(1, n)``, which are the same along every axis, as a text's are."""
        ids = ids.expand(self._axes, *ids.shape) if self._axes > 1 else ids
        return tables(self._rotary, layer, hidden, ids)

    # -- masking instead of dropping -----------------------------------------------------------------------------------

    def _hide(self, kept: torch.Tensor, hidden: torch.Tensor) -> None:
        """Remember which prompt positions stay visible: ``(length,)`` bool."""
        assert self._scene.visual is not None
        visible = torch.ones(hidden.shape[1], dtype=torch.bool, device=hidden.device)
        visible = visible.index_fill(0, self._scene.visual, False)
        self._visible = visible.index_fill(0, self._scene.visual.index_select(0, kept), True)

    def _mask(self, args: Any, kwargs: Any) -> Any:
        """Forbid every query to look at hidden positions; nothing gets shorter."""
        assert self._visible is not None
        hidden = args[0] if args else kwargs["hidden_states"]
        with scopes.scope("pruner", "surgery"):
            columns = torch.arange(self._past + hidden.shape[1], device=hidden.device)
            rows = columns[self._past :, None]
            visible = torch.ones(len(columns), dtype=torch.bool, device=hidden.device)
            visible[: self._length] = self._visible
            mask = kwargs.get("attention_mask")
            told = self._both_ways and mask is not None  # who looks at whom, which is not only back
            allowed = (visible.expand(rows.shape[0], -1) if told else (columns <= rows) & visible)[None, None]
            if mask is None:
                mask = allowed if _attention_of(self._layers[0]) != "eager" else additive(allowed, hidden.dtype)
            else:
                mask = (
                    mask & allowed
                    if mask.dtype == torch.bool
                    else mask.masked_fill(~allowed, torch.finfo(mask.dtype).min)
                )
            return args, {**kwargs, "attention_mask": mask}


def _kind(layer: nn.Module) -> tuple[str | None, int | None]:
    """What layers have in common that are given the same positions and mask."""
    return kind_of(layer), window_of(layer)


def _placed(values: npt.NDArray[Any], like: torch.Tensor) -> torch.Tensor:
    """``values`` where ``like`` is, without storage if ``like`` has none."""
    host = on_host(values)
    return like.new_empty(host.shape, dtype=host.dtype).copy_(host)


def _widest(layer: nn.Module) -> int:
    """Numbers a token of the widest activation of ``layer``; an MLP holds two such at once, gated or not."""
    return max((part.out_features for part in layer.modules() if isinstance(part, nn.Linear)), default=0)


def _attention_of(layer: nn.Module) -> str:
    """The attention implementation a decoder layer runs."""
    return str(getattr(getattr(attention_in(layer), "config", None), "_attn_implementation", None))
