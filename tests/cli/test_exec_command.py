"""``memprof exec``: the calls of an unchanged script, measured, and predicted over models without weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_model

from memprof.store import find_runs, read_run

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
#: Generates from three lines, one of them twice, and says what it was given.
SCRIPT = """
import sys, torch
from transformers import AutoModelForImageTextToText

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype=torch.float32).to(device)
torch.manual_seed(0)

def inputs(length, images=1):
    ids = torch.full((1, length), 5)
    ids[0, 2:18] = 290
    return {k: v.to(device) for k, v in dict(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.randn(images, 3, 112, 112)).items()}

with torch.inference_mode():
    print(model.generate(**inputs(24), max_new_tokens=4).shape)
for length in (30, 60):
    out = model.generate(**inputs(length), max_new_tokens=3, do_sample=True)
print(out.shape, torch.rand(1).item())
"""
AFTER = {
    "answers": 'print(out.tolist()); print(model.generate(**inputs(24), max_new_tokens=2).tolist()); sys.exit(3)',
    "decodes": "from transformers import PreTrainedTokenizerBase as T\n"
    "print(T.decode(None, out[0]), T.batch_decode(None, out))",
    "branches": "print('before')\nif out[0, -1] == 2:\n    print('stopped')",
    "measures": "print(torch.cuda.max_memory_allocated())",
    "looks up": "model.generate(**inputs(24), max_new_tokens=4, prompt_lookup_num_tokens=2)",
    "flash": 'AutoModelForImageTextToText.from_pretrained(sys.argv[1], attn_implementation="flash_attention_2")',
    "casts": "with torch.autocast(device): model.generate(**inputs(24), max_new_tokens=2)",
    "wrong": "model.generate(**inputs(24, images=3), max_new_tokens=2)",
    "falls back": "try:\n    model.generate(**inputs(10**6), max_new_tokens=2)\nexcept torch.OutOfMemoryError as e:\n"
    "    print('too large')\nmodel.generate(**inputs(10**6), max_new_tokens=2)",
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny InternVL as a user would have it on disk."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model("internvl")[2].save_pretrained(folder)
    return folder


def start(here: Path, model: Path, after: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the script with ``after`` behind it: with memprof where there are ``words`` for it, else alone."""
    (here / "demo.py").write_text(SCRIPT + after + "\n")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MEMPROF_CACHE": str(here / "cache"), "OMP_NUM_THREADS": "1"}
    watched = ["-m", "memprof", "exec", *words] if words else []
    return subprocess.run(
        [sys.executable, *watched, "demo.py", str(model)], cwd=here, env=env, capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip


def test_every_call_is_a_sample_and_the_script_is_none_the_wiser(tmp_path: Path, saved: Path) -> None:
    alone = start(tmp_path, saved, AFTER["answers"])
    done = start(tmp_path, saved, AFTER["answers"], "-o", "run")
    assert alone.returncode == done.returncode == 3, done.stderr
    assert done.stdout == alone.stdout
    run = read_run(tmp_path / "run")
    assert [sample.caller for sample in run.samples] == ["demo.py:16", "demo.py:18", "demo.py:18", "demo.py:20"]
    assert [len(sample.tokens) for sample in run.samples] == [4, 3, 3, 2]
    assert [sample.text_tokens for sample in run.samples] == [8, 14, 44, 8]
    assert {sample.visual_tokens for sample in run.samples} == {16}
    assert all(sample.ok and sample.dynamic_peak_bytes == sum(sample.peak_parts.values()) for sample in run.samples)
    assert run.record.complete
    assert run.record.status == "measured"
    assert all(":" in holder.line for holder in run.samples[0].peak_holders if holder.part not in ("inputs", "vision"))
    assert "demo.py:18" in done.stderr
    assert "saved in run" in done.stderr
    table = reported(tmp_path / "run")
    assert "demo.py:18" in table


def reported(folder: Path) -> str:
    from memprof import reports

    return reports.render("table", find_runs([folder])) + reports.render("markdown", find_runs([folder]))


def test_predicted_to_the_byte_as_a_window_of_ones_own(tmp_path: Path, saved: Path) -> None:
    import torch
    from transformers import AutoConfig

    import memprof

    done = start(tmp_path, saved, AFTER["decodes"], "-o", "run", "--predict", "--gpu", "l4")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "torch.Size([1, 28])"
    assert lines[-1] == "[no answer: predicted] ['[no answer: predicted]']"
    run = read_run(tmp_path / "run")
    assert run.record.status == "predicted"
    assert run.record.environment["gpu"] == "l4"
    ids = torch.full((1, 60), 5)
    ids[0, 2:18] = 290
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 112, 112)}
    config = AutoConfig.from_pretrained(saved)
    with memprof.weightless(config, card="l4", dtype="float32") as model, memprof.profile(model) as own:
        model.generate(**inputs, max_new_tokens=3, do_sample=True)
    assert run.samples[2].tokens == own.samples[0].tokens
    assert run.samples[2].peak_parts == own.samples[0].peak_parts
    assert run.record.static_bytes == own.record.static_bytes


@pytest.mark.parametrize(
    ("after", "line", "instead"),
    [
        ("branches", "demo.py:21 needs the value of a tensor", "run it without --predict"),
        ("measures", "demo.py:20: torch.cuda.", "run it without --predict"),
        ("looks up", "prompt lookup a forward is not a token", "profile generate() without them"),
        ("flash", "demo.py:20: from_pretrained(attn_implementation='flash_attention_2')", "give sdpa or eager"),
        ("casts", "demo.py:20: torch.autocast is not predicted", "from_pretrained(dtype=...)"),
    ],
)
def test_a_script_that_needs_an_answer_is_refused_in_one_line(
    tmp_path: Path, saved: Path, after: str, line: str, instead: str
) -> None:
    done = start(tmp_path, saved, AFTER[after], "-q", "-o", "run", "--predict")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert line in done.stderr
    assert instead in done.stderr
    assert len(read_run(tmp_path / "run").finished) == 3  # what was predicted before stays


#: Asks the card all that a script may ask of it without a model.
ASKING = """
import math, torch
print(torch.cuda.get_device_properties(0).total_memory)
start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
with torch.cuda.stream(torch.cuda.Stream()):
    start.record()
end.record(torch.cuda.current_stream())
end.synchronize(), torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
print(end.query(), math.isnan(start.elapsed_time(end)))
"""


@pytest.mark.parametrize("gpu", [None, "l4", "a100@any", "24GiB"])
def test_the_script_is_told_of_the_card_as_it_is(tmp_path: Path, gpu: str | None) -> None:
    from memprof.gpus import CARDS, DEFAULT, find_card

    (tmp_path / "demo.py").write_text(ASKING)
    words = ["--gpu", gpu] if gpu else []
    done = subprocess.run(
        [sys.executable, "-m", "memprof", "exec", "-q", "--predict", *words, "demo.py"], cwd=tmp_path, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=False, timeout=120,
    )  # fmt: skip
    card = find_card(gpu)
    real = card.memory_bytes or CARDS.get(card.name, CARDS[DEFAULT]).memory_bytes
    assert done.stdout.split() == [str(real), "True", "True"], done.stderr


def test_a_card_that_is_full_refuses_as_a_card_does(tmp_path: Path, saved: Path) -> None:
    done = start(tmp_path, saved, AFTER["falls back"], "-q", "-o", "run", "--predict", "--gpu", "1GiB")
    assert done.stdout.splitlines()[-1] == "too large", done.stderr
    assert done.returncode == 4
    assert done.stderr.startswith("memprof: predicted not to fit on 1GiB: ")
    assert done.stderr.count("\n") == 1
    run = read_run(tmp_path / "run")
    assert [sample.status for sample in run.samples] == ["ok", "ok", "ok", "oom", "oom"]
    assert run.samples[3].caller == "demo.py:21"


@pytest.mark.parametrize(
    ("what", "module", "name"), [("pkg.sub.demo", True, "_pkg.sub.demo"), ("here/demo.v2.py", False, "_demo.v2")]
)
def test_a_folder_of_its_own_has_the_whole_name(what: str, module: bool, name: str) -> None:
    from memprof.cli.exec import _new_folder

    assert _new_folder(what, module=module).name.endswith(name)


def test_an_error_in_generate_is_the_scripts_own(tmp_path: Path, saved: Path) -> None:
    done = start(tmp_path, saved, AFTER["wrong"], "-q", "-o", "run")
    assert done.returncode == 1
    assert 'demo.py", line 20, in <module>' in done.stderr
    assert done.stderr.splitlines()[-1].startswith("ValueError: Image features and image tokens do not match")
    assert "memprof" not in done.stderr
    assert [sample.status for sample in read_run(tmp_path / "run").samples] == ["ok", "ok", "ok", "failed"]
