"""Text of others on one line: nothing a terminal obeys, no password, and in any encoding something to read."""

from __future__ import annotations

import codecs
import re

#: Control characters, marks that turn the direction of writing, and halves of characters.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")
#: What stands for characters that an old encoding lacks; all others are written out.
_PLAIN = {
    "─": "-", "━": "-", "│": "|", "·": "-", "−": "-", "–": "-", "—": "-", "…": "...", "×": "x", "±": "+-", "≤": "<=",
    "≥": ">=", "→": "->", "█": "#", "▇": "#", "•": "*", "’": "'", "“": '"', "”": '"', "✓": "ok",
    "\N{NO-BREAK SPACE}": " ", "\N{REPLACEMENT CHARACTER}": "?",
}  # fmt: skip
_USERINFO = re.compile(r"(://[^:@/\s]*):\S*@")
_SECRET = re.compile(
    r"(?i)\b(\w*(?:password|passwd|pwd|secret|access_token|api_?key)\s*=\s*)('[^']*'|\"[^\"]*\"|[^&\s'\";]+)"
)


def visible(text: str, but: str = "") -> str:
    r"""``text`` with every character that a terminal would obey written out (``\\x1b``); those in ``but`` stay."""
    return _UNSEEN.sub(lambda found: found[0] if found[0] in but else ascii(found[0])[1:-1], text)


def masked(text: str) -> str:
    """``text`` without the passwords of the URLs and connection strings in it."""
    return _SECRET.sub(r"\1***", _USERINFO.sub(r"\1:***@", text))


def _in_plain_letters(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return "".join(_PLAIN.get(c) or ascii(c)[1:-1] for c in lost), error.end


#: The name of what an output stream does with characters that its encoding lacks (``errors=`` of a text stream).
PLAIN_LETTERS = "memprof.plain_letters"
codecs.register_error(PLAIN_LETTERS, _in_plain_letters)
