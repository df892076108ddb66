"""Sliding windows: which layers have one, and answers in which they fill, predicted from sizes as from a direct run."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import transformers
from tiny import tiny_card

from memprof.analysis.fit import fit
from memprof.bench import Bench
from memprof.errors import UsageError
from memprof.families import FAMILIES, Model
from memprof.forecasts import Ask
from memprof.forecasts.windows import windows_of
from memprof.gpus import find_card
from memprof.models import find
from memprof.models.find import named
from memprof.prompts import Shape
from memprof.records import RunSpec
from memprof.runner import complete_spec

_SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300,
}  # fmt: skip
_KINDS = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
_GEMMA: dict[str, Any] = {"sliding_window": 40, "num_hidden_layers": 2, "layer_types": _KINDS[:2]}
#: Every way a configuration has to say it: of each layer, of all, of none though it has the number.
CONFIGS = {
    "LlamaConfig": {}, "MistralConfig": {"sliding_window": 32}, "Phi3Config": {"sliding_window": 16},
    "Qwen2Config": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "Qwen3Config": {"use_sliding_window": False, "sliding_window": 8},
    "Gemma2Config": {"sliding_window": 64, "layer_types": _KINDS}, "Gemma3TextConfig": {"sliding_window": 16},
    "Cohere2Config": {"sliding_window": 12}, "Llama4TextConfig": {"attention_chunk_size": 24},
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_windows_are_those_of_the_cache_that_transformers_makes(kind: str) -> None:
    config = getattr(transformers, kind)(**_SIZES, **CONFIGS[kind])
    model = dataclasses.replace(named()["llama-3.2-1b"], config=find._numbers(config))
    layers = transformers.DynamicCache(config=config).layers
    expected = tuple(getattr(layer, "sliding_window", None) for layer in layers)
    assert windows_of(model) == expected


def tiny(family: str) -> Model:
    """A model with a window of 40 tokens in some of its layers, or in all."""
    if family == "gemma3":
        return tiny_card(FAMILIES.load("gemma3")()).but(text=_GEMMA)
    kind = transformers.MistralConfig(**_SIZES, sliding_window=40)
    config = {"model_type": "mistral", **find._numbers(kind), "tie_word_embeddings": False}
    return dataclasses.replace(named()["llama-3.2-1b"], name="tiny-text", config=config, dtype="float32")


def asking(monkeypatch: pytest.MonkeyPatch, model: Model, method: str = "baseline") -> tuple[Bench, Any]:
    """A bench that predicts, and what makes asks of tokens of a prompt and of its answer."""
    monkeypatch.setenv("MEMPROF_CACHE", "")
    monkeypatch.setattr(find, "find", lambda *_: model)
    done = complete_spec(RunSpec(model=model.name, task="ai2d", device="sim", dtype="bfloat16", method=method))

    def ask(tokens: int, new_tokens: int, batch: int = 1) -> Ask:
        images = [model.family.image(model, 100, 100, 1)] if model.family.sees else []
        shape: Shape = model.family.shape_of(model, images, 0, batch)
        return dataclasses.replace(done.ask(shape.longer(tokens - shape.length)), new_tokens=new_tokens)

    return Bench(done.setup), ask


@pytest.mark.parametrize(
    ("family", "tokens", "new_tokens", "batch"),
    [("gemma3", 31, 17, 1), ("gemma3", 36, 10, 1), ("text", 39, 3, 1), ("text", 30, 11, 2), ("text", 45, 8, 1)],
    ids=["in the middle", "soon", "in the first step", "in the last step, side by side", "before"],
)
def test_a_window_that_fills_is_predicted_to_the_byte(
    family: str, tokens: int, new_tokens: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, asked = asking(monkeypatch, tiny(family))
    ask = asked(tokens, new_tokens, batch)
    bench.foresee([ask])
    predicted = bench._predict(ask)
    assert predicted is not None, "a program answers, not a direct run"
    assert predicted.memory == bench.profile(ask).memory


@pytest.mark.parametrize("tokens", [31, 45])
def test_a_pruned_answer_is_run_directly_where_a_window_is_full(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a cut each layer's window fills in a step of its own, which no program tells."""
    bench, asked = asking(monkeypatch, tiny("gemma3"), "random:layer=1,positions=original")
    ask = asked(tokens, 17)
    bench.foresee([ask])
    assert bench._predict(ask) is None
    assert bench.outcome(ask).memory == bench.profile(ask).memory


def test_what_a_full_window_leaves_unknown_is_refused_as_a_run_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, asked = asking(monkeypatch, tiny("gemma3"), "random:layer=1,positions=compact")
    for run in (bench.outcome, bench.profile):
        with pytest.raises(UsageError, match="sliding window is full: it has 40 tokens, and 40 are reached"):
            run(asked(31, 17))


def test_what_fits_knows_that_full_windows_do_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers of one model slide: its answer ends at its last position, and needs what a prediction says."""
    model = tiny("text").but(text={"max_position_embeddings": 200})
    bench, asked = asking(monkeypatch, model)
    spec = RunSpec(
        model=model.name, method="baseline", task="ai2d", device="sim", dtype="bfloat16", max_new_tokens=4
    )
    answer = fit(spec, find_card("1GiB"), question_tokens=10, bench=bench)
    [limit] = [one for one in answer.limits if one.name == "new tokens"]
    tokens = model.family.shape_of(model, [], 10).length
    assert limit.largest == 200 - tokens
    allocated = bench.outcome(asked(tokens, 200 - tokens)).memory.fullest.peak_allocated_bytes
    assert limit.device_bytes is not None
    assert abs(limit.device_bytes - (answer.need.device_bytes + allocated - answer.need.allocated_bytes)) < 32 * 1024
