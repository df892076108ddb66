"""The adapters of harnesses: a record a sample, memory beside scores, answers and models as they were.

The harnesses themselves are faked here after their documented interfaces: lmms-eval 0.7 (``evaluate(lm, task_dict)``
calls ``lm.generate_until`` with all requests and returns logged samples) and VLMEvalKit 0.2 (``infer_data`` builds a
prompt from a line of the data and calls ``model.generate``). ``test_lmms_eval_itself.py`` runs the real lmms-eval where
it is installed.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import state_of, tiny_model, tiny_prompt
from typed import call

from memprof.bench.generate import place
from memprof.errors import MemprofError, UsageError
from memprof.harness import lmms_eval as lmms_adapter
from memprof.harness import vlmevalkit as kit_adapter
from memprof.harness.watching import Watch
from memprof.profiler import Profiler
from memprof.records import PARTS
from memprof.store import find_runs, read_run

WIDTHS = (100, 400, 250)


def inputs_of(width: int) -> dict[str, torch.Tensor]:
    family, card, model = tiny_model("internvl")
    return place(tiny_prompt(family, card, width=width), model)


def answer_of(model: Any, width: int, **how: Any) -> str:
    """What a wrapper does: make inputs, generate, decode; in inference mode, as most of them."""
    inputs = inputs_of(width)
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False, **how)
    return " ".join(map(str, out[0, inputs["input_ids"].shape[1] :].tolist()))


class FakeLmm:
    """A wrapper as lmms-eval's simple ones: sorts its requests, answers them, gives answers in their order."""

    batch_size = 1

    def __init__(self, model: Any, **how: Any) -> None:
        self._model, self.how = model, how
        self.asked: list[int] = []

    @property
    def model(self) -> Any:
        return self._model

    def generate_until(self, requests: list[Any]) -> list[str]:
        answers = {}
        for request in sorted(requests, key=lambda r: -r.args[0]):
            self.asked.append(len(requests))
            try:
                answers[request.doc_id] = answer_of(self.model, request.args[0], **self.how)
            except Exception:  # as LlavaHf does: an error is an empty answer
                answers[request.doc_id] = ""
        return [answers[request.doc_id] for request in requests]

    def clean(self) -> None:
        del self._model


def lmms_evaluate(lm: Any, task_dict: dict[str, list[int]], log_samples: bool = True) -> dict[str, Any]:
    """lmms-eval's evaluate, as far as an adapter can see it."""
    requests = [
        SimpleNamespace(args=(width,), task_name=task, doc_id=number, metadata={})
        for task, widths in task_dict.items() for number, width in enumerate(widths)
    ]  # fmt: skip
    padding = SimpleNamespace(**{**vars(requests[-1]), "metadata": {"__padding_only__": True}})
    answers = lm.generate_until([*requests, padding])[:-1]
    lm.clean()
    samples: dict[str, list[dict[str, Any]]] = {task: [] for task in task_dict}
    for request, answer in zip(requests, answers, strict=True):
        samples[request.task_name].append({"doc_id": request.doc_id, "resps": [answer], "exact_match": 1.0})
    return {"results": {}, **({"samples": samples} if log_samples else {})}


@pytest.fixture
def harnesses(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Both harnesses, faked."""
    evaluator, command = ModuleType("lmms_eval.evaluator"), ModuleType("lmms_eval.__main__")
    evaluator.evaluate = lmms_evaluate  # type: ignore[attr-defined]
    lmms = ModuleType("lmms_eval")
    lmms.evaluator, lmms.__path__ = evaluator, []  # type: ignore[attr-defined]
    inference, base, vlm, kit = (
        ModuleType(name) for name in ("vlmeval.inference", "vlmeval.vlm.base", "vlmeval.vlm", "vlmeval")
    )
    inference.infer_data, base.BaseModel = kit_infer_data, FakeBaseModel  # type: ignore[attr-defined]
    kit.inference, kit.__path__, vlm.__path__ = inference, [], []  # type: ignore[attr-defined]
    for module in (evaluator, command, lmms, inference, base, vlm, kit):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    plain = FakeBaseModel.generate
    yield SimpleNamespace(evaluator=evaluator, command=command, inference=inference)
    assert evaluator.evaluate is lmms_evaluate  # type: ignore[attr-defined]
    assert inference.infer_data is kit_infer_data  # type: ignore[attr-defined]
    assert FakeBaseModel.generate is plain


def peak_of(model: Any, width: int) -> int:
    """The peak of one prompt, profiled by hand as the adapters do."""
    with Profiler(model) as profiler:
        model.generate(**inputs_of(width), max_new_tokens=3, do_sample=False)
    return max(profiler.tokens.peak_allocated_bytes)


def test_lmms_eval_gets_a_memory_beside_each_score(harnesses: SimpleNamespace, tmp_path: Path) -> None:
    _, _, model = tiny_model("internvl")
    before = state_of(model)
    plain = lmms_evaluate(FakeLmm(model), {"ai2d": [*WIDTHS], "mme": [100]})
    lm = FakeLmm(model)
    with lmms_adapter.watched(tmp_path / "runs"):
        results = harnesses.evaluator.evaluate(lm, {"ai2d": [*WIDTHS], "mme": [100]})
    assert state_of(model) == before
    assert "generate" not in vars(model)
    assert set(lm.asked) == {1}
    memories = [sample.pop("memory") for sample in results["samples"]["ai2d"]]
    assert results["samples"]["ai2d"] == plain["samples"]["ai2d"]
    assert [one["peak_allocated_bytes"] for one in memories] == [peak_of(model, width) for width in WIDTHS]
    for one in memories:
        assert (one["status"], one["device"], one["error"]) == ("measured", "cpu", None)
        assert sum(one["parts"].values()) == one["dynamic_peak_bytes"] > one["kv_cache_bytes"] > 0
    run = read_run(tmp_path / "runs" / "ai2d")
    assert run.record.complete
    assert run.unfinished is None
    assert [sample.answer for sample in run.samples] == [sample["resps"][0] for sample in plain["samples"]["ai2d"]]
    assert [len(sample.tokens) for sample in run.samples] == [3, 3, 3]
    assert [sample.id for sample in read_run(tmp_path / "runs" / "mme").samples] == ["0"]


def test_every_report_reads_what_an_adapter_wrote(
    harnesses: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with lmms_adapter.watched(tmp_path / "runs"):
        harnesses.evaluator.evaluate(FakeLmm(tiny_model("internvl")[2]), {"ai2d": [*WIDTHS], "mme": [100]})
    code, out, err = call(capsys, "report", str(tmp_path / "runs"))
    assert (code, err) == (0, "")
    assert "measured" in out
    for suffix in ("html", "csv", "md", "tex", "json"):
        code, _, err = call(capsys, "report", str(tmp_path / "runs"), "-o", str(tmp_path / f"page.{suffix}"))
        assert code == 0, err
    assert call(capsys, "diff", str(tmp_path / "runs" / "mme"), str(tmp_path / "runs" / "ai2d"))[0] == 0
    assert call(capsys, "plot", str(tmp_path / "runs"), "-o", str(tmp_path / "figures"))[0] == 0


def test_a_batch_is_refused_and_so_is_a_folder_that_is_not_new(harnesses: SimpleNamespace, tmp_path: Path) -> None:
    lm = FakeLmm(tiny_model("internvl")[2])
    lm.batch_size = 4
    with pytest.raises(UsageError, match="--batch_size 1"), lmms_adapter.watched(tmp_path / "runs"):
        harnesses.evaluator.evaluate(lm, {"ai2d": [100]})
    assert not (tmp_path / "runs").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty"), lmms_adapter.watched(tmp_path / "full"):
        pytest.fail("not reached")


def test_what_the_profiler_refuses_is_no_wrong_answer(harnesses: SimpleNamespace, tmp_path: Path) -> None:
    """The wrapper takes every exception for an empty answer; the evaluation ends with memprof's reason all the same."""
    lm = FakeLmm(tiny_model("internvl")[2], prefill_chunk_size=4)
    with pytest.raises(MemprofError, match="a forward is not a token"), lmms_adapter.watched(tmp_path / "runs"):
        harnesses.evaluator.evaluate(lm, {"ai2d": [*WIDTHS]})
    assert "generate" not in vars(lm.model)
    assert len(lm.asked) == 1


def test_an_error_of_the_models_own_is_a_failed_sample(harnesses: SimpleNamespace, tmp_path: Path) -> None:
    lm = FakeLmm(tiny_model("internvl")[2], no_such_argument=1)
    with lmms_adapter.watched(tmp_path / "runs"):
        results = harnesses.evaluator.evaluate(lm, {"ai2d": [100, 200]})
    assert [sample["resps"] for sample in results["samples"]["ai2d"]] == [[""], [""]]
    assert all("no_such_argument" in sample["memory"]["error"] for sample in results["samples"]["ai2d"])
    assert [sample.status for sample in read_run(tmp_path / "runs" / "ai2d").samples] == ["failed", "failed"]


def test_an_error_that_ends_the_evaluation_leaves_its_line(tmp_path: Path) -> None:
    _, _, model = tiny_model("internvl")

    def evaluate() -> None:
        with Watch(tmp_path / "runs", "x") as watch:
            for name, how in (("0", {}), ("1", {"no_such_argument": 1})):
                with watch.sample(model, "t", name):
                    answer_of(model, 100, **how)

    with pytest.raises(ValueError, match="no_such_argument"):
        evaluate()
    run = read_run(tmp_path / "runs" / "t")
    assert [(sample.id, sample.status) for sample in run.samples] == [("0", "ok"), ("1", "failed")]
    assert not run.record.complete
    assert run.unfinished is not None


def test_a_model_that_is_elsewhere_is_refused(tmp_path: Path) -> None:
    with (
        Watch(tmp_path / "runs", "x") as watch,
        pytest.raises(UsageError, match="holds no transformers model"),
        watch.sample(SimpleNamespace(client="http"), "t", "0"),
    ):
        pytest.fail("not reached")
    assert not (tmp_path / "runs").exists()


def test_several_generations_of_one_sample_are_one_record_of_the_highest(tmp_path: Path) -> None:
    _, _, model = tiny_model("internvl")
    with Watch(tmp_path / "runs", "x") as watch:
        with watch.sample(model, "t", "0"):
            for width in (100, 250, 400):
                answer_of(model, width)
        with watch.sample(model, "t", "0"):
            answer_of(model, 400)
    first, second = read_run(tmp_path / "runs" / "t").samples
    assert [first.id, second.id] == ["0", "0.2"]
    assert second.peak_allocated_bytes == peak_of(model, 400)
    assert first.peak_allocated_bytes == max(peak_of(model, width) for width in (100, 400, 250))


def test_processes_of_one_evaluation_write_shards_of_one_run(
    harnesses: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("internvl")[2]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):  # the first process ends last, and has all samples
        monkeypatch.setenv("RANK", rank)
        with lmms_adapter.watched(tmp_path / "runs"), Watch(tmp_path / "runs", lmms_adapter.NAME) as watch:
            for number, width in list(enumerate(WIDTHS))[int(rank) :: 2]:
                with watch.sample(model, "ai2d", str(number)):
                    answer_of(model, width)
    results = {"samples": {"ai2d": [{"doc_id": number} for number in range(3)]}}
    lmms_adapter._put_beside(results, tmp_path / "runs")
    peaks = [sample["memory"]["peak_allocated_bytes"] for sample in results["samples"]["ai2d"]]
    assert peaks == [peak_of(model, width) for width in WIDTHS]
    (run,) = find_runs([tmp_path / "runs"])
    assert [sample.id for sample in run.samples] == ["0", "1", "2"]
    assert run.record.complete
    assert run.unfinished is None


# -- VLMEvalKit --------------------------------------------------------------------------------------------------------


class FakeBaseModel:
    """VLMEvalKit's BaseModel, as far as infer_data uses it."""

    def set_dump_image(self, dump: Any) -> None:
        self.dump_image_func = dump

    def use_custom_prompt(self, dataset: str) -> bool:
        return False

    def generate(self, message: Any, dataset: Any = None) -> str:
        return self.generate_inner(message, dataset)

    def generate_inner(self, message: Any, dataset: Any = None) -> str:
        raise NotImplementedError


class FakeVlm(FakeBaseModel):
    def __init__(self, model: Any, *, custom: bool) -> None:
        self.tokenizer, self.model, self.custom = object(), model, custom

    def use_custom_prompt(self, dataset: str) -> bool:
        return self.custom

    def build_prompt(self, line: Any, dataset: str) -> list[dict[str, Any]]:
        return [{"type": "image", "value": self.dump_image_func(line)}]

    def generate_inner(self, message: Any, dataset: Any = None) -> str:
        return answer_of(self.model, message[0]["value"])


class FakeDataset:
    dataset_name = "AI2D_TEST"

    def __init__(self) -> None:
        self.data = [{"index": 10 + number, "width": width} for number, width in enumerate(WIDTHS)]

    def dump_image(self, line: Any) -> int:
        return line["width"]  # type: ignore[no-any-return]

    def build_prompt(self, line: Any) -> list[dict[str, Any]]:
        return [{"type": "image", "value": self.dump_image(line)}]


def kit_infer_data(model: Any, model_name: str, work_dir: Any, dataset: Any, out_file: str) -> dict[int, str]:
    """VLMEvalKit's infer_data, as far as an adapter can see it."""
    res = {}
    model.set_dump_image(dataset.dump_image)
    for line in dataset.data:
        custom = model.use_custom_prompt(dataset.dataset_name)
        struct = model.build_prompt(line, dataset=dataset.dataset_name) if custom else dataset.build_prompt(line)
        res[line["index"]] = model.generate(message=struct, dataset=dataset.dataset_name)
    return res


@pytest.mark.parametrize("custom", [False, True], ids=["dataset's prompt", "model's own prompt"])
def test_vlmevalkit_gets_a_table_beside_its_answers(harnesses: SimpleNamespace, tmp_path: Path, custom: bool) -> None:
    model, dataset = tiny_model("internvl")[2], FakeDataset()
    before = state_of(model)
    plain = kit_infer_data(FakeVlm(model, custom=custom), "tiny", tmp_path, dataset, "x.pkl")
    work = tmp_path / "work"
    work.mkdir()
    with kit_adapter.watched(tmp_path / "runs"):
        got = harnesses.inference.infer_data(
            FakeVlm(model, custom=custom), "tiny", work_dir=work, dataset=dataset, out_file="x.pkl"
        )
    assert got == plain
    assert state_of(model) == before
    assert set(vars(dataset)) == {"data"}
    rows = list(csv.DictReader((work / "tiny_AI2D_TEST_memory.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["index"] for row in rows] == ["10", "11", "12"]
    assert [int(row["peak_allocated_bytes"]) for row in rows] == [peak_of(model, width) for width in WIDTHS]
    for row in rows:
        assert row["status"] == "measured"
        assert sum(int(row[f"{part}_at_peak"]) for part in PARTS) == int(row["dynamic_peak_bytes"])
        assert 0 < int(row["kv_cache_bytes"]) < int(row["dynamic_peak_bytes"])
    run = read_run(tmp_path / "runs" / "AI2D_TEST")
    assert [sample.answer for sample in run.samples] == [*plain.values()]
    assert run.record.complete


def test_a_loop_that_is_not_watched_runs_as_it_is(harnesses: SimpleNamespace, tmp_path: Path) -> None:
    model = FakeVlm(tiny_model("internvl")[2], custom=False)
    with kit_adapter.watched(tmp_path / "runs"):
        assert model.generate([{"type": "image", "value": 100}]) == answer_of(model.model, 100)
    assert not (tmp_path / "runs").exists()


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_gives_the_harness_its_words(
    harnesses: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[list[str]] = []

    def cli_evaluate() -> None:
        said.append(sys.argv)
        harnesses.evaluator.evaluate(FakeLmm(tiny_model("internvl")[2]), {"ai2d": [100]})

    harnesses.command.cli_evaluate = cli_evaluate
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    out = tmp_path / "runs"
    code, text, err = call(capsys, "harness", "lmms-eval", "-o", str(out), "--", "--model", "x", "--tasks", "ai2d")
    assert (code, err) == (0, "")
    assert said == [["lmms_eval", "--model", "x", "--tasks", "ai2d"]]
    assert f"memprof report {out}" in text
    assert (out / "ai2d" / "run.json").exists()


def test_the_command_runs_vlmevalkits_script(
    harnesses: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    (tmp_path / "helper.py").write_text("WORK = 'beside'\n")
    (tmp_path / "run.py").write_text(
        "import sys\nfrom helper import WORK\nassert __name__ == '__main__'\nprint(WORK, *sys.argv[1:])\n"
    )
    words = ["--", str(tmp_path / "run.py"), "--data", "MME"]
    code, text, _ = call(capsys, "harness", "vlmevalkit", "-o", str(tmp_path / "runs"), *words)
    assert code == 0
    assert text.startswith("beside --data MME\n")


def test_mistakes_at_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "harness", "lm-harness", "-o", str(tmp_path / "r"), "--", "x")
    assert code == 2
    assert "lmms-eval, vlmevalkit" in err
    code, _, err = call(capsys, "harness", "vlmevalkit", "-o", str(tmp_path / "r"), "--", "x")
    assert code == 1
    assert err.count("\n") == 1
    assert "is not installed here" in err
