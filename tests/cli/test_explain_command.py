"""``memprof explain``: a sentence and tables to stdout, one JSON document with ``--json``, errors as one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typed import call

from memprof.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("explain")
    (path / "one.csv").write_text("width,height,text_tokens\n448,448,20\n")
    with pytest.raises(SystemExit) as end:
        main(["run", "--method", "topv", "--stack", "paper", "--device", "sim", "--data", str(path / "one.csv"),
              "--max-new-tokens", "1", "-o", str(path / "run"), "--json"])  # fmt: skip
    assert not end.value.code
    return path / "run"


def test_the_record_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "explain", str(folder), "--no-what-if", "--unit", "MiB")
    assert code == 0
    assert err == ""
    assert out.startswith("InternVL2-2B under TopV peaks at ")
    assert "Who holds it at that instant (predicted)" in out
    assert "Largest tensors then" in out
    assert "What would lower it" not in out
    assert "\x1b" not in out


def test_what_would_lower_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "explain", str(folder))
    assert code == 0
    assert err == ""
    assert "What would lower it (predicted; * may change answers)" in out
    assert "8-bit KV" in out
    assert "keep 0.1" in out


def test_json_is_one_document_of_bytes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "explain", str(folder), "--no-what-if", "--json")
    assert code == 0
    (found,) = json.loads(out)["explanations"]
    assert sum(found["parts"].values()) == found["dynamic_peak_bytes"]
    assert found["answers"] == []


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--sample", "nobody"], 2, "unknown finished sample 'nobody'"),
        (["--unit", "G"], 2, "unknown unit"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, says: str
) -> None:
    got, out, err = call(capsys, "explain", str(folder), *words)
    assert (got, out) == (code, "")
    assert says in err
    assert err.count("\n") == 1


def test_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "explain", str(tmp_path))
    assert code == 1
    assert "holds no run" in err
