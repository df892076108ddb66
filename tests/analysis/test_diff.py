"""What makes the difference between two runs, and what is no comparison."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "figures"))

from synthetic import make_runs

from memprof.analysis.diff import diff
from memprof.errors import UsageError
from memprof.records import PARTS, Run


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    made = make_runs(("ai2d",), samples=5, tokens=4)
    return {run.record.spec.method.partition(":")[0]: run for run in made}


def changed(run: Run, **fields: Any) -> Run:
    spec = dataclasses.replace(run.record.spec, **fields)
    return Run(dataclasses.replace(run.record, spec=spec), run.samples, run.path)


def test_parts_make_up_the_whole_change(runs: dict[str, Run]) -> None:
    found = diff(runs["baseline"], runs["topv"])
    assert found.sample_a == found.sample_b == runs["baseline"].highest.id  # type: ignore[union-attr]
    assert sum(part.change for part in found.parts) == found.dynamic.change < 0
    assert {part.name for part in found.parts} <= set(PARTS)
    sizes = [abs(part.change) for part in found.parts]
    assert sizes == sorted(sizes, reverse=True)
    assert found.static.change == 0


def test_turning_it_round_turns_every_sign(runs: dict[str, Run]) -> None:
    there, back = diff(runs["baseline"], runs["topv"]), diff(runs["topv"], runs["baseline"])
    if there.sample_a == back.sample_a:
        assert {d.name: d.change for d in there.parts} == {d.name: -d.change for d in back.parts}
    assert there.common == back.common
    assert there.mean_change == -back.mean_change  # type: ignore[operator]


def test_a_run_against_its_copy_shows_nothing(runs: dict[str, Run]) -> None:
    found = diff(runs["topv"], Run(runs["topv"].record, runs["topv"].samples, "elsewhere"))
    assert found.dynamic.change == 0
    assert all(d.change == 0 for d in [*found.parts, *found.modules, *found.static_parts])
    assert [c.mean_change for c in found.tokens] == [0, 0, 0, 0]
    assert found.lower == 0
    assert found.said == []


def test_curves_name_the_token_where_they_part(runs: dict[str, Run]) -> None:
    found = {c.name: c for c in diff(runs["baseline"], runs["topv"]).tokens}
    peak = found["peak_allocated_bytes"]
    assert peak.token == 0
    assert peak.b - peak.a == diff(runs["baseline"], runs["topv"]).dynamic.change
    assert found["kv_bytes"].b < found["kv_bytes"].a


def test_layers_of_a_kind_are_one_module(runs: dict[str, Run]) -> None:
    assert not any(".0." in d.name or ".23." in d.name for d in diff(runs["baseline"], runs["fastv"]).modules)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model": "llava-1.5-7b"}, "different models: internvl2-2b and llava-1.5-7b"),
        ({"task": "ocrbench"}, "different tasks: ai2d and ocrbench"),
        ({"stack": "current"}, "different stacks"),
        ({"max_new_tokens": 99}, "different numbers of new tokens"),
    ],
)
def test_what_differs_beside_is_said(runs: dict[str, Run], fields: dict[str, Any], said: str) -> None:
    found = diff(changed(runs["baseline"], stack="paper"), changed(runs["topv"], **{"stack": "paper", **fields}))
    assert any(said in line for line in found.said)
    if "task" in fields or "model" in fields:
        assert found.common == 0


def test_measured_against_predicted_is_said(runs: dict[str, Run]) -> None:
    measured = Run(dataclasses.replace(runs["topv"].record, status="measured"), runs["topv"].samples)
    predicted = Run(dataclasses.replace(runs["topv"].record, status="predicted"), runs["topv"].samples)
    assert "A is measured and B is predicted" in diff(measured, predicted).said[0]


def test_nonsense_is_refused_in_one_line(runs: dict[str, Run]) -> None:
    with pytest.raises(UsageError, match="no finished sample"):
        diff(runs["baseline"], Run(runs["topv"].record, []))
    one = Run(runs["topv"].record, runs["topv"].samples, "runs/a")
    with pytest.raises(UsageError, match="compared with itself"):
        diff(one, one)


def test_json_carries_every_change(runs: dict[str, Run]) -> None:
    data = diff(runs["baseline"], runs["topv"]).to_json()
    assert data["dynamic"]["change"] == data["dynamic"]["b"] - data["dynamic"]["a"]
    assert all("change" in part for part in data["parts"])
