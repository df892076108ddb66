"""Predictions held to references: made here by the simulator, and bent by hand where a miss is to be seen."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from memprof.analysis import histories
from memprof.analysis import validate as module
from memprof.analysis.validate import GOALS, Goal, Point, validate
from memprof.cli import main
from memprof.environment import package_version
from memprof.errors import DataError
from memprof.gpus import card_of
from memprof.models import find
from memprof.records import RunSpec
from memprof.simulator.allocator import AllocatorSettings
from memprof.snapshots.history import HISTORY, read_history, write_history
from memprof.snapshots.recording import Frame, Recording, read_recordings
from memprof.snapshots.report import check_replay

ROOT = Path(__file__).parents[2]
BASELINE, TOPV = "internvl2-2b_current_baseline", "internvl2-2b_paper_topv"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """scripts/record_reference.py."""
    spec = importlib.util.spec_from_file_location("record_reference", ROOT / "scripts" / "record_reference.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def recorded(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dry run of the script, its status changed to what a card's would be: a reference without a fault."""
    folder = tmp_path_factory.mktemp("reference")
    few = [step for step in script.steps("sim", 2) if step.name in (BASELINE, TOPV) or step.shape == (448, 448, 53)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(find, "find", script.tiny)
        patch.setattr(script, "shapes", lambda _: [(1792, 1344, 53), (448, 448, 20), (896, 896, 53)])
        assert script.Recorder(folder, 600).record(few)
    for path in folder.glob("*/run.json"):
        run = json.loads(path.read_text())
        run["status"], run["spec"]["device"] = "measured", "cuda"
        run["environment"] |= {"gpu": "NVIDIA H100", "driver": "580.1", "device_bytes_of": "process"}
        path.write_text(json.dumps(run))
    return folder


@pytest.fixture
def reference(recorded: Path, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(find, "find", script.tiny)
    return Path(shutil.copytree(recorded, tmp_path / "reference"))


def bend(reference: Path, run: str, change: Callable[[dict[str, Any]], None], line: int = 0) -> None:
    """Change one sample of a reference."""
    path = reference / run / "samples.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    change(lines[line])
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))


def missing(n_bytes: int) -> Callable[[dict[str, Any]], None]:
    """A card that took ``n_bytes`` more at the peak than any part claims."""

    def change(sample: dict[str, Any]) -> None:
        columns = sample["tokens"]
        columns["peak_allocated_bytes"][sample["peak_token"]] += n_bytes
        columns["reserved_bytes"] = [r + n_bytes for r in columns["reserved_bytes"]]
        sample["dynamic_peak_bytes"] += n_bytes
        sample["peak_parts"]["unexplained"] += n_bytes

    return change


def test_a_reference_without_a_fault_meets_every_goal(reference: Path) -> None:
    found = validate(reference)
    assert found.met
    assert [score.measure for score in found.totals] == list(GOALS)
    assert all((s.median, s.worst, s.lowest) == (0, 0, 0) for s in found.totals)
    assert {s.measure: s.points for s in found.totals} == {
        "dynamic": 6, "token_dynamic": 12, "kv_cache": 12, "static": 2, "reserved": 12, "allocated": 12,
    }  # fmt: skip
    assert list(found.runs) == ["internvl2-2b baseline current", "internvl2-2b topv:keep=0.5,layer=2 paper"]
    assert found.where[0].startswith("NVIDIA H100, driver 580.1, torch ")
    (history,) = found.histories
    assert history.peak_measured == history.peak_predicted > 0
    assert history.sizes == []


def test_the_context_is_what_the_driver_says_beyond_the_allocator(reference: Path) -> None:
    assert validate(reference).context_bytes is None

    def change(sample: dict[str, Any]) -> None:
        columns = sample["tokens"]
        columns["device_used_bytes"] = [n + 5 + i for i, n in enumerate(columns["reserved_bytes"])]

    bend(reference, BASELINE, change)
    assert validate(reference).context_bytes == (5, 6)


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA GeForce RTX 4090", "rtx4090"), ("Tesla T4", "t4"),
        ("NVIDIA L40S", None), (None, None),
    ],
)  # fmt: skip
def test_cards_are_known_by_what_torch_calls_them(gpu: str | None, name: str | None) -> None:
    assert card_of(gpu) == name


def test_predictions_run_under_the_settings_of_the_reference(reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # not the reference's
    assert validate(reference).met
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    for path in reference.glob("*/run.json"):
        run = json.loads(path.read_text())
        run["environment"]["allocator_settings"] = {"PYTORCH_ALLOC_CONF": "roundup_power2_divisions:4"}
        path.write_text(json.dumps(run))
    assert {score.measure for score in validate(reference).totals if not score.met} >= {"dynamic"}
    assert "PYTORCH_ALLOC_CONF" not in os.environ


def test_what_is_missing_is_found_and_named(reference: Path) -> None:
    bend(reference, TOPV, missing(9_000_000))
    found = validate(reference)
    missed = {score.measure for score in found.totals if not score.met}
    assert missed >= {"dynamic", "token_dynamic", "reserved"}
    assert "kv_cache" not in missed
    worst = found.cases[0]
    assert (worst.point.run.split()[1], worst.point.tiles) == ("topv:keep=0.5,layer=2", 13)
    assert worst.point.predicted - worst.point.measured == -9_000_000
    assert worst.point.error == pytest.approx(worst.point.predicted / worst.point.measured - 1)
    assert worst.point.error < -0.03
    assert [(gap.name, gap.change) for gap in worst.parts] == [("unexplained", -9_000_000)]
    assert worst.holders == []


def test_one_byte_of_cache_is_too_much(reference: Path) -> None:
    def change(sample: dict[str, Any]) -> None:
        sample["tokens"]["kv_bytes"][1] += 1

    bend(reference, BASELINE, change)
    assert [score.measure for score in validate(reference).totals if not score.met] == ["kv_cache"]


def test_a_tensor_at_the_peak_that_differs_is_named(reference: Path) -> None:
    def change(sample: dict[str, Any]) -> None:
        holder = sample["peak_holders"][0]
        assert holder["bytes"] > 1_000
        holder["bytes"] += 512

    bend(reference, BASELINE, missing(512))
    bend(reference, BASELINE, change)
    case = next(case for case in validate(reference).cases if case.point.error)
    assert [gap.change for gap in case.holders] == [-512]
    assert case.holders[0].name.split()[-1].startswith(("bfloat", "float"))


def test_histories_tell_sizes_apart(reference: Path) -> None:
    (path,) = reference.glob(f"*{HISTORY}")
    about, recording = read_history(path)
    workspace = 4_000_000  # what a kernel takes, from the first event to the last
    line = Frame("linear.py", 125, "forward")
    recording = dataclasses.replace(
        recording,
        actions=[0, *recording.actions], addresses=[2**40, *recording.addresses], sizes=[workspace, *recording.sizes],
        stack_ids=[len(recording.stacks), *recording.stack_ids], lane_ids=[0, *recording.lane_ids],
        stacks=(*recording.stacks, (line,)),
    )  # fmt: skip
    columns = ("actions", "addresses", "sizes", "stack_ids", "lane_ids")
    recording = dataclasses.replace(recording, **{name: np.asarray(getattr(recording, name)) for name in columns})
    write_history(path, about, recording)
    (history,) = validate(reference).histories
    (size,) = history.sizes
    rounded = -(-workspace // 512) * 512
    assert (size.bytes, size.site) == (rounded, "linear.py:125 forward")
    assert (size.held_measured, size.held_predicted, size.made_measured, size.made_predicted) == (1, 0, 1, 0)
    assert size.change == history.peak_predicted - history.peak_measured == -rounded


def test_a_snapshot_keeps_what_its_analysis_reads(shared: Path, tmp_path: Path) -> None:
    """A real card's snapshot, written as a history and read again, still replays to the last address."""
    (whole,) = (r for r in read_recordings(shared / "traces" / "transformer_forward.pickle") if len(r))
    path = tmp_path / f"real{HISTORY}"
    write_history(path, {"sample": 1}, whole)
    about, again = read_history(path)
    assert about == {"sample": 1}
    assert path.stat().st_size < 200_000
    assert len(again) == len(whole)
    assert check_replay(again) == check_replay(whole)
    assert check_replay(again).exact
    assert histories._Walk.of(again) == histories._Walk.of(whole)


def test_what_is_no_history_is_refused(tmp_path: Path) -> None:
    path = tmp_path / f"x{HISTORY}"
    path.write_bytes(b"no")
    with pytest.raises(DataError, match="no history"):
        read_history(path)


def test_an_empty_history_is_one() -> None:
    nothing = np.zeros(0, dtype=int)
    empty = Recording(0, AllocatorSettings(), (), nothing, nothing, nothing, nothing, nothing, (), ())
    assert histories.set_against("x", empty, empty).sizes == []


def test_predictions_are_no_reference(reference: Path) -> None:
    for path in reference.glob("*/run.json"):
        path.write_text(path.read_text().replace('"measured"', '"predicted"'))
    with pytest.raises(DataError, match="measured on a card"):
        validate(reference)


def test_goals_read_as_they_are_checked() -> None:
    assert str(GOALS["kv_cache"]) == "equal in ≥ 100 %"
    assert str(GOALS["static"]) == "off by ≤ 512 B"
    goal = Goal(equal=0.5, within=30, median=0.01, worst=0.03, low=-0.01)
    assert str(goal) == "equal in ≥ 50 %, off by ≤ 30 B, median ≤ 1 %, worst ≤ 3 %, none below −1 %"

    def met(one: Goal, *errors: int) -> bool:
        """Of points of 1,000 bytes, so far off."""
        return one.met([Point("dynamic", "r", "s", 1, 0, 1000, 1000 + error) for error in errors])

    assert met(goal, 0, 0, 30)
    assert not met(goal, 5, -5, 0)
    assert not met(goal, 0, 31)
    shares = Goal(median=0.01, worst=0.03, low=-0.01)
    assert met(shares, 5, -5, 30)
    assert not met(shares, 20, 20)
    assert not met(shares, 0, 0, 40)
    assert not met(shares, 0, 0, -11)
    assert Point("kv_cache", "r", "s", 1, 0, 0, 0).error == 0
    assert Point("kv_cache", "r", "s", 1, 0, 0, 5).error == float("inf")


def test_two_cards_are_set_against_each_other(reference: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(reference, other)
    same = validate(reference, other)
    assert all(score.equal == 1 for score in same.totals)
    assert not same.histories
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="holds no run"):
        validate(reference, tmp_path / "none")


def test_versions_that_differ_are_said_with_what_they_move(reference: Path) -> None:
    for path in reference.glob("*/run.json"):
        run = json.loads(path.read_text())
        run["environment"] |= {"gpu": "Some Card", "packages": {"torch": "2.11.0", "transformers": "5.17.0"}}
        path.write_text(json.dumps(run))
    notes = validate(reference).notes
    assert any("no rules for Some Card" in note for note in notes)
    if not str(package_version("transformers")).startswith("5.17"):
        assert any("transformers 5.17.0" in note for note in notes)


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as done:
        main(["validate", *words])
    out = capsys.readouterr()
    assert isinstance(done.value.code, int)
    return done.value.code, out.out, out.err


def test_the_command(reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = tmp_path / "figures" / "errors.svg"
    code, out, err = call(capsys, str(reference), "-o", str(figure))
    assert (code, err) == (0, "")
    assert "exact" in out
    assert "NVIDIA H100" in out
    assert figure.read_text().count("<svg") == 1
    drawn = json.loads(figure.with_suffix(".json").read_text())
    (there,) = drawn["references"]
    assert there["label"].startswith("H100, transformers 5.")
    points = [point for point in validate(reference).points if point.measure == "dynamic"]
    pairs = there["measures"]["peak of a sample"]["pairs"]
    assert sum(count for _, _, count in pairs) == len(points)
    assert {(a, p) for a, p, _ in pairs} == {(point.measured, point.predicted) for point in points}
    bend(reference, TOPV, missing(3_000_000))
    code, out, err = call(capsys, str(reference), "--json")
    document = json.loads(out)
    assert (code, document["schema"], document["met"]) == (3, 1, False)
    assert document["cases"][0]["point"]["error"] < -0.03
    assert "points" not in document
    assert err.startswith("memprof: ")
    assert f"dynamic peak of a sample ({GOALS['dynamic']})" in err
    assert err.count("\n") == 1
    code, out, _ = call(capsys, str(reference))
    assert code == 3
    assert "unexplained" in out
    assert "no block differs" in out


@pytest.mark.parametrize(("words", "code"), [(["/nowhere"], 1), (["/nowhere", "-o", "x.txt"], 2)])
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], words: list[str], code: int) -> None:
    got, out, err = call(capsys, *words)
    assert (got, out, err.count("\n")) == (code, "", 1)


# -- the script that records ------------------------------------------------------------------------------------------


def test_every_number_of_tiles_is_recorded(script: ModuleType) -> None:
    card = find.find(script.INTERNVL)
    family = card.family
    tiles = [family.shape(card, *shape, None).tiles for shape in script.shapes(script.INTERNVL)]
    assert sorted(set(tiles)) == [1, *range(3, 14)]
    assert tiles[:4] == [13, 1, 7, 3]


def test_steps_cover_what_is_asked_and_are_named_apart(script: ModuleType) -> None:
    steps = list(script.steps("cuda", 16))
    assert len({step.name for step in steps}) == len(steps)
    runs = {(s.spec.model, s.spec.method, s.spec.stack) for s in steps if s.shape is None}
    methods = ("baseline", "fastv:scores=row", "fastv:scores=map", "topv", "random")
    assert runs == {(m, x, s) for m in (script.INTERNVL, script.LLAVA) for x in methods for s in ("current", "paper")}
    assert {s.spec.dtype for s in steps if s.spec.model == script.LLAVA} == {"float16"}
    assert sum(s.shape is not None for s in steps) == 7


def test_a_cut_recording_goes_on(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "find", script.tiny)
    monkeypatch.setattr(script, "shapes", lambda _: [(448, 448, 20), (896, 448, 20)])
    first = [next(script.steps("sim", 2))]
    recorder = script.Recorder(tmp_path, 600)
    checks = iter([None, script.TimeUp])

    def check(*_: object) -> None:
        stop = next(checks, None)
        if stop is not None:
            raise stop

    monkeypatch.setattr(recorder, "check", check)
    assert not recorder.record(first)
    assert len((tmp_path / BASELINE / "samples.jsonl").read_text().splitlines()) == 1
    assert script.Recorder(tmp_path, 600).record(first)
    assert len((tmp_path / BASELINE / "samples.jsonl").read_text().splitlines()) == 2
    assert json.loads((tmp_path / "reference.json").read_text())["recorded"][0]["samples"] == "2 samples"


def test_a_step_that_fails_ends_no_recording(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(find, "find", script.tiny)
    monkeypatch.setattr(script, "shapes", lambda _: [(448, 448, 20)])
    history = dataclasses.replace(next(script.steps("sim", 2)), shape=(448, 448, 20))
    two = [history, next(script.steps("sim", 2))]
    recorder = script.Recorder(tmp_path, 600)

    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: lost\nmore")

    with monkeypatch.context() as patch:
        patch.setattr(script, "as_recording", fail)
        assert not recorder.record(two)
    assert f"{history.name}: failed: CUDA error: lost in" in capsys.readouterr().err
    assert recorder.bench.ready()[1].attribution == "prefill"
    first, second = json.loads((tmp_path / "reference.json").read_text())["recorded"]
    assert (first["step"], first["failed"]) == (history.name, "CUDA error: lost")
    assert (second["step"], second["samples"]) == (BASELINE, "1 sample")
    assert script.Recorder(tmp_path, 600).record(two)
    entries = {e["step"]: e for e in json.loads((tmp_path / "reference.json").read_text())["recorded"]}
    assert entries[BASELINE] == second, "what was done before is not overwritten"
    assert "samples" in entries[history.name]


def test_a_recording_goes_on_with_its_own_card_alone(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = {"step": "llava", "samples": "8 samples", "seconds": 7.0}
    before = json.dumps({"schema": 1, "card": "NVIDIA H100", "recorded": [done]})
    (tmp_path / "reference.json").write_text(before)
    monkeypatch.setattr(script, "card_name", lambda: "NVIDIA H200")
    assert script.main(["-o", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"{tmp_path} was recorded on NVIDIA H100, and here is NVIDIA H200; use another folder\n"
    )
    assert (tmp_path / "reference.json").read_text() == before
    monkeypatch.setattr(script, "card_name", lambda: "NVIDIA H100")
    assert script.Recorder(tmp_path, 600).log == {"llava": done}


def test_recording_needs_no_command_line_packages() -> None:
    code = (
        "import sys, runpy\n"
        "for name in ('typer', 'rich', 'matplotlib', 'click'): sys.modules[name] = None\n"
        "import transformers\n"
        f"runpy.run_path({str(ROOT / 'scripts' / 'record_reference.py')!r}, run_name='other')\n"
    )
    import subprocess

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_checkpoint_is_predicted_with_its_own_sizes(tmp_path: Path) -> None:
    card = find.find("internvl2-2b")
    family = card.family
    small = card.but(text={"num_hidden_layers": 12})
    (tmp_path / "config.json").write_text(json.dumps(family.config(small).to_dict()))
    benches: module.Benches = {}
    for weights, layers in (("hub", 24), (str(tmp_path), 12), ("random", 24)):
        measured = RunSpec("internvl2-2b", "baseline", "ai2d", "cuda", weights=weights)
        bench = module._bench(benches, module._predicting(measured, {"gpu": "NVIDIA H100"}), {})
        assert bench.model.layers == layers
    assert len(benches) == 2
