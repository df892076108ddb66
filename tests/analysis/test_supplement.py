"""The supplement's six figures come out, and nothing in between is fitted."""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path

import pytest

from memprof.analysis import supplement as s
from memprof.analysis.whatif import Benches
from memprof.families import Model
from memprof.models.find import find
from memprof.pruning import build_pruner
from memprof.records import Run
from memprof.store import find_runs

ROOT = Path(__file__).parents[2]
CHOSEN = s.Setting((10, 7), (130, 90), 0.51, "GB", "mask")


@pytest.fixture(scope="module")
def card() -> Model:
    return find(s.MODEL)


def test_published_numbers_agree_with_each_other() -> None:
    found = s.savings(s.PUBLISHED)
    for task in s.TASKS:
        for other, published in s.PUBLISHED_SAVINGS[task].items():
            assert found[task][other] == pytest.approx(published, abs=0.06)
    assert s.misfit(s.PUBLISHED) < 0.02


def test_the_search_finds_one_setting_that_meets_all(card: Model) -> None:
    every = s.search(card)
    best, setting = every[0]
    assert best < 1
    assert setting == CHOSEN
    assert {found.form for off, found in every if off <= 1} == {"mask"}, "no other form of FastV meets the figures"
    assert [off for off, _ in every] == sorted(off for off, _ in every)
    kinds = [(f.tiles, f.unit, f.form) for _, f in s.distinct(every, 4)]
    assert len(set(kinds)) == 4


@pytest.mark.parametrize("tiles", s.TILES)
def test_an_image_of_each_number_of_tiles_can_be(card: Model, tiles: int) -> None:
    family = find(s.MODEL).family
    shape = s.shape_of(card, tiles, 100)
    assert shape.length == 256 * tiles + 100
    made = family.shape(card, *s.image_size(shape), 100 - sum(card.template), None)
    assert made == shape


def test_half_of_the_tokens_are_the_published_flops() -> None:
    for tiles in CHOSEN.tiles:
        assert s.flops_cut(tiles, CHOSEN.keep) == pytest.approx(0.48, abs=0.015)


def test_scores_pass_the_logits_between_the_tasks(card: Model) -> None:
    meet = s.crossing(card, 100)
    assert meet is not None
    assert 256 * CHOSEN.tiles[1] + CHOSEN.text[1] < meet < 256 * CHOSEN.tiles[0] + CHOSEN.text[0]
    assert s.crossing(card, 100, "row") is None


def test_methods_of_a_setting_are_specs() -> None:
    for form in s.FORMS:
        setting = dataclasses.replace(CHOSEN, form=form)
        for method in s.METHODS:
            build_pruner(setting.method(method), "paper")


@pytest.fixture(scope="module")
def of_a_card() -> list[Run]:
    return find_runs(sorted((ROOT / "reference" / "h200-runs").glob("supp-*")))


@pytest.mark.parametrize("stack", ["paper", "current"])
def test_what_a_card_measured_is_found_by_prompt_and_method(of_a_card: list[Run], stack: str) -> None:
    found = s.measured(CHOSEN, of_a_card, stack)
    told = s._told_of(found, "GB")
    assert told is not None
    assert told["where"] == "measured on cuda (NVIDIA H200)"
    assert {run.record.spec.stack for row in found.values() for run in row.values()} == {stack}
    if stack == "paper":
        assert all(abs(e) <= 5 for row in s.error_percent(told["dynamic_gb"]).values() for e in row.values())
    other = s.measured(dataclasses.replace(CHOSEN, keep=0.5), of_a_card, stack)
    assert {method: set(row) for method, row in other.items()} == {
        "baseline": set(s.TASKS), "topv": set(), "fastv": set(),
    }  # fmt: skip
    assert s._told_of(other, "GB") is None
    assert not s.measured(dataclasses.replace(CHOSEN, text=(120, 80)), of_a_card, stack)["baseline"]


def test_the_recipe_says_and_draws_all_three(of_a_card: list[Run], tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "reproduce_supplement.py"), run_name="other")
    made = json.loads((ROOT / "plots" / "supplement.json").read_text(encoding="utf-8"))
    said = script["text"](made)
    assert "measured on cuda (NVIDIA H200)" in said
    script["beside"](made, of_a_card[:1], tmp_path / "x")
    drawn = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert list(drawn["bars"]) == ["published", "measured", "predicted", "predicted, today's stack"]
    assert (tmp_path / "x.png").stat().st_size > 10_000
    script["beside"](made | {"measured": None}, of_a_card[:1], tmp_path / "y")
    assert "measured" not in json.loads((tmp_path / "y.json").read_text(encoding="utf-8"))["bars"]


@pytest.mark.slow
def test_the_predictor_gives_the_supplement(card: Model) -> None:
    memory = s.predict(CHOSEN, Benches())
    dynamic = s.dynamic_of(memory, CHOSEN.unit)
    assert all(abs(e) <= 5 for row in s.error_percent(dynamic).values() for e in row.values())
    found = s.savings(dynamic)
    for task in s.TASKS:
        for other, published in s.PUBLISHED_SAVINGS[task].items():
            assert abs(found[task][other] - published) <= 3
    assert dynamic["fastv"]["ai2d"] > 1.1 * dynamic["baseline"]["ai2d"]
    assert dynamic["fastv"]["ocrbench"] == pytest.approx(dynamic["baseline"]["ocrbench"], rel=0.01)
    for method in s.METHODS:
        for at, task in enumerate(s.TASKS):
            kind = CHOSEN.form if method == "fastv" else method
            closed = s.closed_form(kind, card, CHOSEN.tiles[at], CHOSEN.text[at], CHOSEN.keep)
            assert closed == pytest.approx(memory[method][task].dynamic_peak_bytes, rel=0.015), (method, task)
    told = s.words(CHOSEN, memory, memory, card)
    assert "the attention scores (16 heads × 2,690 × 2,690) set FastV's peak" in told[0]
    assert "both methods peak at the same logits" in told[0]


def test_runs_are_made_once(tmp_path: Path) -> None:
    little = s.Setting((1, 1), (60, 60), 0.5, "GB", "mask")
    runs = s.make_runs(little, tmp_path, tokens=1)
    assert [(run.record.spec.task, run.record.spec.method.partition(":")[0]) for run in runs] == [
        (task, method) for task in s.TASKS for method in ("topv", "baseline", "fastv")
    ]
    assert all(run.record.complete for run in runs)
    again = s.make_runs(little, tmp_path, tokens=1)
    assert [run.samples for run in again] == [run.samples for run in runs]
