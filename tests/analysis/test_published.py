"""Which definition gives a published KV figure: every number is worked out here by hand."""

from __future__ import annotations

from typing import Any

import pytest

from memprof.analysis.published import BUDGET, definitions, explain, readings, told
from memprof.errors import BadValue
from memprof.models.find import find
from memprof.pruning import build_pruner

LLAVA = find("llava-1.5-7b")
SHAPE = LLAVA.family.shape(LLAVA, 336, 336, 30)
#: Keys and values of 32 heads of 128 numbers of two bytes.
TOKEN = 2 * 32 * 128 * 2


def by_name(method: str) -> dict[str, int]:
    found = definitions(LLAVA, build_pruner(method), SHAPE, "float16")
    assert len({way.name for way in found}) == len(found)
    return {way.name: way.bytes for way in found}


def test_each_definition_counts_what_it_says() -> None:
    text, ways = SHAPE.text_tokens, by_name("fastv:keep=0.25,layer=3")
    assert SHAPE.visual_tokens == 576
    assert ways == {
        "what each layer holds: text and visual tokens": (3 * (576 + text) + 29 * (144 + text)) * TOKEN,
        "visual tokens each layer holds, without text": (3 * 576 + 29 * 144) * TOKEN,
        "visual tokens behind the last cut, in all layers, without text": 32 * 144 * TOKEN,
        "tokens behind the last cut, in all layers, with text": 32 * (144 + text) * TOKEN,
        "visual tokens of ONE layer behind the last cut, without text": 144 * TOKEN,
        "visual tokens of the layers behind the first cut, without text": 29 * 144 * TOKEN,
        "tokens of the layers behind the first cut, with text": 29 * (144 + text) * TOKEN,
        BUDGET: 32 * 144 * TOKEN,
        "the budget of visual tokens, in all layers, with text": 32 * (144 + text) * TOKEN,
    }


def test_merged_tokens_and_masks_count_as_they_are_held() -> None:
    merged = by_name("sparsevlm:keep=0.3333333333")
    assert merged["visual tokens each layer holds, without text"] == (3 * 576 + 4 * 309 + 9 * 204 + 16 * 113) * TOKEN
    assert merged[BUDGET] == 192 * 32 * TOKEN
    masked = by_name("fastv:drop=mask")
    assert masked["visual tokens each layer holds, without text"] == 32 * 576 * TOKEN


def test_a_figure_is_found_and_its_unit_told() -> None:
    document = explain("31.5 MB", LLAVA, f"divprune:keep={60 / 576}", SHAPE, "float16")
    assert {(m["definition"], m["unit"]) for m in document["matches"]} >= {(BUDGET, "MB")}
    assert all(abs(m["off"]) < 0.01 for m in document["matches"])
    assert "<- the figure, read in MB" in told(document)
    mixed = explain("30 MB", LLAVA, f"divprune:keep={60 / 576}", SHAPE, "float16")
    assert {m["unit"] for m in mixed["matches"]} == {"MiB"}, "meant by MB, but binary"


def test_a_figure_that_nothing_gives_is_said_to_be_none() -> None:
    document = explain("1 MB", LLAVA, "divprune", SHAPE, "float16")
    assert document["matches"] == []
    assert "none gives it within 1 %" in told(document)


@pytest.mark.parametrize("figure", ["a lot", "31.5", "12 parsecs", "-3 MB", "31.5 KB"])
def test_what_is_no_figure_is_refused(figure: str) -> None:
    with pytest.raises(BadValue, match=r"31\.5 MB"):
        readings(figure)


@pytest.mark.parametrize(
    ("figure", "expected"),
    [
        ("31.5 MB", {"MB": 31_500_000, "MiB": int(31.5 * 2**20)}),
        ("1,024 MiB", {"MiB": 2**30, "MB": 1_024_000_000}),
        ("0.3gb", {"GB": 300_000_000, "GiB": int(0.3 * 2**30)}),
    ],
)
def test_a_figure_is_read_in_both_units(figure: str, expected: dict[str, Any]) -> None:
    assert readings(figure) == expected
