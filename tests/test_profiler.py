from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from tiny import families, state_of, tiny_model, tiny_prompt
from torch import nn

from memprof import scopes
from memprof.bench.generate import place
from memprof.errors import MemprofError
from memprof.profiler import Profiler, cache_tensors, storage_bytes
from memprof.records import PARTS


def profiled(model: Any, prompt: Any, tokens: int = 4, **how: Any) -> Profiler:
    with Profiler(model) as profiler:
        model.generate(
            **place(prompt, model), max_new_tokens=tokens, do_sample=False,
            logits_processor=profiler.meter.logits_processors(), **how,
        )  # fmt: skip
    return profiler


@pytest.mark.parametrize("family", families())
@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_one_entry_a_token_and_parts_that_add_up(family: str, device: str) -> None:
    kind, card, model = tiny_model(family, device=device)
    before = state_of(model)
    profiler = profiled(model, tiny_prompt(kind, card))
    columns, reading, static = profiler.tokens, profiler.reading, profiler.meter.static_bytes
    for column in vars(columns).values():
        assert len(column) == 4
    top = max(columns.peak_allocated_bytes)
    assert columns.peak_allocated_bytes[reading.peak_token] == top
    assert set(reading.parts) == set(PARTS)
    assert sum(reading.parts.values()) == top - static
    assert all(p >= a for p, a in zip(columns.peak_allocated_bytes, columns.allocated_bytes, strict=True))
    assert all(r >= p for r, p in zip(columns.reserved_bytes, columns.peak_allocated_bytes, strict=True))
    assert static < reading.vision_peak_bytes <= top
    assert (columns.seconds[0] is None) == (device == "sim")
    assert state_of(model) == before
    assert scopes.depth() == 1


def test_kv_is_exact() -> None:
    kind, card, model = tiny_model("internvl")
    prompt = tiny_prompt(kind, card)
    profiler = profiled(model, prompt)
    text = card.text
    head = text["hidden_size"] // text["num_attention_heads"]
    a_token = 2 * text["num_hidden_layers"] * text["num_key_value_heads"] * head * 4
    assert profiler.tokens.kv_bytes == [a_token * (prompt.shape.length + t) for t in range(4)]
    assert profiler.kv_tokens == [prompt.shape.length] * text["num_hidden_layers"]


def test_profiling_does_not_change_what_is_generated() -> None:
    kind, card, model = tiny_model("internvl")
    prompt = tiny_prompt(kind, card)
    plain = model.generate(**place(prompt, model), max_new_tokens=5, do_sample=False)
    with Profiler(model):
        seen = model.generate(**place(prompt, model), max_new_tokens=5, do_sample=False)
    assert torch.equal(plain, seen)


@pytest.mark.parametrize("at", ["model.vision_tower", "model.language_model.layers.2", "lm_head"])
def test_nothing_is_left_after_an_exception(at: str) -> None:
    kind, card, model = tiny_model("internvl")
    prompt = tiny_prompt(kind, card)
    before = state_of(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("stop")

    hook = model.get_submodule(at).register_forward_hook(fail)
    profiler = Profiler(model)
    with pytest.raises(RuntimeError, match="stop"), profiler:
        model.generate(**place(prompt, model), max_new_tokens=2, do_sample=False)
    hook.remove()
    assert profiler.failed
    assert state_of(model) == before
    assert scopes.depth() == 1
    again = profiled(model, prompt)
    assert len(again.tokens) == 4


def test_known_tensors_are_counted_to_the_byte() -> None:
    """A model simple enough to count by hand: what the ledger says is what was allocated."""
    kind, card, model = tiny_model("internvl")
    prompt = tiny_prompt(kind, card)
    plain = profiled(model, prompt).tokens.allocated_bytes
    held: list[torch.Tensor] = []

    class Hoard(nn.Module):
        def forward(self, *_: Any) -> None:
            held.append(torch.empty(1_000_003, dtype=torch.uint8))

    hook = model.model.language_model.layers[0].register_forward_pre_hook(lambda *_: Hoard()())
    hoarded = profiled(model, prompt).tokens.allocated_bytes
    hook.remove()
    assert [b - a for a, b in zip(plain, hoarded, strict=True)] == [1_000_003 * (t + 1) for t in range(4)]


def test_a_view_counts_with_its_whole_storage() -> None:
    whole = torch.zeros(10, 100)
    assert storage_bytes([whole[:2]]) == 4_000
    assert storage_bytes([whole[:2], whole[5:]]) == 4_000
    assert cache_tensors(None) == []


def test_a_language_model_without_vision() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=100, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    with Profiler(model) as profiler:
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False, attention_mask=torch.ones(1, 3))
    assert len(profiler.tokens) == 3
    assert profiler.reading.vision_peak_bytes in (0, profiler.meter.static_bytes)


@pytest.mark.parametrize(
    "how", [{"prefill_chunk_size": 4}, {"prompt_lookup_num_tokens": 2}], ids=["chunked prefill", "prompt lookup"]
)
def test_forwards_that_are_not_tokens_are_refused_by_name(how: dict[str, Any]) -> None:
    kind, card, model = tiny_model(families()[0])
    before = state_of(model)
    with pytest.raises(MemprofError, match="a forward is not a token"):
        profiled(model, tiny_prompt(kind, card), **how)
    assert state_of(model) == before
    assert len(profiled(model, tiny_prompt(kind, card)).tokens) == 4


def test_assisted_decoding_is_refused_by_name() -> None:
    kind, card, model = tiny_model(families()[0])
    with pytest.raises(MemprofError, match="a forward is not a token"):
        profiled(model, tiny_prompt(kind, card), assistant_model=model.__class__(model.config).eval())


def test_inference_mode_is_refused_by_name() -> None:
    kind, card, model = tiny_model(families()[0])
    with pytest.raises(MemprofError, match="no_grad"), torch.inference_mode():
        profiled(model, tiny_prompt(kind, card))


def test_a_cache_made_in_advance_counts_what_is_filled() -> None:
    kind, card, model = tiny_model(families()[0])
    prompt = tiny_prompt(kind, card)
    usual = profiled(model, prompt).kv_tokens
    assert profiled(model, prompt, cache_implementation="static").kv_tokens == usual


def test_what_a_thread_dies_of_is_nothing_to_another() -> None:
    kind, card, model = tiny_model(families()[0])
    before, seen = state_of(model), list[BaseException]()

    def fails() -> None:
        try:
            with Profiler(model):
                scopes.push("mlp", "somewhere")
                raise ValueError("of its own")
        except ValueError as error:
            seen.append(error)

    thread = threading.Thread(target=fails)
    thread.start()
    thread.join()
    assert len(seen) == 1
    assert (state_of(model), scopes.depth()) == (before, 1)
    assert len(profiled(model, tiny_prompt(kind, card)).tokens) == 4


def test_a_window_belongs_to_its_thread() -> None:
    kind, card, model = tiny_model(families()[0])
    before, said = state_of(model), list[str]()

    def generates() -> None:
        for act in (lambda: profiled(model, tiny_prompt(kind, card)),
                    lambda: model.generate(**place(tiny_prompt(kind, card), model), max_new_tokens=2)):  # fmt: skip
            try:
                act()
            except MemprofError as error:
                said.append(str(error))

    with Profiler(model):
        thread = threading.Thread(target=generates)
        thread.start()
        thread.join()
    assert len(said) == 2
    assert "another thread profiles this model" in said[0]
    assert "another thread than the profiler's window" in said[1]
    assert state_of(model) == before
