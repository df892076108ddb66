"""What is profiled of a script's calls, what is not and is told, and that nobody is in anybody's way."""

from __future__ import annotations

import errno
import gc
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model

import memprof
from memprof.catching import MODULE, Catch
from memprof.errors import RunExists
from memprof.execution import Execution
from memprof.files import locked
from memprof.models.build import build_model
from memprof.reports.rows import CALLERS_HEAD, sheets
from memprof.script import on_import
from memprof.store import RunFolder, find_runs, read_run
from memprof.telling.facts import unfinished


@contextmanager
def watching(execution: Execution) -> Iterator[None]:
    """As while a script runs."""
    over = on_import(execution.waiting())
    try:
        yield
    finally:
        over()
        execution.catch.undo()
        execution.close()


def ids(length: int) -> dict[str, Any]:
    made = torch.full((1, length), 5)
    return {"input_ids": made, "attention_mask": torch.ones_like(made)}


@pytest.fixture
def model() -> Any:
    return tiny_model("internvl")[2]


def test_a_model_has_a_folder_and_several_have_one_each(model: Any, tmp_path: Path) -> None:
    other = tiny_model("llava")[2]
    with watching(Execution("a script", tmp_path / "run")):
        model.generate(**ids(20), max_new_tokens=2)
        assert len(read_run(tmp_path / "run").samples) == 1  # already there, and not called complete
        assert not read_run(tmp_path / "run").record.complete
        other.generate(**ids(20), max_new_tokens=2)
        model.generate(**ids(30), max_new_tokens=2)
    runs = find_runs([tmp_path / "run"])
    assert sorted(len(run.samples) for run in runs) == [1, 2]
    assert all(run.record.complete and run.record.totals["samples"] == len(run.samples) for run in runs)
    assert len({run.path for run in runs}) == 2
    with pytest.raises(RunExists):
        Execution("a script", tmp_path / "run").check()
    Execution("a script", tmp_path / "run", force=True).check()
    assert not list((tmp_path / "run").glob("*/run.json"))


def test_the_caller_is_the_line_that_is_no_librarys(model: Any) -> None:
    execution = Execution("a script")

    def helper() -> None:
        model.generate(**ids(20), max_new_tokens=1)

    with watching(execution):
        helper()
        thread = threading.Thread(target=model.generate, kwargs={**ids(20), "max_new_tokens": 1}, name="worker")
        thread.start()
        thread.join()
    line = helper.__code__.co_firstlineno + 1
    first, second = (sample.caller for sample in execution.runs[0].samples)
    assert first is not None
    assert first.endswith(f"test_execution.py:{line}")
    assert second == "thread worker"


def test_a_second_thread_with_the_same_model_gets_what_it_asked_for_and_is_told(model: Any) -> None:
    asked, made = {**ids(24), "max_new_tokens": 4}, []
    expected = model.generate(**asked)

    class Second:
        """Generates with the same model in another thread, once, when the first token is there."""

        def put(self, tokens: Any) -> None:
            if not made:
                thread = threading.Thread(target=lambda: made.append(model.generate(**asked)))
                thread.start()
                thread.join()

        def end(self) -> None: ...

    execution = Execution("a script")
    with watching(execution):
        made.append(model.generate(**asked, streamer=Second()))
    assert len(made) == 2
    assert all(torch.equal(one, expected) for one in made)
    (said,) = execution.said
    assert said.endswith(": not profiled, as another thread was generating")
    assert len(execution.uncounted) == 2  # what was read of the first is not of it alone


def test_the_folder_and_the_callers_stay_where_the_script_goes(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(Path(__file__).parents[1])
    seen = Execution("a script", Path(os.path.relpath(tmp_path / "run")))
    with watching(seen):
        monkeypatch.chdir(tmp_path / "elsewhere")
        model.generate(**ids(20), max_new_tokens=1)
    (sample,) = read_run(tmp_path / "run").samples
    assert str(sample.caller).startswith("tests/test_execution.py:")
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("written", [0, 1])
def test_a_disk_that_fills_is_told_once_and_is_no_error_of_the_scripts(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    expected = model.generate(**ids(20), max_new_tokens=2)
    execution = Execution("a script", tmp_path / "run")
    room, append = iter(range(written)), RunFolder.append

    def full(folder: RunFolder, sample: Any) -> None:
        if next(room, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder.path))
        append(folder, sample)

    monkeypatch.setattr(RunFolder, "append", full)
    with watching(execution):
        for _ in range(3):
            assert torch.equal(model.generate(**ids(20), max_new_tokens=2), expected)
    assert len(execution.runs[0].samples) == 3
    (line,) = execution.said
    assert line.endswith(f": No space left on device; saved there: {written} of 3 calls")
    assert execution.kept == bool(written)
    left = read_run(tmp_path / "run")
    assert (len(left.samples), left.record.complete) == (written, False)
    (told,) = unfinished([left])
    assert "run the program again" in told
    assert "--resume" not in told
    with locked(tmp_path / "run", wait=False):  # free for whoever comes next
        pass


def test_a_folder_that_another_took_meanwhile_is_no_error_of_the_scripts(model: Any, tmp_path: Path) -> None:
    execution = Execution("a script", tmp_path / "run")
    execution.check()
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run"), watching(execution):
        model.generate(**ids(20), max_new_tokens=2)
    assert "another process is writing" in execution.said[0]


def test_calls_that_failed_have_a_row_of_their_own(model: Any) -> None:
    execution = Execution("a script")
    with watching(execution):
        for token in (5, 10**6):  # the second has no embedding
            given = ids(20)
            with suppress(IndexError):
                model.generate(**{**given, "input_ids": given["input_ids"] * 0 + token}, max_new_tokens=2)
    (sheet,) = sheets(execution.runs, "GiB")
    done, failed = (dict(zip(CALLERS_HEAD, row, strict=True)) for row in sheet.callers)
    assert done["called from"] == failed["called from"]
    assert (done["calls"], done["made"]) == ("1", "2")
    assert (failed["calls"], failed["made"], failed["KV cache"]) == ("1 failed", "0", "0.000")
    assert sheet.rows[0][sheet.head.index("dynamic peak")] == "≥ 0.000"


def test_rows_of_one_name_say_which_folder_each_is(tmp_path: Path) -> None:
    with watching(Execution("a script", tmp_path / "run")):
        for _ in range(2):
            made: Any = build_model(tiny_model("internvl")[1], device="cpu", dtype="float32")
            made.generate(**ids(20), max_new_tokens=1)
    runs = find_runs([tmp_path / "run"])
    (sheet,) = sheets(runs, "GiB")
    first, second = (Path(str(run.path)).name for run in runs)
    assert f"Baseline is {first}; Baseline #2 is {second}" in sheet.remarks
    assert [row[0] for row in sheet.rows] == ["Baseline", "Baseline #2"]


def test_what_cannot_be_profiled_runs_all_the_same_and_is_told(model: Any) -> None:
    asked = {**ids(24), "max_new_tokens": 4}
    expected = model.generate(**asked, prompt_lookup_num_tokens=2)
    execution = Execution("a script")
    with watching(execution):
        out = model.generate(**asked, prompt_lookup_num_tokens=2)
        model.generate(**asked)
    assert torch.equal(out, expected)
    first, second = execution.runs[0].samples
    assert first.status == "failed"
    assert "prompt lookup" in str(first.error)
    assert first.dynamic_peak_bytes == 0
    assert second.ok


def test_inference_mode_is_profiled_and_changes_no_token(model: Any) -> None:
    execution = Execution("a script")
    with torch.inference_mode():
        given = ids(24)  # tensors that are made there can be changed only there
        alone = model.generate(**given, max_new_tokens=4)
        with watching(execution):
            out = model.generate(**given, max_new_tokens=4)
    assert torch.equal(out, alone)
    assert [sample.ok for sample in execution.runs[0].samples] == [True]


def test_a_window_of_the_scripts_own_is_left_alone(model: Any) -> None:
    execution = Execution("a script")
    with watching(execution), memprof.profile(model) as own:
        model.generate(**ids(20), max_new_tokens=2)
    assert len(own.samples) == 1
    assert execution.runs == []


def test_a_model_that_the_script_lets_go_is_gone() -> None:
    _, card, _ = tiny_model("internvl")
    made: Any = build_model(card, device="cpu", dtype="float32")
    seen, execution = weakref.ref(made), Execution("a script")
    with watching(execution):
        made.generate(**ids(20), max_new_tokens=2)
        gc.collect()
        gc.disable()
        try:
            del made
            assert seen() is None
        finally:
            gc.enable()
    assert len(execution.runs[0].samples) == 1


def test_nothing_is_left_behind(model: Any) -> None:
    import sys

    from transformers import GenerationMixin

    before, finders = GenerationMixin.generate, list(sys.meta_path)
    with watching(Execution("a script")):
        assert GenerationMixin.generate is not before
        model.generate(**ids(20), max_new_tokens=1)
    assert GenerationMixin.generate is before
    assert sys.meta_path == finders
    assert "generate" not in vars(model)


def test_a_call_within_a_call_belongs_to_the_outer_one() -> None:
    from types import ModuleType

    asked = []

    class GenerationMixin:
        def generate(self, deep: int) -> int:
            return self.generate(deep - 1) + 1 if deep else 0

    module = ModuleType(MODULE)
    module.GenerationMixin = GenerationMixin  # type: ignore[attr-defined]

    def around(model: Any, caller: str, generate: Any, args: Any, kwargs: Any) -> Any:
        asked.append(caller)
        return generate(model, *args, **kwargs)

    Catch(around)(module)
    assert GenerationMixin().generate(3) == 3
    assert len(asked) == 1
