"""What every method must hold, on every family, under every attention. Methods and families are found, not listed."""

from __future__ import annotations

import dataclasses
import random
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from by_hand import masked, rebuilt, recorded
from rounds import rounds
from tiny import families, no_image, several_images, state_of, tiny_model, tiny_prompt

from memprof.anatomy import anatomy
from memprof.bench.generate import place, profile_prompt
from memprof.errors import BadValue, UsageError
from memprof.families._grids import Grids
from memprof.profiler import Profiler
from memprof.prompts import Prompt
from memprof.pruning import METHODS, Pruner, build_pruner, method_spec
from memprof.pruning.signals import needs_layer_before
from memprof.pruning.surgery import Surgery

METHOD_NAMES = METHODS.names()
NOTHING = nullcontext()
PRUNING = [name for name in METHOD_NAMES if name != "baseline"]
ATTENTION = ("eager", "sdpa")
every_family = pytest.mark.parametrize("family", families())
every_method = pytest.mark.parametrize("method", METHOD_NAMES)


def pruner_for(method: str, **fields: Any) -> Pruner:
    pruner = build_pruner(method)
    known = {f.name for f in dataclasses.fields(pruner)}
    return dataclasses.replace(pruner, **{k: v for k, v in fields.items() if k in known})


def refused(pruner: Pruner, prompt: Prompt) -> bool:
    """Whether the pruner must refuse: it cuts, and the tower's patches are not the prompt's tokens one by one."""
    joined = any(image.views for image in prompt.shape.images)
    return joined and bool({"vision", "vision_keys", "patches"} & pruner.needs) and getattr(pruner, "keep", 0) != 1


def generate(model: Any, pruner: Pruner, prompt: Prompt, tokens: int = 4) -> tuple[Any, Surgery, Profiler]:
    """A profiled answer under ``pruner``."""
    profiler = Profiler(model)
    out, surgery = answer(model, pruner, prompt, tokens, profiler)
    return out, surgery, profiler


def answer(
    model: Any, pruner: Pruner, prompt: Prompt, tokens: int = 4, around: AbstractContextManager[Any] = NOTHING
) -> tuple[Any, Surgery]:
    """An answer under ``pruner``, given ``around`` it."""
    if refused(pruner, prompt):
        with pytest.raises(UsageError, match=r"^.*reads the vision tower.*take a method.*$"):
            Surgery(model, pruner, prompt.places)
        pytest.skip("refused in one line, as it must be")
    with Surgery(model, pruner, prompt.places, seed=7) as surgery, around:
        out = model.generate(
            **place(prompt, model), max_new_tokens=tokens, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    return out, surgery


@cache
def unpruned(family: str, attention: str) -> tuple[torch.Tensor, ...]:
    """The logits that a model of the family makes of its prompt when nothing is cut."""
    kind, card, model = tiny_model(family, attention)
    out, _ = answer(model, build_pruner("baseline"), tiny_prompt(kind, card))
    return tuple(out.logits)


@pytest.mark.parametrize(("method", "family", "attention"), rounds(METHOD_NAMES, families(), ATTENTION))
def test_choice_and_cache_are_as_planned(method: str, family: str, attention: str) -> None:
    kind, card, model = tiny_model(family, attention)
    prompt = tiny_prompt(kind, card)
    pruner = pruner_for(method, keep=0.4)
    before = state_of(model)
    out, surgery, profiler = generate(model, pruner, prompt)
    assert state_of(model) == before
    visual = prompt.shape.visual_tokens
    kept = surgery.kept()
    assert kept is not None
    assert len(kept) == len(surgery.stages)
    before_the_cut = set(range(visual))
    for number, (stage, chosen) in enumerate(zip(surgery.stages, kept, strict=True)):
        # A later cut may keep tokens that an earlier one merged, and those are none of the prompt's own.
        merged = any(stage.merged for stage in surgery.stages[:number])
        assert len(chosen) <= stage.kept if merged else len(chosen) == stage.kept
        assert chosen == sorted(set(chosen))
        assert set(chosen) <= before_the_cut
        before_the_cut = set(chosen)
    assert profiler.kv_tokens == surgery.kv_tokens
    assert all(n >= prompt.shape.text_tokens for n in surgery.kv_tokens)
    assert out.sequences.shape[1] == prompt.shape.length + 4
    again, surgery_again = answer(model, pruner, prompt)
    assert surgery_again.kept() == kept
    assert all(torch.equal(a, b) for a, b in zip(out.logits, again.logits, strict=True))


@pytest.mark.parametrize(("method", "family", "attention"), rounds(METHOD_NAMES, families(), ATTENTION))
def test_keeping_all_is_baseline_bit_for_bit(method: str, family: str, attention: str) -> None:
    kind, card, model = tiny_model(family, attention)
    prompt = tiny_prompt(kind, card)
    pruner = pruner_for(method, keep=1.0)
    if getattr(pruner, "keep", 1.0) != 1.0:
        pytest.skip("the method has no share to keep")
    plain = unpruned(family, attention)
    out, surgery = answer(model, pruner, prompt)
    assert surgery.stages == ()
    assert all(torch.equal(a, b) for a, b in zip(plain, out.logits, strict=True))


@pytest.mark.parametrize(
    ("method", "family", "positions", "attention"),
    rounds(PRUNING, families(), ("original", "compact"), ATTENTION),
)
def test_dropping_equals_what_is_worked_out_by_hand(method: str, positions: str, family: str, attention: str) -> None:
    kind, card, model = tiny_model(family, attention)
    prompt = tiny_prompt(kind, card)
    pruner, choices = recorded(pruner_for(method, keep=0.4, positions=positions))
    out, surgery, profiler = generate(model, pruner, prompt)
    assert profiler.kv_tokens == surgery.kv_tokens
    expected = rebuilt(model, prompt, surgery, choices, out.sequences[0])
    for step, logits in enumerate(out.logits):
        torch.testing.assert_close(logits[0], expected[step], atol=1e-5, rtol=1e-5)
    if positions == "original" and not any(stage.merged for stage in surgery.stages):
        for step, other in enumerate(masked(model, prompt, surgery, out.sequences[0])):
            torch.testing.assert_close(other, expected[step], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(unpruned(family, attention)[-1], out.logits[-1], atol=1e-4), (
        "pruning changed nothing: the test sees nothing"
    )


@every_family
def test_order_of_methods_does_not_matter(family: str) -> None:
    """Each method says what it said, whichever ran before it: forwards, backwards, and in an order drawn at random."""
    kind, card, model = tiny_model(family)
    prompt = tiny_prompt(kind, card)
    methods = [method for method in METHOD_NAMES if not refused(pruner_for(method), prompt)]
    assert len(methods) > 2
    said = {method: answer(model, pruner_for(method), prompt)[0].logits for method in methods}
    for order in (methods[::-1], random.Random(family).sample(methods, len(methods))):
        for method in order:
            again, _ = answer(model, pruner_for(method), prompt)
            assert all(torch.equal(a, b) for a, b in zip(said[method], again.logits, strict=True)), (method, order)


@every_family
@every_method
def test_model_is_untouched_after_an_exception(method: str, family: str) -> None:
    kind, card, model = tiny_model(family)
    prompt = tiny_prompt(kind, card)
    before = state_of(model)

    class Stop(Exception):
        pass

    def fail(*_: Any) -> None:
        raise Stop

    hook = anatomy(model).layers[3][1].register_forward_hook(fail)
    with pytest.raises((Stop, pytest.skip.Exception)):
        generate(model, pruner_for(method), prompt)
    hook.remove()
    assert state_of(model) == before


@pytest.mark.parametrize(
    ("method", "family", "kind_of_prompt"),
    rounds(METHOD_NAMES, families(), ("several images", "no image", "one tile", "one pixel row")),
)
def test_awkward_prompts(method: str, family: str, kind_of_prompt: str) -> None:
    kind, card, model = tiny_model(family)
    made = {
        "several images": lambda: several_images(kind, card),
        "no image": lambda: no_image(kind, card),
        "one tile": lambda: tiny_prompt(kind, card, 100, 100),
        "one pixel row": lambda: tiny_prompt(kind, card, 900, 1),
    }[kind_of_prompt]
    if kind_of_prompt == "one pixel row" and isinstance(kind, Grids):
        with pytest.raises(BadValue, match=r"900 x 1 pixels is too narrow"):
            made()
        return
    prompt = made()
    pruner, choices = recorded(pruner_for(method, keep=0.4))
    out, surgery, profiler = generate(model, pruner, prompt)
    assert profiler.kv_tokens == surgery.kv_tokens
    assert out.sequences.shape[1] == prompt.shape.length + 4
    if surgery.stages:
        expected = rebuilt(model, prompt, surgery, choices, out.sequences[0])
        torch.testing.assert_close(out.logits[-1][0], expected[-1], atol=1e-5, rtol=1e-5)


@every_family
@every_method
def test_runs_without_storage_as_with_it(method: str, family: str) -> None:
    """The sim meter's run and the cpu meter's make the same cache: shapes follow from shapes alone."""
    kind, card, real = tiny_model(family)
    _, _, fake = tiny_model(family, device="sim")
    prompt = tiny_prompt(kind, card)
    pruner = pruner_for(method, keep=0.4)
    if refused(pruner, prompt):
        pytest.skip("refused")
    outcomes = [
        profile_prompt(model, Profiler(model).meter, pruner, "current", prompt, new_tokens=3) for model in (real, fake)
    ]
    a, b = (o.memory for o in outcomes)
    assert a.kv_tokens_found == b.kv_tokens_found == a.kv_tokens_planned
    assert a.fullest.tokens.kv_bytes == b.fullest.tokens.kv_bytes
    assert outcomes[1].tokens is None


@pytest.mark.parametrize("method", PRUNING)
def test_a_layer_beyond_the_model_is_refused(method: str) -> None:
    assert method_spec(pruner_for(method)).startswith(method)
    if {"layer", "parts"} & {f.name for f in dataclasses.fields(build_pruner(method))}:
        with pytest.raises(BadValue, match="layer"):
            pruner_for(method, layer=99, parts=99).stages(100, 24)


@pytest.mark.parametrize(
    "method", [m for m in PRUNING if "layer" in {f.name for f in dataclasses.fields(build_pruner(m))}]
)
def test_a_cut_before_every_layer_works_or_is_refused_at_once(method: str) -> None:
    kind, card, model = tiny_model(families()[0], "eager")
    prompt = tiny_prompt(kind, card)
    pruner, choices = recorded(pruner_for(method, keep=0.4, layer=0))
    if needs_layer_before(pruner.needs):
        with pytest.raises(BadValue, match="layer=1"):
            Surgery(model, pruner, prompt.places)
        return
    out, surgery, profiler = generate(model, pruner, prompt)
    assert (
        profiler.kv_tokens
        == surgery.kv_tokens
        == [round(0.4 * prompt.shape.visual_tokens) + prompt.shape.text_tokens] * 5
    )
    expected = rebuilt(model, prompt, surgery, choices, out.sequences[0])
    torch.testing.assert_close(out.logits[-1][0], expected[-1], atol=1e-5, rtol=1e-5)


@every_method
def test_every_method_says_what_it_is(method: str) -> None:
    cls = METHODS.load(method)
    assert cls.title
    assert cls.paper
    assert cls.reference is None or (cls.departs and "arXiv" in cls.paper)
    for field in dataclasses.fields(cls):
        assert field.metadata["help"]
        assert field.metadata["origin"] in ("paper", "code", "second-hand", "memprof")
