"""The audit catches every planted fault, and passes what is as it should be."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny import families, state_of, tiny_model, tiny_prompt

from memprof.analysis.audit import Evidence, audit_generate, audit_pruner, judge
from memprof.bench.generate import place
from memprof.errors import GateFailed, UsageError
from memprof.pruning import METHODS, build_pruner
from memprof.pruning.surgery import Surgery


def kinds(report: Any) -> list[str]:
    return [finding.kind for finding in report.findings]


def layers_of(model: Any) -> Any:
    return model.model.language_model.layers


# -- memprof's own methods ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", families())
@pytest.mark.parametrize("method", METHODS.names())
def test_every_method_of_memprof_passes(method: str, family: str) -> None:
    pruner = build_pruner(method)
    kind, card, model = tiny_model(family, "eager" if pruner.eager else "sdpa")
    try:
        report = audit_pruner(model, pruner, tiny_prompt(kind, card))
    except UsageError as refused:
        pytest.skip(f"refused, as the contract tests say: {refused}")
    assert report.passed, report.findings
    assert report.layers == 5
    report.check()


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_keys_of_few_tokens_are_no_map(device: str) -> None:
    """Pruned to fewer tokens than a head has numbers, a layer's keys are wider than long, as a map is."""
    kind, card, model = tiny_model("llava", device=device)
    prompt = tiny_prompt(kind, card, text=1)
    pruner = build_pruner("divprune:keep=0.05")
    stage = pruner.stages(prompt.shape.visual_tokens, 5)[0]
    assert 1 < stage.kept + prompt.shape.text_tokens <= 32 // 4
    assert audit_pruner(model, pruner, prompt).passed


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_fastv_on_either_attention(attention: str, device: str) -> None:
    kind, card, model = tiny_model("internvl", attention, device)
    scores = "map" if attention == "eager" else "row"
    assert audit_pruner(model, build_pruner(f"fastv:scores={scores}"), tiny_prompt(kind, card), stack="paper").passed


# -- planted faults ----------------------------------------------------------------------------------------------------


def test_mask_only_pruning_is_caught() -> None:
    kind, card, model = tiny_model("internvl")
    prompt = tiny_prompt(kind, card)
    report = audit_pruner(model, build_pruner("fastv:drop=mask"), prompt)
    assert kinds(report) == ["masked"]
    assert report.findings[0].layers == [2, 3, 4]
    # Half of the visual tokens, in three layers, keys and values of 2 heads x 8 numbers in fp32.
    assert report.findings[0].bytes == prompt.shape.visual_tokens // 2 * 3 * 2 * 2 * 8 * 4
    with pytest.raises(GateFailed, match="nothing left the cache: layers 2-4 hold all"):
        report.check()


def test_mask_only_pruning_of_the_reference_also_keeps_a_map() -> None:
    kind, card, model = tiny_model("internvl", "eager")
    report = audit_pruner(model, build_pruner("fastv:drop=mask,scores=map"), tiny_prompt(kind, card))
    assert kinds(report) == ["masked", "map"]
    assert report.findings[1].layers == [1]
    assert "until layer 4" in report.findings[1].line


@contextmanager
def running_twice(model: Any, number: int) -> Iterator[None]:
    """FastV's published fault: the layer before the cut runs once for its scores and once more for its output."""

    def before(module: Any, args: Any, kwargs: Any) -> None:
        module.forward(*args, **kwargs)

    hook = layers_of(model)[number].register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def test_doubled_kv_is_caught() -> None:
    kind, card, model = tiny_model("internvl")
    prompt = tiny_prompt(kind, card)
    with Surgery(model, build_pruner("fastv"), prompt.places) as surgery, running_twice(model, 1):
        report = audit_generate(model, place(prompt, model), surgery.kv_tokens)
    assert kinds(report) == ["doubled"]
    assert report.findings[0].layers == [1]
    assert "2 times the prompt's" in report.findings[0].line
    assert report.findings[0].bytes == len(prompt.ids) * 2 * 2 * 8 * 4


@contextmanager
def slicing_caches(model: Any, start: int, kept: int) -> Iterator[None]:
    """Pruning that shortens the cache by a view: the lengths are right, and no byte is freed."""

    def after(module: Any, args: Any, out: Any) -> None:
        for layer in out.past_key_values.layers[start:]:
            layer.keys, layer.values = layer.keys[:, :, :kept], layer.values[:, :, :kept]

    hook = model.register_forward_hook(after)
    try:
        yield
    finally:
        hook.remove()


def test_a_view_that_keeps_its_buffer_is_caught() -> None:
    kind, card, model = tiny_model("internvl")
    prompt = tiny_prompt(kind, card)
    n = len(prompt.ids)
    with slicing_caches(model, 2, n // 2):
        report = audit_generate(model, place(prompt, model), [n, n] + [n // 2] * 3)
    assert kinds(report) == ["view"]
    assert report.findings[0].layers == [2, 3, 4]
    assert report.findings[0].bytes == (n - n // 2) * 3 * 2 * 2 * 8 * 4


@contextmanager
def keeping_maps(model: Any, numbers: list[int]) -> Iterator[None]:
    kept: list[torch.Tensor] = []

    def after(module: Any, args: Any, out: Any) -> None:
        kept.append(out[1])

    hooks = [layers_of(model)[number].self_attn.register_forward_hook(after) for number in numbers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_a_kept_map_is_caught(device: str) -> None:
    kind, card, model = tiny_model("internvl", "eager", device)
    prompt = tiny_prompt(kind, card)
    with keeping_maps(model, [1, 3]):
        report = audit_generate(model, place(prompt, model), len(prompt.ids))
    assert kinds(report) == ["map"]
    assert report.findings[0].layers == [1, 3]
    assert report.findings[0].line.endswith("kept until the end of prefill")
    assert report.findings[0].bytes >= 2 * 4 * 4 * len(prompt.ids) ** 2


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_an_untouched_model_passes_and_is_left_untouched(attention: str) -> None:
    kind, card, model = tiny_model("internvl", attention)
    prompt = tiny_prompt(kind, card)
    before = state_of(model)
    assert audit_generate(model, place(prompt, model), len(prompt.ids)).passed
    assert state_of(model) == before


def test_another_length_than_planned_is_a_finding() -> None:
    kind, card, model = tiny_model("internvl")
    prompt = tiny_prompt(kind, card)
    n = len(prompt.ids)
    with Surgery(model, build_pruner("uniform:keep=0.5"), prompt.places):
        report = audit_generate(model, place(prompt, model), [n] * 2 + [n - 5] * 3)
    assert kinds(report) == ["length"]


def test_inputs_without_a_prompt_are_refused() -> None:
    _, _, model = tiny_model("internvl")
    with pytest.raises(UsageError, match="input_ids"):
        audit_generate(model, {}, 3)


# -- judging -----------------------------------------------------------------------------------------------------------


def evidence(**changes: Any) -> Evidence:
    good = Evidence("a", 10, [10, 6], [10, 6], [40, 24], [40, 24])
    return dataclasses.replace(good, **changes)


def test_good_evidence_has_no_fault() -> None:
    assert judge(evidence()) == []


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"found": [10, 10], "held_bytes": [40, 40], "needed_bytes": [40, 40]}, "masked"),
        ({"found": [20, 6], "held_bytes": [80, 24], "needed_bytes": [80, 24]}, "doubled"),
        ({"found": [10, 7], "held_bytes": [40, 28], "needed_bytes": [40, 28]}, "length"),
        ({"found": [10]}, "length"),
        ({"held_bytes": [40, 40]}, "view"),
    ],
)
def test_each_fault_is_called_by_its_name(changes: dict[str, Any], kind: str) -> None:
    assert [finding.kind for finding in judge(evidence(**changes))] == [kind]
