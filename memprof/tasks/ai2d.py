"""AI2D: multiple-choice questions about science diagrams."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from memprof.plugins import setting
from memprof.tasks import Sample, Task

INSTRUCTION = "Answer with the option's letter from the given choices directly."
_LETTER_DOT = re.compile(r"\s*([A-Z])\.")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class AI2D(Task):
    """AI2D as lmms-eval asks and scores it.

    Prompt (lmms-eval ``ai2d``, default format ``mcq``; VLMEvalKit builds the same text): the question, one line
    ``A. ...`` an option, then the instruction.

    Score: exact match on the letter, by one of two published rules.

    * ``lmms-eval`` (the default, because the data set, prompt and 16 new tokens are also lmms-eval's): a capital and a
      full stop at the start give the letter; then the whole text must equal it, case and ASCII punctuation ignored.
      Accepted for B: ``B``, ``b``, ``B.``, ``(B)``, ``B)``, ``**B**``, ``B. leaf``. Not: ``B leaf``, ``(B) leaf``,
      ``leaf``, ``The answer is B``.
    * ``internvl`` (``evaluate_vqa.py`` of InternVL): the stripped text must equal the letter, case ignored. For B:
      ``B``, ``b``. Not: ``B.``. InternVL's run also allows 10 new tokens and at most 6 tiles.

    VLMEvalKit searches the whole text for a lone letter and may ask a judge model; that rule is not offered.

    Rows: ``options`` and a 0-based ``answer`` (the hub writes it as a string), or columns ``A``, ``B``, ... and a
    letter (VLMEvalKit). AI2D's licence forbids handing it on: the bundled sample has image sizes and nothing else.
    """

    title: ClassVar[str] = "AI2D"
    paper: ClassVar[str] = "Kembhavi et al. 2016, A Diagram Is Worth A Dozen Images, arXiv:1603.07396"
    metric: ClassVar[str] = "exact match"
    hub: ClassVar[tuple[str, str] | None] = ("lmms-lab/ai2d", "test")

    rule: str = setting("lmms-eval", "which published scoring rule", origin="code", choices=("lmms-eval", "internvl"))

    def prompt(self, row: Mapping[str, Any]) -> str:
        """Question, options, instruction, a line each."""
        options = [f"{letter}. {option}" for letter, option in zip(_letters(), _options(row), strict=False)]
        return "\n".join([row["question"], *options, INSTRUCTION])

    def answers(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """The right option's letter."""
        letters = _letters()[: len(_options(row))]
        answer = str(row["answer"]).strip()
        if answer.isdecimal() and int(answer) < len(letters):
            return (letters[int(answer)],)
        if len(answer) == 1 and answer.upper() in letters:
            return (answer.upper(),)
        raise ValueError(f"answer {answer!r} is neither an index nor a letter of the {len(letters)} options")

    def score(self, prediction: str, sample: Sample) -> float:
        """1.0 or 0.0 by the rule chosen."""
        given = prediction.strip()
        if self.rule == "lmms-eval":
            start = _LETTER_DOT.match(given)
            given = (start[1] if start else given).translate(_NO_PUNCTUATION)
        return float(given.lower() in {answer.lower() for answer in sample.answers})


def _letters() -> str:
    return string.ascii_uppercase


def _options(row: Mapping[str, Any]) -> list[str]:
    """The options of a row in the hub's layout or VLMEvalKit's."""
    given = row["options"] if "options" in row else [row[letter] for letter in _letters() if row.get(letter)]
    if not isinstance(given, list) or not 2 <= len(given) <= len(_letters()):
        raise ValueError(
            "no options: a list 'options', or columns A, B, ..., with at least two (questions that are answered freely "
            "go with --task folder)"
        )
    return [str(option) for option in given]
