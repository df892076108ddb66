"""Answers side by side in Markdown: a table with a method a column, its picture, its answer, what it kept."""

from __future__ import annotations

import re
from collections.abc import Mapping

from memprof.asked import Asked
from memprof.reports.answers.sheet import HEAD, Column, key_text, sheet
from memprof.reports.answers.words import Marked
from memprof.reports.formats.markdown import escape, table


def render(asked: Asked, unit: str = "GiB", *, pictures: Mapping[str, str] | None = None) -> str:
    """The question, two tables and a line of origin.

    Args:
        asked: What was asked, and the answers.
        unit: Of bytes.
        pictures: Names of the picture files beside the page, by the method's label; None where there are none.
    """
    said = sheet(asked, unit)
    pictures = pictures or {}
    lines = [f"### {escape(said.heading)}", "", f"> **User:** {_one_line(said.question)}", ""]
    rows = [
        ("", [_picture(c, pictures.get(c.label)) for c in said.columns]),
        ("answer", [_answer(c) for c in said.columns]),
        ("", [f"<sub>{escape(c.compared)}</sub>" if c.compared else "" for c in said.columns]),
        ("keeps", [escape(c.kept) if c.tokens is not None else "" for c in said.columns]),
    ]
    shown = [f"| {' | '.join([name, *cells])} |" for name, cells in rows if any(cells)]
    if shown:
        lines += [
            f"| {' | '.join(['', *(escape(c.label) for c in said.columns)])} |",
            "|" + " --- |" * (len(said.columns) + 1), *shown, "",
        ]  # fmt: skip
    if pictures:
        lines += [f"<sub>{escape(key_text(asked))}</sub>", ""]
    lines += [*table(HEAD, said.rows), ""]
    lines += [f"- {escape(line)}" for line in said.remarks] + [""] * bool(said.remarks)
    return "\n".join([*lines, f"<sub>{escape(said.origin)}</sub>"]) + "\n"


def _picture(one: Column, file: str | None) -> str:
    return f"![{escape(f'{one.label} keeps {one.kept}')}]({file})" if file else ""


def _answer(one: Column) -> str:
    if one.error:
        return f"_{escape(one.error)}_"
    return "" if one.answer is None else _marked(one.answer)


def _marked(answer: Marked) -> str:
    """Differing words in bold. Inside a word, Markdown's stars bind to letters only, so other signs take a tag."""
    if not answer.spans:
        return "_(nothing)_"
    out = ""
    for text, differs in answer.spans:
        stars = answer.unit == "word" or re.fullmatch(r"\w+", text)
        shown = _one_line(text)
        out += shown if not differs else f"**{shown}**" if stars else f"<b>{shown}</b>"
    return out


def _one_line(text: str) -> str:
    return "<br>".join(escape(line) for line in text.split("\n"))
