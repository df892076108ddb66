"""A page that stands alone: its style, its script and its data in one file, and nothing else may load or run."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from importlib.resources import files
from typing import Any

from memprof.lines import visible


def page(package: str, title: str, data: Any, style: str | None = None) -> str:
    """``page/page.html`` of ``package`` with its script, a style (its own if None), a title and data filled in.

    The browser is forbidden by the page itself to load anything or to run any script but the page's own, so a text in
    the data can do no harm even if it got where it should not be.
    """
    style = asset(package, "page.css") if style is None else style
    script = asset(package, "page.js")
    holes = {
        "STYLE_HASH": _digest(style),
        "SCRIPT_HASH": _digest(script),
        "TITLE": escape(title),
        "STYLE": style,
        "SCRIPT": script,
        "DATA": embed(data),
    }
    head, *pieces = asset(package, "page.html").split("@")
    filled = [holes[piece] if number % 2 == 0 else piece for number, piece in enumerate(pieces)]
    return head + "".join(filled)


def escape(text: str) -> str:
    """Text that HTML shows as it stands; what a terminal would obey, where a page is printed on one, is written out."""
    return html.escape(visible(text, but="\n\t"))


def embed(data: Any) -> str:
    """JSON that may stand in a ``<script>`` element: no text in it can end the element or begin another."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def asset(package: str, name: str) -> str:
    """A file beside the page of ``package``."""
    return files(package).joinpath("page", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
