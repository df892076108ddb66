"""``memprof compare`` and ``memprof audit --published`` from the outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memprof.cli import main


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main([*words])
    return int(ended.value.code or 0)


def test_compare_writes_runs_table_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("compare", "--model", "proving", "--task", "ocrbench", "--methods", "random,dart", "--keep", "0.5,0.25",
             "--limit", "2", "--max-new-tokens", "3", "-o", str(tmp_path))  # fmt: skip
    assert run(*words) == 0
    out = capsys.readouterr().out
    assert "| 0.5 / 0.5 | DART |" in out
    for name in ("compare.json", "compare.md", "comparison.pdf", "comparison.png", "comparison.json"):
        assert (tmp_path / name).is_file()
    assert run(*words, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert {row["spec"] for row in document["rows"]} >= {"baseline", "dart:keep=0.25,layer=2"}


@pytest.mark.parametrize(
    "words",
    [
        ("--keep", "a"), ("--keep", "0"), ("--keep", "0.5,2"), ("--methods", "nothing"), ("--unit", "parsec"),
        ("--methods", "baseline"),
    ],
)  # fmt: skip
def test_compare_refuses_what_it_cannot_do(words: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("compare", "--model", "proving", *words) == 2
    assert capsys.readouterr().err.startswith("memprof: ")


def test_audit_says_which_definition_gives_a_published_figure(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("audit", "--published", "31.5 MB", "--model", "llava-1.5-7b", "--method", f"divprune:keep={60 / 576}")
    assert run(*words) == 0
    assert "<- the figure, read in MB" in capsys.readouterr().out
    assert run(*words, "--json") == 0
    assert json.loads(capsys.readouterr().out)["published"][0]["matches"]


@pytest.mark.parametrize("words", [(), ("runs/x", "--method", "topv"), ("--method", "topv", "--published", "much")])
def test_audit_refuses_a_figure_of_nothing(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    published = () if "--published" in words else ("--published", "31.5 MB")
    assert run("audit", *published, *words) == 2
    assert capsys.readouterr().err.startswith("memprof: ")
