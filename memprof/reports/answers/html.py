"""One self-contained page: picture and question, the methods side by side, the numbers. No script, no request."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping
from importlib.resources import files
from typing import TYPE_CHECKING

from memprof.asked import Asked
from memprof.reports.answers.sheet import HEAD, Column, Sheet, key_text, sheet
from memprof.reports.answers.words import Marked
from memprof.reports.pages import escape
from memprof.telling.palette import method_colour

if TYPE_CHECKING:
    from PIL.Image import Image

#: Longest edge of the asked-about picture on the page.
_SHOWN = 640


def render(asked: Asked, unit: str = "GiB", *, pictures: Mapping[str, Image] | None = None) -> str:
    """The page. The browser is forbidden by it to load or run anything, whatever a prompt or an answer says.

    Args:
        asked: What was asked, and the answers.
        unit: Of bytes.
        pictures: What each method kept, drawn, by its label.
    """
    said, pictures = sheet(asked, unit), pictures or {}
    own = "".join(f".m{i}{{--c:{method_colour(one.method)}}}\n" for i, one in enumerate(said.columns))
    style = files("memprof.reports").joinpath("answers", "page.css").read_text(encoding="utf-8") + own
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    cards = [
        _card(i, one, pictures.get(one.label))
        for i, one in enumerate(said.columns)
        if one.answer or one.error or one.label in pictures
    ]
    status = asked.answers[0].run.record.status
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'sha256-{digest}'; \
base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>memprof: {escape(said.question)}</title>
<style>{style}</style>
</head>
<body>
<main>
<section class="asked">
<img alt="the picture asked about" src="{_data(_small(asked.picture))}">
<div>
<p class="user">User</p>
<h1>{_lines(said.question)}</h1>
<p class="muted">{escape(said.title)} <span class="badge {status}">{status}</span></p>
</div>
</section>
{f'<section class="cards">{"".join(cards)}</section>' if cards else ""}
{f'<p class="muted">{escape(key_text(asked))}</p>' if pictures else ""}
<p class="muted unit">bytes in {escape(unit)}</p>
{_table(said)}
{_remarks(said)}
<footer class="muted">{escape(said.origin)}</footer>
</main>
</body>
</html>
"""


def _card(number: int, one: Column, picture: Image | None) -> str:
    shown = ""
    if picture is not None:
        words = escape(f"{one.label} keeps {one.kept}")
        caption = f"<figcaption>keeps {escape(one.kept)}</figcaption>"
        shown = f'<figure><img alt="{words}" src="{_data(picture)}">{caption}</figure>'
    return (
        f'<article class="m{number}"><h2>{escape(one.label)}</h2><div class="answer">{_answer(one)}</div>'
        f'<p class="muted">{escape(one.compared)}</p>{shown}</article>\n'
    )


def _answer(one: Column) -> str:
    if one.error:
        return f'<span class="error">{escape(one.error)}</span>'
    return "" if one.answer is None else _marked(one.answer)


def _marked(answer: Marked) -> str:
    if not answer.spans:
        return "<i>(nothing)</i>"
    return "".join(f"<mark>{_lines(text)}</mark>" if differs else _lines(text) for text, differs in answer.spans)


def _table(said: Sheet) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in HEAD)
    rows = "".join(
        f'<tr class="m{i}"><td><span class="dot"></span>{escape(row[0])}</td>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>\n"
        for i, row in enumerate(said.rows)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table></div>'


def _remarks(said: Sheet) -> str:
    lines = "".join(f"<li>{escape(line)}</li>\n" for line in said.remarks)
    return f'<ul class="remarks">\n{lines}</ul>' if lines else ""


def _lines(text: str) -> str:
    return "<br>".join(escape(line) for line in text.split("\n"))


def _small(picture: Image) -> Image:
    copy = picture.copy()
    copy.thumbnail((_SHOWN, _SHOWN))
    return copy


def _data(picture: Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
