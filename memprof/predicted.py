"""One prompt predicted from its sizes, as a run of one sample; where the book knows it, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from memprof import limits
from memprof.bench import Bench
from memprof.environment import environment
from memprof.errors import LacksAttention, UnknownName
from memprof.forecasts import BESIDE, Ask, Setup
from memprof.gpus import calibrated, find_card
from memprof.models.find import check_model, find, named, of_config, plain_config
from memprof.models.heeding import check_heeded
from memprof.prompts import Prompt, Shape
from memprof.pruning import build_pruner, method_spec, visual_flops_cut
from memprof.records import ATTENTIONS, GIVEN, STACKS, Memory, Run, RunRecord, RunSpec, SampleRecord, summarize

if TYPE_CHECKING:
    from memprof.families import Model

#: Stands where a run's task would.
TASK = "prompt"


def described(model: Any) -> tuple[Model, str, str | None]:
    """What is known of ``model``, the dtype and the attention that it is to have; None: the method's, else SDPA.

    Args:
        model: A name, a hub id, a path, a transformers configuration, or a model that has one.

    Raises:
        UsageError: Nothing is called so, or it has no configuration.
        WeightsError: A configuration that cannot be read, or whose family is not known.
    """
    if isinstance(model, str):
        known = find(model)
        return known, known.dtype, None
    check_model(model)
    raw = plain_config(model)
    known = of_config(raw)
    runs = str(getattr(config_of(model).get_text_config(), "_attn_implementation", None))
    return known, dtype_of(model) or str(raw.get("dtype") or known.dtype), runs if runs in ATTENTIONS else None


def config_of(model: Any) -> Any:
    """The configuration of a model, or the one given."""
    return getattr(model, "config", model)


def dtype_of(model: Any) -> str | None:
    """The dtype of a model's weights; None of what has none."""
    return None if config_of(model) is model else str(next(model.parameters()).dtype).removeprefix("torch.")


def predict(
    model: Any,
    images: Sequence[tuple[int, int]],
    *,
    text_tokens: int,
    method: str,
    stack: str,
    new_tokens: int,
    card: str | None,
    dtype: str | None,
    attention: str | None,
    max_tiles: int | None,
    batch: int,
) -> Run:
    """As :func:`memprof.api.predict` without inputs."""
    how = partial(
        _predict, model, images, text_tokens=text_tokens, method=method, stack=stack, new_tokens=new_tokens, card=card,
        dtype=dtype, max_tiles=max_tiles, batch=batch,
    )  # fmt: skip
    try:
        return how(attention=attention)
    except LacksAttention:
        if attention is not None:
            raise
        return how(attention="eager")


def _predict(
    model: Any, images: Sequence[tuple[int, int]], *, text_tokens: int, method: str, stack: str, new_tokens: int,
    card: str | None, dtype: str | None, attention: str | None, max_tiles: int | None, batch: int,
) -> Run:  # fmt: skip
    known, own_dtype, own_attention = described(model)
    pruner = build_pruner(method, stack)
    pruner.stages(1_000, known.layers)  # raises where it cuts beyond the model
    spec = RunSpec(
        model=known.name, method=method_spec(pruner), task=TASK, device="sim", stack=stack, dtype=dtype or own_dtype,
        attention="eager" if pruner.eager else attention or own_attention or "sdpa", data=GIVEN,
        max_new_tokens=new_tokens, max_tiles=max_tiles, warmup=0, gpu=card, text_tokens=text_tokens,
    )  # fmt: skip
    _check(spec, batch)
    check_heeded(known, max_tiles=max_tiles)
    shown = [known.family.image(known, width, height, max_tiles) for width, height in images]
    shape = known.family.shape_of(known, shown, text_tokens, batch)
    limits.check_whole(shape.length, batch)
    setup, ask = Setup.of(spec, known), Ask(pruner, stack, Prompt(shape), new_tokens)
    memory, static_parts = _answer(setup, ask)
    sample = SampleRecord(
        "prompt", width=images[0][0] if images else 0, height=images[0][1] if images else 0
    ).of_prompt(shape).with_memory(memory)  # fmt: skip
    if memory.refused is not None:
        sample.status, sample.error = "oom", memory.refused
    found = {"dtype": spec.dtype, "attention": {"asked": spec.attention, "got": spec.attention}}
    on = calibrated(find_card(card))
    cut = visual_flops_cut(sample.kept_visual_tokens, shape.visual_tokens, known.hidden, known.ffn)
    record = RunRecord(
        spec, "predicted", environment() | found | on.environment() | {"positions": pruner.positions},
        static_bytes=sum(static_parts.values()), static_parts=static_parts, layers=known.layers,
        data_label=_sizes(images, shape, text_tokens), visual_flops_cut=cut, complete=True, samples_asked=1,
        configuration=None if isinstance(model, str) or known.name in named() else plain_config(model),
    )  # fmt: skip
    run = Run(record, [sample])
    record.totals = summarize(run)
    return run


def _check(spec: RunSpec, batch: int) -> None:
    """Raise UsageError for what no prompt can be."""
    for what, value, valid in (("stack", spec.stack, STACKS), ("attention", spec.attention, ATTENTIONS)):
        if value not in valid:
            raise UnknownName(what, value, valid)
    for name, number in (
        ("new_tokens", spec.max_new_tokens), ("text_tokens", spec.text_tokens), ("batch", batch),
        ("max_tiles", spec.max_tiles),
    ):  # fmt: skip
        limits.check(name, number)


def _sizes(images: Sequence[tuple[int, int]], shape: Shape, text_tokens: int) -> str:
    """``'2 images (1600 x 1200, 640 x 480) and 53 tokens of text'``."""
    sizes = ", ".join(f"{width} × {height}" for width, height in images)
    seen = f"{len(images)} image{'s' * (len(images) != 1)} ({sizes}) and " if images else ""
    beside = f", {shape.batch} side by side" if shape.batch > 1 else ""
    return f"a prompt of {seen}{text_tokens} text tokens{beside}"


def _answer(setup: Setup, ask: Ask) -> tuple[Memory, dict[str, int]]:
    """What the prompt takes, and what is there before it: from the book, else recorded for it first.

    What is recorded are prompts a little longer as well, so that the book knows all of them.
    """
    bench = Bench(setup)
    if not bench.knows(ask):
        bench.foresee(ask.about(ask.shape.longer(more)) for more in BESIDE)
    return bench.outcome(ask).memory, bench.standing(ask.pruner, ask.manner).static_parts
