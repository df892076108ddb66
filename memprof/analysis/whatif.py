"""What would lower a peak: each change to a run is carried out by the predictor on the same prompt, never estimated.

A counterfactual is a function from a :class:`Change` to the changes it can make of it; adding one is one entry in
:data:`COUNTERFACTUALS`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from memprof.analysis.predicting import predicting
from memprof.bench import Bench
from memprof.families import Model
from memprof.forecasts import Around, Ask, Setup
from memprof.gpus import find_card
from memprof.prompts import Prompt, Shape
from memprof.pruning import Pruner, build_pruner, kept_share, method_spec
from memprof.records import Memory, RunSpec


@dataclass(frozen=True)
class Change:
    """A run done otherwise.

    Attributes:
        spec: What the predictor is to run.
        pruner: Its method.
        shape: The prompt.
        model: What the spec runs, with the configuration of its weights.
        name: What is changed, in words.
        how: How to ask for it: an option of ``memprof run``, or where there is none, what it takes.
        around: Contexts entered on the model around ``generate()``.
        exact: Whether the model's answers stay what they were (up to rounding).
    """

    spec: RunSpec
    pruner: Pruner
    shape: Shape
    model: Model
    name: str = "as it is"
    how: str = ""
    around: tuple[Around, ...] = ()
    exact: bool = True

    @property
    def takes_a_share(self) -> bool:
        """Whether more or less can be kept: the method has a share, or prunes nothing yet."""
        return self.shape.visual_tokens > 1 and (
            kept_share(self.pruner) is not None or not self.pruner.stages(self.shape.visual_tokens, self.model.layers)
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
    """The vision tower over one tile, or a few, at a time; only projected features stay.

    Images of one view, as a grid of any size is, run one by one.
    """
    what = "tile" if any(image.tiles > 1 for image in now.shape.images) else "image"
    for tiles in (1, 4):
        if now.shape.tiles > tiles:
            yield now.but(
                f"vision tower {f'{tiles} {what}s' if tiles > 1 else f'one {what}'} at a time",
                "in code: call get_image_features on parts of pixel_values", around=_chunks(tiles),
            )  # fmt: skip


def eight_bit_cache(now: Change) -> Iterator[Change]:
    """The KV cache as int8 with one scale a head and token; a layer is widened while it runs."""
    yield now.but(
        "8-bit KV cache", "in code: a quantised cache", around=Around("8-bit cache", _quantised), exact=False
    )


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
    return Around(f"vision in parts of {tiles}", functools.partial(_chunked, tiles=tiles))


def _chunked(model: Any, tiles: int) -> AbstractContextManager[None]:
    from memprof.analysis.vision_chunks import chunked_vision

    return chunked_vision(model, tiles)


def _quantised(model: Any) -> AbstractContextManager[None]:
    from memprof.analysis.entered import quantised_cache

    return quantised_cache(model)


# -- running them ------------------------------------------------------------------------------------------------------


class Benches:
    """Predicts prompts under changes. Models without storage are kept, one for each kind of attention.

    Where a card was asked for, its memory limit is left out: a peak that was cut short would pass for a low one.
    """

    #: Tokens made first; more are made only if they could reach the peak.
    FEW = 2

    def __init__(self) -> None:
        self._benches: dict[Setup, Bench] = {}

    def memory(self, change: Change, *, every_token: bool = False) -> Memory:
        """What :func:`memprof.bench.generate.profile_prompt` says of ``change``, on the simulated device.

        Args:
            change: What to run.
            every_token: Make all of its tokens, also where they cannot reach the peak, and were never recorded.
        """
        tokens = change.spec.max_new_tokens
        every_token = every_token or self.knows(change, tokens)
        memory = self._run(change, tokens if every_token else min(self.FEW, tokens))
        return self._run(change, tokens) if may_rise(memory, tokens) else memory

    def knows(self, change: Change, tokens: int = FEW) -> bool:
        """Whether so many tokens of ``change`` were recorded before."""
        bench, ask = self._asked(change, min(tokens, change.spec.max_new_tokens))
        return bench.knows(ask)

    def _run(self, change: Change, tokens: int) -> Memory:
        bench, ask = self._asked(change, tokens)
        bench.foresee([ask])
        return bench.outcome(ask).memory

    def _asked(self, change: Change, tokens: int) -> tuple[Bench, Ask]:
        spec = predicting(change.spec, warmup=0, gpu=find_card(change.spec.gpu).any_memory)
        setup = Setup.of(spec, change.model)
        if setup not in self._benches:
            self._benches[setup] = Bench(setup)
        ask = Ask(change.pruner, spec.stack, Prompt(change.shape), tokens, spec.seed, change.around)
        return self._benches[setup], ask


def may_rise(memory: Memory, tokens: int) -> bool:
    """Whether later decode steps could pass the peak so far: each adds a row of cache, and holds one layer's twice."""
    columns = memory.fullest.tokens
    if len(columns) >= tokens:
        return False
    step = columns.kv_bytes[-1] - columns.kv_bytes[-2] if len(columns) > 1 else 0
    reach = columns.peak_allocated_bytes[-1] + 3 * step * (tokens - len(columns)) + 2**20
    return bool(reach >= max(columns.peak_allocated_bytes))
