"""Answers as text: differences, what is said of them, and nothing that a prompt or a model could smuggle in."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from asking import answered, asked, picture
from PIL import Image

from memprof.asked import Asked, Cut, Grid
from memprof.errors import BadValue, MemprofError, UnknownName
from memprof.reports import answers
from memprof.reports.answers.sheet import kept_text, legend, sheet
from memprof.reports.answers.words import mark, readable

GRID = Grid(columns=2, rows=1, thumbnail=True, across=4, down=4)
HALF = [Cut(2, 24, list(range(24)))]
NASTY = "<script>alert(1)</script> **x** [a](b) | `c` \x1b[31mred\x1b[0m\u202e"


def three() -> Asked:
    return asked(
        GRID,
        answered("baseline", "A man and a baby are sitting on a couch.", grid=GRID),
        answered("fastv:keep=0.5,layer=2", "A man and a baby are sitting on a couch.", HALF, grid=GRID),
        answered("topv:keep=0.5,layer=2", "A man and a rabbit are on a couch.", HALF, grid=GRID, dynamic=50 << 20),
    )


# -- differences -------------------------------------------------------------------------------------------------------


def test_differing_words_are_marked_and_missing_ones_counted() -> None:
    found = mark("A man and a rabbit are on a couch.", "A man and a baby are sitting on a couch.")
    assert found.spans == [("A man and a ", False), ("rabbit", True), (" are on a couch.", False)]
    assert (found.unit, found.units, found.differing, found.missing, found.same) == ("word", 9, 1, 1, False)


def test_neighbours_are_marked_as_one_and_nothing_is_lost() -> None:
    text = " one\n\ntwo  three four "
    found = mark(text, "one five four")
    assert [piece for piece, differs in found.spans if differs] == ["two  three"]
    assert "".join(piece for piece, _ in found.spans) == text


def test_single_words_are_compared_by_characters() -> None:
    found = mark("K7XNP", "K7XMPE")
    assert found.spans == [("K7X", False), ("N", True), ("P", False)]
    assert (found.unit, found.differing, found.missing) == ("character", 1, 1)
    assert mark("J", "a cursive J").unit == "word"


@pytest.mark.parametrize(("answer", "reference", "same"), [("", "", True), ("a  b", "a b", True), ("", "a b", False)])
def test_empty_and_respaced_answers(answer: str, reference: str, same: bool) -> None:
    assert mark(answer, reference).same is same


def test_what_could_steer_a_terminal_is_replaced() -> None:
    assert readable("a\x1b[2J\u202eb\r\nc\td") == "a\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}b\nc d"


# -- what is said ------------------------------------------------------------------------------------------------------


def test_the_first_answer_is_the_reference_and_the_others_are_held_against_it() -> None:
    first, same, other = sheet(three(), "MiB").columns
    assert first.compared == "what the others are compared with"
    assert same.compared == "the same as Baseline"
    assert other.compared == "1 of 9 words differ from Baseline, 1 of Baseline's words left out"


def test_rows_say_peak_saving_cache_flops_and_status() -> None:
    baseline, _, topv = sheet(three(), "MiB").rows
    assert baseline == ["Baseline", "48/48", "3", "1124.0", "100.0", "-", "1.0", "50.0 %", "measured"]
    assert topv == ["TopV", "24/48", "3", "1074.0", "50.0", "50.0 %", "1.0", "50.0 %", "measured"]


def test_what_was_kept_in_words() -> None:
    def text(cuts: list[Cut]) -> str:
        return kept_text(answered(cuts=cuts, grid=GRID))

    assert text([]) == "all 48 visual tokens"
    assert text([Cut(2, 24, None)]) == "24 of 48 visual tokens, after 2 layers"
    assert text([Cut(0, 5, None)]) == "5 of 48 visual tokens, before the language model"
    cuts = [Cut(2, 24, None), Cut(4, 12, None), Cut(6, 6, None)]
    assert text(cuts) == "6 of 48 visual tokens, after the last of 3 cuts (24, 12, 6)"


# -- formats -----------------------------------------------------------------------------------------------------------


def test_terminal_sets_answers_side_by_side_in_80_columns() -> None:
    lines = answers.terminal.render(three(), "MiB", width=80).splitlines()
    assert max(map(len, lines)) <= 80
    assert any(re.match(r"Baseline +FastV +TopV", line) for line in lines)
    text = "\n".join(lines)
    assert "*rabbit*" in text
    assert "\x1b" not in text
    assert re.search(r"████ ████  ████ +████ ████  ···· +████ ████  ····\n████ ████  ████ +████ ····  ····", text)


def test_terminal_in_colour_marks_by_colour() -> None:
    text = answers.terminal.render(three(), "MiB", width=80, colour=True)
    assert "*rabbit*" not in text
    assert re.search("\x1b\\[1;35mrabbit\x1b", text)


def test_many_methods_are_broken_into_rows() -> None:
    many = [answered(f"topv:keep=0.{k},layer=2", f"w{k}", HALF, grid=GRID) for k in range(1, 6)]
    text = answers.terminal.render(asked(GRID, *many), "MiB", width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"TopV keep 0.4 +TopV keep 0.5", text)


def test_large_maps_are_drawn_in_shades_and_say_so() -> None:
    grid = Grid(columns=4, rows=3, thumbnail=True, across=16, down=16)
    half = [Cut(2, grid.tokens // 2, list(range(0, grid.tokens, 2)))]
    found = asked(grid, *(answered(f"topv:keep=0.{k},layer=2", f"w{k}", half, grid=grid) for k in range(1, 4)))
    text = answers.terminal.render(found, width=80)
    assert "▒▒▒▒ ▒▒▒▒ ▒▒▒▒ ▒▒▒▒  ▒▒▒▒" in text
    assert "shades are shares of 4 × 4 visual tokens" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_picture_of_random_weights_says_so_where_it_may_be_taken_from_its_place() -> None:
    one = answered("topv:keep=0.5,layer=2", None, HALF, grid=GRID)
    trained = asked(GRID, one)
    (column,) = sheet(trained, "GiB").columns
    said = legend(column, trained)
    assert said[0] == "TopV keeps 24 of 48 visual tokens, after 2 layers"
    one.run.record.spec.weights = "random"
    random = Asked(**{**vars(trained), "weights": "random weights"})
    assert legend(column, random) == [*said, "random weights"]


def test_markdown_sets_differences_in_bold() -> None:
    text = answers.render("markdown", three(), "MiB")
    assert "| answer | A man and a baby are sitting on a couch. |" in text
    assert "A man and a **rabbit** are on a couch." in text
    assert "![" not in text  # without a file there is no place for pictures


def test_markdown_marks_signs_inside_a_word_by_a_tag() -> None:
    two = asked(GRID, answered(text="AB!D", grid=GRID), answered("topv", "AB?D", HALF, grid=GRID))
    assert "AB<b>?</b>D" in answers.render("markdown", two)


def test_nothing_said_is_shown_as_that() -> None:
    quiet = asked(GRID, answered(text="", grid=GRID))
    assert "(nothing)" in answers.render("terminal", quiet)
    assert "(nothing)" in answers.render("markdown", quiet)
    assert "(nothing)" in answers.render("html", quiet)


@pytest.fixture
def nasty() -> Asked:
    return asked(
        GRID, answered(text=f"plain {NASTY}", grid=GRID), answered("topv", f"{NASTY} other", HALF, grid=GRID),
        question=NASTY, notes=[NASTY],
    )  # fmt: skip


def test_html_escapes_all_that_was_said_and_asks_for_nothing(nasty: Asked) -> None:
    page = answers.render("html", nasty)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "\x1b" not in page
    assert "<mark>" in page
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert "url(" not in page
    assert "default-src 'none'" in page
    assert page.count("data:image/png;base64,") == 3  # the picture, and one of what each method kept


def test_markdown_escapes_all_that_was_said(nasty: Asked) -> None:
    text = answers.render("markdown", nasty)
    assert "<script" not in text
    assert "[a](b)" not in text
    assert "**x**" not in text.replace(r"\*\*x\*\*", "")
    assert "\x1b" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows[:3]} == {4}


def test_terminal_lets_no_escape_through(nasty: Asked) -> None:
    assert "\x1b" not in answers.terminal.render(nasty, width=80)
    assert "\x1b[31m" not in answers.terminal.render(nasty, width=80, colour=True)


def test_json_holds_bytes_and_numbers_of_tokens() -> None:
    document = json.loads(answers.render("json", three()))
    assert (document["schema"], document["question"]) == (1, "what is this?")
    sizes = {"across": 4, "down": 4, "side": 4}
    assert document["grid"] == {"columns": 2, "rows": 1, "thumbnail": True, **sizes}
    first, _, topv = document["answers"]
    assert first["cuts"] == []
    assert topv["cuts"] == [{"layer": 2, "kept": 24, "tokens": list(range(24))}]
    assert topv["dynamic_peak_bytes"] == 50 << 20
    assert (topv["answer"], topv["differing"]) == ("A man and a rabbit are on a couch.", 1)


def test_a_prediction_shows_numbers_and_no_picture() -> None:
    found = asked(
        GRID, *(answered(m, None, c, grid=GRID, status="predicted") for m, c in (("baseline", []), ("topv", HALF)))
    )
    for name in ("terminal", "markdown", "html"):
        text = answers.render(name, found)
        assert "predicted" in text
        assert "24/48" in text
        assert "keeps" not in text
    assert answers.render("html", found).count("data:image/png") == 1  # the picture itself


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_folder_holds_all_of_it(tmp_path: Path) -> None:
    written = answers.save(three(), tmp_path / "all", None, "MiB")
    names = {"ask.html", "ask.md", "ask.json", "ask-baseline.png", "ask-fastv.png", "ask-topv.png"}
    assert {path.name for path in written} == names == {path.name for path in (tmp_path / "all").iterdir()}
    text = (tmp_path / "all" / "ask.md").read_text()
    for link in re.findall(r"\]\(([^)]+)\)", text):
        Image.open(tmp_path / "all" / link).load()
    assert len(re.findall(r"!\[[^\]]*\]\(ask-\w+\.png\)", text)) == 3


def test_pictures_lie_beside_the_markdown_file(tmp_path: Path) -> None:
    written = answers.save(three(), tmp_path / "My answers.md", None)
    assert [p.name for p in written] == [
        "My answers.md", "my-answers-baseline.png", "my-answers-fastv.png", "my-answers-topv.png",
    ]  # fmt: skip


def test_the_format_asked_for_outweighs_the_suffix(tmp_path: Path) -> None:
    (page,) = answers.save(three(), tmp_path / "page.txt", "html")
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert [p.name for p in answers.save(three(), tmp_path / "folder", "json")] == ["ask.json"]


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="html, json, markdown, terminal"):
        answers.check("pdf")
    with pytest.raises(BadValue, match=r"\.html"):
        answers.check_target(tmp_path / "a.pdf", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(MemprofError, match="cannot write"):
        answers.save(three(), tmp_path / "file" / "a.md", None)


def test_the_asked_picture_is_shown_small() -> None:
    big = asked(GRID, answered(grid=GRID))
    page = answers.render("html", Asked(**{**vars(big), "picture": picture(3000, 2000)}))
    assert len(page) < 700_000
