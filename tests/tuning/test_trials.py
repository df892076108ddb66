from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from stub import GIB, Stub, question

from memprof import bench
from memprof.environment import RANK_VARIABLES, rank_shard
from memprof.errors import DataError
from memprof.gpus import CONTEXT_BYTES
from memprof.models.find import find
from memprof.records import PARTS, RunRecord, RunSpec, SampleRecord, TokenColumns
from memprof.store import RunFolder
from memprof.tasks import TASKS
from memprof.tuning import Question, trials
from memprof.tuning.trials import Measurer, Predictor, card_bytes


def measured(**changes: Any) -> Question:
    """A question about trained weights on a card."""
    spec = RunSpec(model="internvl2-2b", method="baseline", task="ai2d", device="cuda", weights="hub", limit=3)
    return Question(spec, ("topv",), **({"budget_bytes": 5 * GIB} | changes))


class Card:
    """Stands for ``subprocess.run``: writes the run folder that a measured run would leave."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, code: int = 0, score: float = 0.75, *, short: bool = False
    ) -> None:
        self.launched: list[list[str]] = []
        self.environment: dict[str, str] = {}
        self.code, self.score, self.short = code, score, short
        self.compared: dict[str, float] | None = None
        monkeypatch.setattr(subprocess, "run", self)

    def __call__(self, words: list[str], **how: Any) -> Any:
        self.launched.append(words)
        self.environment = how.get("env") or dict(os.environ)
        method, path = words[words.index("--method") + 1], Path(words[words.index("-o") + 1])
        spec = RunSpec(model="internvl2-2b", method=method, task="ai2d", device="cuda")
        score = 0.8 if method == "baseline" else self.score
        with RunFolder.open(path, RunRecord(spec, "measured", static_bytes=4 * GIB, complete=True)) as folder:
            folder.append(
                SampleRecord(
                    "a", visual_tokens=10, kept_visual_tokens=[10, 10, 5, 5], score=score, fidelity=self.compared,
                    tokens=TokenColumns([4 * GIB + 9], [1], [4 * GIB + 10], [1], [None], [0.5]),
                    peak_parts=dict.fromkeys(PARTS, 0) | {"mlp": 9}, dynamic_peak_bytes=9,
                )
            )  # fmt: skip
            if self.short:
                folder.append(SampleRecord("b", status="oom", error="CUDA out of memory"))
        return SimpleNamespace(returncode=self.code, stderr="memprof: 1 sample ran out of memory" * self.short)


def test_what_is_predicted_not_to_fit_is_never_launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    card, predict = Card(monkeypatch), Stub()
    evaluate = Measurer(measured(), tmp_path, predict)
    assert evaluate("topv:keep=0.9,layer=2", "a").status == "not launched"
    tight = Measurer(measured(budget_bytes=9 * GIB), tmp_path, predict, card_bytes=5 * GIB)
    assert tight("topv:keep=0.9,layer=2", "b").status == "not launched"
    assert card.launched == []
    assert evaluate("topv:keep=0.1,layer=2", "c").status == "measured"
    assert len(card.launched) == 2  # the setting, and once the unpruned model that its loss is held against
    evaluate("topv:keep=0.2,layer=2", "d")
    assert len(card.launched) == 3


def test_each_trial_is_a_process_of_its_own_in_a_folder_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    card = Card(monkeypatch)
    result = Measurer(measured(), tmp_path, None)("topv:keep=0.1,layer=2", "0007_topv")
    words = card.launched[0]
    assert words[:4] == [sys.executable, "-m", "memprof.tuning._child", "run"]
    assert words[words.index("-o") + 1] == str(tmp_path / "0007_topv")
    assert "--resume" not in words
    assert (result.peak_allocated_bytes, result.peak_reserved_bytes) == (4 * GIB + 9, 4 * GIB + 10)
    assert (result.kept_share, result.seconds, result.accuracy) == (0.75, 0.5, 0.75)
    assert result.loss == pytest.approx(0.05)
    again = Measurer(measured(), tmp_path, None)
    assert again._words("topv", tmp_path / "0007_topv")[-1] == "--resume"  # a trial taken up again goes on in it


@pytest.mark.parametrize(
    "names", [("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID")]
)
def test_a_trial_of_one_rank_of_many_is_a_whole_run(
    names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in zip(names, "041", strict=True):
        monkeypatch.setenv(name, value)
    assert rank_shard() is not None
    card = Card(monkeypatch)
    assert Measurer(measured(), tmp_path, None)("topv:keep=0.1,layer=2", "a").status == "measured"
    assert "PATH" in card.environment
    assert card.environment.get("LOCAL_RANK") == os.environ.get("LOCAL_RANK")  # which card is its own is still said
    monkeypatch.setattr(os, "environ", card.environment)
    assert rank_shard() is None


def test_agreement_with_the_unpruned_model_is_the_loss_where_it_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    card = Card(monkeypatch)
    card.compared = {"agreement": 0.9}
    assert Measurer(measured(), tmp_path, None)("topv:keep=0.1,layer=2", "a").loss == pytest.approx(0.1)
    assert len(card.launched) == 1


@pytest.mark.parametrize("code", [5, 0])
def test_out_of_memory_is_a_result(code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where the other samples finished, and the run so ended well."""
    Card(monkeypatch, code=code, short=True)
    result = Measurer(measured(), tmp_path, None)("topv:keep=0.9,layer=2", "a")
    assert result.status == "oom"
    assert "out of memory" in (result.error or "")


def test_a_process_that_leaves_nothing_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gone = SimpleNamespace(returncode=-9, stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: gone)
    result = Measurer(measured(), tmp_path, None)("topv", "a")
    assert (result.status, result.error) == ("failed", "the trial's process ended with -9")


def questions(folder: Path, *said: str) -> str:
    """A JSONL of questions about one picture, without counts of tokens."""
    Image.new("RGB", (448, 448)).save(folder / "one.png")
    path = folder / "asked.jsonl"
    path.write_text("".join(json.dumps({"image": "one.png", "question": q, "answer": "a"}) + "\n" for q in said))
    return str(path)


def test_questions_have_the_tasks_length_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = SimpleNamespace(encode=str.split)
    monkeypatch.setattr(bench, "load_tokenizer", lambda card, weights: words)
    data = questions(tmp_path, "what is this", "who", "what is that")
    spec = dataclasses.replace(measured().spec, task="folder", data=data)
    predict = Predictor(spec)
    template = sum(predict.bench.model.template)
    # Nothing but sizes is predicted, so no tokenizer is asked.
    usual = TASKS.build("folder").usual_text_tokens()
    assert {shape.text_tokens - template: n for shape, n in predict.shapes.items()} == {usual: 3}
    (tmp_path / "one.png").write_bytes(b"broken")
    with pytest.raises(DataError, match="no sample can be read"):
        Predictor(spec)


def test_a_checkpoints_own_sizes_are_predicted(tmp_path: Path) -> None:
    card = find("internvl2-2b")
    family = card.family
    small = card.but(text={"num_hidden_layers": 12})
    (tmp_path / "config.json").write_text(json.dumps(family.config(small).to_dict()))
    spec = measured().spec
    for weights, layers in (("hub", 24), (str(tmp_path), 12)):
        predict = Predictor(dataclasses.replace(spec, weights=weights))
        assert predict.bench.model.layers == layers
        assert predict.spec.device == "sim"


class Machine(SimpleNamespace):
    """NVML of a machine with cards of these sizes by number, of which some are in slices; and one with this UUID."""

    class NVMLError(Exception):
        pass

    def __init__(self, *sizes: int, sliced: tuple[int, ...] = (), slices: int = GIB) -> None:
        super().__init__(
            nvmlInit=lambda: None,
            nvmlDeviceGetHandleByIndex=lambda n: {"total": dict(enumerate(sizes))[n], "sliced": n in sliced},
            nvmlDeviceGetHandleByUUID=lambda uuid: {"GPU-x": {"total": sizes[-1], "sliced": False},
                                                    "MIG-y": {"total": slices}}[uuid],
            nvmlDeviceGetName=lambda _: "Tesla T4", nvmlDeviceGetMigMode=self.mode,
            nvmlDeviceGetMigDeviceHandleByIndex=lambda card, n: {"total": slices},
            nvmlDeviceGetMemoryInfo=lambda card: SimpleNamespace(total=card["total"]),
        )  # fmt: skip

    def mode(self, card: dict[str, Any]) -> tuple[int, int]:
        if not card["sliced"] and card["total"] > 30 * GIB:
            raise self.NVMLError("Not Supported")
        return int(card["sliced"]), 0


def test_what_a_card_gives_beside_its_context(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", Machine(15 * GIB))
    assert card_bytes() == 15 * GIB - CONTEXT_BYTES
    monkeypatch.setattr(trials, "calibrated", lambda card: dataclasses.replace(card, measured={"context_bytes": GIB}))
    assert card_bytes() == 14 * GIB
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert card_bytes() is None


@pytest.mark.parametrize(
    ("visible", "total"),
    [(None, 40), ("0", 40), ("1", 20), (" 1,0", 20), ("GPU-x", 10), ("MIG-y", 1), ("2", 1), ("", None), ("-1", None),
     ("7", None), ("NoDevFiles", None)],
)  # fmt: skip
def test_the_card_that_is_visible_is_asked_and_its_slice(
    visible: str | None, total: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Machine(40 * GIB, 20 * GIB, 80 * GIB, 10 * GIB, sliced=(2,)))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert card_bytes() == (total * GIB - CONTEXT_BYTES if total is not None else None)


@pytest.mark.slow
def test_a_real_measured_trial(tmp_path: Path) -> None:
    spec = dataclasses.replace(
        measured().spec, model="proving", device="cpu", weights="shipped", dtype="float32", limit=1
    )
    asked = Question(spec, ("topv",), budget_bytes=GIB)
    result = Measurer(asked, tmp_path, None)("topv:keep=0.5,layer=2", "a")
    assert result.status == "measured", result.error
    assert result.accuracy is not None
    assert result.peak_allocated_bytes > 0
    assert question().measured is False
