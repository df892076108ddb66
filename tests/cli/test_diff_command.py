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


def test_more_than_allowed_ends_with_3_and_says_what_grew(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(
        capsys, "diff", str(folder / "ai2d-topv"), str(folder / "ai2d-baseline"), "--fail-above", "2%"
    )
    assert code == 3
    assert "dynamic peak of" in out
    assert err.startswith("memprof: B takes more than A by more than 2%: dynamic peak of")
    assert err.count("\n") == 1


def test_what_is_allowed_ends_with_0(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = str(folder / "ai2d-topv"), str(folder / "ai2d-baseline")
    code, out, err = call(capsys, "diff", *pair, "--fail-above", "2%", "--fail-above", "900GiB")
    assert (code, err) == (0, "")
    code, less, _ = call(capsys, "diff", *reversed(pair), "--fail-above", "0%")
    assert code == 0
    assert "dynamic peak of" not in out + less


def test_markdown_for_a_pull_request(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = str(folder / "ai2d-topv"), str(folder / "ai2d-baseline")
    code, out, _ = call(capsys, "diff", *pair, "--fail-above", "2%", "--format", "markdown")
    assert code == 3
    lines = out.splitlines()
    assert lines[0] == "### Memory: grew by more than 2%"
    head = next(line for line in lines if line.startswith("| what"))
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert "B - A" in head
    assert any(line.startswith("| static") for line in lines)
    _, held, _ = call(capsys, "diff", *pair, "--fail-above", "99GiB", "--format", "markdown")
    assert held.splitlines()[0] == "### Memory: within 99GiB"
    _, free, _ = call(capsys, "diff", *pair, "--format", "markdown")
    assert "###" not in free


def test_json_says_what_is_above(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = str(folder / "ai2d-topv"), str(folder / "ai2d-baseline")
    code, out, _ = call(capsys, "diff", *pair, "--fail-above", "2%", "--json")
    assert code == 3
    data = json.loads(out)
    assert data["fail_above"] == "2%"
    assert all(one["change"] == one["b"] - one["a"] > 0 for one in data["above"])
    assert "above" not in json.loads(call(capsys, "diff", *pair, "--format", "json")[1])


def verdicts(out: str) -> list[str]:
    return [line.removeprefix("### ") for line in out.splitlines() if line.removeprefix("### ").startswith("Memory: ")]


@pytest.mark.parametrize("words", [[], ["--format", "markdown"]])
def test_the_verdict_is_said_in_the_terminal_as_in_markdown(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    pair = str(folder / "ai2d-topv"), str(folder / "ai2d-baseline")
    for limit, verdict in (("2%", "grew by more than 2%"), ("99GiB", "within 99GiB")):
        assert verdicts(call(capsys, "diff", *pair, "--fail-above", limit, *words)[1]) == [f"Memory: {verdict}"]
    assert verdicts(call(capsys, "diff", *pair, *words)[1]) == []


def test_a_sample_that_is_gone_fails_every_limit(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_runs(tmp_path, make_runs(("ai2d",), samples=1, tokens=3))
    words = "diff", str(folder / "ai2d-topv"), str(tmp_path / "ai2d-topv"), "--fail-above", "900GiB"
    code, out, err = call(capsys, *words)
    assert code == 3
    assert verdicts(out) == ["Memory: 2 that finished in A do not in B"]
    assert out.count("B has no such sample") == 2
    assert err.startswith("memprof: B does not finish what A did: dynamic peak of ")
    assert err.endswith("B has no such sample; and 1 more\n")
    data = json.loads(call(capsys, *words, "--json")[1])
    assert data["verdict"] == "2 that finished in A do not in B"
    assert [(one["b"], one["reason"]) for one in data["above"]] == [(None, None)] * 2


def test_a_run_that_is_gone_fails_every_limit_and_a_new_one_none(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_runs(samples=4, tokens=3)
    write_runs(tmp_path, [run for run in made if run is not made[0]])
    code, out, err = call(capsys, "diff", str(folder), str(tmp_path), "--fail-above", "900GiB")
    assert code == 3
    assert "in one folder only: baseline on internvl2-2b, AI2D (in A)" in out.replace("\n", " ")
    assert verdicts(out) == ["Memory: 1 that finished in A does not in B"]
    assert err.startswith("memprof: B does not finish what A did: run of baseline on internvl2-2b, ai2d: ")
    assert err.endswith("at its highest in A; B has no such run\n")
    code, out, _ = call(capsys, "diff", str(tmp_path), str(folder), "--fail-above", "0%", "--format", "markdown")
    assert code == 0
    assert verdicts(out) == ["Memory: within 0%"]
    assert "(in B)" in out
    assert "different tasks" not in out  # each was paired with its own


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--fail-above", "2"], "2%"),
        (["--format", "pdf"], "valid: json, markdown, table"),
        (["--format", "markdown", "--json"], "disagree"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    code, out, err = call(capsys, "diff", str(folder / "ai2d-topv"), str(folder / "ai2d-baseline"), *words)
    assert (code, out) == (2, "")
    assert said in err
