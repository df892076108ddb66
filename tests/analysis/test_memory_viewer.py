"""A predicted run becomes a file for PyTorch's memory viewer: every allocation, at the addresses of our allocator."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import families, tiny_card

from memprof.analysis.memory_viewer import export
from memprof.cli import main
from memprof.errors import DataError, UnknownName, UsageError
from memprof.families import FAMILIES
from memprof.records import Run, RunSpec, SampleRecord
from memprof.runner import run
from memprof.snapshots.report import analyse


def tiny_run(
    family: str, folder: Path, monkeypatch: pytest.MonkeyPatch, rows: str = "400,200,9\n100,100,9\n", **fields: Any
) -> Run:
    """A run of a tiny model of ``family`` on two shapes, predicted."""
    kind = FAMILIES.load(family)()
    monkeypatch.setattr("memprof.models.find.find", lambda *_: tiny_card(kind))
    data = folder / "shapes.csv"
    data.write_text("width,height,text_tokens\n" + rows)
    spec = RunSpec(
        "tiny", "topv:keep=0.5", "ai2d", "sim", dtype="float32", data=str(data), max_new_tokens=3, max_tiles=4
    )
    return run(dataclasses.replace(spec, **fields), folder / "run")


@pytest.mark.parametrize("family", families())
@pytest.mark.parametrize("settings", ["", "expandable_segments:True"])
def test_the_file_reads_back_exactly(
    family: str, settings: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", settings)
    found = tiny_run(family, tmp_path, monkeypatch)
    path = tmp_path / "deep" / "memory.pickle"
    done = export(found, path)
    top = found.highest
    assert top is not None
    assert done.sample == top.id
    assert not done.notes
    report = analyse(path)  # by the reader that takes plain data alone
    assert report.replay.exact
    assert report.replay.addresses_total > 300
    assert report.events == done.events
    assert (report.peak_allocated_bytes, report.peak_reserved_bytes) == (
        top.peak_allocated_bytes, top.peak_reserved_bytes
    )  # fmt: skip
    assert report.status == "predicted"
    data = pickle.loads(path.read_bytes())
    frames = [event["frames"] for event in data["device_traces"][0]]
    assert {stack[-1]["filename"] for stack in frames} == {"<predicted by memprof>"}
    assert any(stack[0]["filename"].startswith("aten.mm") and "layers.2" in stack[1]["name"] for stack in frames)
    assert {f"token {t}: decode" for t in (1, 2)} < {a["name"] for a in data["external_annotations"]}
    assert data["memprof"]["spec"]["method"].startswith("topv:keep=0.5")
    weights = [
        b for s in data["segments"] for b in s["blocks"] if b["frames"][:1] and b["frames"][0]["filename"] == "loaded"
    ]
    assert sum(b["size"] for b in weights) == found.record.static_bytes


def test_a_sample_is_chosen_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tiny_run("internvl", tmp_path, monkeypatch)
    low = min(found.finished, key=lambda s: s.dynamic_peak_bytes)
    assert export(found, tmp_path / "low.pickle", low.id).sample == low.id
    assert analyse(tmp_path / "low.pickle").peak_allocated_bytes == low.peak_allocated_bytes
    with pytest.raises(UnknownName, match="unknown sample 'nowhere'"):
        export(found, tmp_path / "no.pickle", "nowhere")


def test_a_record_that_says_otherwise_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tiny_run("internvl", tmp_path, monkeypatch)
    top = found.highest
    assert top is not None
    top.tokens.peak_allocated_bytes[top.peak_token] += 512
    (note,) = export(found, tmp_path / "memory.pickle").notes
    assert "predicted by another version" in note
    assert f"{top.peak_allocated_bytes - 512:,} bytes allocated, not {top.peak_allocated_bytes:,})" in note


def test_what_a_card_refuses_ends_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tiny_run("internvl", tmp_path, monkeypatch, "100,100,3000\n", gpu="539MiB")  # 500: context; 33: workspaces
    assert {s.status for s in found.samples} == {"oom"}
    export(found, tmp_path / "memory.pickle")
    (events,) = pickle.loads((tmp_path / "memory.pickle").read_bytes())["device_traces"]
    assert events[-1]["action"] == "oom"


def test_what_was_measured_is_not_predicted_in_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tiny_run("internvl", tmp_path, monkeypatch)
    found.record.status = "measured"
    with pytest.raises(UsageError, match="_record_memory_history") as caught:
        export(found, tmp_path / "memory.pickle")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "memory.pickle").exists()
    found.record.status, found.samples = "predicted", [SampleRecord("a", "failed", "no")]
    with pytest.raises(DataError, match="no sample to predict again"):
        export(found, tmp_path / "memory.pickle")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_run("internvl", tmp_path, monkeypatch)
    path = tmp_path / "memory.pickle"

    def command(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        return (int(ended.value.code or 0), *capsys.readouterr())

    asked = ("report", tmp_path / "run", "--format", "snapshot")
    assert command(*asked, "-o", path) == (0, f"{path}\n", "")
    code, out, _ = command("snapshot", path)
    assert code == 0
    assert "predicted, GPU 0" in out
    assert "measured" not in out
    assert "(exact)" in out.replace("\n", " ")
    assert command(*asked)[::2] == (2, "memprof: a snapshot is a binary file: say where with -o memory.pickle\n")
    shutil.copytree(tmp_path / "run", tmp_path / "twin")
    assert "a snapshot holds one run and 2 were found" in command("report", tmp_path, *asked[2:], "-o", path)[2]
    assert "--sample chooses" in command("report", tmp_path / "run", "--sample", "a")[2]
