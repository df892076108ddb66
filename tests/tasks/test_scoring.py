"""The published scoring rules, every branch, on predictions made by hand."""

import pytest

from memprof.errors import BadValue, DataError
from memprof.tasks import TASKS, Sample
from memprof.tasks._pictures import Drawn
from memprof.tasks.ocrbench import FORMULA, INSTRUCTION, QUESTIONS


def sample(*answers, category=None):
    return Sample("0", 4, 4, "?", None, answers, category, Drawn(4, 4, "0"))


LMMS = {
    "B": 1, "b": 1, " B \n": 1, "B.": 1, "(B)": 1, "B)": 1, "**B**": 1, "B:": 1, "B. leaf": 1, " B. A and B": 1,
    "A": 0, "A. B": 0, "B leaf": 0, "(B) leaf": 0, "leaf": 0, "The answer is B": 0, "The answer is B.": 0,
    "b. leaf": 0, "AB": 0, "": 0, ".": 0,
}  # fmt: skip


@pytest.mark.parametrize(("prediction", "score"), LMMS.items())
def test_ai2d_lmms_eval(prediction, score):
    assert TASKS.build("ai2d").score(prediction, sample("B")) == score


INTERNVL = {"B": 1, "b": 1, " b\n": 1, "B.": 0, "(B)": 0, "B. leaf": 0, "A": 0, "": 0}


@pytest.mark.parametrize(("prediction", "score"), INTERNVL.items())
def test_ai2d_internvl(prediction, score):
    assert TASKS.build("ai2d:rule=internvl").score(prediction, sample("B")) == score


def test_ai2d_rule_is_checked():
    with pytest.raises(BadValue, match="lmms-eval, internvl"):
        TASKS.build("ai2d:rule=guess")


def test_ai2d_prompt_is_the_published_one():
    row = {"question": "What takes in water?", "options": ["leaf", "root"], "answer": "1"}
    task = TASKS.build("ai2d")
    assert task.prompt(row) == (
        "What takes in water?\nA. leaf\nB. root\nAnswer with the option's letter from the given choices directly."
    )
    assert task.answers(row) == ("B",)
    tsv = {"question": "What takes in water?", "A": "leaf", "B": "root", "answer": "b"}
    assert (task.prompt(tsv), task.answers(tsv)) == (task.prompt(row), ("B",))


@pytest.mark.parametrize("answer", ["2", "C", "-1", "", "root", "AB"])
def test_ai2d_answer_outside_the_options(answer):
    with pytest.raises(ValueError, match="neither an index nor a letter of the 2 options"):
        TASKS.build("ai2d").answers({"options": ["leaf", "root"], "answer": answer})


@pytest.mark.parametrize("row", [{"options": []}, {"options": "leaf"}, {"A": "leaf"}, {}])
def test_ai2d_without_options(row):
    with pytest.raises(ValueError, match="no options"):
        TASKS.build("ai2d").prompt({"question": "?", **row})


OCR = [
    ("The total is 12.50.", ("12.50",), 1),
    ("12.5", ("12.50",), 0),
    ("SECRET recipe", ("Secret Recipe",), 1),
    ("secret\nrecipe", ("SECRET RECIPE",), 1),
    ("secret recipe", ("secret\nrecipe",), 1),
    ("secret  recipe", ("secret recipe",), 0),
    ("centre", (" CENTRE ",), 1),
    ("second", ("first", "second"), 1),
    ("third", ("first", "second"), 0),
    ("", ("a",), 0),
]


@pytest.mark.parametrize(("prediction", "answers", "score"), OCR)
def test_ocrbench_words(prediction, answers, score):
    assert TASKS.build("ocrbench").score(prediction, sample(*answers, category="Doc-oriented VQA")) == score


FORMULAS = [
    ("x ^ { 2 } + Y", ("x^{2}+Y",), 1),
    ("x^{2}+Y", ("x ^ { 2 }\n+ Y",), 1),
    ("so x^{2}\n+Y holds", ("x^{2}+Y",), 1),
    ("x^{2}+y", ("x^{2}+Y",), 0),
    ("X^{2}+Y", ("x^{2}+Y",), 0),
    ("b", ("a", "b"), 1),
]


@pytest.mark.parametrize(("prediction", "answers", "score"), FORMULAS)
def test_ocrbench_formulas_keep_case_and_drop_spaces(prediction, answers, score):
    assert TASKS.build("ocrbench").score(prediction, sample(*answers, category=FORMULA)) == score


def test_ocrbench_prompt_with_and_without_the_suffix():
    row = {"question": "what is written?", "answer": ["A"], "text_tokens": 15, "question_tokens": 4}
    with_suffix, without = TASKS.build("ocrbench"), TASKS.build("ocrbench:suffix=false")
    assert with_suffix.prompt(row) == f"what is written?\n{INSTRUCTION}"
    assert without.prompt(row) == "what is written?"
    assert (with_suffix.text_tokens(row), without.text_tokens(row)) == (15, 4)


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ({"answer": ["a", "b"]}, ("a", "b")),
        ({"answer": "a"}, ("a",)),
        ({"answers": "a"}, ("a",)),
        ({"answer": "['a', \"b's\"]"}, ("a", "b's")),
        ({"answer": "[a"}, ("[a",)),
        ({"answer": "[not python]"}, ("[not python]",)),
    ],
)
def test_ocrbench_answers(row, answers):
    assert TASKS.build("ocrbench").answers(row) == answers


@pytest.mark.parametrize("name", ["question_type", "category", "type"])
def test_ocrbench_category_under_any_name(name):
    assert TASKS.build("ocrbench").category({name: FORMULA}) == FORMULA


def test_ocrbench_has_ten_types_and_a_thousand_questions():
    assert len(QUESTIONS) == 10
    assert sum(QUESTIONS.values()) == 1000


def test_ocrbench_final_score_needs_all_questions():
    task = TASKS.build("ocrbench")
    every = [(name, float(i % 2)) for name, of in QUESTIONS.items() for i in range(of)]
    totals = task.aggregate(every)
    assert (totals["final_score"], totals["correct"], totals["text_recognition"]) == (500, 500, 150)
    assert totals["categories"][FORMULA] == {"correct": 50, "samples": 100, "of": 100}
    assert totals["score"] == 0.5
    part = task.aggregate(iter(every[:-1]))
    assert part["final_score"] is None
    assert part["correct"] == 499


def test_aggregate_of_the_others():
    task = TASKS.build("ai2d")
    assert task.aggregate([]) == {"metric": "exact match", "samples": 0, "score": None}
    assert task.aggregate([(None, 1.0), (None, 0.0)]) == {"metric": "exact match", "samples": 2, "score": 0.5}
    named = TASKS.build("folder").aggregate([("x", 1.0), ("y", 0.0), ("x", 0.0)])
    assert named["categories"] == {"x": {"samples": 2, "score": 0.5}, "y": {"samples": 1, "score": 0.0}}


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [("It is  a RED\ncar.", ("red car",), 1), ("blue", ("red", "blue"), 1), ("green", ("red",), 0), ("x", (), 0)],
)
def test_folder(prediction, answers, score):
    assert TASKS.build("folder").score(prediction, sample(*answers)) == score


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ({}, ()),
        ({"answer": ""}, ()),
        ({"answer": 4}, ("4",)),
        ({"answers": ["a", 1]}, ("a", "1")),
        ({"answers": []}, ()),
    ],
)
def test_folder_answers(row, answers):
    assert TASKS.build("folder").answers(row) == answers


def test_an_error_of_a_row_is_a_data_error_that_names_it(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"image": "a.png", "question": "?", "options": ["x", "y"], "answer": "7"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: answer '7' is neither"):
        TASKS.build("ai2d").samples(str(tmp_path))
