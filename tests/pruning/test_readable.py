"""What a language model does to its queries is worked out as it does it, or refused in one line; hooks go either way.

The language models are transformers' own, tiny and random, inside LLaVA; which signals suit which is found by holding
``fastv:scores=row`` against ``scores=map``, the model's own attention map.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tiny import state_of

import memprof
from memprof.errors import UsageError

VISUAL, IMAGE, SIZE = 25, 299, 70
TEXT = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 6, "num_attention_heads": 6,
    "num_key_value_heads": 3, "vocab_size": 310, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "image_size": SIZE, "patch_size": 14, "projection_dim": 32,
}  # fmt: skip
SIGLIP = {**CLIP, "model_type": "siglip_vision_model"}
HEAD = {"head_dim": 8}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen2": {}, "qwen3": HEAD, "granite": {"attention_multiplier": 0.2}, "starcoder2": {},
    "gemma2": {**HEAD, "query_pre_attn_scalar": 8, "sliding_window": 256},
    "gemma3_text": {**HEAD, "query_pre_attn_scalar": 8, "sliding_window": 256},
    "phi3": {}, "phi": {"partial_rotary_factor": 0.5}, "stablelm": {}, "olmo2": {}, "persimmon": {},
    "glm4": {**HEAD, "partial_rotary_factor": 0.5}, "ernie4_5": HEAD, "hunyuan_v1_dense": HEAD,
    "cohere": {}, "cohere2": {"sliding_window": 256}, "exaone4": {"sliding_window": 256},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0, 1, 1]}, "gpt_oss": {**HEAD, "num_local_experts": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 3},
}  # fmt: skip
#: Those whose queries are worked out; all others are refused.
SUITED = {"llama", "qwen2", "qwen3", "granite", "starcoder2", "gemma3_text"}
METHODS = ("fastv:keep=0.4,scores=row", "fastv:keep=0.4,scores=map", "topv:keep=0.4", "dart:keep=0.4",
           "pyramiddrop:keep=0.5", "sparsevlm:keep=0.4", "random:keep=0.4,positions=compact")  # fmt: skip


def built(text: str, vision: dict[str, Any] = CLIP, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        text_config={**TEXT, **MODELS[text], "model_type": text}, vision_config=vision, image_token_index=IMAGE,
        vision_feature_layer=-2, **fields,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
    return model


def inputs(before: int = 4, behind: int = 5) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    words = torch.randint(10, 200, (1, before + behind), generator=draw)
    ids = torch.cat([words[:, :before], torch.full((1, VISUAL), IMAGE), words[:, before:]], 1)
    pixels = torch.randn((1, 3, SIZE, SIZE), generator=draw)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def kept(model: Any, method: str, given: dict[str, torch.Tensor]) -> list[list[int]] | None:
    with memprof.prune(model, method, given) as surgery:
        model.generate(**given, max_new_tokens=2, do_sample=False)
    return surgery.kept()


@pytest.mark.parametrize("text", MODELS)
def test_a_language_model_is_read_as_it_is_or_refused(text: str) -> None:
    model, given = built(text), inputs()
    model.generate(**given, max_new_tokens=1)  # transformers hooks a model for itself the first time
    before, found, said = state_of(model), {}, []
    for method in METHODS:
        try:
            found[method] = kept(model, method, given)
        except UsageError as error:
            said.append(str(error))
        assert state_of(model) == before, method
    row, whole = (found.get(method) for method in METHODS[:2])
    assert (row is not None) == (text in SUITED)
    assert row in (None, whole)
    assert not any("\n" in line for line in said)


def test_whatever_fails_while_entering_leaves_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    from memprof.pruning.signals.target import Target
    from memprof.pruning.surgery import entered_on

    model, given = built("llama"), inputs()
    model.generate(**given, max_new_tokens=1)
    before = state_of(model)

    def broken(self: Target, numbers: object) -> None:
        self.scene.post(self.scene.layers[0], lambda *_: None)
        raise AttributeError("no such part")

    monkeypatch.setattr(Target, "watch", broken)
    with pytest.raises(AttributeError, match="no such part"):
        kept(model, "topv:keep=0.4", given)
    assert state_of(model) == before
    assert entered_on(model) is None


def test_one_model_is_pruned_once_at_a_time() -> None:
    model, given = built("llama"), inputs()
    with memprof.prune(model, "random:keep=0.4", given) as outer:
        with pytest.raises(UsageError, match="pruned already"):
            kept(model, "topv:keep=0.4", given)
        model.generate(**given, max_new_tokens=2)
    assert outer.kept() is not None


@pytest.mark.parametrize("layer", [0, 2])
def test_a_cache_that_was_cut_is_gone_on_with_where_its_first_layer_is_whole(layer: int) -> None:
    model, given = built("llama"), inputs()
    more = torch.tensor([[11, 12, 13, 14]])
    with memprof.prune(model, f"random:keep=0.4,layer={layer},positions=original", given):
        out = model.generate(**given, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        cache, ids = out.past_key_values, torch.cat([out.sequences, more], 1)
        before = [one.get_seq_length() for one in cache.layers]

        def go_on() -> None:
            model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=2)

        if layer == 0:
            with pytest.raises(UsageError, match="cuts before every layer, and a cache cut there cannot be gone on"):
                go_on()
            return
        go_on()
    # The answer's last token, the four new ones, and the first of the second answer.
    assert [one.get_seq_length() - was for one, was in zip(cache.layers, before, strict=True)] == [6] * len(before)


def test_what_does_not_grow_or_is_padded_is_refused() -> None:
    model, given = built("llama"), inputs()
    with memprof.prune(model, "random:keep=0.4", given), pytest.raises(UsageError, match="cache that grows"):
        model.generate(**given, max_new_tokens=2, cache_implementation="static")
    with memprof.prune(model, "random:keep=0.4", given), pytest.raises(UsageError, match="use_cache=True"):
        model.generate(**given, max_new_tokens=2, use_cache=False)
    padded = {**given, "attention_mask": given["attention_mask"].clone()}
    padded["attention_mask"][0, 0] = 0
    with pytest.raises(UsageError, match="padded"):
        memprof.prune(model, "fastv:keep=0.4", padded)


@pytest.mark.parametrize(("vision", "there"), [(CLIP, True), (SIGLIP, False)])
def test_a_class_token_is_handed_on_only_where_there_is_one(vision: dict[str, Any], there: bool) -> None:
    model = built("llama", vision, vision_feature_select_strategy="default" if there else "full")
    if there:
        assert kept(model, "visionzip:keep=0.4,class_token=true", inputs())
    else:
        with pytest.raises(UsageError, match="no class token in use"):
            kept(model, "visionzip:keep=0.4,class_token=true", inputs())
