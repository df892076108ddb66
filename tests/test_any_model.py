"""Models that memprof has no family for: the profiler counts them by their structure, or says in a line why not.

Configurations are tiny and weights random. What a cache holds is known from its definition, so it is told by hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import nn
from typed import call

import memprof
from memprof import Profiler
from memprof.errors import LacksAttention, MemprofError, UsageError, WeightsError
from memprof.meters import meter_for
from memprof.meters.cpu import CpuMeter
from memprof.profiler import storages
from memprof.store import read_run

TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 512, "pad_token_id": 0,
}  # fmt: skip
CLIP = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
BART = {
    "vocab_size": 300, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
OPT = {
    "model_type": "opt", "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 300, "word_embed_proj_dim": 32, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
QFORMER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "encoder_hidden_size": 32, "vocab_size": 300,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
IMAGE = 299
#: Bytes of one token's keys and values in two layers of 32 numbers in float32; half of them where heads are grouped.
WHOLE, GROUPED = 2 * 2 * 32 * 4, 2 * 2 * 16 * 4


def ids(text: int = 5, visual: int = 0) -> torch.Tensor:
    drawn = torch.randint(10, 200, (1, text), generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.full((1, visual), IMAGE), drawn], 1)


def pixels(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (1, 3, 28, 28)), generator=torch.Generator().manual_seed(1))


def sees(visual: int, *shape: int) -> dict[str, Any]:
    return {"input_ids": ids(visual=visual), "pixel_values": pixels(*shape)}


@dataclass
class Case:
    """A model and what is known of it: its cache after prefill, what a token adds, where its parts are."""

    build: Callable[[], Any]
    inputs: Callable[[], dict[str, Any]]
    cache: int
    token: int
    layers: str
    vision: str | None = None
    fixed: Callable[[Any], None] = lambda model: None


def grids(kind: Any, **text: Any) -> Any:
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}
    return kind(text_config={"rope_parameters": ROPE, **TEXT, **text}, vision_config=vision, image_token_id=IMAGE,
                image_start_token_id=298, image_end_token_id=297)  # fmt: skip


def pieces(edge: int) -> dict[str, Any]:
    found = torch.cat([torch.tensor([[298]]), ids(visual=4)[:, :4], torch.tensor([[297]]), ids()], 1)
    return {
        "input_ids": found, "mm_token_type_ids": (found == IMAGE).int(), "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "pixel_values": pixels(16, 3 * 2 * edge**2),
    }  # fmt: skip


CASES = {
    # An encoder beside the decoder: what the decoder keeps of the encoder's 5 positions is made once.
    "bart": Case(
        lambda: t.BartForConditionalGeneration(t.BartConfig(**BART, max_position_embeddings=128)),
        lambda: {"input_ids": ids()}, 6 * WHOLE, WHOLE, "model.decoder.layers",
    ),
    "t5": Case(
        lambda: t.T5ForConditionalGeneration(
            t.T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
        ),
        lambda: {"input_ids": ids()}, 6 * WHOLE, WHOLE, "decoder.block",
    ),
    "whisper": Case(
        lambda: t.WhisperForConditionalGeneration(
            t.WhisperConfig(
                **BART, num_mel_bins=8, max_source_positions=50, max_target_positions=64, suppress_tokens=None,
                begin_suppress_tokens=None,
            )
        ),
        lambda: {"input_features": pixels(1, 8, 100)}, 51 * WHOLE, WHOLE, "model.decoder.layers", None,
        lambda model: setattr(model.generation_config, "pad_token_id", 5),  # it cuts padding off what was predicted
    ),
    "florence2": Case(
        lambda: t.Florence2ForConditionalGeneration(
            t.Florence2Config(
                text_config={"model_type": "bart", **BART, "max_position_embeddings": 128}, image_token_id=IMAGE,
                vision_config={
                    "depths": (1, 1, 1, 1), "embed_dim": (8, 16, 16, 16), "num_heads": (1, 2, 2, 2),
                    "num_groups": (1, 2, 2, 2), "window_size": 4, "projection_dim": 32, "max_position_embeddings": 16,
                },
            )
        ),
        lambda: sees(5, 1, 3, 64, 64), 11 * WHOLE, WHOLE, "model.language_model.decoder.layers", "model.vision_tower",
    ),
    "vision-encoder-decoder": Case(
        lambda: t.VisionEncoderDecoderModel(
            config=t.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
                t.ViTConfig(**CLIP),
                t.GPT2Config(
                    vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64, add_cross_attention=True,
                    pad_token_id=0, decoder_start_token_id=1,
                ),
            )
        ),
        lambda: {"pixel_values": pixels()}, 6 * WHOLE, WHOLE, "decoder.transformer.h", "encoder",
        lambda model: setattr(model.generation_config, "decoder_start_token_id", 1),
    ),
    # generate() is handed on to a language model inside.
    "blip-2": Case(
        lambda: t.Blip2ForConditionalGeneration(
            t.Blip2Config(
                vision_config=CLIP, qformer_config=QFORMER, text_config=OPT, num_query_tokens=4,
                image_token_index=IMAGE,
            )
        ),
        lambda: sees(4), 9 * WHOLE, WHOLE, "language_model.model.decoder.layers", "vision_model",
    ),
    "instructblip": Case(
        lambda: t.InstructBlipForConditionalGeneration(
            t.InstructBlipConfig(
                vision_config=CLIP, qformer_config=QFORMER, text_config=OPT, num_query_tokens=4,
                image_token_index=IMAGE,
            )
        ),
        lambda: {**sees(4), "qformer_input_ids": ids(4)}, 9 * WHOLE, WHOLE, "language_model.model.decoder.layers",
        "vision_model",
    ),
    "kosmos-2": Case(
        lambda: t.Kosmos2ForConditionalGeneration(
            t.Kosmos2Config(
                text_config={
                    "vocab_size": 300, "embed_dim": 32, "layers": 2, "ffn_dim": 64, "attention_heads": 4,
                    "max_position_embeddings": 128,
                },
                vision_config=CLIP, latent_query_num=4,
            )
        ),
        lambda: {
            "input_ids": ids(8), "pixel_values": pixels(),
            "image_embeds_position_mask": torch.tensor([[0, 1, 1, 1, 1, 0, 0, 0]]),
        },
        8 * WHOLE, WHOLE, "text_model.model.layers", "vision_model",
    ),
    # A tower at the top, a list of layers longer than the decoder's, layers that see through others.
    "llama4": Case(
        lambda: t.Llama4ForConditionalGeneration(
            t.Llama4Config(
                text_config={
                    **TEXT, "intermediate_size_mlp": 64, "head_dim": 8, "num_local_experts": 4, "bos_token_id": 1,
                    "eos_token_id": 2,
                },
                vision_config={
                    **CLIP, "patch_size": 7, "intermediate_size": 128, "pixel_shuffle_ratio": 0.5,
                    "projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32,
                },
                image_token_index=IMAGE,
            )
        ),
        lambda: sees(4), 9 * GROUPED + 16, GROUPED, "language_model.model.layers", "vision_model",
    ),
    "mllama": Case(
        lambda: t.MllamaForConditionalGeneration(
            t.MllamaConfig(
                text_config={**TEXT, "num_hidden_layers": 4, "cross_attention_layers": [1]},
                vision_config={
                    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_global_layers": 1,
                    "attention_heads": 4, "image_size": 28, "patch_size": 14, "max_num_tiles": 2,
                    "intermediate_layers_indices": [0], "vision_output_dim": 64,
                    "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
                },
                image_token_index=IMAGE,
            )
        ),
        lambda: {
            "input_ids": ids(8), "attention_mask": torch.ones(1, 8, dtype=torch.long),
            "pixel_values": pixels(1, 1, 2, 3, 28, 28), "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(1, 1, 2, dtype=torch.long),
            "cross_attention_mask": torch.ones(1, 8, 1, 2, dtype=torch.long),
        },
        # Three layers of 8 tokens, and one of two tiles' 5 tokens each, which no step lengthens.
        3 * 8 * GROUPED // 2 + 10 * GROUPED // 2, 3 * GROUPED // 2, "model.language_model.layers",
        "model.vision_model",
    ),
    "paligemma": Case(
        lambda: t.PaliGemmaForConditionalGeneration(
            t.PaliGemmaConfig(
                text_config={"model_type": "gemma", "head_dim": 8, **TEXT}, projection_dim=32, image_token_index=IMAGE,
                vision_config={"model_type": "siglip_vision_model", "projection_dim": 32, **CLIP},
            )
        ),
        lambda: {
            **sees(4), "token_type_ids": torch.zeros(1, 9, dtype=torch.long),
            "attention_mask": torch.ones(1, 9, dtype=torch.long),
        },
        9 * GROUPED, GROUPED, "model.language_model.layers", "model.vision_tower",
    ),
    "deepseek-vl": Case(
        lambda: t.DeepseekVLForConditionalGeneration(
            t.DeepseekVLConfig(
                text_config={"model_type": "llama", **TEXT}, image_token_id=IMAGE,
                vision_config={"model_type": "siglip_vision_model", **CLIP},
            )
        ),
        lambda: sees(4), 9 * GROUPED, GROUPED, "model.language_model.layers", "model.vision_model",
    ),
    "glm4v": Case(
        lambda: t.Glm4vForConditionalGeneration(grids(t.Glm4vConfig)), lambda: pieces(14), 11 * GROUPED, GROUPED,
        "model.language_model.layers", "model.visual",
    ),
    "chameleon": Case(
        lambda: t.ChameleonForConditionalGeneration(
            t.ChameleonConfig(
                vq_config={
                    "embed_dim": 16, "num_embeddings": 40, "latent_dim": 16, "in_channels": 3, "base_channels": 32,
                    "channel_multiplier": [1, 2], "num_res_blocks": 1, "resolution": 8, "double_latent": False,
                },
                vocabulary_map={"<image>": IMAGE, **{f"IMGIMG{'ABCDEFGHIJ'[k // 10]}{'ABCDEFGHIJ'[k % 10]}Z": 100 + k
                                                     for k in range(40)}}, **TEXT,
            )
        ),
        lambda: sees(16, 1, 3, 8, 8), 21 * GROUPED, GROUPED, "model.layers", "model.vqmodel",
    ),
    # States in place of keys: of each layer the last 3 (conv) and 4 (state) numbers of 64 channels.
    "mamba": Case(
        lambda: t.MambaForCausalLM(
            t.MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0)
        ),
        lambda: {"input_ids": ids()}, 2 * 64 * (4 + 4) * 4, 0, "backbone.layers",
    ),
    "jamba": Case(
        lambda: t.JambaForCausalLM(
            t.JambaConfig(
                **{**TEXT, "num_hidden_layers": 4}, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
                expert_layer_offset=1, num_experts=2, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False,
            )
        ),
        lambda: {"input_ids": ids()}, 2 * 64 * (4 + 4) * 4 + 5 * GROUPED, GROUPED, "model.layers",
    ),
    "lfm2": Case(
        lambda: t.Lfm2ForCausalLM(t.Lfm2Config(layer_types=["conv", "full_attention"], **TEXT)),
        lambda: {"input_ids": ids()}, 32 * 3 * 4 + 5 * GROUPED // 2, GROUPED // 2, "model.layers",
    ),
    "rwkv": Case(
        lambda: t.RwkvForCausalLM(
            t.RwkvConfig(
                vocab_size=300, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, context_length=64,
                pad_token_id=0,
            )
        ),
        lambda: {"input_ids": ids()}, 5 * 32 * 2 * 4, 0, "rwkv.blocks",
    ),
}  # fmt: skip


def built(name: str) -> Any:
    torch.manual_seed(0)
    model = CASES[name].build().eval()
    return prepared(model, name)


def prepared(model: Any, name: str) -> Any:
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    model.generation_config.pad_token_id = 0
    CASES[name].fixed(model)
    return model


def profiled(model: Any, inputs: dict[str, Any], tokens: int = 4, **how: Any) -> tuple[Profiler, torch.Tensor]:
    with Profiler(model) as profiler:
        out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **how)
    return profiler, out


@pytest.mark.parametrize("name", CASES)
def test_a_model_is_counted_by_its_structure(name: str) -> None:
    case, model = CASES[name], built(name)
    plain = model.generate(**case.inputs(), max_new_tokens=4, do_sample=False)
    profiler, out = profiled(model, case.inputs())
    assert torch.equal(out, plain)
    assert profiler.tokens.kv_bytes == [case.cache + case.token * step for step in range(4)]
    where, reading, static = profiler.anatomy, profiler.reading, profiler.meter.static_bytes
    assert where.layers[0][0] == f"{case.layers}.0"
    top = max(reading.peak_allocated_bytes)
    assert sum(reading.parts.values()) == top - static
    if case.vision is not None:
        assert where.vision[0][0] == case.vision
    if case.vision not in (None, "model.vqmodel"):  # which is not called as a module
        assert static < reading.vision_peak_bytes <= top
    assert not any(hooks for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks))


@pytest.mark.parametrize("name", CASES)
def test_it_is_predicted_from_its_configuration(name: str) -> None:
    case = CASES[name]
    config = built(name).config
    with memprof.weightless(config, dtype="float32", card="h100") as model, Profiler(model) as profiler:
        if name == "jamba":
            with pytest.raises(UsageError, match="bfloat16 alone"):
                prepared(model, name).generate(**case.inputs(), max_new_tokens=4, do_sample=False)
            return
        prepared(model, name).generate(**case.inputs(), max_new_tokens=4, do_sample=False)
    assert profiler.tokens.kv_bytes == [case.cache + case.token * step for step in range(4)]
    assert type(model).__name__ == type(built(name)).__name__


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "qwen3_vl_moe"])
def test_experts_are_predicted_whoever_goes_where(kind: str) -> None:
    """One product runs all experts over the sorted tokens: what it makes follows from how many there are."""
    experts = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8, "num_experts": 4}
    given: dict[str, Any] = {"input_ids": ids(8)}
    config: Any
    if kind == "mixtral":
        config = t.MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **TEXT)
    elif kind == "qwen3_moe":
        config = t.Qwen3MoeConfig(**experts, **TEXT)
    else:
        vision = {
            "depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32,
            "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1],
        }  # fmt: skip
        config = t.Qwen3VLMoeConfig(
            text_config={"rope_parameters": ROPE, **TEXT, **experts}, vision_config=vision, image_token_id=IMAGE,
            vision_start_token_id=298, vision_end_token_id=297,
        )  # fmt: skip
        given = pieces(16)
    torch.manual_seed(0)
    lengths = given["input_ids"].shape[1]
    peaks = []
    for seed in range(2):
        asked = given["input_ids"]
        moved = {**given, "input_ids": torch.where(asked < 200, asked + seed, asked)}
        with memprof.weightless(config, dtype="bfloat16") as model, Profiler(model) as profiler:
            model.generate(**moved, max_new_tokens=3, do_sample=False)
        assert profiler.tokens.kv_bytes == [(lengths + step) * GROUPED // 2 for step in range(3)]
        peaks.append(profiler.reading.peak_allocated_bytes)
    assert peaks[0] == peaks[1]


# -- around a model ----------------------------------------------------------------------------------------------------


def llama() -> Any:
    torch.manual_seed(0)
    model = t.LlamaForCausalLM(t.LlamaConfig(**TEXT)).eval()
    model.generation_config.eos_token_id = None
    return model


class Adapter(nn.Module):
    """As PEFT's wrappers are: an adapter's model around the base model, and generate() handed on."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = base

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.model.generate(*args, **kwargs)


def test_a_wrapper_is_its_model() -> None:
    model = llama()
    inside, _ = profiled(model, {"input_ids": ids()})
    around, _ = profiled(Adapter(model), {"input_ids": ids()})
    assert around.tokens.kv_bytes == inside.tokens.kv_bytes
    assert around.reading.peak_allocated_bytes == inside.reading.peak_allocated_bytes
    assert around.anatomy.layers[0][0] == "base_model.model.model.layers.0"


def test_peft() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    assert profiled(model, {"input_ids": ids()})[0].tokens.kv_bytes == [n * GROUPED for n in range(5, 9)]


def test_without_a_cache_nothing_is_kept_and_every_forward_is_a_token() -> None:
    profiler, _ = profiled(llama(), {"input_ids": ids()}, use_cache=False)
    assert profiler.tokens.kv_bytes == [0] * 4
    assert profiler.kv_tokens == []


def test_outputs_that_are_tuples_hide_no_cache() -> None:
    model = llama()
    with Profiler(model) as profiler:
        out = model(input_ids=ids(), past_key_values=t.DynamicCache(), use_cache=True, return_dict=False)
    assert type(out) is tuple
    assert profiler.tokens.kv_bytes == [5 * GROUPED]


def test_a_window_without_a_generation_is_no_reading() -> None:
    said = r"no forward of LlamaForCausalLM ran inside the window: call generate\(\)"
    with pytest.raises(MemprofError, match=said), Profiler(llama()):
        llama().generate(ids(), max_new_tokens=2)


def test_a_second_generation_is_told_by_name() -> None:
    model = llama()
    with Profiler(model):
        model.generate(ids(), max_new_tokens=2)
        with pytest.raises(MemprofError, match="a second generation began"):
            model.generate(ids(), max_new_tokens=2)
    assert len(profiled(model, {"input_ids": ids()})[0].tokens) == 4


def test_what_follows_a_failed_forward_is_told_from_it() -> None:
    model = llama()

    def fails(*_: Any) -> None:
        raise RuntimeError("once")

    with Profiler(model) as profiler:
        hook = model.model.register_forward_hook(fails)
        with pytest.raises(RuntimeError, match="once"):
            model.generate(ids(), max_new_tokens=3)
        hook.remove()
        with pytest.raises(MemprofError, match="a second generation began"):
            model.generate(ids(), max_new_tokens=3)
    assert "a second generation began" in str(profiler.refused)
    assert len(profiled(model, {"input_ids": ids()})[0].tokens) == 4


@pytest.mark.parametrize("how", ["forward", "model"])
def test_a_compiled_model(how: str) -> None:
    model = llama()
    plain, out = profiled(model, {"input_ids": ids()})
    if how == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
        compiled = model
    else:
        compiled = torch.compile(model, backend="eager")
    profiler, again = profiled(compiled, {"input_ids": ids()})
    assert torch.equal(out, again)
    assert profiler.tokens.kv_bytes == plain.tokens.kv_bytes


class Halved(torch.Tensor):
    """A tensor made of two others, as quantisation packages have them."""

    @staticmethod
    def __new__(cls, whole: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=whole.dtype)

    def __init__(self, whole: torch.Tensor) -> None:
        self.data_part, self.scale = whole.to(torch.int8), whole.abs().amax(-1, keepdim=True)

    def __tensor_flatten__(self) -> Any:
        return ["data_part", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(str(func))


@pytest.mark.parametrize("form", ["pair", "packed"])
def test_a_quantised_cache_counts_what_it_holds(form: str) -> None:
    layer: Any = t.cache_utils.DynamicLayer()
    layer.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8))
    wide = torch.ones(1, 2, 7, 8)
    packed: Any = (wide.to(torch.int8), wide.amax(-1)) if form == "pair" else Halved(wide)
    layer._quantized_keys = packed
    cache = t.DynamicCache()
    cache.layers = [layer]
    assert sum(storages(cache).values()) == 2 * (2 * 3 * 8 * 4) + 2 * 7 * 8 + 2 * 7 * 4


def test_offloaded_weights_hold_nothing_until_they_are_there() -> None:
    """As accelerate does it: a weight waits on the meta device, and is loaded while its module runs."""
    model, whole = llama(), llama()
    layer, held = model.model.layers[1].mlp, dict(llama().model.layers[1].mlp.named_parameters())

    def fill(*_: Any) -> None:
        for name, weight in held.items():
            owner = layer.get_submodule(name.rpartition(".")[0])
            owner.weight = nn.Parameter(weight.detach().clone())

    def empty(*_: Any) -> None:
        layer.to("meta")

    empty()
    layer.register_forward_pre_hook(fill)
    layer.register_forward_hook(empty)
    assert type(meter_for(model)) is CpuMeter
    missing = sum(weight.nbytes for weight in held.values())
    assert meter_for(model).static_bytes == meter_for(whole).static_bytes - missing
    profiler, out = profiled(model, {"input_ids": ids()})
    assert torch.equal(out, profiled(whole, {"input_ids": ids()})[1])
    assert max(profiler.reading.peak_allocated_bytes) > profiler.meter.static_bytes + missing


def test_weights_that_are_nowhere_are_told() -> None:
    with torch.device("meta"):
        model = t.LlamaForCausalLM(t.LlamaConfig(**TEXT))
    with pytest.raises(UsageError, match="LlamaForCausalLM are on meta, where nothing can be measured"):
        Profiler(model)


def test_attention_that_a_model_has_not_is_told() -> None:
    config = CASES["mamba"].build().config
    said = "no sdpa attention for a MambaConfig; ask for eager"
    with pytest.raises(UsageError, match=said), memprof.weightless(config, attention="sdpa"):
        pass


SMALL = {"vocab_size": 300, "hidden_size": 32}
#: What transformers has no SDPA for, or writes its configuration in a way of its own.
ODD: dict[str, Callable[[], Any]] = {
    "no SDPA": lambda: CASES["mamba"].build().config,
    "attention without a configuration": lambda: t.BloomConfig(n_layer=2, n_head=4, **SMALL),
    "keys that are numbers": lambda: t.MptConfig(d_model=32, n_layers=2, n_heads=4, vocab_size=300),
    "an infinity": lambda: t.Mamba2Config(
        num_hidden_layers=2, state_size=8, num_heads=8, head_dim=8, n_groups=2, expand=2, **SMALL
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_attention_is_what_the_model_has_where_none_is_asked_for(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMPROF_CACHE", str(tmp_path / "cache"))
    config = ODD[case]()
    config.save_pretrained(tmp_path / "model")
    found = [memprof.predict(config, text_tokens=6, new_tokens=2)]
    found += [memprof.predict(of, text_tokens=6, new_tokens=2) for of in (tmp_path / "model", str(tmp_path / "model"))]
    assert {run.record.spec.attention for run in found} == {"eager"}
    assert len({run.peak for run in found}) == 1
    with memprof.weightless(tmp_path / "model") as model:
        assert model.config._attn_implementation == "eager"
    with pytest.raises(LacksAttention, match="no sdpa attention"):
        memprof.predict(config, text_tokens=6, new_tokens=2, attention="sdpa")


def test_what_sees_is_no_language_model() -> None:
    """Transformers has a class for Mllama's decoder alone, too; its tower would be left out without a word."""
    text = {**SMALL, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "pad_token_id": 0}
    config = t.MllamaConfig(text_config=text, vision_config={"hidden_size": 16})
    for images in ((), ((64, 64),)):
        with pytest.raises(WeightsError, match=r"a mllama is more than its language model.*predict\(config, inputs\)"):
            memprof.predict(config, images=images, text_tokens=6, new_tokens=1)


@pytest.mark.parametrize("nothing", [None, {"model_type": "llama"}, 5])
def test_what_is_no_model_is_told(nothing: Any) -> None:
    for inputs in (None, {"input_ids": ids()}):
        with pytest.raises(UsageError, match=f"a {type(nothing).__name__} says nothing of a model"):
            memprof.predict(nothing, inputs, new_tokens=1)


# -- as `memprof run --model FILE` -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words", "code", "said"),
    [
        ("jamba", (), 0, "Jamba"), ("lfm2", (), 0, "Lfm2"), ("mamba", ("--attention", "eager"), 0, "Mamba"),
        ("mamba", (), 2, "transformers has no sdpa attention for mamba; use --attention eager"),
        ("bart", (), 1, "a bart reads with an encoder, and memprof run takes decoders alone"),
    ],
)  # fmt: skip
def test_a_configuration_is_run_or_refused_in_a_line(
    name: str, words: tuple[str, ...], code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("MEMPROF_CACHE", str(tmp_path / "cache"))
    config = CASES[name].build().config
    config.dtype = "bfloat16"
    (tmp_path / f"{name}.json").write_text(json.dumps(config.to_dict(), default=str))
    (tmp_path / "one.csv").write_text("width,height,text_tokens\n100,100,5\n")
    ended, out, err = call(
        capsys, "run", "--model", str(tmp_path / f"{name}.json"), "--device", "sim", "--data",
        str(tmp_path / "one.csv"), "--max-new-tokens", "3", "-o", str(tmp_path / "r"), "-q", *words,
    )  # fmt: skip
    assert ended == code, err
    if code:
        assert said in err
        assert err.count("\n") == 1
        return
    (sample,) = read_run(tmp_path / "r").samples
    kept = CASES[name]
    wide = 2 * 64 * 4 * 4 if name in ("mamba", "jamba") else 0  # states stay float32
    assert sample.tokens.kv_bytes == [(kept.cache + step * kept.token + wide) // 2 for step in range(3)]
    assert out


def test_layers_that_differ_are_all_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention stands in the seventh layer alone: a few layers at the start do not tell of it."""
    monkeypatch.setenv("MEMPROF_CACHE", str(tmp_path / "cache"))
    config = CASES["lfm2"].build().config
    config = type(config)(
        **{**TEXT, "num_hidden_layers": 8}, layer_types=[*["conv"] * 6, "full_attention", "conv"], dtype="bfloat16"
    )
    (tmp_path / "hybrid.json").write_text(json.dumps(config.to_dict(), default=str))
    memory = memprof.predict(str(tmp_path / "hybrid.json"), text_tokens=9, new_tokens=3).memory.fullest
    conv, attention = 7 * 32 * 3 * 2, GROUPED // 4
    assert memory.tokens.kv_bytes == [conv + (9 + step) * attention for step in range(3)]
