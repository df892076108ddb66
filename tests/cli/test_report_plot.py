"""``memprof report`` and ``memprof plot``: results to stdout, errors as one line and an exit code, no torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "figures"))

from synthetic import make_run, make_runs, write_runs

from memprof.cli import plot, report
from memprof.errors import DataError, UnknownName, UsageError
from memprof.records import SampleRecord, summarize
from memprof.store import find_runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    write_runs(path, make_runs(("ai2d",), samples=5, tokens=3))
    return path


def test_report_prints_a_table(folder, capsys):
    report.report([folder])
    out = capsys.readouterr().out
    assert "InternVL2-2B on AI2D" in out
    assert "\x1b" not in out


def test_report_json_is_the_document(folder, capsys):
    report.report([folder], format="json")
    assert json.loads(capsys.readouterr().out)["runs"] == [summarize(run) for run in find_runs([folder])]


def test_report_writes_a_file_and_names_it(folder, tmp_path, capsys):
    file = tmp_path / "deep" / "report.html"
    report.report([folder], format="html", output=file)
    assert capsys.readouterr().out == f"{file}\n"
    assert file.read_text().startswith("<!DOCTYPE html>")


def test_errors_say_what_is_valid(folder, tmp_path):
    with pytest.raises(UnknownName, match="valid: chrome, csv, html, json, latex, markdown, snapshot, table"):
        report.report([folder], format="xml")
    with pytest.raises(UsageError, match="--unit MB is for what is shown; a snapshot holds bytes"):
        report.report([folder], format="snapshot", unit="MB", output=tmp_path / "memory.pickle")
    with pytest.raises(DataError, match="holds no run"):
        report.report([tmp_path])
    with pytest.raises(DataError, match="holds no run"):
        plot.plot([tmp_path], tmp_path / "out")


def test_plot_writes_figures_and_lists_them(folder, tmp_path, capsys):
    plot.plot([folder / "ai2d-topv"], tmp_path / "plots")
    listed = capsys.readouterr().out.split()
    assert listed
    assert sorted(map(Path, listed)) == sorted((tmp_path / "plots").iterdir())
    assert {Path(p).suffix for p in listed} == {".pdf", ".png", ".json", ".txt"}


def test_plot_draws_again_from_data(folder, tmp_path, capsys):
    plot.plot([folder / "ai2d-topv"], tmp_path / "a", format=["png"])
    plot.plot(sorted((tmp_path / "a").glob("*.json")), tmp_path / "b", format=["png"], quiet=True)
    capsys.readouterr()
    for file in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()


def test_nothing_to_draw_is_an_error(tmp_path):
    run = make_run(samples=1)
    run.samples[:] = [SampleRecord("a", "failed", "no")]
    (path,) = write_runs(tmp_path / "runs", [run])
    with pytest.raises(DataError, match="nothing to draw"):
        plot.plot([path], tmp_path / "plots")


@pytest.mark.parametrize("command", ["report", "plot"])
def test_no_torch_is_loaded(folder, tmp_path, command):
    call = {
        "report": f"report.report([{str(folder)!r}])",
        "plot": f"plot.plot([Path({str(folder)!r})], Path({str(tmp_path)!r}), format=['png'])",
    }[command]
    code = (
        f"import sys; from pathlib import Path; from memprof.cli import {command}; {call}\n"
        "assert not {'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, stdout=subprocess.DEVNULL)
