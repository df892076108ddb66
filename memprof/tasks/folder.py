"""Anyone's own images: a folder with a JSONL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from memprof.tasks import Sample, Task


@dataclass(frozen=True)
class Folder(Task):
    """Questions about a folder of images, one JSON object a line.

    Columns: ``image`` (a path relative to the JSONL), ``question``; optional: ``answer`` or ``answers`` (a string or a
    list of them), ``id``, ``category``. A sample without an answer is run and not scored.

    Prompt: the question as it stands. Score: 1 if any answer stands in the output, case ignored and runs of white space
    as one space; containment rather than equality, because models answer in sentences. Both are memprof's choice.
    """

    title: ClassVar[str] = "image folder"
    paper: ClassVar[str] = "none: anyone's own images"
    metric: ClassVar[str] = "answer contained"

    def prompt(self, row: Mapping[str, Any]) -> str:
        """The question as it stands."""
        question: str = row["question"]  # what is no text was refused by the caller
        return question

    def answers(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """Every answer given, none being fine."""
        given = row.get("answers", row.get("answer"))
        if given is None or given == "":
            return ()
        return tuple(str(a) for a in given) if isinstance(given, list) else (str(given),)

    def score(self, prediction: str, sample: Sample) -> float:
        """1.0 if an answer stands in ``prediction``, else 0.0."""
        return float(any(_plain(answer) in _plain(prediction) for answer in sample.answers))


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
