"""Which run is meant: its folder, ``latest``, a part of its name; and what there is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typed import call


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """A folder with two saved runs of the smallest model: an older one of two methods in runs/, a newer elsewhere."""
    (tmp_path / "one.csv").write_text("width,height,text_tokens\n448,448,20\n")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    given = ["run", "--model", "proving", "--device", "sim", "--max-new-tokens", "1"]
    given += ["--data", str(tmp_path / "one.csv")]
    assert call(capsys, *given, "--method", "baseline", "--method", "topv", "-o", "runs/both", "-q")[0] == 0
    assert call(capsys, *given, "--method", "fastv", "-o", str(tmp_path / "elsewhere"), "-q")[0] == 0
    for file in Path("runs/both").glob("*/*"):
        os.utime(file, (1_700_000_000, 1_700_000_000))
    return tmp_path


def test_a_run_says_where_it_is(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "--model", "proving", "--device", "sim", "--max-new-tokens", "1", "--data", str(here / "one.csv")]
    code, out, err = call(capsys, *words)
    assert code == 0
    (made,) = (path for path in Path("runs").iterdir() if path.name != "both")
    assert f"saved in {made}" in err
    assert str(made) not in out
    assert call(capsys, "report", made.name[5:], "--format", "json")[0] == 0


@pytest.mark.parametrize(
    ("named", "methods"),
    [
        ("latest", ["fastv"]), ("both", ["baseline", "topv"]), ("bot", ["baseline", "topv"]), ("topv", ["topv"]),
        ("both/topv", ["topv"]), ("ot/opv", ["topv"]), ("runs/both", ["baseline", "topv"]), ("elsewhere", ["fastv"]),
    ],
)  # fmt: skip
def test_a_run_is_found_by_a_part_of_its_name(
    here: Path, capsys: pytest.CaptureFixture[str], named: str, methods: list[str]
) -> None:
    code, out, _ = call(capsys, "report", named, "--format", "json")
    assert code == 0
    assert [run["method"].partition(":")[0] for run in json.loads(out)["runs"]] == methods


def test_a_name_that_two_runs_have_is_refused_with_both(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "report", "both/", "--format", "json")
    assert code == 0
    code, _, err = call(capsys, "report", "t", "--format", "json")
    assert code == 1
    assert err.count("\n") == 1
    assert "runs/both" in err
    assert "elsewhere" in err
    code, _, err = call(capsys, "explain", "no-such-run")
    assert (code, "memprof runs" in err) == (1, True)


def test_runs_are_listed_newest_first(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "runs", "--json")
    rows = json.loads(out)["runs"]
    assert (code, [Path(row["path"]).name for row in rows]) == (0, ["elsewhere", "both"])
    assert all(row["peak_allocated_bytes"] > 0 and row["status"] == "predicted" for row in rows)
    out = call(capsys, "runs")[1]
    assert out.index("elsewhere") < out.index("both")
    assert "Baseline, TopV" in out


def test_a_run_that_moved_away_or_was_damaged_is_no_failure(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "elsewhere").rename(here / "moved")
    Path("runs/both/topv/run.json").write_text("[]")
    code, out, _ = call(capsys, "runs")
    assert code == 0
    assert "elsewhere" not in out
    assert "cannot be read" in out


def test_interrupted_it_says_what_is_kept_and_how_to_go_on(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "two.csv").write_text("width,height,text_tokens\n448,448,20\n448,448,30\n")
    from memprof import runner

    real, seen = runner._profile_sample, []

    def once(*given: object) -> object:
        if seen:
            raise KeyboardInterrupt
        seen.append(given)
        return real(*given)  # type: ignore[arg-type]

    words = ["run", "--model", "proving", "--device", "sim", "--max-new-tokens", "1", "--data", str(here / "two.csv")]
    monkeypatch.setattr("sys.argv", ["memprof", *words])
    with monkeypatch.context() as patch:
        patch.setattr(runner, "_profile_sample", once)
        code, _, err = call(capsys, *words, "-o", "runs/cut")
    assert code == 130
    assert "1 sample kept in runs/cut" in err
    again = err.strip().partition("go on with: ")[2].split()
    assert again[0] == "memprof"
    assert "unfinished" in call(capsys, "runs")[1]
    assert "unfinished" in call(capsys, "report", "cut")[1]
    code, out, _ = call(capsys, *again[1:], "--json")
    assert (code, json.loads(out)["runs"][0]["samples"]) == (0, 2)


def test_a_folder_of_plain_pictures_is_predicted_from_their_sizes(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    from memprof.store import read_run
    from memprof.tasks import TASKS

    (here / "pictures").mkdir()
    sizes = {"a.png": (40, 30), "b.jpg": (64, 64)}
    for name, size in sizes.items():
        Image.new("RGB", size).save(here / "pictures" / name)
    words = ["run", "--model", "internvl3-1b", "--max-new-tokens", "1", "--data", str(here / "pictures"), "-q"]
    code, out, err = call(capsys, *words, "--device", "sim", "--text-tokens", "7", "-o", "p")
    assert code == 0, err
    assert "pictures in pictures" in " ".join(out.split())
    assert "AI2D" not in out
    run = read_run("p")
    assert {s.id: (s.width, s.height) for s in run.samples} == sizes
    template = run.samples[0].text_tokens - 7
    code, _, err = call(capsys, *words, "--device", "sim", "-o", "q", "--limit", "1")
    assert code == 0, err
    assert read_run("q").samples[0].text_tokens == template + TASKS.build("ai2d").usual_text_tokens()


def test_trials_of_a_search_are_on_no_list(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("memprof.cli._runs.LIST", tmp_path / "runs.txt")
    words = ("run", "--model", "proving", "--method", "baseline", "--device", "sim", "--limit", "1", "-q")
    assert call(capsys, *words, "--unlisted", "-o", str(tmp_path / "trial"))[0] == 0
    assert not (tmp_path / "runs.txt").exists()
    assert call(capsys, *words, "-o", str(tmp_path / "mine"))[0] == 0
    assert (tmp_path / "runs.txt").read_text().split() == [str(tmp_path / "mine")]
