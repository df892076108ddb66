"""Where an answer differs from another, word by word; and a model's text made safe to show."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import SequenceMatcher


@dataclass(frozen=True)
class Marked:
    """An answer with its differences marked.

    Attributes:
        spans: Pieces of the answer, in order and without loss, each with whether it differs.
        unit: What was compared: ``word``, or ``character`` where both answers are one word.
        units: How many of them the answer has.
        differing: How many of those differ.
        missing: How many of the reference's have nothing in their place.
    """

    spans: list[tuple[str, bool]]
    unit: str
    units: int
    differing: int
    missing: int

    @property
    def same(self) -> bool:
        """Whether nothing differs but white space."""
        return not self.differing and not self.missing


def mark(answer: str, reference: str) -> Marked:
    """``answer`` with the words marked that ``reference`` does not have in their place.

    Single words are compared character by character: a string read off a picture is one.
    """
    single = len(answer.split()) == 1 == len(reference.split())
    pattern = r"\S" if single else r"\S+"
    ours = list(re.finditer(pattern, answer))
    theirs = re.findall(pattern, reference)
    match = SequenceMatcher(None, theirs, [piece.group() for piece in ours], autojunk=False)
    steps = [step for step in match.get_opcodes() if step[0] != "equal"]
    spans, done = [], 0
    for *_, first, last in steps:
        if first < last:
            start, end = ours[first].start(), ours[last - 1].end()
            spans += [(answer[done:start], False), (answer[start:end], True)]
            done = end
    spans.append((answer[done:], False))
    return Marked(
        [(text, differs) for text, differs in spans if text],
        "character" if single else "word",
        len(ours),
        sum(last - first for *_, first, last in steps),
        sum(max(0, (i2 - i1) - (j2 - j1)) for _, i1, i2, j1, j2 in steps),
    )


def readable(text: str) -> str:
    """A model's or a user's text with line breaks and nothing else that could steer a terminal or a page."""
    return "".join(
        c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}"
        for c in text.replace("\r\n", "\n").replace("\t", " ")
    )
