"""What makes the difference between two runs, and what is no comparison."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "figures"))

from synthetic import make_runs

from memprof.allowance import Allowance
from memprof.analysis.diff import diff, growth
from memprof.errors import BadValue, UsageError
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


def larger(run: Run, *, more: int = 0, static: int = 0, only: int | None = None) -> Run:
    """``run`` with so many more dynamic bytes in every sample, or in the one numbered ``only``, and static ones."""
    samples = [
        dataclasses.replace(s, dynamic_peak_bytes=s.dynamic_peak_bytes + (more if only in (None, at) else 0))
        for at, s in enumerate(run.samples)
    ]
    record = dataclasses.replace(run.record, static_bytes=run.record.static_bytes + static)
    return Run(record, samples, "elsewhere")


def test_growth_is_told_of_every_sample_and_not_of_the_highest_alone(runs: dict[str, Run]) -> None:
    base = runs["baseline"]
    lowest = min(range(len(base.samples)), key=lambda at: base.samples[at].dynamic_peak_bytes if
                 base.samples[at].ok else 2**62)  # fmt: skip
    found = growth(base, larger(base, more=64 * 2**20, only=lowest), Allowance.of("2%", "32MiB"))
    assert [grown.sample for grown in found] == [base.samples[lowest].id]
    assert found[0].change == 64 * 2**20


def test_what_is_allowed_passes_to_the_byte(runs: dict[str, Run]) -> None:
    base = runs["baseline"]
    assert growth(base, larger(base, more=2**20), Allowance.of("1MiB")) == []
    assert len(growth(base, larger(base, more=2**20 + 1), Allowance.of("1MiB"))) == len(base.finished)
    assert growth(base, larger(base, more=-(2**30), static=-(2**30)), Allowance.of("0%")) == []


def test_weights_do_not_hide_what_doubles_above_them(runs: dict[str, Run]) -> None:
    base = runs["baseline"]
    top = base.highest
    assert top is not None
    small = top.dynamic_peak_bytes // 20  # 5 % of the dynamic peak, and well below 2 % of all
    assert small < 0.02 * (base.record.static_bytes + top.dynamic_peak_bytes)
    assert growth(base, larger(base, more=small), Allowance.of("2%"))
    assert [g.what for g in growth(base, larger(base, static=2**30), Allowance.of("2%"))] == ["static"]


def test_a_sample_that_no_longer_finishes_has_outgrown_everything(runs: dict[str, Run]) -> None:
    base = runs["baseline"]
    samples = [dataclasses.replace(s, status="oom", error="no room") if s.ok else s for s in base.samples]
    found = growth(base, Run(base.record, samples, "elsewhere"), Allowance.of("900GiB"))
    assert len(found) == len(base.finished)
    assert found[0].b is None
    assert found[0].reason == "no room"


@pytest.mark.parametrize("text", ["2", "", "-1%", "two", "5 percent"])
def test_no_allowance_is_refused(text: str) -> None:
    with pytest.raises(BadValue, match="write"):
        Allowance.of(text)


def test_of_several_allowances_the_larger_counts() -> None:
    allowed = Allowance.of("2%", "32MiB")
    assert allowed.bytes_of(2**20) == 32 * 2**20
    assert allowed.bytes_of(100 * 2**30) == 2 * 2**30
    assert allowed.text == "2% or 32MiB"
