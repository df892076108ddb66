"""``memprof audit``: passes end with 0, findings with 3 and one line each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typed import call

from memprof.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("audit")
    (path / "one.csv").write_text("width,height,text_tokens\n448,448,20\n")
    with pytest.raises(SystemExit) as end:
        main(["run", "--method", "topv", "--method", "fastv:drop=mask", "--device", "sim", "--json",
              "--data", str(path / "one.csv"), "--max-new-tokens", "1", "-o", str(path / "runs")])  # fmt: skip
    assert not end.value.code
    return path / "runs"


def test_a_run_that_kept_its_plan_passes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "audit", str(folder / "topv"))
    assert (code, err) == (0, "")
    assert "passed (1 prompt, 24 layers)" in out


def test_a_run_that_only_masked_fails_with_3(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "audit", str(folder))
    assert code == 3
    assert "masked: nothing left the cache: layers 2-23 hold all 324 tokens where 196 were to stay" in out
    assert err.startswith("memprof: the pruning plan is not met by fastv")
    assert err.count("\n") == 1


def test_json_is_one_document_also_when_it_fails(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "audit", str(folder), "--json")
    assert code == 3
    audits = {a["subject"].partition(":")[0]: a for a in json.loads(out)["audits"]}
    assert audits["topv"]["passed"]
    assert [f["kind"] for f in audits["fastv"]["findings"]] == ["masked"]


def test_a_cache_that_holds_more_than_it_needs_is_caught_in_a_record(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text((folder / "topv" / "run.json").read_text())
    sample = json.loads((folder / "topv" / "samples.jsonl").read_text())
    sample["kv_bytes_per_layer"][5] = sample["kv_bytes_per_layer"][0]
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    code, out, _ = call(capsys, "audit", str(tmp_path))
    assert code == 3
    assert "view: the KV of layer 5 keeps" in out


@pytest.mark.parametrize("key", ["kv_bytes_per_layer", "kv_tokens_found"])
def test_lengths_that_are_not_recorded_are_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    (tmp_path / "run.json").write_text((folder / "topv" / "run.json").read_text())
    sample = json.loads((folder / "topv" / "samples.jsonl").read_text())
    (tmp_path / "samples.jsonl").write_text(json.dumps({**sample, key: []}) + "\n")
    code, out, err = call(capsys, "audit", str(tmp_path))
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert f"sample {sample['id']} is recorded with KV lengths of" in err


@pytest.mark.parametrize("words", [("--stack", "paper"), ("--dtype", "float32"), ("--device", "cpu")])
def test_what_a_run_says_is_not_asked_for(
    folder: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, str]
) -> None:
    expected = f"memprof: {words[0]} goes with --method; a run says it\n"
    assert call(capsys, "audit", str(folder / "topv"), *words) == (2, "", expected)


def test_a_method_is_tried(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "audit", "--method", "uniform:keep=0.25")
    assert code == 0
    assert out == "uniform:keep=0.25,layer=2 on InternVL2-2B: passed (1 prompt, 24 layers)\n"


def test_either_a_run_or_a_method(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], [str(folder), "--method", "topv"]):
        code, _, err = call(capsys, "audit", *words)
        assert code == 2
        assert "not both" in err
