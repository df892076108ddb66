"""Models of other makers, measured on a card with given inputs: predicted from their configurations alone.

``reference/other_models/samples_h200.json`` holds configurations, and of each sample the shapes of its inputs, what
``generate()`` was asked, and what an H200 held. Whatever is put in there is tried here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import memprof
import memprof.errors
from memprof.profiler import Profiler

REFERENCE = json.loads((Path(__file__).parents[1] / "reference" / "other_models" / "samples_h200.json").read_text())
#: Prompts beyond so many tokens take a while; they are tried where slow tests are.
LONG = 1_700


def sample_name(sample: dict[str, Any]) -> str:
    options = "_".join(map(str, sample["options"].values()))
    images = f"{len(sample['images'])}im"
    return f"{sample['model']}-{images}-{sample['batch']}x{sample['prompt_tokens']}-{sample['attention']}-{options}"


def minor(version: str) -> list[str]:
    return version.split(".")[:2]


def marked(sample: dict[str, Any]) -> Any:
    marks = [pytest.mark.slow] if sample["prompt_tokens"] > LONG else []
    there = REFERENCE["environment"]["transformers"]
    if sample["images"] and minor(there) != minor(transformers.__version__):
        # What a vision tower holds on to differs from version to version; a language model's prefill did not.
        marks.append(pytest.mark.skip(reason=f"measured under transformers {there}"))
    return pytest.param(sample, id=sample_name(sample), marks=marks)


def configuration(name: str) -> Any:
    return transformers.AutoConfig.for_model(**REFERENCE["configurations"][name])


def visual_tokens(config: Any, sample: dict[str, Any]) -> torch.Tensor:
    """Grids of a sample's images in patches, ``(images, 3)``."""
    edge = config.vision_config.patch_size
    return torch.tensor([[1, height // edge, width // edge] for width, height in sample["images"]])


def inputs_of(config: Any, sample: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Ordinary tensors of the shapes and dtypes that were given, with image tokens where images are."""
    shape, _ = sample["inputs"]["input_ids"]
    ids = torch.randint(10, 1_000, shape, generator=torch.Generator().manual_seed(0))
    found = dict[str, torch.Tensor]()
    if "visual_tokens" in sample:
        found["image_sizes"] = torch.tensor([(height, width) for width, height in sample["images"]])
        ids[:, 4 : 4 + sample["visual_tokens"]] = config.image_token_id
    elif sample["images"]:
        grids = visual_tokens(config, sample)
        found["image_grid_thw"], at = grids, 4
        for tokens in (grids.prod(1) // config.vision_config.spatial_merge_size**2).tolist():
            ids[:, at] = config.vision_start_token_id
            ids[:, at + 1 : at + 1 + tokens] = config.image_token_id
            at += tokens + 2
    found |= {"input_ids": ids, "mm_token_type_ids": ids == getattr(config, "image_token_id", -1)}
    given = {
        name: found.get(name, torch.ones(size, dtype=getattr(torch, dtype))).to(getattr(torch, dtype))
        for name, (size, dtype) in sample["inputs"].items()
    }
    assert {name: list(tensor.shape) for name, tensor in given.items()} == {
        name: size for name, (size, _) in sample["inputs"].items()
    }
    return given


@pytest.mark.parametrize("sample", [marked(sample) for sample in REFERENCE["samples"]])
def test_what_a_card_held_is_predicted(sample: dict[str, Any]) -> None:
    config = configuration(sample["model"])
    inputs, options = inputs_of(config, sample), dict(sample["options"])
    if options.pop("logits", None) == "all":
        options["logits_to_keep"] = 0
    card, dtype, attention = REFERENCE["environment"]["card"], sample["dtype"], sample["attention"]
    with (
        memprof.weightless(config, dtype=dtype, card=card, attention=attention) as model,
        Profiler(model) as profiler,
    ):
        model.generate(**inputs, max_new_tokens=sample["tokens"], do_sample=False, **options)
    peaks = profiler.reading.peak_allocated_bytes
    dynamic = max(peaks) - profiler.meter.static_bytes
    assert len(peaks) == sample["tokens"]
    assert -0.002 <= dynamic / sample["dynamic_peak_bytes"] - 1 <= 0.005
    assert profiler.tokens.kv_bytes[-1] == sample["kv_bytes"]


def test_a_configuration_that_generates_nothing_is_refused() -> None:
    with (
        pytest.raises(memprof.errors.UsageError, match="no class that generates from a CLIPVisionConfig"),
        memprof.weightless(transformers.CLIPVisionConfig()),
    ):
        pass


def test_the_model_is_as_it_was_when_the_window_ends() -> None:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=300,
        tie_word_embeddings=True,
    )  # fmt: skip
    before = config.to_dict()
    with memprof.weightless(config, card="l4") as model:
        assert "generate" in vars(model)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        with Profiler(model) as profiler:
            out = model.generate(torch.arange(4)[None], max_new_tokens=3)
        assert out.shape == (1, 7)
        assert profiler.meter.environment()["gpu"] == "l4"
    assert "generate" not in vars(model)
    assert config.to_dict() == before
