"""The commands as a user types them: output, exit codes, one clear line for every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typed import call

from memprof.cli import commands


@pytest.fixture
def small(tmp_path: Path) -> str:
    path = tmp_path / "small.csv"
    path.write_text("width,height,text_tokens\n448,448,20\n")
    return str(path)


def test_run_prints_one_json_document_and_writes_what_it_says(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, small: str
) -> None:
    code, out, err = call(
        capsys, "run", "--method", "baseline", "--method", "topv", "--data", small, "--device", "sim",
        "--max-new-tokens", "2", "--json", "-o", str(tmp_path / "r"),
    )  # fmt: skip
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document["schema"] == 1
    keys = {
        "model", "method", "task", "device", "status", "stack", "samples", "failed", "tokens", "static_bytes",
        "dynamic_peak_bytes", "peak_allocated_bytes", "peak_reserved_bytes", "kv_cache_bytes", "parts",
        "visual_flops_cut", "path",
    }  # fmt: skip
    for one, folder in zip(document["runs"], ("baseline", "topv"), strict=True):
        assert keys <= set(one)
        assert one["status"] == "predicted"
        assert sum(one["parts"].values()) == one["dynamic_peak_bytes"]
        assert one["path"] == str(tmp_path / "r" / folder)
        assert (tmp_path / "r" / folder / "run.json").exists()
    assert document["runs"][1]["method"] == "topv:keep=0.5,layer=2"


def test_an_existing_run_is_not_touched(capsys: pytest.CaptureFixture[str], tmp_path: Path, small: str) -> None:
    words = ["run", "--data", small, "--device", "sim", "--max-new-tokens", "1", "-o", str(tmp_path / "r"), "-q"]
    assert call(capsys, *words)[0] == 0
    lines = (tmp_path / "r" / "samples.jsonl").read_bytes()
    code, out, err = call(capsys, *words)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert "--resume" in err
    assert "--force" in err
    assert call(capsys, *words, "--resume")[0] == 0
    assert (tmp_path / "r" / "samples.jsonl").read_bytes() == lines


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["run", "--model", "gpt"], 2, "internvl2-2b"),
        (["run", "--method", "nope"], 2, "baseline"),
        (["run", "--method", "topv:kep=1"], 2, "keep"),
        (["run", "--method", "topv:keep=1.2"], 2, "keep=1.2 is outside (0, 1]"),
        (["run", "--method", "topv:layer=30"], 2, "24 decoder layers"),
        (["run", "--task", "nope"], 2, "ai2d"),
        (["run", "--device", "tpu"], 2, "cuda"),
        (["run", "--stack", "old"], 2, "paper"),
        (["run", "--unit", "G"], 2, "GiB"),
        (["run", "--nope"], 2, "No such option"),
        (["run", "--data", "/nowhere.csv", "--device", "sim"], 1, "/nowhere.csv"),
        (["report", "/nowhere"], 1, "no run"),
        (["report", "/nowhere", "--format", "pdf"], 2, "markdown"),
        (["list", "nothing"], 2, "methods"),
    ],
)
def test_mistakes_are_one_clear_line(
    capsys: pytest.CaptureFixture[str], words: list[str], code: int, says: str
) -> None:
    got, out, err = call(capsys, *words)
    assert (got, out) == (code, "")
    assert says in err
    assert err.startswith("memprof: ")
    assert err.count("\n") == 1


def test_a_broken_csv_is_named_with_its_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text("width,height,text_tokens\n448,448,20\nwide,448,20\n")
    code, _, err = call(capsys, "run", "--data", str(path), "--device", "sim")
    assert code == 1
    assert "bad.csv, line 3" in err


def test_cuda_without_a_card_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a card")
    code, _, err = call(capsys, "run", "--device", "cuda")
    assert code == 1
    assert "--device sim" in err


@pytest.mark.parametrize("command", commands())
def test_every_command_has_help_with_examples(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = call(capsys, command, "--help")
    assert code == 0
    assert f"memprof {command}" in out


def test_list_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = call(capsys, "list", "--json")
    found = json.loads(out)
    from memprof.pruning import METHODS
    from memprof.tasks import TASKS

    assert [m["name"] for m in found["methods"]] == METHODS.names()
    assert all(f["origin"] and f["help"] for m in found["methods"] for f in m["fields"])
    assert [t["name"] for t in found["tasks"]] == TASKS.names()
    assert {d["name"] for d in found["devices"]} == {"cuda", "sim", "cpu"}
    assert "internvl2-2b" in {m["name"] for m in found["models"]}


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "doctor", "--json")
    assert code == 0
    assert json.loads(out)["devices"]["sim"] == "ready"
    assert "torch" in call(capsys, "doctor")[1]


def test_help_without_a_command_ends_with_its_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    out = call(capsys)[1]
    assert "Start with:  memprof run" in out
    assert out.rstrip("\n").splitlines()[-1].strip()
