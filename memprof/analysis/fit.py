"""What fits on a card: the largest prompt, answer and share of visual tokens, and what would have to give."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memprof.analysis.bracket import next_value
from memprof.analysis.holders import leading_part, words_for
from memprof.analysis.predicting import predicting
from memprof.errors import BadValue, DoesNotFit
from memprof.families import PromptShape
from memprof.pruning import METHODS, kept_share, method_name, method_spec
from memprof.records import RunSpec
from memprof.runner import Bench, complete_spec
from memprof.simulator.cards import Card, calibrated
from memprof.units import format_bytes

#: Tokens of an AI2D question, rounded up (METHODS: 53 on average).
QUESTION_TOKENS = 53
#: Most tiles that are looked at; beyond, the vision tower's batch is nobody's picture.
MOST_TILES = 128
#: Most prompts side by side that are looked at.
MOST_BATCH = 256


@dataclass(frozen=True)
class Need:
    """What one prompt needs, in bytes.

    Attributes:
        allocated_bytes: Highest allocated.
        reserved_bytes: Highest reserved on a card without end: what fragmentation leaves unusable is in it, and what is
            cached, which the allocator gives back before it refuses. So a card somewhat smaller may do, more slowly;
            ``memprof run --gpu`` says whether.
        device_bytes: Reserved, and the CUDA context.
        held_by: Who holds most of the peak above the weights.
    """

    allocated_bytes: int
    reserved_bytes: int
    device_bytes: int
    held_by: str


@dataclass(frozen=True)
class Limit:
    """How far one thing can go with the others as asked.

    Attributes:
        name: ``tiles``, ``images``, ``new tokens``, ``keep`` or ``batch``.
        asked: What was asked.
        largest: The largest that fits, or None where not even the least does.
        device_bytes: What it needs at its largest.
        note: What bounds it other than the card, or how it was found.
    """

    name: str
    asked: float
    largest: float | None
    device_bytes: int | None
    note: str = ""


@dataclass(frozen=True)
class Fit:
    """The answer of :func:`fit`; sizes in bytes.

    Attributes:
        model, method, stack, dtype: What was asked about, the method in full.
        gpu: The card's name, or its size as it was asked for.
        gpu_bytes, context_bytes: Its memory, and what the CUDA context takes of it.
        static_bytes: Weights, and the workspaces that libraries keep on such a card.
        need: What the prompt as asked needs.
        fits: Whether it fits.
        limits: How far each thing can go.
        give: What would make it fit, where it does not.
    """

    model: str
    method: str
    stack: str
    dtype: str
    gpu: str
    gpu_bytes: int
    context_bytes: int
    static_bytes: int
    need: Need
    fits: bool
    limits: tuple[Limit, ...]
    give: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """This answer as plain data."""
        return dataclasses.asdict(self)


def fit(
    spec: RunSpec,
    card: Card,
    *,
    context_bytes: int | None = None,
    tiles: int | None = None,
    images: int = 1,
    question_tokens: int = QUESTION_TOKENS,
    bench: Bench | None = None,
) -> Fit:
    """What fits on ``card`` when ``spec``'s model runs under its method, stack and dtype; predicted.

    Args:
        spec: Its task, data, limit and card are not looked at; ``max_new_tokens`` is the answer's length.
        card: Its memory, and where it is one in particular its kernels and workspaces.
        context_bytes: What the CUDA context takes of it; None: as the card says (:attr:`Card.context_bytes`).
        tiles: Tiles of an image, thumbnail included; None: as many as the model cuts at most.
        images: Images of so many tiles.
        question_tokens: Text tokens beside the chat template.
        bench: Where the model is kept.

    Raises:
        DoesNotFit: The weights alone, or the least prompt, do not fit; says what would.
        UsageError: An unknown name, or a value outside its range.
    """
    card = calibrated(card)
    if card.memory_bytes is None:
        raise BadValue(f"card {card.name!r} has no limit that something could fit into; give a card's name or a size")
    gpu_bytes = card.memory_bytes
    context_bytes = card.context_bytes if context_bytes is None else context_bytes
    # Here is the limit, not in the allocator: what is too large is to be known as well.
    spec, _, _ = complete_spec(predicting(spec, data="bundled", limit=None, gpu=card.any_memory))
    bench = bench or Bench(spec)
    desk = _Desk(spec, bench, context_bytes, question_tokens)
    if tiles is None:
        tiles = bench.card.max_tiles + (bench.family.thumbnails and bench.card.max_tiles > 1)
    if tiles < 1 or images < 1 or question_tokens < 0:
        raise BadValue("tiles and images must be at least 1, and a question cannot have fewer than 0 tokens")
    if desk.static_bytes + context_bytes > gpu_bytes:
        raise DoesNotFit(_weights_alone(desk, gpu_bytes, context_bytes))
    total = tiles * images
    asked = desk.need(spec.method, total)
    limits = (
        *_tiles(desk, gpu_bytes, tiles, images),
        _new_tokens(desk, gpu_bytes, total),
        *_keep(desk, gpu_bytes, total),
        _batch(desk, gpu_bytes, total),
    )
    fits = asked.device_bytes <= gpu_bytes
    give = () if fits else _what_gives(desk, gpu_bytes, total, asked, limits)
    if not fits and all(limit.largest is None for limit in limits):
        least = desk.need(spec.method, 1)
        if least.device_bytes > gpu_bytes:
            raise DoesNotFit(
                f"not even one tile fits {format_bytes(gpu_bytes)}: it needs {format_bytes(least.device_bytes)}, "
                f"{format_bytes(context_bytes, 'MiB', 0)} of CUDA context among it; most of what lies above the "
                f"weights is held by {least.held_by}. What would help: {'; '.join(give)}"
            )
    return Fit(
        spec.model, spec.method, spec.stack, spec.dtype, card.name, gpu_bytes, context_bytes, desk.static_bytes, asked,
        fits, limits, give,
    )  # fmt: skip


class _Desk:
    """Needs of prompts that differ in tiles, method and length."""

    def __init__(self, spec: RunSpec, bench: Bench, context_bytes: int, question_tokens: int) -> None:
        self.spec, self.bench, self.context_bytes, self.question_tokens = spec, bench, context_bytes, question_tokens
        self.static_bytes = int(bench.ready(spec)[1].static_bytes)
        self.layers = int(bench.card.text["num_hidden_layers"])
        self.positions = int(bench.card.text.get("max_position_embeddings", 32768))

    def shape(self, tiles: int, batch: int = 1) -> PromptShape:
        """A prompt of so many tiles in all; bytes do not depend on how they lie."""
        before, after = self.bench.card.template
        visual = tiles * self.bench.family.side(self.bench.card) ** 2
        return PromptShape(tiles, tiles, 1, visual, before, after + self.question_tokens, batch)

    def most_tiles(self) -> int:
        """Tiles that the model has positions for."""
        each = self.bench.family.side(self.bench.card) ** 2
        text = self.shape(1).text_tokens + self.spec.max_new_tokens
        return max(1, min(MOST_TILES, (self.positions - text) // each))

    def foresee(self, method: str, shapes: list[PromptShape]) -> None:
        """Have programs made for all of these at once."""
        spec, pruner, _ = complete_spec(dataclasses.replace(self.spec, method=method))
        self.bench.foresee(spec, pruner, shapes)

    def memory(self, method: str, tiles: int, stack: str | None = None, batch: int = 1) -> dict[str, Any]:
        """The memory half of a record."""
        spec = dataclasses.replace(self.spec, method=method, stack=stack or self.spec.stack)
        spec, pruner, _ = complete_spec(spec)
        return self.bench.outcome(spec, pruner, self.shape(tiles, batch), spec.seed).memory

    def need(self, method: str, tiles: int, stack: str | None = None, batch: int = 1) -> Need:
        """What a prompt needs, or ``batch`` of them side by side."""
        memory = self.memory(method, tiles, stack, batch)
        reserved = max(memory["tokens"].reserved_bytes)
        return Need(
            max(memory["tokens"].peak_allocated_bytes), reserved, reserved + self.context_bytes,
            words_for(leading_part(memory["peak_parts"]), memory["peak_holders"]),
        )  # fmt: skip


def _tiles(desk: _Desk, gpu_bytes: int, tiles: int, images: int) -> tuple[Limit, ...]:
    """Tiles of one image, and images of so many tiles: the same bytes, as all tiles run as one batch."""
    method, most = desk.spec.method, desk.most_tiles()
    desk.foresee(method, [desk.shape(n) for n in sorted({*_powers(most), most})])
    seen: list[tuple[float, float]] = []
    while (value := next_value(seen, 1, most, step=1)) is not None:
        seen.append((value, desk.need(method, int(value)).device_bytes - gpu_bytes))
    total = max((int(value) for value, over in seen if over <= 0), default=None)
    bound = f"the model's {desk.positions:,} positions" if total == most < MOST_TILES else ""
    found = []
    if desk.bench.card.max_tiles > 1:
        each = total // images if total else None
        needs = desk.need(method, each * images).device_bytes if each else None
        found.append(Limit("tiles", tiles, each or None, needs, bound))
    many = total // tiles if total else None
    needs = desk.need(method, many * tiles).device_bytes if many else None
    found.append(Limit("images", images, many or None, needs, bound or f"of {tiles} tile{'s' * (tiles > 1)} each"))
    return tuple(found)


def _powers(most: int) -> list[int]:
    """1, 2, 4 and so on up to ``most``."""
    return [2**n for n in range(most.bit_length())]


def _batch(desk: _Desk, gpu_bytes: int, tiles: int) -> Limit:
    """Prompts as asked side by side; a method that prunes takes one at a time."""
    method = desk.spec.method
    if complete_spec(desk.spec)[1].stages(desk.shape(tiles).visual_tokens, desk.layers):
        fits = desk.need(method, tiles).device_bytes <= gpu_bytes
        return Limit("batch", 1, 1 if fits else None, None, "pruning cuts one prompt at a time")
    desk.foresee(method, [desk.shape(tiles, n) for n in _powers(MOST_BATCH)[1:]])
    seen: list[tuple[float, float]] = []
    while (value := next_value(seen, 1, MOST_BATCH, step=1)) is not None:
        seen.append((value, desk.need(method, tiles, batch=int(value)).device_bytes - gpu_bytes))
    largest = max((value for value, over in seen if over <= 0), default=None)
    note = f"no more than {MOST_BATCH} are looked at" if largest == MOST_BATCH else "prompts of equal length"
    return Limit("batch", 1, largest, None if largest is None else round(dict(seen)[largest] + gpu_bytes), note)


def _new_tokens(desk: _Desk, gpu_bytes: int, tiles: int) -> Limit:
    """New tokens: what one more adds to the cache, from the cache's growth over the tokens that were predicted."""
    spec, memory = desk.spec, desk.memory(desk.spec.method, tiles)
    asked = desk.need(spec.method, tiles)
    columns, made = memory["tokens"], spec.max_new_tokens
    shape = desk.shape(tiles)
    most = desk.positions - shape.length
    grown = memory["kv_bytes_per_layer"], memory["kv_tokens_found"]
    each = [nbytes / tokens for nbytes, tokens in zip(*grown, strict=True) if tokens]
    a_token = sum(each) + max(each, default=0) / 2  # while it grows, a layer's keys are there twice
    unused = asked.reserved_bytes - asked.allocated_bytes
    last = columns.peak_allocated_bytes[-1] + unused + desk.context_bytes
    if asked.device_bytes > gpu_bytes:
        return Limit("new tokens", made, None, None, "the prompt alone is too large")
    more = int((gpu_bytes - last) // a_token)
    largest = min(most, made + max(0, more))
    needs = max(asked.device_bytes, round(last + (largest - made) * a_token))
    note = f"the model's {desk.positions:,} positions" if largest == most else ""
    return Limit("new tokens", made, largest, needs, note or f"extrapolated from {made}")


def _keep(desk: _Desk, gpu_bytes: int, tiles: int) -> tuple[Limit, ...]:
    """The largest share of visual tokens, where the method has one."""
    _, pruner, _ = complete_spec(desk.spec)
    share = kept_share(pruner)
    if share is None:
        return ()
    field = next(f for f in dataclasses.fields(pruner) if f.name == "keep")
    low, high = field.metadata.get("search") or (0.02, 1.0)
    seen: list[tuple[float, float]] = []
    while (value := next_value(seen, low, high, step=0.0005)) is not None:
        seen.append((value, desk.need(_with_keep(pruner, value), tiles).device_bytes - gpu_bytes))
    fitting = [value for value, over in seen if over <= 0]
    if not fitting:
        return (Limit("keep", share, None, None),)
    needs = dict(seen)[max(fitting)] + gpu_bytes
    return (Limit("keep", share, max(fitting), round(needs)),)


def _with_keep(pruner: Any, keep: float) -> str:
    return method_spec(dataclasses.replace(pruner, keep=keep))


def _what_gives(desk: _Desk, gpu_bytes: int, tiles: int, asked: Need, limits: tuple[Limit, ...]) -> tuple[str, ...]:
    """What would make the prompt fit: less of one thing, another stack, another card."""
    give = [
        f"{limit.name} {limit.largest:g} instead of {limit.asked:g}"
        for limit in limits
        if limit.largest is not None and limit.largest < limit.asked
    ]
    if desk.spec.stack == "paper" and desk.need(desk.spec.method, tiles, "current").device_bytes <= gpu_bytes:
        give.append("stack current, which makes logits of the last position alone")
    if method_name(complete_spec(desk.spec)[1]) == "baseline" and "topv" in METHODS.names():
        pruned = _keep(_Desk(dataclasses.replace(desk.spec, method="topv"), desk.bench, desk.context_bytes,
                             desk.question_tokens), gpu_bytes, tiles)  # fmt: skip
        give += [f"pruning: topv with keep {one.largest:g}" for one in pruned if one.largest is not None]
    return (*give, f"a card of {format_bytes(asked.device_bytes, 'GiB', 1)}")


def _weights_alone(desk: _Desk, gpu_bytes: int, context_bytes: int) -> str:
    weights, room, bits = desk.static_bytes, gpu_bytes - context_bytes, 32 if desk.spec.dtype == "float32" else 16
    fewer = [(n, weights * n // bits) for n in (16, 8, 4) if n < bits and weights * n // bits < room]
    would = [f"{n}-bit weights (about {format_bytes(size, digits=1)})" for n, size in fewer]
    would += ["a smaller model", f"a card of {format_bytes(weights + context_bytes, digits=1)} and more"]
    return (
        f"the weights of {desk.spec.model} alone, {format_bytes(weights)} in {desk.spec.dtype}, do not fit: a card of "
        f"{format_bytes(gpu_bytes)} has {format_bytes(max(0, room))} beside its CUDA context "
        f"({format_bytes(context_bytes, 'MiB', 0)}), and no pruning lowers that; what would help: {', '.join(would)}"
    )


def as_text(answer: Fit, unit: str = "GiB") -> list[Mapping[str, str]]:
    """The limits as rows of text."""
    return [
        {
            "what": limit.name, "asked": f"{limit.asked:g}",
            "largest": "none" if limit.largest is None else f"{limit.largest:g}",
            "needs": format_bytes(limit.device_bytes, unit) if limit.device_bytes else "-", "note": limit.note,
        }
        for limit in answer.limits
    ]  # fmt: skip
