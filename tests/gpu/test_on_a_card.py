"""What only a card can show: that what is called measured is what torch and the driver say. Skipped without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import state_of, tiny_card, tiny_model, tiny_prompt

import memprof
from memprof.analysis.validate import compare, predict
from memprof.bench.generate import place, profile_prompt
from memprof.bench.outcome import release
from memprof.cli import main
from memprof.meters.cuda import ATTRIBUTIONS, CudaMeter, PeakCounter
from memprof.models import find
from memprof.models.find import named
from memprof.profiler import Profiler
from memprof.prompts import Prompt
from memprof.pruning import build_pruner
from memprof.records import PARTS, RunSpec
from memprof.runner import run
from memprof.snapshots.history import HISTORY, read_history
from memprof.snapshots.report import check_replay
from memprof.store import read_run
from memprof.units import GIB, MIB

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no card"),
]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Prompt]:
    """A tiny model on the card, its kernels loaded and its workspaces there, and a prompt."""
    kind, card, model = tiny_model("internvl", device="cuda")
    prompt = tiny_prompt(kind, card, width=800, height=600)
    for _ in range(2):
        generate(model, prompt)
    return model, prompt


@pytest.fixture(autouse=True)
def empty() -> Iterator[None]:
    release("cuda")
    yield
    assert not PeakCounter._open
    release("cuda")


def generate(model: Any, prompt: Prompt, tokens: int = 6) -> list[int]:
    out = model.generate(**place(prompt, model), max_new_tokens=tokens, do_sample=False)
    return [int(token) for token in out[0, len(prompt.ids) :]]


def profiled(model: Any, prompt: Prompt, **how: Any) -> tuple[Profiler, list[int]]:
    release("cuda")
    with Profiler(model, CudaMeter(model, **how)) as profiler:
        made = generate(model, prompt)
    return profiler, made


@pytest.mark.parametrize("attribution", ATTRIBUTIONS)
def test_the_peak_is_what_torch_says_without_memprof(tiny: tuple[Any, Prompt], attribution: str) -> None:
    model, prompt = tiny
    static = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    plain = generate(model, prompt)
    peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    before = state_of(model)
    profiler, made = profiled(model, prompt, attribution=attribution)
    reading = profiler.reading
    assert made == plain
    assert state_of(model) == before
    assert (max(reading.peak_allocated_bytes), max(reading.reserved_bytes)) == peaks
    assert all(len(column) == 6 for column in vars(profiler.tokens).values())
    for peak, now, held in zip(
        reading.peak_allocated_bytes, reading.allocated_bytes, reading.reserved_bytes, strict=True
    ):
        assert static < now <= peak <= held
    assert static < reading.vision_peak_bytes <= peaks[0]
    assert set(reading.parts) == set(PARTS)
    assert sum(reading.parts.values()) == peaks[0] - static
    assert reading.parts["unexplained"] >= 0
    if attribution != "none":
        assert reading.parts["unexplained"] < 0.5 * (peaks[0] - static)
        assert reading.holders
    del made
    release("cuda")
    assert torch.cuda.memory_allocated() == static


def test_a_window_around_ones_own_generate_counts_what_it_is_given(tiny: tuple[Any, Prompt]) -> None:
    model, prompt = tiny
    before = torch.cuda.memory_allocated()
    inputs = place(prompt, model)
    given = torch.cuda.memory_allocated() - before
    asked: dict[str, Any] = {**inputs, "max_new_tokens": 6, "do_sample": False}
    plain = model.generate(**asked).tolist()
    release("cuda")
    torch.cuda.reset_peak_memory_stats()
    model.generate(**asked)
    peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    with memprof.profile(model) as window:
        assert model.generate(**asked).tolist() == plain
    (sample,) = window.samples
    assert (window.peak, sample.peak_reserved_bytes) == peaks
    assert window.record.static_bytes == before
    assert window.parts["inputs"] == given
    assert sum(window.parts.values()) == peaks[0] - before
    assert (window.record.status, window.record.spec.device) == ("measured", "cuda")


def test_kv_is_exact_on_the_card(tiny: tuple[Any, Prompt]) -> None:
    model, prompt = tiny
    text = model.config.text_config
    a_token = 2 * text.num_hidden_layers * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads) * 4
    profiler, _ = profiled(model, prompt)
    assert profiler.tokens.kv_bytes == [a_token * (prompt.shape.length + t) for t in range(6)]


def test_what_stood_in_the_counter_before_is_given_back(tiny: tuple[Any, Prompt]) -> None:
    model, prompt = tiny
    torch.cuda.reset_peak_memory_stats()
    hill = torch.empty(256 * MIB, dtype=torch.uint8, device="cuda")
    before = torch.cuda.max_memory_allocated()
    del hill
    profiler, _ = profiled(model, prompt)
    meter = profiler.meter
    assert isinstance(meter, CudaMeter)
    assert meter.counter.outer_bytes == before > max(profiler.reading.peak_allocated_bytes)


def test_nested_windows_see_the_same_peaks(tiny: tuple[Any, Prompt]) -> None:
    model, prompt = tiny
    with (
        Profiler(model, CudaMeter(model, "none")) as outer,
        Profiler(model, CudaMeter(model)) as inner,
    ):
        generate(model, prompt)
    assert outer.reading.peak_allocated_bytes == inner.reading.peak_allocated_bytes
    assert outer.reading.reserved_bytes == inner.reading.reserved_bytes


def test_an_inner_window_hides_nothing_from_the_outer_one(tiny: tuple[Any, Prompt]) -> None:
    model, prompt = tiny
    outer = PeakCounter(torch.device("cuda", 0))
    outer.open()
    profiler, _ = profiled(model, prompt)
    top = max(profiler.reading.peak_allocated_bytes)
    assert outer.take().peak_allocated >= top
    outer.close()


def test_the_driver_is_asked_or_a_note_says_why_not(tiny: tuple[Any, Prompt]) -> None:
    model, prompt = tiny
    profiler, _ = profiled(model, prompt, ask_driver="always")
    meter = profiler.meter
    assert isinstance(meter, CudaMeter)
    used = profiler.tokens.device_used_bytes
    for held, n_bytes in zip(profiler.tokens.reserved_bytes, used, strict=True):
        assert n_bytes is not None
        assert n_bytes > held
    whose = meter.environment()["device_bytes_of"]
    assert meter.notes() == [] if whose == "process" else "whole card" in meter.notes()[0]
    rarely, _ = profiled(model, prompt)
    assert rarely.tokens.device_used_bytes[0] is not None


def test_the_environment_is_whole(tiny: tuple[Any, Prompt]) -> None:
    here = CudaMeter(tiny[0]).environment()
    assert here["gpu"] == torch.cuda.get_device_name(0)
    assert here["gpu_memory_bytes"] > 10 * GIB
    assert here["allocator"] == "native"
    assert here["allocator_in_force"]["expandable_segments"] is False
    json.dumps(here)


def test_allocator_settings_of_the_environment_are_recorded() -> None:
    code = (
        "import json, torch\nfrom memprof.environment import environment\n"
        "from memprof.meters.cuda import allocator_in_force\ntorch.ones(1, device='cuda')\n"
        "print(json.dumps([environment()['allocator_settings'], allocator_in_force()]))"
    )
    asked = os.environ | {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=asked)
    assert done.returncode == 0, done.stderr
    said, in_force = json.loads(done.stdout.splitlines()[-1])
    assert said == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert in_force["expandable_segments"] is True


def test_an_exception_leaves_nothing(tiny: tuple[Any, Prompt]) -> None:
    model, prompt = tiny
    before, static = state_of(model), torch.cuda.memory_allocated()

    def fail(*_: Any) -> None:
        raise RuntimeError("stop")

    hook = model.lm_head.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        profiled(model, prompt)
    hook.remove()
    release("cuda")
    assert state_of(model) == before
    assert torch.cuda.memory_allocated() == static


def shapes(folder: Path, *sizes: tuple[int, int]) -> str:
    path = folder / "shapes.csv"
    path.write_text("\n".join(["width,height,text_tokens", *(f"{w},{h},53" for w, h in sizes), ""]))
    return str(path)


def near(one: Any, slack: int) -> None:
    """KV exact; dynamic peak and reserved within 3 %, or ``slack`` bytes where a model is too small for shares."""
    there = predict(one, {})
    for point in compare(one, there):
        if point.measure == "kv_cache":
            assert point.error == 0
        elif point.measure in ("dynamic", "reserved"):
            assert abs(point.predicted - point.measured) <= max(0.03 * point.measured, slack), point


@pytest.mark.parametrize("method", ["baseline", "topv", "fastv:scores=row"])
def test_tiny_models_are_predicted(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "find", lambda name, *_: tiny_card(named()[name].family))
    data = shapes(tmp_path, (1792, 1344), (448, 448))
    spec = RunSpec("internvl2-2b", method, "ai2d", "cuda", data=data, max_new_tokens=4)
    done = run(spec, tmp_path / "run")
    assert all(sample.ok for sample in done.samples), done.samples
    assert done.record.status == "measured"
    assert all(sample.tokens.seconds[0] for sample in done.samples)
    near(done, 4 * MIB)


@pytest.mark.slow
def test_internvl2_2b_is_predicted_at_one_tile(tmp_path: Path) -> None:
    spec = RunSpec("internvl2-2b", "baseline", "ai2d", "cuda", data=shapes(tmp_path, (448, 448)), max_new_tokens=4)
    done = run(spec, tmp_path / "run")
    sample = done.samples[0]
    assert sample.ok, sample.error
    assert sum(sample.peak_parts.values()) == sample.dynamic_peak_bytes
    assert sample.dynamic_peak_bytes == sample.peak_allocated_bytes - done.record.static_bytes
    near(done, 0)


@pytest.mark.slow
def test_out_of_memory_is_recorded_and_ends_with_5_where_nothing_ran(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 5 * GIB) / total)
    try:
        for name, sizes, code in (("run", ((448, 448), (1792, 1344)), 0), ("none", ((1792, 1344),), 5)):
            (tmp_path / name).mkdir()
            with pytest.raises(SystemExit) as done:
                main(["run", "--device", "cuda", "--stack", "paper", "--data", shapes(tmp_path / name, *sizes),
                      "--max-new-tokens", "2", "-q", "-o", str(tmp_path / name / "run")])  # fmt: skip
            assert done.value.code == code
            assert "ran out of memory" in capsys.readouterr().err
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    fine, beyond = read_run(tmp_path / "run" / "run").samples
    assert fine.status == "ok"
    assert beyond.status == "oom"
    for words in ("out of memory", "Tried to allocate", "it ended in prefill of token 0", "held then: static"):
        assert words in str(beyond.error)


def test_a_history_replays_to_the_last_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    import record_reference as script

    monkeypatch.setattr(find, "find", script.tiny)
    step = next(step for step in script.steps("cuda", 3) if step.shape is not None)
    assert script.Recorder(tmp_path, 600).record([step])
    about, recording = read_history(next(tmp_path.glob(f"*{HISTORY}")))
    assert about["environment"]["gpu"] == torch.cuda.get_device_name(0)
    assert len(recording) > 1_000
    assert any(frames[0].filename.endswith(".py") for frames in recording.stacks)
    assert check_replay(recording).exact


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", ["topv", "fastv:scores=row", "fastv:scores=map", "random"])
def test_pruning_holds_on_the_card(method: str, attention: str) -> None:
    pruner = build_pruner(method)
    kind, card, model = tiny_model("internvl", "eager" if pruner.eager else attention, "cuda")
    prompt = tiny_prompt(kind, card, width=800, height=600)
    memory = profile_prompt(model, CudaMeter(model), pruner, "current", prompt, new_tokens=3).memory
    assert memory.kv_tokens_found == memory.kv_tokens_planned
    assert memory.kept_visual_tokens[-1] == round(prompt.shape.visual_tokens / 2)
    assert sum(memory.fullest.peak_parts.values()) == memory.fullest.dynamic_peak_bytes
