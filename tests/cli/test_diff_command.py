"""``memprof diff``: a sentence and a table, or one JSON document."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typed import call

sys.path.insert(0, str(Path(__file__).parents[1] / "figures"))

from synthetic import make_runs, write_runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    write_runs(path, make_runs(samples=4, tokens=3))
    return path


def test_a_sentence_and_a_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "diff", str(folder / "ai2d-baseline"), str(folder / "ai2d-topv"))
    assert (code, err) == (0, "")
    assert "lower than A above static" in out
    assert "KV cache" in out
    assert "samples in both" in out
    assert "note:" not in out
    assert "\x1b" not in out


def test_other_tasks_are_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "diff", str(folder / "ai2d-topv"), str(folder / "ocrbench-topv"))
    assert code == 0
    assert "note: different tasks: ai2d and ocrbench" in out


def test_json_is_one_document(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "diff", str(folder / "ai2d-baseline"), str(folder / "ai2d-fastv"), "--json")
    assert code == 0
    data = json.loads(out)
    assert data["schema"] == 1
    assert sum(part["change"] for part in data["parts"]) == data["dynamic"]["change"]


def test_a_run_with_itself_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "diff", str(folder / "ai2d-topv"), str(folder / "ai2d-topv"))
    assert (code, out) == (2, "")
    assert "compared with itself" in err
