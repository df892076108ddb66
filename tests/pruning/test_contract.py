"""What every method must hold, on every family, under every attention. Methods and families are found, not listed."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from tiny import families, no_image, several_images, state_of, tiny_model, tiny_prompt

from memprof.errors import BadValue
from memprof.profiler import Profiler
from memprof.pruning import METHODS, Pruner, build_pruner, method_spec
from memprof.pruning.surgery import Surgery
from memprof.runner import Prompt, place, profile_prompt

METHOD_NAMES = METHODS.names()
PRUNING = [name for name in METHOD_NAMES if name != "baseline"]
cases = pytest.mark.parametrize("attention", ["eager", "sdpa"])
every_family = pytest.mark.parametrize("family", families())
every_method = pytest.mark.parametrize("method", METHOD_NAMES)


def pruner_for(method: str, **fields: Any) -> Pruner:
    pruner = build_pruner(method)
    known = {f.name for f in dataclasses.fields(pruner)}
    return dataclasses.replace(pruner, **{k: v for k, v in fields.items() if k in known})


def generate(model: Any, pruner: Pruner, prompt: Prompt, tokens: int = 4) -> tuple[Any, Surgery, Profiler]:
    with Surgery(model, pruner, prompt.layout, seed=7) as surgery, Profiler(model) as profiler:
        out = model.generate(
            **place(prompt, model), max_new_tokens=tokens, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    return out, surgery, profiler


@cases
@every_family
@every_method
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
    for stage, chosen in zip(surgery.stages, kept, strict=True):
        assert len(chosen) == stage.kept
        assert chosen == sorted(set(chosen))
        assert set(chosen) <= set(range(visual))
    assert profiler.kv_tokens == surgery.kv_tokens
    assert all(n >= prompt.shape.text_tokens for n in surgery.kv_tokens)
    assert out.sequences.shape[1] == prompt.shape.length + 4
    again, surgery_again, _ = generate(model, pruner, prompt)
    assert surgery_again.kept() == kept
    assert all(torch.equal(a, b) for a, b in zip(out.logits, again.logits, strict=True))


@every_family
@every_method
@cases
def test_keeping_all_is_baseline_bit_for_bit(method: str, family: str, attention: str) -> None:
    kind, card, model = tiny_model(family, attention)
    prompt = tiny_prompt(kind, card)
    pruner = pruner_for(method, keep=1.0)
    if getattr(pruner, "keep", 1.0) != 1.0:
        pytest.skip("the method has no share to keep")
    plain, _, _ = generate(model, build_pruner("baseline"), prompt)
    out, surgery, _ = generate(model, pruner, prompt)
    assert surgery.stages == ()
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, out.logits, strict=True))


@cases
@every_family
@pytest.mark.parametrize("method", PRUNING)
def test_dropping_equals_masking(method: str, family: str, attention: str) -> None:
    kind, card, model = tiny_model(family, attention)
    prompt = tiny_prompt(kind, card)
    out, surgery, _ = generate(model, pruner_for(method, keep=0.4), prompt)
    expected = masked(model, prompt, surgery, out.sequences[0])
    for step, logits in enumerate(out.logits):
        torch.testing.assert_close(logits[0], expected[step], atol=1e-5, rtol=1e-5)
    plain, _, _ = generate(model, build_pruner("baseline"), prompt)
    assert not torch.allclose(plain.logits[-1], out.logits[-1], atol=1e-4), (
        "pruning changed nothing: the test sees nothing"
    )


@torch.no_grad()
def masked(model: Any, prompt: Prompt, surgery: Surgery, tokens: torch.Tensor) -> list[torch.Tensor]:
    """The oracle: the whole sequence at once, no cache, no hooks; from a cut on, nobody looks at what was cut."""
    core = model.model
    inputs = place(prompt, model)
    embeds = core.get_input_embeddings()(tokens[None])
    features = core.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    features = torch.cat(list(features)) if isinstance(features, list | tuple) else features
    image = torch.tensor(prompt.layout.index)
    embeds[0, image] = features.reshape(-1, embeds.shape[-1])
    n = embeds.shape[1]
    rotary = core.language_model.rotary_emb(embeds, torch.arange(n)[None])
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    kept = surgery.kept()
    assert kept is not None
    hidden = embeds
    for number, layer in enumerate(core.language_model.layers):
        allowed = causal.clone()
        for stage, chosen in zip(surgery.stages, kept, strict=True):
            if number >= stage.layer:
                gone = np.setdiff1d(np.arange(len(image)), chosen)
                allowed[:, image[gone]] = False
        allowed |= torch.eye(n, dtype=torch.bool)  # a row that sees nothing is no number; nobody looks at these rows
        mask = torch.zeros(1, 1, n, n).masked_fill(~allowed, torch.finfo(torch.float32).min)
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, past_key_values=None)
    logits = model.lm_head(core.language_model.norm(hidden))[0]
    return list(logits[prompt.shape.length - 1 : n - 1])


@every_family
@every_method
def test_order_of_methods_does_not_matter(method: str, family: str) -> None:
    kind, card, model = tiny_model(family)
    prompt = tiny_prompt(kind, card)
    alone, _, _ = generate(model, pruner_for(method), prompt)
    for other in METHOD_NAMES:
        generate(model, pruner_for(other), prompt, tokens=1)
    after, _, _ = generate(model, pruner_for(method), prompt)
    assert all(torch.equal(a, b) for a, b in zip(alone.logits, after.logits, strict=True))


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

    hook = model.model.language_model.layers[3].register_forward_hook(fail)
    with pytest.raises(Stop):
        generate(model, pruner_for(method), prompt)
    hook.remove()
    assert state_of(model) == before


@every_family
@every_method
@pytest.mark.parametrize("kind_of_prompt", ["several images", "no image", "one tile", "one pixel row"])
def test_awkward_prompts(method: str, family: str, kind_of_prompt: str) -> None:
    kind, card, model = tiny_model(family)
    prompt = {
        "several images": lambda: several_images(kind, card),
        "no image": lambda: no_image(kind, card),
        "one tile": lambda: tiny_prompt(kind, card, 100, 100),
        "one pixel row": lambda: tiny_prompt(kind, card, 900, 1),
    }[kind_of_prompt]()
    out, surgery, profiler = generate(model, pruner_for(method, keep=0.4), prompt)
    assert profiler.kv_tokens == surgery.kv_tokens
    assert out.sequences.shape[1] == prompt.shape.length + 4
    if surgery.stages:
        expected = masked(model, prompt, surgery, out.sequences[0])
        torch.testing.assert_close(out.logits[-1][0], expected[-1], atol=1e-5, rtol=1e-5)


@every_family
@every_method
def test_runs_without_storage_as_with_it(method: str, family: str) -> None:
    """The sim meter's run and the cpu meter's make the same cache: shapes follow from shapes alone."""
    kind, card, real = tiny_model(family)
    _, _, fake = tiny_model(family, device="sim")
    prompt = tiny_prompt(kind, card)
    pruner = pruner_for(method, keep=0.4)
    outcomes = [
        profile_prompt(model, Profiler(model).meter, pruner, "current", prompt, new_tokens=3) for model in (real, fake)
    ]
    a, b = (o.memory for o in outcomes)
    assert a["kv_tokens_found"] == b["kv_tokens_found"]
    assert a["tokens"].kv_bytes == b["tokens"].kv_bytes
    assert outcomes[1].tokens is None


@pytest.mark.parametrize("method", PRUNING)
def test_a_layer_beyond_the_model_is_refused(method: str) -> None:
    with pytest.raises(BadValue, match="layer"):
        pruner_for(method, layer=99, parts=99).stages(100, 24)
    assert method_spec(pruner_for(method)).startswith(method)


@pytest.mark.parametrize(
    "method", [m for m in PRUNING if "layer" in {f.name for f in dataclasses.fields(build_pruner(m))}]
)
def test_a_cut_before_every_layer_works_or_is_refused_at_once(method: str) -> None:
    kind, card, model = tiny_model(families()[0], "eager")
    prompt, pruner = tiny_prompt(kind, card), pruner_for(method, keep=0.4, layer=0)
    if pruner.needs & {"target", "row", "map"}:
        with pytest.raises(BadValue, match="layer=1"):
            Surgery(model, pruner, prompt.layout)
        return
    out, surgery, profiler = generate(model, pruner, prompt)
    assert (
        profiler.kv_tokens
        == surgery.kv_tokens
        == [round(0.4 * prompt.shape.visual_tokens) + prompt.shape.text_tokens] * 5
    )
    expected = masked(model, prompt, surgery, out.sequences[0])
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
