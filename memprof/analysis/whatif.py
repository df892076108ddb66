"""What would lower a peak: each change to a run is carried out by the predictor on the same prompt, never estimated.

A counterfactual is a function from a :class:`Change` to the changes it can make of it; adding one is one entry in
:data:`COUNTERFACTUALS`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from memprof import scopes
from memprof.analysis.predicting import predicting
from memprof.anatomy import anatomy
from memprof.errors import UsageError
from memprof.families import PromptShape
from memprof.pruning import Pruner, build_pruner, kept_share, method_spec
from memprof.records import RunSpec
from memprof.runner import Bench, make_prompt, model_of, profile_prompt
from memprof.simulator.cards import find_card

#: Enters something on a model for the time of one ``generate()``.
Around = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class Change:
    """A run done otherwise.

    Attributes:
        spec: What the predictor is to run.
        pruner: Its method.
        shape: The prompt.
        name: What is changed, in words.
        how: How to ask for it: an option of ``memprof run``, or where there is none, what it takes.
        around: Contexts entered on the model around ``generate()``.
        exact: Whether the model's answers stay what they were (up to rounding).
    """

    spec: RunSpec
    pruner: Pruner
    shape: PromptShape
    name: str = "as it is"
    how: str = ""
    around: tuple[Around, ...] = ()
    exact: bool = True

    @property
    def takes_a_share(self) -> bool:
        """Whether more or less can be kept: the method has a share, or prunes nothing yet."""
        layers = int(model_of(self.spec)[1].text["num_hidden_layers"])
        return self.shape.visual_tokens > 1 and (
            kept_share(self.pruner) is not None or not self.pruner.stages(self.shape.visual_tokens, layers)
        )

    def but(self, name: str, how: str, *, around: Around | None = None, exact: bool = True, **fields: Any) -> Change:
        """This change with ``fields`` (of the change itself or of its spec) replaced."""
        own = {key: value for key, value in fields.items() if key in ("pruner", "shape")}
        spec = dataclasses.replace(self.spec, **{key: value for key, value in fields.items() if key not in own})
        wrapped = self.around if around is None else (*self.around, around)
        return dataclasses.replace(
            self, spec=spec, name=name, how=how, around=wrapped, exact=self.exact and exact, **own
        )


Counterfactual = Callable[[Change], Iterator[Change]]

# -- the counterfactuals -----------------------------------------------------------------------------------------------


def last_position_logits(now: Change) -> Iterator[Change]:
    """Logits of the position that is to be continued, not of all, and no fp32 copy of the others."""
    if now.spec.stack == "paper":
        yield now.but("logits of the last position only", "--stack current", stack="current")


def fused_attention(now: Change) -> Iterator[Change]:
    """SDPA, which makes no attention map; a method that reads one takes the single row it needs instead."""
    if not now.pruner.eager and now.spec.attention == "eager":
        yield now.but("SDPA instead of eager attention", "--attention sdpa", attention="sdpa")
    if now.pruner.eager and hasattr(now.pruner, "scores"):
        row = dataclasses.replace(now.pruner, scores="row")  # type: ignore[call-arg]
        yield now.but(
            "one row of scores and SDPA, no attention map", f"--method {method_spec(row)}", pruner=row, attention="sdpa"
        )


def vision_in_chunks(now: Change) -> Iterator[Change]:
    """The vision tower over one tile, or a few, at a time; only projected features stay."""
    for tiles in (1, 4):
        if now.shape.tiles > tiles:
            yield now.but(
                f"vision tower {f'{tiles} tiles' if tiles > 1 else 'one tile'} at a time",
                "in code: call get_image_features on parts of pixel_values", around=_chunks(tiles),
            )  # fmt: skip


def eight_bit_cache(now: Change) -> Iterator[Change]:
    """The KV cache as int8 with one scale a head and token; a layer is widened while it runs."""
    yield now.but("8-bit KV cache", "in code: a quantised cache", around=quantised_cache, exact=False)


def other_keep(now: Change) -> Iterator[Change]:
    """Another share of visual tokens kept. An unpruned run is pruned by ``uniform``, the plainest method."""
    for keep in (0.75, 0.5, 0.25, 0.1):
        if now.takes_a_share and keep != kept_share(now.pruner):
            pruner = _keeping(now.pruner, keep)
            yield now.but(
                f"keep {keep:g} (pruned {1 - keep:g})", f"--method {method_spec(pruner)}", pruner=pruner, exact=False
            )


#: Every counterfactual, in the order they are tried.
COUNTERFACTUALS: tuple[Counterfactual, ...] = (
    last_position_logits, fused_attention, vision_in_chunks, eight_bit_cache, other_keep,
)  # fmt: skip


def all_exact(now: Change) -> Change | None:
    """Every change that leaves the answers as they are, together; None if there are fewer than two."""
    change, names = now, []
    for counterfactual in COUNTERFACTUALS:
        made = next((c for c in counterfactual(change) if c.exact), None)
        if made is not None:
            change = made
            names.append(made.name)
    together = dataclasses.replace(change, name="all that change no answer", how="; ".join(names))
    return together if len(names) > 1 else None


def floor(now: Change) -> Change | None:
    """As few visual tokens as pruning can leave: what the method's share cannot go below."""
    if not now.takes_a_share:
        return None
    pruner = _keeping(now.pruner, 1 / now.shape.visual_tokens)
    return now.but("one visual token kept", f"--method {method_spec(pruner)}", pruner=pruner, exact=False)


def _keeping(pruner: Pruner, keep: float) -> Pruner:
    if kept_share(pruner) is None:
        return dataclasses.replace(build_pruner("uniform"), keep=keep)  # type: ignore[call-arg]
    return dataclasses.replace(pruner, keep=keep)  # type: ignore[call-arg]


# -- what has no option of its own: contexts, really carried out -------------------------------------------------------


def _chunks(tiles: int) -> Around:
    return functools.partial(chunked_vision, tiles=tiles)


@contextmanager
def chunked_vision(model: nn.Module, tiles: int) -> Iterator[None]:
    """Run the vision side over ``tiles`` images at a time; what is kept of each are its projected features.

    Raises:
        UsageError: The model has no ``get_image_features`` of transformers.
    """
    core: Any = getattr(model, "base_model", model)
    if not hasattr(core, "get_image_features"):
        raise UsageError(f"{type(model).__name__} has no get_image_features to call tile by tile")
    whole = core.get_image_features

    @functools.wraps(whole)
    def in_turn(pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        features: list[torch.Tensor] = []
        out: Any = None
        for piece in pixel_values.split(tiles):  # type: ignore[no-untyped-call]
            out = None  # let go of the images before
            out = whole(pixel_values=piece, **kwargs)
            features.extend(out.pooler_output)
            out.last_hidden_state = out.hidden_states = None
        with scopes.scope("vision", "chunked vision"):
            out.pooler_output = torch.stack(features) if torch.is_tensor(out.pooler_output) else features
        return out

    core.get_image_features = in_turn
    try:
        yield
    finally:
        del core.get_image_features


@contextmanager
def quantised_cache(model: nn.Module) -> Iterator[None]:
    """Keep each layer's KV as int8 with a scale for every head and token while no layer works on it.

    transformers' own quantised caches need further packages (quanto or HQQ), so hooks do it: before a layer runs, its
    keys and values are widened; when it is done they are rounded to int8 and the wide ones are let go.
    """

    def widen(layer: Any, args: Any, kwargs: Any) -> None:
        entry = _entry(layer, kwargs)
        if entry is not None and hasattr(entry, "scales"):
            with scopes.scope("kv_cache", "8-bit cache"):
                entry.keys, entry.values = (
                    narrow * scale for narrow, scale in zip((entry.keys, entry.values), entry.scales, strict=True)
                )

    def narrow(layer: Any, args: Any, kwargs: Any, out: Any) -> None:
        entry = _entry(layer, kwargs)
        if entry is not None:
            with scopes.scope("kv_cache", "8-bit cache"):
                entry.keys, key_scale = _to_int8(entry.keys)
                entry.values, value_scale = _to_int8(entry.values)
                entry.scales = (key_scale, value_scale)

    hooks = []
    for _, layer in anatomy(model).layers:
        hooks.append(layer.register_forward_pre_hook(widen, with_kwargs=True))
        hooks.append(layer.register_forward_hook(narrow, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _entry(layer: Any, kwargs: Any) -> Any:
    """A decoder layer's place in the cache, or None before it has one."""
    cache, number = kwargs.get("past_key_values"), layer.self_attn.layer_idx
    return cache.layers[number] if cache is not None and number < len(cache.layers) else None


def _to_int8(wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``wide`` rounded to int8, and the scale of each row of its last dimension."""
    scale = wide.abs().amax(-1, keepdim=True).clamp_min(1e-6) / 127
    return (wide / scale).round().to(torch.int8), scale


# -- running them ------------------------------------------------------------------------------------------------------


class Benches:
    """Predicts prompts under changes. Models without storage are kept, one for each kind of attention.

    Where a card was asked for, its memory limit is left out: a peak that was cut short would pass for a low one.
    """

    #: Tokens made first; more are made only if they could reach the peak.
    FEW = 2

    def __init__(self) -> None:
        self._benches: dict[tuple[str, ...], Bench] = {}

    def memory(self, change: Change, *, every_token: bool = False) -> dict[str, Any]:
        """What :func:`memprof.runner.profile_prompt` says of ``change``, on the simulated device.

        Args:
            change: What to run.
            every_token: Make all of its tokens, also where they cannot reach the peak.
        """
        spec = predicting(change.spec, warmup=0, gpu=find_card(change.spec.gpu).any_memory)
        few = spec.max_new_tokens if every_token else min(self.FEW, spec.max_new_tokens)
        memory = self._run(dataclasses.replace(spec, max_new_tokens=few), change)
        return self._run(spec, change) if _may_rise(memory, spec.max_new_tokens) else memory

    def _run(self, spec: RunSpec, change: Change) -> dict[str, Any]:
        key = (spec.model, spec.dtype, spec.weights, spec.attention)
        if key not in self._benches:
            self._benches[key] = Bench(spec)
        bench = self._benches[key]
        if not change.around:
            bench.foresee(spec, change.pruner, [change.shape])
            return bench.outcome(spec, change.pruner, change.shape, spec.seed).memory
        model, meter = bench.ready(spec)
        prompt = make_prompt(bench.family, bench.card, change.shape, seed=spec.seed)
        with ExitStack() as entered:
            for around in change.around:
                entered.enter_context(around(model))
            return profile_prompt(
                model, meter, change.pruner, spec.stack, prompt, new_tokens=spec.max_new_tokens, seed=spec.seed
            ).memory


def _may_rise(memory: dict[str, Any], tokens: int) -> bool:
    """Whether later decode steps could pass the peak so far: each adds a row of cache, and holds one layer's twice."""
    columns = memory["tokens"]
    if len(columns) >= tokens:
        return False
    step = columns.kv_bytes[-1] - columns.kv_bytes[-2] if len(columns) > 1 else 0
    reach = columns.peak_allocated_bytes[-1] + 3 * step * (tokens - len(columns)) + 2**20
    return bool(reach >= max(columns.peak_allocated_bytes))
