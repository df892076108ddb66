"""Checkpoints of every layout load bit for bit, within the host memory promised; what is wrong with one is said."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import TEXT, logits, model_of, old_hf, original_config, original_internvl, tiny, write
from safetensors.torch import load_file, save_file

from memprof.errors import WeightsError
from memprof.families import Model
from memprof.models.build import build_model
from memprof.models.checkpoint import load_checkpoint
from memprof.models.find import find

ATTENTION = {"text_config": "eager", "vision_config": "sdpa"}


def load(name: str, where: Path | str, dtype: str = "float32") -> Any:
    """What a user gets who names the published model and gives a path."""
    return load_checkpoint(find(name, str(where)), str(where), device="cpu", dtype=dtype, attention=ATTENTION)


def assert_same(found: Any, wanted: Any, card: Model) -> None:
    """Every parameter and buffer bit for bit, and so the logits."""
    assert found.state_dict().keys() == wanted.state_dict().keys()
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    buffers = dict(found.named_buffers())
    for name, buffer in wanted.named_buffers():
        assert torch.equal(buffers[name], buffer), name
        assert buffers[name].dtype == buffer.dtype, name
    assert torch.equal(logits(found, card), logits(wanted, card))


# -- layouts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    ("name", "kind", "template"),
    [
        ("internvl2-2b", "internlm2", "internlm2-chat"),
        ("internvl2-26b", "internlm2", "internlm2-chat"),  # InternViT-6B: RMSNorm, qk-norm, no qkv bias
        ("internvl2.5-1b", "qwen2", "internvl2_5"),
    ],
)
def test_original_internvl(name: str, kind: str, template: str, shards: int, tmp_path: Path) -> None:
    card = tiny(name)
    model = model_of(card)
    write(tmp_path / "mine", original_internvl(model), original_config(card, kind, template), shards)
    found = load(name, tmp_path / "mine")
    assert_same(found, model, card)
    assert found.generation_config.eos_token_id == card.text["eos_token_id"]
    published = find(name)
    family = published.family
    derived = find(name, str(tmp_path / "mine"))
    assert (derived.name, derived.title) == (name, f"{published.title} as in mine")
    assert (derived.config["chat"], derived.max_tiles, derived.dtype) == (template, 6, "bfloat16")
    assert family.image_token(derived) == family.image_token(card)
    assert {key: derived.text[key] for key in TEXT} == TEXT
    again = find(derived.name, str(tmp_path / "mine"))
    assert again == derived  # so that who has the derived card may pass it on


@pytest.mark.parametrize("name", ["internvl3-1b", "internvl2-2b", "llava-1.5-7b"])
@pytest.mark.parametrize("names", ["old", "new"])
def test_hf(name: str, names: str, tmp_path: Path) -> None:
    card = tiny(name)
    model = model_of(card)
    tensors = old_hf(model) if names == "old" else model.state_dict()
    write(tmp_path, tensors, model.config.to_dict(), shards=2)
    assert_same(load(name, tmp_path), model, card)


def test_sizes_like_the_cards_keep_its_title(tmp_path: Path) -> None:
    card = find("llava-1.5-7b")
    family = card.family
    (tmp_path / "config.json").write_text(json.dumps(family.config(card).to_dict()))
    found = find(card.name, str(tmp_path))
    assert (found.title, found.source) == (card.title, f"configuration file of {tmp_path}")


@pytest.mark.parametrize("name", ["internvl2-2b", "internvl3-8b", "llava-1.5-13b"])
def test_a_card_and_its_configuration_say_the_same(name: str, tmp_path: Path) -> None:
    card = find(name)
    family = card.family
    (tmp_path / "config.json").write_text(json.dumps(family.config(card).to_dict()))
    assert family.config(find(name, str(tmp_path))).to_dict() == family.config(card).to_dict()


def test_random_weights_leave_the_card_alone() -> None:
    card = find("internvl2-2b")
    assert find(card.name, "random") is card


class TestTiedEmbeddings:
    @pytest.fixture
    def model(self) -> Any:
        return model_of(tiny("internvl3-1b", tie_word_embeddings=True))

    def test_stored_once(self, model: Any, tmp_path: Path) -> None:
        tensors = {k: v for k, v in old_hf(model).items() if "lm_head" not in k}
        write(tmp_path, tensors, model.config.to_dict())
        found = load("internvl3-1b", tmp_path)
        assert found.lm_head.weight is found.get_input_embeddings().weight
        assert_same(found, model, tiny("internvl3-1b"))

    def test_stored_twice(self, model: Any, tmp_path: Path) -> None:
        """What is stored decides: a model that says it is tied and stores an output embedding runs with it."""
        tensors = old_hf(model)
        tensors["language_model.lm_head.weight"] = tensors["language_model.lm_head.weight"] + 1
        write(tmp_path, tensors, model.config.to_dict())
        found = load("internvl3-1b", tmp_path)
        assert torch.equal(found.lm_head.weight, found.get_input_embeddings().weight + 1)


def test_stored_buffers_are_made_anew(tmp_path: Path) -> None:
    """Old checkpoints stored rotary tables and position ids; they are not taken for foreign tensors, nor used."""
    card = tiny("llava-1.5-7b")
    model = model_of(card)
    tensors = old_hf(model) | {
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.full((4,), 9.0),
        "vision_tower.vision_model.embeddings.position_ids": torch.zeros(1, 17, dtype=torch.int64),
    }
    write(tmp_path, tensors, model.config.to_dict())
    assert_same(load("llava-1.5-7b", tmp_path), model, card)


# -- dtype, attention, generation --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny InternVL2-2B in the original layout."""
    card = tiny("internvl2-2b")
    config = original_config(card, "internlm2", "internlm2-chat")
    return write(tmp_path_factory.mktemp("good") / "good", original_internvl(model_of(card)), config)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype(good: Path, dtype: str) -> None:
    whole, half = load("internvl2-2b", good), load("internvl2-2b", good, dtype)
    for (name, found), wanted in zip(half.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(found, wanted.to(getattr(torch, dtype))), name
    for (name, found), wanted in zip(half.named_buffers(), whole.buffers(), strict=True):
        assert found.dtype == torch.float32, name
        assert torch.equal(found, wanted), name


def test_every_parameter_has_its_own_storage(good: Path) -> None:
    """Nothing is a view of the file or of a fused tensor: what a storage holds is what its parameter is."""
    model = load("internvl2-2b", good)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == len(list(model.parameters()))


def test_as_build_model_calls_it(good: Path) -> None:
    where = str(good / "model.safetensors")
    model: Any = build_model(
        find("internvl2-2b", where), device="cpu", dtype="float32", weights=where, attention="eager"
    )
    assert model.config.text_config._attn_implementation == "eager"
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert not model.training


def test_single_file_without_configuration_is_held_to_the_card(good: Path, tmp_path: Path) -> None:
    shutil.copy(good / "model.safetensors", tmp_path / "alone.safetensors")
    with pytest.raises(WeightsError, match=r"has shape .* of InternVL2-2B cannot have its"):
        load("internvl2-2b", tmp_path / "alone.safetensors")
    alone = str(tmp_path / "alone.safetensors")
    card = tiny("internvl2-2b")
    model = load_checkpoint(card, alone, device="cpu", dtype="float32", attention=ATTENTION)
    assert_same(model, model_of(card), card)


# -- what is wrong is said ---------------------------------------------------------------------------------------------

NORM = "language_model.model.norm.weight"


def tensors_of(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def config_of(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        part, _, leaf = key.rpartition("__")
        (config[part] if part else config)[leaf] = value
    (folder / "config.json").write_text(json.dumps(config))


def cut(folder: Path, size: int) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(size if size > 0 else file.seek(0, 2) + size)


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")


def index(folder: Path, **shards: str) -> None:
    listed = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors") | shards
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))


BROKEN: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "nothing": (lambda f: (f / "model.safetensors").unlink(), ("good", "holds no weights", "safetensors only")),
    "pickle": (pickle_only, ("pytorch_model.bin", "a pickle, which can run code", "safetensors only")),
    "missing": (lambda f: tensors_of(f, lambda t: t.pop(NORM)), ("model.language_model.norm.weight", "missing from")),
    "foreign": (
        lambda f: tensors_of(f, lambda t: t.update(lora=torch.ones(1))),
        ("'lora'", "model.safetensors", "no part of InternVL2-2B as in good"),
    ),
    "shape": (
        lambda f: tensors_of(f, lambda t: t.update({NORM: torch.ones(33)})),
        (NORM, "model.safetensors", "shape (33,)", "(32,)"),
    ),
    "fused": (
        lambda f: tensors_of(f, lambda t: t.update({"mlp1.1.weight": t["mlp1.1.weight"].T.contiguous()})),
        ("mlp1.1.weight", "model.safetensors"),
    ),
    "wqkv": (
        lambda f: tensors_of(
            f, lambda t: t.update({"language_model.model.layers.1.attention.wqkv.weight": torch.ones(63, 32)})
        ),
        ("layers.1.attention.wqkv.weight", "shape (63, 32)"),
    ),
    "quantised": (
        lambda f: tensors_of(f, lambda t: t.update({NORM: torch.ones(32, dtype=torch.int8)})),
        (NORM, "model.safetensors", "stored as I8"),
    ),
    "same": (
        lambda f: tensors_of(f, lambda t: t.update({"model.language_model.norm.weight": torch.ones(32)})),
        (NORM, "model.language_model.norm.weight", "one and the same"),
    ),
    "twice": (
        lambda f: save_file({NORM: torch.ones(32)}, f / "more.safetensors"),
        (NORM, "model.safetensors", "more.safetensors", "stands twice"),
    ),
    "truncated": (lambda f: cut(f, -8), ("model.safetensors", "is truncated: tensor '", "ends at byte")),
    "header": (lambda f: cut(f, 900), ("model.safetensors", "is truncated: its header")),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), ("model.safetensors", "not a safetensors file")),
    "garbage": (lambda f: (f / "model.safetensors").write_bytes(b"\x93NUMPY" * 99), ("not a safetensors file",)),
    "list": (
        lambda f: (f / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]"),
        ("not a safetensors file",),
    ),
    "pointer": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        ("model.safetensors", "Git LFS pointer", "git lfs pull"),
    ),
    "shard": (lambda f: index(f, extra="other.safetensors"), ("other.safetensors", "is missing", "'extra'")),
    "index": (lambda f: index(f, extra="model.safetensors"), ("'extra'", "model.safetensors", "index says")),
    "json": (lambda f: (f / "config.json").write_text("{"), ("config.json", "cannot be read as JSON")),
    "array": (lambda f: (f / "config.json").write_text("[]"), ("config.json", "no JSON object")),
    "other": (lambda f: config_of(f, model_type="llava"), ("config.json", "'llava'", "internvl2-2b")),
    "phi": (lambda f: config_of(f, llm_config__model_type="phi3"), ("config.json", "'phi3'", "internlm2")),
    "lacking": (
        lambda f: config_of(f, llm_config={"model_type": "internlm2"}),
        ("config.json", "'vocab_size' is missing"),
    ),
    "type": (lambda f: config_of(f, llm_config__hidden_size="wide"), ("config.json", "hidden_size")),
    "layer": (lambda f: config_of(f, select_layer=-4), ("config.json", "select_layer -4")),
    "shuffle": (lambda f: config_of(f, ps_version="v1"), ("config.json", "ps_version 'v1'")),
    "resized": (lambda f: config_of(f, force_image_size=448), ("config.json", "force_image_size 448", "56")),
    "chat": (lambda f: config_of(f, template="phi3-chat"), ("config.json", "'phi3-chat'", "'internlm2-chat'")),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken(name: str, good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "good"
    shutil.copytree(good, folder)
    spoil, said = BROKEN[name]
    spoil(folder)
    with pytest.raises(WeightsError) as caught:
        load("internvl2-2b", folder)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in said), message
    assert caught.value.exit_code == 1


def test_no_such_path(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no checkpoint at"):
        load("internvl2-2b", tmp_path / "absent")


def test_pickle_by_name(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"w\.bin is a pickle"):
        load("internvl2-2b", tmp_path / "w.bin")


def test_vision_tower_of_another_kind(tmp_path: Path) -> None:
    config = model_of(tiny("llava-1.5-7b")).config.to_dict()
    config["vision_config"] = {"model_type": "siglip_vision_model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    card = find("llava-1.5-7b")
    with pytest.raises(WeightsError, match="siglip_vision_model"):
        find(card.name, str(tmp_path))


def test_remote_code_is_never_run(good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "good"
    shutil.copytree(good, folder)
    for name in ("modeling_internvl_chat.py", "configuration_internvl_chat.py", "tokenization_internlm2.py"):
        (folder / name).write_text("raise SystemExit('remote code ran')")
    load("internvl2-2b", folder)


# -- the hub -----------------------------------------------------------------------------------------------------------

ASK = """
import sys
from memprof.errors import WeightsError
from memprof.models.find import find
from memprof.models.checkpoint import load_checkpoint
try:
    model = load_checkpoint(find("internvl2-2b", "hub"), "hub", device="cpu", dtype="float32", attention="sdpa")
    print(sum(p.numel() for p in model.parameters()))
except WeightsError as error:
    print("error:", error)
"""


def on_the_hub(home: Path) -> str:
    """What loading says with ``home`` as the whole world."""
    import os

    env = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    env.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", ASK], env=env, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.slow
def test_offline_and_cached(good: Path, tmp_path: Path) -> None:
    said = on_the_hub(tmp_path / "empty")
    assert said.startswith("error: OpenGVLab/InternVL2-2B is not in the Hugging Face cache")
    assert "HF_HUB_OFFLINE" in said
    assert "\n" not in said
    repository = tmp_path / "full" / "hub" / "models--OpenGVLab--InternVL2-2B"
    shutil.copytree(good, repository / "snapshots" / "0123abcd")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    assert int(on_the_hub(tmp_path / "full")) == sum(p.numel() for p in load("internvl2-2b", good).parameters())


# -- host memory -------------------------------------------------------------------------------------------------------

MEASURE = """
import gc, sys
from memprof.models.find import find
from memprof.models.checkpoint import load_checkpoint

def resident(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))

warm, big, dtype = sys.argv[1:]
load = lambda where: load_checkpoint(find("internvl2-2b", where), where, device="cpu", dtype=dtype, attention="sdpa")
load(warm)
gc.collect()
with open("/proc/self/clear_refs", "w") as reset:
    reset.write("5")
before = resident("VmRSS")
model = load(big)
print(resident("VmHWM") - before, sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_host_memory(good: Path, tmp_path: Path) -> None:
    """Below 1.2 x the checkpoint; where every tensor is converted on its way, as far below as the model is smaller."""
    card = tiny("internvl2-2b", hidden_size=512, intermediate_size=2048, num_hidden_layers=8, vocab_size=2000)
    config = original_config(card, "internlm2", "internlm2-chat")
    big = write(tmp_path / "big", original_internvl(model_of(card)), config, shards=2)
    size = sum(file.stat().st_size for file in big.glob("*.safetensors"))
    assert size > 100_000_000
    for dtype in ("float32", "bfloat16"):
        command = [sys.executable, "-c", MEASURE, str(good), str(big), dtype]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak, held = map(int, done.stdout.split())
        assert 0.9 * held < peak < held + 0.2 * size, (dtype, peak, held, size)
