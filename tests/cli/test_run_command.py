"""``memprof run``: how a run ends, where it goes, and what is said on the way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typed import call

from memprof import api
from memprof.api import resolve_device
from memprof.bench import Bench
from memprof.errors import DataError, RunExists
from memprof.forecasts import Ask
from memprof.models.find import find
from memprof.pruning import method_name
from memprof.store import find_runs, read_run


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A run of two samples, typed in an empty folder."""
    (tmp_path / "two.csv").write_text("width,height,text_tokens\n448,448,20\n448,448,30\n")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    given = ["--model", "proving", "--device", "sim", "--max-new-tokens", "1"]
    return ["run", "-q", *given, "--data", str(tmp_path / "two.csv")]


def failing(monkeypatch: pytest.MonkeyPatch, method: str, text_tokens: int | None = None) -> None:
    """Let ``method`` fail on the samples of so much text, or on all."""
    real = Bench.outcome

    def outcome(self: Bench, ask: Ask) -> Any:
        asked = ask.shape.text_tokens - sum(self.model.template)
        if method_name(ask.pruner) == method and text_tokens in (None, asked):
            raise DataError("the picture is broken")
        return real(self, ask)

    monkeypatch.setattr(Bench, "outcome", outcome)


def test_a_method_of_which_nothing_finished_fails_by_name(
    capsys: pytest.CaptureFixture[str], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "topv")
    code, out, err = call(capsys, *words, "--method", "baseline", "--method", "topv", "-o", "r")
    assert code == 1
    assert "Baseline" in out
    assert (
        err == "memprof: no sample finished under topv:keep=0.5,layer=2; the first failed with: the picture is broken\n"
    )


def test_failed_samples_are_mentioned_and_run_again_when_asked(
    capsys: pytest.CaptureFixture[str], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        failing(patch, "baseline", text_tokens=20)
        code, _, err = call(capsys, *words, "-o", "r")
        assert (code, err) == (0, "")
    code, _, err = call(capsys, *words, "-o", "r", "--resume")
    assert (code, err) == (0, "memprof: 1 of 2 samples failed; --retry-failed runs them again\n")
    assert [s.ok for s in read_run("r").samples] == [False, True]
    code, _, err = call(capsys, *words, "-o", "r", "--resume", "--retry-failed")
    assert (code, err) == (0, "")
    run = read_run("r")
    assert [s.ok for s in run.samples] == [True, True]
    assert run.samples[0].text_tokens < run.samples[1].text_tokens
    code, _, err = call(capsys, *words, "-o", "r", "--retry-failed")
    assert (code, err) == (2, "memprof: --retry-failed goes with --resume\n")


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (["--attention", "bogus"], 2, "unknown attention 'bogus'; valid: eager, sdpa"),
        (["--attention", "flash_attention_2"], 2, "valid: eager, sdpa"),
        (["--gpu", "2GiB", "--model", "internvl2-2b"], 4, "do not fit"),
        (["--gpu", "1023MiB"], 2, "--gpu 1023MiB is less than 1GiB"),
        (["--gpu", "0GiB"], 2, "no memory"),
        (["--dtype", "float99"], 2, "float99"),
    ],
)
def test_what_cannot_be_built_leaves_no_folder(
    capsys: pytest.CaptureFixture[str], words: list[str], more: list[str], code: int, says: str
) -> None:
    got, out, err = call(capsys, *words, *more, "-o", "r")
    assert (got, out) == (code, "")
    assert says in err
    assert err.count("\n") == 1
    assert not Path("r").exists()


def test_a_run_is_finished_where_it_is(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    expected = "memprof: --resume finishes the run in a folder, which -o names (memprof runs lists them)\n"
    assert call(capsys, *words, "--resume") == (2, "", expected)


@pytest.mark.parametrize("unit", ["MB", "GiB"])
def test_room_is_told_in_the_unit_of_the_table(
    capsys: pytest.CaptureFixture[str], words: list[str], unit: str
) -> None:
    loud = [word for word in words if word != "-q"]
    code, _, err = call(capsys, *loud, "--gpu", "8GiB", "--unit", unit, "-o", "r")
    (line,) = [line for line in err.splitlines() if line.startswith("fits on 8GiB")]
    assert code == 0
    assert line.count(f" {unit} ") == 2


@pytest.mark.parametrize(("tokens", "count"), [((20,), "1 sample"), ((20, 30), "2 samples")])
def test_what_a_card_would_refuse_is_counted(
    capsys: pytest.CaptureFixture[str], words: list[str], monkeypatch: pytest.MonkeyPatch, tokens: Any, count: str
) -> None:
    real = Bench.outcome

    def outcome(self: Bench, ask: Ask) -> Any:
        refused = "out of memory" if ask.shape.text_tokens - sum(self.model.template) in tokens else None
        found = real(self, ask)
        return replace(found, memory=replace(found.memory, refused=refused))

    monkeypatch.setattr(Bench, "outcome", outcome)
    code, _, err = call(capsys, *words, "--gpu", "8GiB", "-o", "r")
    assert (code, err) == (4, f"memprof: {count} predicted not to fit on 8GiB; samples.jsonl says where\n")


def test_out_of_memory_ends_with_5_only_where_nothing_ran(
    capsys: pytest.CaptureFixture[str], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a card refuses is one sample's; the others are done, and are a result."""
    real, lost = Bench.outcome, set[int]()

    def outcome(self: Bench, ask: Ask) -> Any:
        if ask.shape.text_tokens - sum(self.model.template) in lost:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(self, ask)

    monkeypatch.setattr(Bench, "outcome", outcome)
    measured = [word if word != "sim" else "cpu" for word in words]
    lost = {30}
    code, out, err = call(capsys, *measured, "--method", "baseline", "-o", "some")
    assert (code, "Baseline" in out) == (0, True)
    assert "1 sample of 2 ran out of memory; the others are done" in err
    assert [s.status for s in read_run(Path("some")).samples] == ["ok", "oom"]
    lost = {20, 30}
    code, _, err = call(capsys, *measured, "--method", "baseline", "-o", "none")
    assert code == 5
    assert err == "memprof: 2 samples ran out of memory; samples.jsonl says where\n"


def test_shards_of_this_very_folder(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    for number in (1, 2):
        assert call(capsys, *words, "--shard", f"{number}/2", "-o", ".")[0] == 0
    assert sorted(p.name for p in Path("..").glob("here.*")) == ["here.1of2", "here.2of2"]
    (run,) = find_runs(Path("..").glob("here.*"))
    assert (len(run.samples), run.record.complete) == (2, True)


def test_a_launchers_shard_is_announced(
    capsys: pytest.CaptureFixture[str], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    code, _, err = call(capsys, *words, "-o", "r")
    assert code == 0
    assert err == "memprof: this process takes sample 2 of every 2 (from SLURM_PROCID); --shard 1/1 takes all\n"
    assert len(read_run("r.2of2").samples) == 1
    code, _, err = call(capsys, *words, "-o", "all", "--shard", "1/1")
    assert (code, err) == (0, "")
    assert len(read_run("all").samples) == 2
    assert read_run("all").record.spec.shard is None


def test_a_card_to_predict_for_means_sim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memprof.api.has_cuda", lambda: True)
    assert resolve_device("auto", find("internvl2-2b")) == "cuda"
    assert resolve_device("auto", find("internvl2-2b"), "h100") == "sim"
    assert resolve_device("auto", find("proving"), "8GiB") == "sim"
    assert resolve_device("cuda", find("internvl2-2b"), "h100") == "cuda"


@pytest.mark.parametrize(
    ("methods", "twice"),
    [
        (["baseline", "baseline"], "baseline"),
        (["baseline", "topv:keep=0.5", "topv:keep=0.5,layer=2"], "topv:keep=0.5,layer=2"),
    ],
)
def test_a_method_given_twice_is_refused_before_anything_runs(
    capsys: pytest.CaptureFixture[str], words: list[str], methods: list[str], twice: str
) -> None:
    code, out, err = call(capsys, *words, *(word for one in methods for word in ("--method", one)), "-o", "r")
    assert (code, out, err) == (2, "", f"memprof: method {twice} is given twice; name each once\n")
    assert not Path("r").exists()
    data = words[words.index("--data") + 1]
    more = [word for one in methods[-2:] if one != "baseline" for word in ("--method", one)] or ["--keep", "0.5,0.5"]
    given = ["compare", "-q", "--model", "proving", "--device", "sim", "--data", data, "-o", "c"]
    code, out, err = call(capsys, *given, *more, *([] if "--keep" in more else ["--keep", "0.5"]))
    assert (code, out) == (2, "")
    assert "is given twice" in err
    assert not Path("c").exists()


def test_what_python_is_told_of_a_run_that_is_there_is_pythons(
    capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert call(capsys, *words, "-o", "r")[0] == 0
    code, _, err = call(capsys, *words, "-o", "r")
    assert (code, err) == (2, "memprof: r already holds a run; --resume finishes it, --force replaces it\n")
    (run,) = api.read("r")
    for again, said in (
        (lambda: run.save("r"), "r already holds a run; force=True replaces it"),
        (
            lambda: api.run(run.record.spec, "r"),
            "r already holds a run; resume=True finishes it, force=True replaces it",
        ),
    ):
        with pytest.raises(RunExists) as told:
            again()
        assert str(told.value) == said
