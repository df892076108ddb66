from __future__ import annotations

import pytest
from stub import question

from memprof.errors import BadValue, UnknownName, UsageError
from memprof.tuning.space import fields_of, with_values


def names(method: str, wanted: tuple[str, ...] | None = None, *, quality: bool = False) -> list[str]:
    return [field.name for field in fields_of(method, wanted, quality=quality)]


def test_without_quality_only_what_memory_rises_with_is_searched() -> None:
    assert names("topv") == ["keep"]
    assert names("baseline") == []
    assert {"keep", "layer", "score"} <= set(names("topv", quality=True))


def test_what_a_spec_fixes_is_not_searched() -> None:
    assert names("topv:keep=0.5") == []
    assert "layer" not in names("topv:layer=3", quality=True)
    assert names("topv", ("keep", "layer")) == ["keep", "layer"]


def test_fields_know_their_ranges() -> None:
    keep, layer = fields_of("topv", ("keep", "layer"), quality=False)
    assert (keep.low, keep.high, keep.monotone, keep.tidy(0.37461)) == (0.02, 1.0, True, 0.3745)
    assert (layer.low, layer.high, layer.step, layer.tidy(3.0)) == (1, 8, 1, 3)
    (score,) = fields_of("topv", ("score",), quality=False)
    assert score.choices is not None
    assert score.default in score.choices


def test_specs_are_canonical() -> None:
    assert with_values("topv:layer=3", {"keep": 0.25}) == "topv:keep=0.25,layer=3"
    assert with_values("baseline", {}) == "baseline"


def test_questions_are_checked() -> None:
    with pytest.raises(UnknownName, match=r"searchable field 'kep'.*keep"):
        question("topv", search=("kep",))
    with pytest.raises(UsageError, match="--budget"):
        question("topv", budget_bytes=None)
    with pytest.raises(UsageError, match="trained weights"):
        question("topv", max_loss=0.02)
    with pytest.raises(BadValue, match="max_loss"):
        question("topv", max_loss=2)
    with pytest.raises(UsageError, match="seconds"):
        question("topv", objective="time")
    with pytest.raises(UsageError, match="twice"):
        question("topv", "topv")
    assert question("topv").bisects
    assert question("topv", "uniform", "baseline").bisects
    assert not question("topv", search=("keep", "layer")).bisects
