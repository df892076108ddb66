"""Who holds the peak is read off the record; what would lower it is really run."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import families, several_images, state_of, tiny_model, tiny_prompt
from torch import nn

from memprof.analysis.entered import quantised_cache
from memprof.analysis.explain import explain, floor_sentence, prompt_shape, sentence
from memprof.analysis.vision_chunks import chunked_vision
from memprof.analysis.whatif import (
    COUNTERFACTUALS,
    Benches,
    Change,
    all_exact,
    eight_bit_cache,
    floor,
    vision_in_chunks,
)  # fmt: skip
from memprof.anatomy import anatomy
from memprof.bench import Bench
from memprof.bench.generate import place, profile_prompt
from memprof.errors import DataError, UnknownName
from memprof.meters import meter_for
from memprof.models.find import find
from memprof.pruning import build_pruner
from memprof.records import CardMemory, Holder, Memory, Run, RunSpec
from memprof.runner import complete_spec, run
from memprof.telling.holders import leading_part, words_for
from memprof.units import format_bytes

every_family = pytest.mark.parametrize("family", families())


def a_run(folder: Path, method: str, stack: str, width: int, height: int, bench: Bench | None = None) -> Run:
    data = folder / "one.csv"
    data.write_text(f"width,height,text_tokens\n{width},{height},42\n")
    spec = RunSpec(
        "internvl2-2b", method, "ai2d", "sim", stack, dtype="bfloat16", data=str(data), max_new_tokens=2, warmup=0
    )
    return run(spec, folder / method.replace(":", "_"), bench=bench or Bench(complete_spec(spec).setup))


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """13 tiles under three methods, paper stack."""
    folder = tmp_path_factory.mktemp("explain")
    bench = Bench(complete_spec(RunSpec("internvl2-2b", "baseline", "ai2d", "sim")).setup)
    return {m: a_run(folder, m, "paper", 1792, 1344, bench) for m in ("baseline", "topv", "fastv")}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """3 tiles, TopV, paper stack."""
    return a_run(tmp_path_factory.mktemp("small"), "topv", "paper", 896, 448)


def size(n_bytes: int) -> str:
    return format_bytes(n_bytes, "GiB", 2)


# -- reading the record ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "holder", "words"),
    [
        ("baseline", "logits", "the fp32 logits of all positions"),
        ("topv", "logits", "the fp32 logits of all positions"),
        ("fastv", "attention", "the attention scores (16 heads × 3,418 × 3,418)"),
    ],
)
def test_the_papers_stack_is_explained(paper: dict[str, Run], method: str, holder: str, words: str) -> None:
    found = explain(paper[method], what_if=False)
    assert (found.holder, found.words, found.phase, found.tiles) == (holder, words, "prefill", 13)
    assert 0.7 < found.share < 1
    assert sum(found.parts.values()) == found.dynamic_peak_bytes
    assert found.static_bytes + found.dynamic_peak_bytes == found.peak_allocated_bytes
    assert found.holders[0].part == holder
    assert found.rounding_bytes > 0
    assert found.context_bytes is None
    text = sentence(found, size)
    assert text.startswith(f"InternVL2-2B under {found.method} peaks at {size(found.peak_allocated_bytes)} in prefill")
    assert f"{words} hold {found.share:.0%}" in text


def test_a_measured_runs_context_is_what_the_driver_adds(small: Run) -> None:
    sample = small.samples[0]
    used = [b + 480_000_000 for b in sample.tokens.reserved_bytes]
    tokens = dataclasses.replace(sample.tokens, device_used_bytes=used)
    run_ = Run(small.record, [dataclasses.replace(sample, tokens=tokens)])
    assert explain(run_, what_if=False).context_bytes == 480_000_000


def test_the_sample_is_chosen(small: Run) -> None:
    name = small.samples[0].id
    assert explain(small, name, what_if=False).sample == name
    with pytest.raises(UnknownName, match="finished sample"):
        explain(small, "nobody", what_if=False)
    with pytest.raises(DataError, match="no finished sample"):
        explain(Run(small.record, []), what_if=False)


def test_the_prompt_is_rebuilt_from_the_record(small: Run) -> None:
    """It is in the record; where an earlier version left only its sums, the image is cut once more."""
    sample, model = small.samples[0], find("internvl2-2b")
    shape = prompt_shape(small, sample, model)
    assert (shape.tiles, shape.length) == (3, sample.visual_tokens + sample.text_tokens)
    older = dataclasses.replace(sample, shape=None)
    assert prompt_shape(small, older, model) == shape
    with pytest.raises(DataError, match="cannot be rebuilt"):
        prompt_shape(small, dataclasses.replace(older, visual_tokens=7), model)


def holder(part: str, shape: list[int], module: str = "m.layers.1.self_attn", dtype: str = "float32") -> Holder:
    return Holder(8, part, module, "aten.add.Tensor", shape, dtype, "prefill")


@pytest.mark.parametrize(
    ("part", "shape", "words"),
    [
        ("logits", [1, 9, 100], "the fp32 logits of all positions"),
        ("logits", [1, 1, 100], "the fp32 logits of the last position"),
        ("attention", [1, 4, 9, 9], "the attention scores (4 heads × 9 × 9)"),
        ("attention", [1, 9, 64], "attention's queries, keys and values"),
        ("vision", [13, 1025, 1024], "the vision tower at work on 13 tiles"),
        ("kv_cache", [1, 2, 9, 8], "the KV cache"),
    ],
)
def test_parts_in_words(part: str, shape: list[int], words: str) -> None:
    assert words_for(part, [holder(part, shape)]) == words


def test_the_leading_part_of_nothing_is_unexplained() -> None:
    assert leading_part({}) == "unexplained"


# -- what would lower it -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answered(small: Run) -> Any:
    return explain(small)


def test_answers_are_predictions_in_order_of_what_they_save(answered: Any) -> None:
    assert answered.predicted_peak_bytes == answered.dynamic_peak_bytes
    assert [a.refused for a in answered.answers] == [None] * len(answered.answers)
    saved = [a.saved_bytes for a in answered.answers]
    assert saved == sorted(saved, reverse=True)
    assert all(a.dynamic_peak_bytes + a.saved_bytes == answered.predicted_peak_bytes for a in answered.answers)
    by_name = {a.name: a for a in answered.answers}
    logits = by_name["logits of the last position only"]
    assert logits.exact
    assert logits.how == "--stack current"
    assert logits.holder != "logits"
    assert logits.saved_bytes > 0
    assert by_name["keep 0.75 (pruned 0.25)"].saved_bytes < 0 < by_name["keep 0.25 (pruned 0.75)"].saved_bytes
    assert not by_name["8-bit KV cache"].exact
    assert by_name["8-bit KV cache"].saved_bytes > 0.4 * answered.parts["kv_cache"]
    assert by_name["all that change no answer"].dynamic_peak_bytes <= logits.dynamic_peak_bytes


def test_the_floor_under_pruning_is_named(answered: Any) -> None:
    assert answered.floor.dynamic_peak_bytes < min(a.dynamic_peak_bytes for a in answered.answers if "keep" in a.name)
    text = floor_sentence(answered, size)
    assert text is not None
    assert size(answered.floor.dynamic_peak_bytes) in text
    assert answered.floor.words in text


def test_a_measured_runs_answers_are_called_predicted(small: Run) -> None:
    record = dataclasses.replace(small.record, status="measured")
    found = explain(Run(record, small.samples), benches=_Same(small))
    assert "predicted" in found.notes[0]


class _Same(Benches):
    """Answers at once, always the same."""

    def __init__(self, run_: Run) -> None:
        sample = run_.samples[0]
        of_card, cache = (
            {field.name: getattr(sample, field.name, None) for field in dataclasses.fields(kind)}
            for kind in (CardMemory, Memory)
        )
        self.memory_there = Memory(**{**cache, "cards": [CardMemory(**{**of_card, "peak_holders": []})]})

    def memory(self, change: Change, *, every_token: bool = False) -> Memory:
        return self.memory_there

    def knows(self, change: Change) -> bool:
        return True


def change(method: str, stack: str = "paper", device: str = "sim", tiles: int = 3) -> Change:
    spec, pruner, _, setup = complete_spec(RunSpec("internvl2-2b", method, "ai2d", device, stack))
    shape = setup.model.family.shape(setup.model, 448 * (tiles - 1), 448, 42)
    return Change(spec, pruner, shape, setup.model)


def test_a_cards_limit_cuts_no_answer_short() -> None:
    now, benches = next(vision_in_chunks(change("topv", tiles=3))), Benches()
    # The weights fit on this card, and no prompt beside them.
    tight = dataclasses.replace(now, spec=dataclasses.replace(now.spec, gpu="4.8GiB"))
    assert benches.memory(tight) == benches.memory(now)


@pytest.mark.parametrize("method", ["baseline", "topv"])
def test_what_is_entered_on_the_model_has_programs_that_say_what_a_direct_run_says(
    method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MEMPROF_CACHE", str(tmp_path))
    now = change(method, "current", tiles=3)
    now = dataclasses.replace(now, spec=dataclasses.replace(now.spec, max_new_tokens=Benches.FEW))
    changes = [now, *vision_in_chunks(now), *eight_bit_cache(now)]
    assert len(changes) == 3
    found = [Benches().memory(one) for one in changes]
    assert len({memory.fullest.dynamic_peak_bytes for memory in found}) == len(found)
    benches = Benches()
    for one, before in zip(changes, found, strict=True):
        assert benches.knows(one), "it is on the disk"
        assert benches.memory(one) == before
        bench, ask = benches._asked(one, Benches.FEW)
        direct = bench.profile(ask).memory  # of all layers
        assert direct.kv_tokens_found == before.kv_tokens_found
        assert direct.fullest == before.fullest


def test_answers_without_the_limit_say_so(small: Run) -> None:
    record = dataclasses.replace(small.record, spec=dataclasses.replace(small.record.spec, gpu="8GiB"))
    (note,) = explain(Run(record, small.samples), benches=_Same(small)).notes
    assert note.startswith("what would lower it is predicted without the memory limit of 8GiB")


@pytest.mark.parametrize("method", ["baseline", "fastv", "topv", "uniform"])
def test_changes_change_one_thing(method: str) -> None:
    now = change(method)
    made = [c for counterfactual in COUNTERFACTUALS for c in counterfactual(now)]
    assert len({c.name for c in made}) == len(made)
    assert all(c.how for c in made)
    for one in made:
        same = (one.spec == now.spec, one.pruner == now.pruner, one.around == now.around)
        assert not all(same)
        assert one.shape == now.shape
    assert now == change(method)
    together = all_exact(now)
    assert together is not None
    assert together.exact
    assert together.spec.stack == "current"
    least = floor(now)
    assert least is not None
    assert least.pruner.stages(now.shape.visual_tokens, 24)[0].kept == 1


def test_fastvs_map_is_replaced_by_a_row() -> None:
    now = change("fastv")
    assert now.spec.attention == "eager"
    row = next(c for f in COUNTERFACTUALS for c in f(now) if "row" in c.name)
    assert (row.spec.attention, row.pruner.eager) == ("sdpa", False)


# -- the contexts, with real numbers -----------------------------------------------------------------------------------


def logits_of(model: Any, prompt: Any) -> torch.Tensor:
    out = model.generate(
        **place(prompt, model), max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return torch.stack(out.logits)


@every_family
@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize("images", [1, 3])
def test_a_chunked_tower_changes_no_number(family: str, tiles: int, images: int) -> None:
    kind, card, model = tiny_model(family)
    prompt, before = tiny_prompt(kind, card) if images == 1 else several_images(kind, card, images), state_of(model)
    embeds = next(m for _, m in anatomy(model).vision[0][1].named_modules() if isinstance(m, nn.Conv2d | nn.Conv3d))
    calls: list[int] = []
    hook = embeds.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    whole = logits_of(model, prompt)
    once, calls = calls, []
    with chunked_vision(model, tiles):
        chunked = logits_of(model, prompt)
    hook.remove()
    torch.testing.assert_close(chunked, whole, atol=1e-4, rtol=1e-4)
    assert state_of(model) == before
    assert (len(once), sum(calls)) == (1, once[0])
    assert len(calls) == math.ceil(prompt.shape.tiles / tiles)


@every_family
def test_a_quantised_cache_is_a_quarter_of_fp32_with_a_scale_a_row_and_close(family: str) -> None:
    kind, card, model = tiny_model(family)
    prompt, before = tiny_prompt(kind, card), state_of(model)
    plain = profile_prompt(model, meter_for(model), build_pruner("topv"), "current", prompt, new_tokens=3).memory
    with quantised_cache(model):
        small_ = profile_prompt(model, meter_for(model), build_pruner("topv"), "current", prompt, new_tokens=3).memory
        narrow = logits_of(model, prompt)
    assert state_of(model) == before
    assert small_.kv_tokens_found == plain.kv_tokens_found
    head = card.kv_numbers // int(card.text["num_key_value_heads"])
    windows = 8 * list(card.text.get("layer_types", ())).count("sliding_attention")  # a layer's own length, an integer
    bytes_of = [[b - windows for b in one.fullest.tokens.kv_bytes] for one in (small_, plain)]
    assert [4 * head * b for b in bytes_of[0]] == [(head + 4) * b for b in bytes_of[1]]
    wide = logits_of(model, prompt)
    assert (narrow[0] - wide[0]).abs().max() < 1e-4, "prefill attends to the wide keys"
    assert 0 < (narrow - wide).norm() < 0.2 * wide.norm()
