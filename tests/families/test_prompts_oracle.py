"""Prompts and token ids are the reference's, case by case (../shared/data/oracles/prompts)."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memprof.families import Model
from memprof.families._chat import Special, Tokenizer
from memprof.families.internvl import InternVL
from memprof.models.find import find
from memprof.models.tokenizer import load_tokenizer
from memprof.prompts import Image

pytest.importorskip("sentencepiece")
SHARED = Path(__file__).parents[3] / "shared"
FILE = SHARED / "data" / "oracles" / "prompts" / "prompts.json"
ORACLE: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}
pytestmark = pytest.mark.skipif(not ORACLE, reason="../shared is not here")

#: The one case memprof means to read differently, and why.
TEXT_STAYS_TEXT = "special_looking"  # its question spells special tokens, which the reference turns into special ids
PLAIN = [case for case in ORACLE.get("cases", []) if case["name"] != TEXT_STAYS_TEXT]
EXTRA = {case["name"]: case for case in ORACLE.get("extra", [])}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(find("internvl2-2b"), str(SHARED / "data" / "tokenizers" / "internvl2-2b"))


def expected_ids(case: dict[str, Any]) -> list[int]:
    """A case's ids, its stored runs expanded and the result held against its checksum."""
    parts = (part if isinstance(part, list) else [part, 1] for part in case["input_ids_parts"])
    ids = [id for id, times in parts for _ in range(times)]
    assert len(ids) == case["n_input_ids"]
    assert hashlib.sha256(np.array(ids, dtype="<i4").tobytes()).hexdigest() == case["input_ids_sha256_int32le"]
    return ids


def image(tiles: int) -> Image:
    return Image(((16, 16),) * tiles, 1, max(1, tiles - 1))


def ids_of(model: Model, question: str, tiles: int, tokenizer: Tokenizer) -> list[int]:
    shown = [image(tiles) if model.family.thumbnails else model.family.image(model, 1, 1)]
    ids = model.family.written(model, question, shown if tiles else [], tokenizer).ids
    assert ids is not None
    return ids


@pytest.mark.parametrize("case", PLAIN, ids=lambda c: f"{c['name']}-{c['num_patches_list'][0]}")
def test_ids(case: dict[str, Any], tokenizer: Tokenizer) -> None:
    card = find("internvl2-2b")
    ids = ids_of(card, case["question"], case["num_patches_list"][0], tokenizer)
    assert ids == expected_ids(case)


def test_every_case_is_compared() -> None:
    assert len(PLAIN) == 22
    assert len(ORACLE["cases"]) == 24
    assert set(EXTRA) == {"two_images", "text_only", "second_turn"}


def test_template_has_the_tokens_the_card_counts(tokenizer: Tokenizer) -> None:
    card = find("internvl2-2b")
    family = card.family
    ids = np.array(ids_of(card, "x", 1, tokenizer))
    visual = np.flatnonzero(ids == family.image_token(card))
    assert (visual[0], len(ids) - 1 - visual[-1]) == (card.template[0], card.template[1] + len(tokenizer.encode("x")))


def test_no_image(tokenizer: Tokenizer) -> None:
    card = find("internvl2-2b")
    case = EXTRA["text_only"]
    assert ids_of(card, case["question"], 0, tokenizer) == expected_ids(case)


def test_several_images(tokenizer: Tokenizer) -> None:
    card = find("internvl2-2b")
    family = card.family
    assert isinstance(family, InternVL)
    case = EXTRA["two_images"]
    first, second, rest = case["question"].split("<image>")
    images = [family.placeholders(card, image(tiles)) for tiles in case["num_patches_list"]]
    turn = (first, *images[0], second, *images[1], rest)
    assert family.conversation(card, [(turn, None)], tokenizer) == expected_ids(case)


def test_history(tokenizer: Tokenizer) -> None:
    card = find("internvl2-2b")
    family = card.family
    assert isinstance(family, InternVL)
    case = EXTRA["second_turn"]
    [(asked, answer)] = case["history"]
    before = (*family.placeholders(card, image(case["num_patches_list"][0])), asked.removeprefix("<image>"))
    turns = [(before, answer), ((case["question"],), None)]
    assert family.conversation(card, turns, tokenizer) == expected_ids(case)


SPECIAL_LOOKING = [case for case in ORACLE.get("cases", []) if case["name"] == TEXT_STAYS_TEXT]


@pytest.mark.parametrize("case", SPECIAL_LOOKING, ids=lambda c: str(c["num_patches_list"][0]))
class TestQuestionThatSpellsSpecialTokens:
    def test_it_stays_text(self, case: dict[str, Any], tokenizer: Tokenizer) -> None:
        card = find("internvl2-2b")
        tiles = case["num_patches_list"][0]
        ids = ids_of(card, case["question"], tiles, tokenizer)
        plain = ids_of(card, "x", tiles, tokenizer)
        special = set(ORACLE["special_token_ids"].values())
        assert [id for id in ids if id in special] == [id for id in plain if id in special]
        assert case["question"] in tokenizer.decode(ids)

    def test_said_as_special_tokens_it_is_the_references(self, case: dict[str, Any], tokenizer: Tokenizer) -> None:
        card = find("internvl2-2b")
        family = card.family
        assert isinstance(family, InternVL)
        before, after = case["question"].split("<image>", 1)
        names = ORACLE["special_token_ids"] | {"[UNUSED_TOKEN_146]": 92543}
        split = re.compile("(" + "|".join(map(re.escape, names)) + ")")

        def parts(text: str) -> list[Any]:
            return [Special(names[piece]) if piece in names else piece for piece in split.split(text) if piece]

        shown = family.placeholders(card, image(case["num_patches_list"][0]))
        turn = [*parts(before), *shown, *parts(after)]
        assert family.conversation(card, [(turn, None)], tokenizer) == expected_ids(case)


@pytest.mark.parametrize("case", ORACLE.get("decode", []), ids=lambda c: repr(c["response"]))
def test_decoding(case: dict[str, Any], tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(case["generated"]) == case["response"]


def test_sentencepiece_and_json_agree(tmp_path: Path) -> None:
    """Llama's tokenizer comes in both forms, and LLaVA's prompt is the same through either."""
    source = SHARED / "data" / "tokenizers" / "llama2"
    card = find("llava-1.5-7b")
    (tmp_path / "json").mkdir()
    (tmp_path / "sp").mkdir()
    for folder, name in (("json", "tokenizer.json"), ("sp", "tokenizer.model")):
        (tmp_path / folder / name).symlink_to(source / name)
        (tmp_path / folder / "tokenizer_config.json").symlink_to(source / "tokenizer_config.json")
    one, two = (load_tokenizer(card, str(tmp_path / folder)) for folder in ("json", "sp"))
    for case in ORACLE["cases"][::2]:
        prompts = [ids_of(card, case["question"], 1, t) for t in (one, two)]
        assert prompts[0] == prompts[1]
        assert one.decode(prompts[0][-9:]) == two.decode(prompts[1][-9:])
        assert prompts[0][:5] == [1, 3148, 1001, 29901, 29871]
        assert prompts[0].count(32000) == 576


def test_llava_template_has_the_tokens_the_card_counts() -> None:
    card = find("llava-1.5-7b")
    family = card.family
    tokenizer = load_tokenizer(card, str(SHARED / "data" / "tokenizers" / "llama2"))
    ids = np.array(ids_of(card, "What is this?", 1, tokenizer))
    visual = np.flatnonzero(ids == family.image_token(card))
    asked = 4  # "What is this?", without the prefix space of its own
    assert (visual[0], len(ids) - 1 - visual[-1]) == (card.template[0], card.template[1] + asked)
