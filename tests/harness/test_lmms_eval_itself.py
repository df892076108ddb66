"""lmms-eval itself, where it is installed: a task of its own kind over a tiny model, with and without memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.filterwarnings("default")  # of lmms-eval's own and of what it imports
pytest.importorskip("lmms_eval.evaluator", reason="lmms-eval is not installed", exc_type=ImportError)

from lmms_eval.api.model import lmms  # noqa: E402
from lmms_eval.evaluator import simple_evaluate  # noqa: E402
from lmms_eval.loggers.evaluation_tracker import EvaluationTracker  # noqa: E402
from lmms_eval.tasks import TaskManager  # noqa: E402
from test_harness_adapters import WIDTHS, answer_of, peak_of  # noqa: E402
from tiny import tiny_model  # noqa: E402

from memprof.harness import lmms_eval as adapter  # noqa: E402
from memprof.store import read_run  # noqa: E402

TASK = """
task: widths
dataset_path: json
dataset_kwargs:
  data_files: {data_files}
test_split: train
output_type: generate_until
doc_to_text: "{{{{width}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  max_new_tokens: 3
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 0.0
"""


class Wrapper(lmms):
    """A wrapper in lmms-eval's own manner, around a tiny model."""

    batch_size = 1

    def __init__(self) -> None:
        super().__init__()
        self._model = tiny_model("internvl")[2]

    @property
    def model(self) -> Any:
        return self._model

    def generate_until(self, requests: Any) -> list[str]:
        found = []
        for context, generation_kwargs, *_ in (request.args for request in requests):
            generation_kwargs.pop("until", None)
            found.append(answer_of(self.model, int(context)))
        return found

    def loglikelihood(self, requests: Any) -> Any:
        raise NotImplementedError

    def generate_until_multi_round(self, requests: Any) -> Any:
        raise NotImplementedError


def evaluated(folder: Path) -> dict[str, Any]:
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(
        model=Wrapper(), tasks=["widths"], task_manager=tasks, log_samples=True, batch_size=1, bootstrap_iters=0
    )
    assert found is not None
    return found  # type: ignore[no-any-return]


@pytest.mark.slow
def test_the_real_one_logs_a_memory_beside_each_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    (tmp_path / "widths.json").write_text("".join(
        json.dumps({"width": width, "answer": "x"}) + "\n" for width in WIDTHS
    ))  # fmt: skip
    (tmp_path / "widths.yaml").write_text(TASK.format(data_files=tmp_path / "widths.json"))
    plain = evaluated(tmp_path)
    with adapter.watched(tmp_path / "runs"):
        watched = evaluated(tmp_path)
    samples = watched["samples"]["widths"]
    memories = [sample["memory"] for sample in samples]
    assert [one["peak_allocated_bytes"] for one in memories] == [peak_of(tiny_model("internvl")[2], w) for w in WIDTHS]
    assert watched["results"] == plain["results"]
    assert [sample["resps"] for sample in samples] == [sample["resps"] for sample in plain["samples"]["widths"]]
    tracker = EvaluationTracker(output_path=str(tmp_path / "logs"))
    tracker.general_config_tracker.model_name_sanitized, tracker.date_id = "tiny", "today"
    tracker.save_results_samples("widths", samples)
    (log,) = (tmp_path / "logs").rglob("*samples_widths.jsonl")
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert [line["memory"] for line in lines] == memories
    assert read_run(tmp_path / "runs" / "widths").record.complete
