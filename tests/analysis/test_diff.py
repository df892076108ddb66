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
from memprof.analysis.diff import diff, growth, missing
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


def test_a_sample_that_is_not_there_has_outgrown_everything(runs: dict[str, Run]) -> None:
    base, everything = runs["baseline"], Allowance.of("900GiB")
    first, *others = base.finished
    found = growth(base, Run(base.record, [first], "elsewhere"), everything)
    assert {grown.sample for grown in found} == {sample.id for sample in others}
    assert all(grown.b is None and grown.reason is None for grown in found)
    renamed = [dataclasses.replace(s, id=f"new {s.id}") for s in base.samples]
    for elsewhere in (renamed, []):  # no sample in common, in either direction, and none at all
        found = growth(base, Run(base.record, elsewhere, "elsewhere"), everything)
        assert {grown.sample for grown in found} == {sample.id for sample in base.finished}
    assert len(growth(Run(base.record, renamed, "new"), base, everything)) == len(base.finished)
    assert growth(Run(base.record, [first], "elsewhere"), base, everything) == []  # more samples are no growth


def test_of_other_data_both_samples_are_named(runs: dict[str, Run]) -> None:
    base = runs["baseline"]
    other = changed(larger(base, more=2**20), task="ocrbench")
    other.samples[:] = [dataclasses.replace(s, id=f"new {s.id}") for s in other.samples]
    (found,) = growth(base, other, Allowance.of("1KiB"))
    assert base.highest is not None
    assert (found.sample, found.other) == (base.highest.id, f"new {base.highest.id}")
    (found,) = growth(base, changed(Run(base.record, [], "elsewhere"), task="ocrbench"), Allowance.of("1KiB"))
    assert (found.sample, found.b, found.other) == (base.highest.id, None, None)


def test_a_run_without_another_is_missing_where_a_sample_of_it_finished(runs: dict[str, Run]) -> None:
    base = runs["baseline"]
    (found,) = missing(base)
    assert found.a == base.highest.dynamic_peak_bytes  # type: ignore[union-attr]
    assert (found.what, found.b, found.other) == ("run", None, "baseline on internvl2-2b, ai2d")
    assert missing(Run(base.record, [s for s in base.samples if not s.ok])) == []


def test_notes_are_words_and_tell_cards_apart_as_they_ran(runs: dict[str, Run]) -> None:
    def of(card: str | None, **fields: Any) -> Run:
        run = changed(runs["baseline"], **fields)
        there = {**run.record.environment, "gpu": card}
        return Run(dataclasses.replace(run.record, environment=there), run.samples)

    def notes(a: Run, b: Run) -> list[str]:
        return [line for line in diff(a, b).said if "cards" in line]

    assert notes(of("NVIDIA L4", gpu=None), of("l4", gpu="l4")) == []
    assert notes(of("NVIDIA H100 80GB HBM3"), of("NVIDIA H200")) == ["different cards: h100 and h200"]
    assert notes(of(None, gpu="l4"), of(None, gpu=None)) == ["different cards: l4 and none"]
    tiles = diff(of(None, max_tiles=4), of(None, max_tiles=None)).said
    assert "different tile limits: 4 and the model's own" in tiles
    assert not any("None" in line for line in diff(of(None, images=2, batch=3), of(None, gpu="l4")).said)


def test_samples_of_one_run_alone_are_said(runs: dict[str, Run]) -> None:
    base = runs["baseline"]
    less = Run(base.record, base.samples[:2], "elsewhere")
    assert f"3 of {len(base.samples)} samples of A are not in B" in diff(base, less).said
    assert f"3 of {len(base.samples)} samples of B are not in A" in diff(less, base).said


@pytest.mark.parametrize("text", ["2", "", "-1%", "two", "5 percent"])
def test_no_allowance_is_refused(text: str) -> None:
    with pytest.raises(BadValue, match="write"):
        Allowance.of(text)


def test_of_several_allowances_the_larger_counts() -> None:
    allowed = Allowance.of("2%", "32MiB")
    assert allowed.bytes_of(2**20) == 32 * 2**20
    assert allowed.bytes_of(100 * 2**30) == 2 * 2**30
    assert allowed.text == "2% or 32MiB"
