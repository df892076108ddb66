"""What is printed at 60, 80 and 120 columns: nothing cut, nothing beyond the edge, as the files in ``screens`` have it.

``pytest --record`` writes them anew; look at them before they are committed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typed import call

sys.path.insert(0, str(Path(__file__).parent / "figures"))

from synthetic import METHODS, make_runs, write_runs

from memprof.models.find import named
from memprof.reports._fitting import fitting
from memprof.reports._paper import Paper

SCREENS = Path(__file__).parent / "screens"
MANY = (*METHODS, "pyramiddrop:keep=0.5", "visionzip:keep=0.25", "vispruner:keep=0.25")
COMMANDS = {
    "report": ("report", "made"),
    "explain": ("explain", "made/ai2d-topv", "--no-what-if"),
    "explain-several": ("explain", "made", "--no-what-if"),
    "diff": ("diff", "made/ai2d-baseline", "made/ai2d-topv"),
    "list-cards": ("list", "cards"),
    "list-tasks": ("list", "tasks"),
}


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("name", COMMANDS)
def test_screens(
    name: str, width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", str(width))
    write_runs(Path("made"), make_runs(("ai2d",), MANY, samples=3, tokens=3))
    code, out, err = call(capsys, *COMMANDS[name])
    assert code == 0, err
    text = "".join(f"{line.rstrip()}\n" for line in out.splitlines())
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    file = SCREENS / f"{name}-{width}.txt"
    if request.config.getoption("--record"):
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [60, 80, 120, 160])
def test_ids_of_models_are_whole(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that they can be copied, whatever the terminal's width."""
    monkeypatch.setenv("COLUMNS", str(width))
    code, out, _ = call(capsys, "list", "models")
    assert code == 0
    words = out.split()
    for model in named().values():
        assert model.name in words
        assert not model.hub or model.hub in words
    assert max(map(len, out.splitlines())) <= width


@pytest.mark.parametrize("columns", [4, 9, 14])
@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_no_table_is_cut(width: int, columns: int) -> None:
    """Of whatever width: a search has as many columns as fields, a score has an interval."""
    head = ["method", *(f"field {number}" for number in range(columns - 1)), "status"]
    cells = [f"0.{n}00 [{n}.00, {n + 1}.00]" for n in range(columns - 1)]
    rows = [["method-1", *cells, "predicted"], ["method-2", *cells, "failed"]]
    paper = Paper(width, colour=False)
    paper.print(fitting(paper, ["", ""], head, rows))
    assert "…" not in paper.text
    assert max(map(len, paper.text.splitlines())) <= width
    for cell in (word for row in rows for text in row for word in text.split()):
        assert cell in paper.text, cell
