"""A comparison is its runs: found again, read off them, and honest about what could not run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memprof import api
from memprof.analysis import compare
from memprof.errors import BadValue, UnknownName
from memprof.gpus import calibrated, find_card
from memprof.pruning import METHODS
from memprof.records import summarize


def asked(**fields: Any) -> Any:
    return api.spec("proving", "baseline", "ocrbench", "cpu", limit=2, max_new_tokens=3, **fields)


def test_all_methods_with_a_budget_are_compared() -> None:
    specs = compare.method_specs(["all"], [0.5, 0.25])
    names = [name for name in METHODS.names() if name != "baseline"]
    assert specs[0] == "baseline"
    assert len(specs) == 1 + 2 * len(names)
    assert {spec.partition(":")[0] for spec in specs} == set(METHODS.names())
    assert compare.method_specs(["topv:sigma=0.1", "topv"], [0.5]) == [
        "baseline", "topv:sigma=0.1,keep=0.5", "topv:keep=0.5",
    ]  # fmt: skip
    with pytest.raises(UnknownName):
        compare.method_specs(["nothing"], [0.5])
    with pytest.raises(BadValue):
        compare.method_specs(["topv"], [1.5])


def test_a_study_is_made_written_and_taken_up_again(tmp_path: Path) -> None:
    specs = compare.method_specs(["random", "topv", "sparsevlm", "cdpruner:relevance=clip"], [0.5])
    begun: list[str] = []
    study = compare.make(asked(), specs, tmp_path, begin=begun.append)
    assert begun == specs
    assert set(study.left_out) == {"cdpruner:relevance=clip,keep=0.5"}
    assert "relevance=question" in study.left_out["cdpruner:relevance=clip,keep=0.5"]
    document = compare.document(study)
    rows = {row["method"]: row for row in document["rows"]}
    assert set(rows) == {"baseline", "random", "topv", "sparsevlm"}
    assert rows["sparsevlm"]["positions"] == "compact"
    assert rows["topv"]["positions"] == "original"
    assert rows["topv"]["accuracy_minus_random"] is not None
    assert rows["random"]["accuracy_minus_random"] is None
    for row in rows.values():
        ways = row["kv_published_bytes"]
        assert ways["what each layer holds: text and visual tokens"] == row["kv_after_prefill_bytes"]
        assert row["prefill_seconds"] > 0
        assert row["samples"] == 2
        assert row["device_bytes"] is None  # on a CPU there is no card to show it
    assert compare.budget_bytes(rows["topv"]) == compare.budget_bytes(rows["baseline"]) // 2

    lines = {path.name: (path / "samples.jsonl").read_text() for path in tmp_path.iterdir() if path.is_dir()}
    seen: list[Any] = []
    again = compare.make(asked(), specs, tmp_path, progress=lambda *_: seen.append(1))
    assert len(seen) <= 2, "only what did not finish may be tried again"
    assert compare.document(again)["rows"] == document["rows"]
    assert {path.name: (path / "samples.jsonl").read_text() for path in tmp_path.iterdir() if path.is_dir()} == lines

    text = compare.told(document, "MiB")
    assert "total" not in text
    assert "left out: `cdpruner:relevance=clip,keep=0.5`" in text
    assert text.count("\n| ") >= 5
    files = compare.write(document, text, tmp_path)
    assert json.loads(files[0].read_text())["rows"] == document["rows"]


def test_the_figure_shows_every_method_and_measure(tmp_path: Path) -> None:
    from memprof import figures

    study = compare.make(asked(), compare.method_specs(["random", "dart"], [0.5, 0.25]), tmp_path)
    data = compare.figure(compare.document(study))
    assert data["methods"] == ["random", "dart"]
    assert data["shares"] == [0.25, 0.5]
    titles = [panel["title"] for panel in data["panels"]]
    assert titles[:4] == ["dynamic peak", "KV after prefill", "prefill", "right answers"]
    held = data["panels"][1]
    assert {point["published"] for point in held["series"]["dart"]} == {
        point["published"] for point in held["series"]["random"]
    }, "a budget is the same for all methods"
    assert all(point["published"] < point["value"] for point in held["series"]["random"])
    files = list(figures.draw_data([data], tmp_path, width="double", unit="MiB"))
    assert {path.suffix for path in files} == {".pdf", ".png", ".json"}
    assert all(path.stat().st_size for path in files)
    before = files[1].read_bytes()
    assert next(p for p in figures.draw_data([data], tmp_path, width="double", unit="MiB") if p.suffix == ".png")
    assert files[1].read_bytes() == before


def test_a_prediction_has_no_times_and_no_quality(tmp_path: Path) -> None:
    spec = api.spec("internvl2-2b", "baseline", "ai2d", "sim", limit=1, max_new_tokens=2)
    study = compare.make(spec, compare.method_specs(["uniform"], [0.25]), tmp_path)
    document = compare.document(study)
    text = compare.told(document, "GiB")
    context = {row["device_bytes"] - row["peak_reserved_bytes"] for row in document["rows"]}
    assert context == {calibrated(find_card(None)).context_bytes}
    for run, row in zip(study.runs, document["rows"], strict=True):
        assert row["device_bytes"] == summarize(run)["device_bytes"]
        assert f" | {row['device_bytes'] / 2**30:.3f} | " in text
    assert "| static GiB | dynamic peak GiB | against Baseline | reserved GiB | total GiB |" in text
    assert "prefill ms" not in text
    assert "accuracy" not in text
    assert "predicted for h100" in text
    data = compare.figure(compare.document(study))
    assert [panel["title"] for panel in data["panels"]] == ["dynamic peak", "KV after prefill"]
    assert data["provenance"]["methods"] == ["KV of the fullest sample"]
