"""What fits on a card: the largest prompt, answer and share of visual tokens, and what would have to give."""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from memprof.analysis.predicting import predicting
from memprof.bench import Bench
from memprof.bracket import next_value
from memprof.errors import BadValue, DataError, DoesNotFit
from memprof.families import Model
from memprof.forecasts.windows import cached_by_first, windows_of
from memprof.gpus import Card, calibrated, find_card
from memprof.limits import MOST_IN_ALL, check
from memprof.models.heeding import check_heeded
from memprof.prompts import Shape
from memprof.pruning import METHODS, kept_share, method_name, method_spec
from memprof.records import Memory, Run, RunSpec, SampleRecord
from memprof.runner import Complete, complete_spec
from memprof.telling.holders import leading_part, words_for
from memprof.units import format_bytes

#: Tokens of an AI2D question, rounded up (METHODS: 53 on average).
QUESTION_TOKENS = 53
#: Most tiles that are looked at; beyond, the vision tower's batch is nobody's picture.
MOST_TILES = 128


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
        refusal: Why nothing fits at all, in one line: the weights alone do not, or not the least prompt. Then there are
            no limits.
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
    refusal: str = ""

    def to_json(self) -> dict[str, Any]:
        """This answer as plain data."""
        return dataclasses.asdict(self)


def fit(spec: RunSpec, card: Card, **how: Any) -> Fit:
    """As :func:`answer`, where something fits.

    Raises:
        DoesNotFit: The weights alone, or the least prompt, do not fit; says what would.
        UsageError: An unknown name, or a value outside its range.
    """
    found = answer(spec, card, **how)
    if found.refusal:
        raise DoesNotFit(found.refusal)
    return found


def answer(
    spec: RunSpec,
    card: Card,
    *,
    context_bytes: int | None = None,
    tiles: int | None = None,
    images: int = 1,
    question_tokens: int = QUESTION_TOKENS,
    bench: Bench | None = None,
) -> Fit:
    """What fits on ``card`` when ``spec``'s model runs under its method, stack and dtype, if anything; predicted.

    Args:
        spec: Its task, data, limit and card are not looked at; ``max_new_tokens`` is the answer's length.
        card: Its memory, and where it is one in particular its kernels and workspaces.
        context_bytes: What the CUDA context takes of it; None: as the card says (:attr:`Card.context_bytes`).
        tiles: Tiles of an image, thumbnail included; None: as many as the model cuts at most.
        images: Images of so many tiles.
        question_tokens: Text tokens beside the chat template.
        bench: Where the model is kept.

    Raises:
        UsageError: An unknown name, or a value outside its range.
    """
    card = calibrated(card)
    if card.memory_bytes is None:
        raise BadValue(f"card {card.name!r} has no limit that something could fit into; give a card's name or a size")
    for name, number in (("tiles", tiles), ("images", images), ("text_tokens", question_tokens)):
        check(name, number)
    gpu_bytes = card.memory_bytes
    context_bytes = card.context_bytes if context_bytes is None else context_bytes
    # Here is the limit, not in the allocator: what is too large is to be known as well.
    spec, _, _, setup = complete_spec(predicting(spec, data="bundled", limit=None, gpu=card.any_memory))
    check_heeded(setup.model, images=images if images > 1 else None, tiles=tiles)
    bench = bench.set_up(setup) if bench is not None else Bench(setup)
    desk = _Desk(spec, bench, context_bytes, question_tokens)
    told = partial(
        Fit, spec.model, spec.method, spec.stack, spec.dtype, card.name, gpu_bytes, context_bytes, desk.static_bytes
    )
    if tiles is None:
        tiles = setup.model.family.most_tiles(setup.model)
    _check_shown(setup.model, tiles, images)
    if desk.static_bytes + context_bytes > gpu_bytes:
        said, static = _weights_alone(desk, gpu_bytes, context_bytes), desk.static_bytes
        return told(Need(static, static, static + context_bytes, "the weights"), False, (), (), said)
    shown = Shown(tiles, images)
    desk.foresee(spec.method, shown)
    asked = desk.need(spec.method, shown)
    limits = (
        *_tiles(desk, gpu_bytes, shown),
        *_images(desk, gpu_bytes, shown),
        _new_tokens(desk, gpu_bytes, shown),
        *_keep(desk, gpu_bytes, shown),
        _batch(desk, gpu_bytes, shown),
    )
    fits = asked.device_bytes <= gpu_bytes
    give = () if fits else _what_gives(desk, gpu_bytes, shown, asked, limits)
    if not fits and all(limit.largest is None for limit in limits):
        least = desk.need(spec.method, Shown(1))
        if least.device_bytes > gpu_bytes:
            said = (
                f"not even one tile fits {format_bytes(gpu_bytes)}: it needs {format_bytes(least.device_bytes)}, "
                f"{format_bytes(context_bytes, 'MiB', 0)} of CUDA context among it; most of what lies above the "
                f"weights is held by {least.held_by}. What would help: {'; '.join(give)}"
            )
            return told(asked, False, (), give, said)
    return told(asked, fits, limits, give)


def need_of(run: Run, sample: SampleRecord) -> Need:
    """What a recorded sample needs on a card without end, predicted: where a card refused it, say."""
    if sample.shape is None:
        raise DataError(f"sample {sample.id} was recorded without the sizes of its prompt")
    card = calibrated(find_card(run.record.spec.gpu))
    done = complete_spec(predicting(run.record.spec, gpu=card.any_memory))
    bench, ask = Bench(done.setup), done.ask(sample.shape)
    bench.foresee([ask])
    return _need(bench.outcome(ask).memory, card.context_bytes)


def _need(memory: Memory, context_bytes: int) -> Need:
    card = memory.fullest
    reserved = card.peak_reserved_bytes
    held = words_for(leading_part(card.peak_parts), card.peak_holders)
    return Need(card.peak_allocated_bytes, reserved, reserved + context_bytes, held)


def searched_tiles(model: Model) -> int:
    """Most tiles of a prompt that are looked at, of all its images."""
    return min(MOST_TILES, model.family.searched_images * model.family.most_tiles(model))


def _check_shown(model: Model, tiles: int, images: int) -> None:
    """Raise BadValue where so much is asked for that looking at it, and at what is beside it, would not end."""
    batched = model.family.one_batch(model)
    asked, most = (tiles * images, 8 * MOST_TILES) if batched else (images, 4 * model.family.searched_images)
    if model.family.sees and asked > most:
        what = "tiles of all images" if batched else "images"
        raise BadValue(f"{asked} {what} are more than the {most} that fit looks at for {model.name}")


@dataclass(frozen=True)
class Shown:
    """What a prompt shows: images of so many tiles each; and how many such prompts stand side by side."""

    tiles: int
    images: int = 1
    batch: int = 1


class _Desk:
    """Needs of prompts that differ in tiles, method and length."""

    def __init__(self, spec: RunSpec, bench: Bench, context_bytes: int, question_tokens: int) -> None:
        self.spec, self.bench, self.context_bytes, self.question_tokens = spec, bench, context_bytes, question_tokens
        done = complete_spec(spec)
        self.static_bytes = bench.standing(done.pruner, spec.stack).static_bytes
        self.model = bench.model

    def shape(self, shown: Shown) -> Shape:
        """The prompt; bytes do not depend on how the tiles of an image lie."""
        images = self.model.family.of_tiles(self.model, shown.tiles, shown.images)
        return self.model.family.shape_of(self.model, images, self.question_tokens, shown.batch)

    def most(self, field: str, shown: Shown, most: int) -> tuple[int, str]:
        """How many tiles or images, by ``field``, the model has positions for, up to ``most``; and what bounds them."""
        left = self.model.positions - self.spec.max_new_tokens
        room = bisect_right(range(1, most + 1), left, key=lambda n: self.shape(replace(shown, **{field: n})).length)
        return (room, f"the model's {self.model.positions:,} positions") if room < most else (most, _looked_at(most))

    def asked(self, method: str, stack: str | None = None) -> Complete:
        """The spec of a method and a stack, with the bench made ready for it."""
        done = complete_spec(dataclasses.replace(self.spec, method=method, stack=stack or self.spec.stack))
        self.bench.set_up(done.setup)
        return done

    def foresee(self, method: str, shown: Shown) -> None:
        """Have a program made for what may be asked, at once, where one answers for any number of tiles."""
        if self.model.family.sees and self.model.family.one_batch(self.model):
            most = max(1, self.most("tiles", Shown(1), searched_tiles(self.model))[0])
            numbers = sorted({*(2**n for n in range(most.bit_length())), most, shown.tiles * shown.images})
            self.bench.foresee(map(self.asked(method).ask, [self.shape(Shown(n)) for n in numbers]))

    def memory(self, method: str, shown: Shown, stack: str | None = None) -> Memory:
        """The memory half of a record."""
        return self.bench.outcome(self.asked(method, stack).ask(self.shape(shown))).memory

    def need(self, method: str, shown: Shown, stack: str | None = None) -> Need:
        """What the prompt needs, or as many of them side by side."""
        return _need(self.memory(method, shown, stack), self.context_bytes)

    def largest(self, field: str, shown: Shown, gpu_bytes: int, most: int) -> tuple[int | None, int | None]:
        """The largest number of what ``field`` names that fits, up to ``most``, and its need; None where none does.

        One is looked at first, and nothing far beyond what fits: what is larger takes longer to predict.
        """
        if most < 1:
            return None, None
        over = dict[float, float]()
        n = 1
        while n <= most:
            over[n] = self.need(self.spec.method, replace(shown, **{field: n})).device_bytes - gpu_bytes
            if over[n] > 0 or n == most:
                break
            n = min(most, _further(over))
        while (value := next_value([*over.items()], 1, n, step=1)) is not None:
            over[value] = self.need(self.spec.method, replace(shown, **{field: int(value)})).device_bytes - gpu_bytes
        fitting = max((value for value, excess in over.items() if excess <= 0), default=None)
        return (None, None) if fitting is None else (int(fitting), round(over[fitting] + gpu_bytes))


def _further(over: Mapping[float, float]) -> int:
    """The next number to look at when all so far fit: where a line through the last two meets the card's memory."""
    *before, n = over
    if not before:
        return 2
    slope = (over[n] - over[before[-1]]) / (n - before[-1])
    reach = n - over[n] / slope if slope > 0 else math.inf
    return int(min(max(reach, n + 1), 32 * n))


def _looked_at(most: int) -> str:
    return f"no more than {most} are looked at"


def _tiles(desk: _Desk, gpu_bytes: int, shown: Shown) -> tuple[Limit, ...]:
    """Tiles of one image, where images are cut into some."""
    if not desk.model.family.sees or desk.model.max_tiles == 1:
        return ()
    most, bound = desk.most("tiles", shown, max(shown.tiles, searched_tiles(desk.model) // shown.images))
    largest, needs = desk.largest("tiles", shown, gpu_bytes, most)
    return (Limit("tiles", shown.tiles, largest, needs, bound if largest == most else ""),)


def _images(desk: _Desk, gpu_bytes: int, shown: Shown) -> tuple[Limit, ...]:
    """Images of as many tiles as asked."""
    if not desk.model.family.sees:
        return ()
    searched = desk.model.family.searched_images
    if desk.model.family.one_batch(desk.model):
        searched = min(searched, math.ceil(searched_tiles(desk.model) / shown.tiles))
    most, bound = desk.most("images", shown, max(shown.images, searched))
    largest, needs = desk.largest("images", shown, gpu_bytes, most)
    of = f"of {shown.tiles} tile{'s' * (shown.tiles > 1)} each" if desk.model.max_tiles > 1 or shown.tiles > 1 else ""
    return (Limit("images", shown.images, largest, needs, bound if largest == most else of),)


def _batch(desk: _Desk, gpu_bytes: int, shown: Shown) -> Limit:
    """Prompts as asked side by side; a method that prunes takes one at a time."""
    if complete_spec(desk.spec).pruner.stages(desk.shape(shown).visual_tokens, desk.model.layers):
        fits = desk.need(desk.spec.method, shown).device_bytes <= gpu_bytes
        return Limit("batch", 1, 1 if fits else None, None, "pruning cuts one prompt at a time")
    room = MOST_IN_ALL // desk.shape(shown).length
    most = max(1, min(desk.model.family.searched_prompts // shown.images, room))
    largest, needs = desk.largest("batch", shown, gpu_bytes, most)
    return Limit("batch", 1, largest, needs, _looked_at(most) if largest == most else "prompts of equal length")


def _new_tokens(desk: _Desk, gpu_bytes: int, shown: Shown) -> Limit:
    """New tokens: what one more adds to the cache, from the cache's growth over the tokens that were predicted."""
    spec, memory = desk.spec, desk.memory(desk.spec.method, shown)
    asked = desk.need(spec.method, shown)
    columns, made = memory.fullest.tokens, spec.max_new_tokens
    shape, pruner, windows = desk.shape(shown), complete_spec(spec).pruner, windows_of(desk.model)
    most, bound = desk.model.positions - shape.length, f"the model's {desk.model.positions:,} positions"
    begun = cached_by_first(pruner, shape, desk.model.layers)
    if (least := min(filter(None, windows), default=0)) and pruner.stages(shape.visual_tokens, desk.model.layers):
        most, bound = min((most, bound), (least - begun, f"told until a window of {least:,} tokens is full"))
    unused = asked.reserved_bytes - asked.allocated_bytes
    last = columns.peak_allocated_bytes[-1] + unused + desk.context_bytes
    if asked.device_bytes > gpu_bytes:
        return Limit("new tokens", made, None, None, "the prompt alone is too large")
    if most < 1:
        return Limit("new tokens", made, None, None, f"the prompt alone is beyond: {bound}")
    grown = partial(_grown, memory, windows, begun + made - 1)
    more = bisect_right(range(1, max(0, most - made) + 1), gpu_bytes - last, key=grown)
    needs = max(asked.device_bytes, last + grown(more))
    note = f"extrapolated from {made}" + (f", layers with a window until it has {least:,} tokens" if least else "")
    return Limit("new tokens", made, made + more, needs, bound if made + more == most else note)


def _grown(memory: Memory, windows: Sequence[int | None], cached: int, more: int) -> int:
    """What ``more`` new tokens add where ``cached`` are: a layer with a sliding window grows until it is full."""
    grown, layers = list[int](), [*zip(memory.kv_bytes_per_layer, memory.kv_tokens_found, strict=True)]
    if len(layers) != len(windows):  # some have no cache of their own: all are taken to grow
        windows = [None] * len(layers)
    for (nbytes, tokens), window in zip(layers, windows, strict=True):
        adds = more if window is None else max(0, min(cached + more, window) - cached)
        grown.append(adds * (nbytes // tokens) if tokens else 0)
    return sum(grown) + max(grown, default=0) // 2  # while it grows, a layer's keys are there twice


def _keep(desk: _Desk, gpu_bytes: int, shown: Shown) -> tuple[Limit, ...]:
    """The largest share of visual tokens, where the method has one."""
    pruner = complete_spec(desk.spec).pruner
    share = kept_share(pruner)
    if share is None:
        return ()
    field = next(f for f in dataclasses.fields(pruner) if f.name == "keep")
    low, high = field.metadata.get("search") or (0.02, 1.0)
    seen: list[tuple[float, float]] = []
    while (value := next_value(seen, low, high, step=0.0005)) is not None:
        seen.append((value, desk.need(_with_keep(pruner, value), shown).device_bytes - gpu_bytes))
    fitting = [value for value, over in seen if over <= 0]
    if not fitting:
        return (Limit("keep", share, None, None),)
    needs = dict(seen)[max(fitting)] + gpu_bytes
    return (Limit("keep", share, max(fitting), round(needs)),)


def _with_keep(pruner: Any, keep: float) -> str:
    return method_spec(dataclasses.replace(pruner, keep=keep))


def _what_gives(desk: _Desk, gpu_bytes: int, shown: Shown, asked: Need, limits: tuple[Limit, ...]) -> tuple[str, ...]:
    """What would make the prompt fit: less of one thing, another stack, another card."""
    give = [
        f"{limit.name} {limit.largest:g} instead of {limit.asked:g}"
        for limit in limits
        if limit.largest is not None and limit.largest < limit.asked
    ]
    if desk.spec.stack == "paper" and desk.need(desk.spec.method, shown, "current").device_bytes <= gpu_bytes:
        give.append("stack current, which makes logits of the last position alone")
    if method_name(complete_spec(desk.spec).pruner) == "baseline" and "topv" in METHODS.names():
        pruned = _keep(_Desk(dataclasses.replace(desk.spec, method="topv"), desk.bench, desk.context_bytes,
                             desk.question_tokens), gpu_bytes, shown)  # fmt: skip
        give += [f"pruning: topv with keep {one.largest:g}" for one in pruned if one.largest is not None]
    return (*give, f"a card of {format_bytes(asked.device_bytes, 'GiB', 1)}")


def _weights_alone(desk: _Desk, gpu_bytes: int, context_bytes: int) -> str:
    weights, room, bits = desk.static_bytes, gpu_bytes - context_bytes, 32 if desk.spec.dtype == "float32" else 16
    fewer = [(n, weights * n // bits) for n in (16, 8, 4) if n < bits and weights * n // bits < room]
    would = [f"{n}-bit weights (about {format_bytes(size, digits=1)})" for n, size in fewer]
    would += ["a smaller model", f"a card of {format_bytes(weights + context_bytes, digits=1)} and more"]
    return (
        f"the weights of {desk.spec.model} alone, {format_bytes(weights)} in {desk.spec.dtype} with workspaces, do not "
        f"fit: a card of {format_bytes(gpu_bytes)} has {format_bytes(max(0, room))} beside its CUDA context "
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
