"""OCRBench: 1,000 questions that reading an image answers."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from memprof.plugins import setting
from memprof.tasks import Sample, Task

INSTRUCTION = "Answer the question using a single word or phrase."
FORMULA = "Handwritten Mathematical Expression Recognition"
RECOGNITION = (
    "Regular Text Recognition",
    "Irregular Text Recognition",
    "Artistic Text Recognition",
    "Handwriting Recognition",
    "Digit String Recognition",
    "Non-Semantic Text Recognition",
)
#: The ten question types and how many of the 1,000 questions each has.
QUESTIONS: dict[str, int] = dict.fromkeys(RECOGNITION, 50) | {
    "Scene Text-centric VQA": 200,
    "Doc-oriented VQA": 200,
    "Key Information Extraction": 200,
    FORMULA: 100,
}


@dataclass(frozen=True)
class OCRBench(Task):
    """OCRBench as VLMEvalKit asks it and as its authors score it.

    Prompt: the question; with ``suffix=true`` a line of instruction follows, as in VLMEvalKit, whose figures InternVL2
    reports (it also allows 24 tiles). With ``suffix=false`` the question stands alone, as with the authors and
    lmms-eval. Published runs allow more new tokens than memprof's 16 (the authors 512, VLMEvalKit 4,096), so long
    answers want ``--max-new-tokens`` raised before a score is compared.

    Score (MultimodalOCR ``OCRBench/scripts``): 1 if any answer stands in the output, both lower-cased, stripped, and
    newlines as spaces. Formulas (all 100 come from HME100k): spaces are dropped and case is kept. lmms-eval lower-cases
    the output of formulas too, which can never match a capital; that fault is not copied.

    Rows: ``question``, ``answer`` (a list, a string, or VLMEvalKit's list written as text) and ``question_type`` (the
    hub), ``category`` (VLMEvalKit) or ``type`` (the authors' JSON).
    """

    title: ClassVar[str] = "OCRBench"
    paper: ClassVar[str] = "Liu et al. 2024, OCRBench: On the Hidden Mystery of OCR in LMMs, arXiv:2305.07895"
    metric: ClassVar[str] = "answer contained"
    hub: ClassVar[tuple[str, str] | None] = ("echo840/OCRBench", "test")

    suffix: bool = setting(True, "add VLMEvalKit's line of instruction", origin="code")

    def prompt(self, row: Mapping[str, Any]) -> str:
        """The question, and the instruction where it is asked for."""
        question: str = row["question"]
        return f"{question}\n{INSTRUCTION}" if self.suffix else question

    def text_tokens(self, row: Mapping[str, Any]) -> int | None:
        """The bundled row's count, with or without the instruction."""
        return row.get("text_tokens" if self.suffix else "question_tokens")

    def answers(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """Every answer that counts."""
        given = row["answer"] if "answer" in row else row["answers"]
        if isinstance(given, str) and given.lstrip().startswith("["):
            with contextlib.suppress(SyntaxError, ValueError):  # an answer may happen to start with a bracket
                given = ast.literal_eval(given)
        return tuple(str(a) for a in given) if isinstance(given, list) else (str(given),)

    def category(self, row: Mapping[str, Any]) -> str | None:
        """The question type, under any of its three names."""
        return next((row[name] for name in ("question_type", "category", "type") if row.get(name)), None)

    def score(self, prediction: str, sample: Sample) -> float:
        """1.0 if an answer stands in ``prediction``, else 0.0."""
        read = _formula if sample.category == FORMULA else _words
        return float(any(read(answer) in read(prediction) for answer in sample.answers))

    def aggregate(self, scores: Iterable[tuple[str | None, float]]) -> dict[str, Any]:
        """The ten types, their sum, and the final score.

        Returns:
            Beside the shared totals: ``correct`` (the sum), ``categories`` (of each of the ten types ``correct``,
            ``samples`` and ``of``, the questions the full set has), ``text_recognition`` (the six recognition types
            together) and ``final_score``: ``correct`` out of 1,000, or None unless all 1,000 were scored.
        """
        pairs = list(scores)
        totals = super().aggregate(pairs)
        types = {
            name: {
                "correct": sum(round(score) for category, score in pairs if category == name),
                "samples": sum(category == name for category, _ in pairs),
                "of": of,
            }
            for name, of in QUESTIONS.items()
        }
        correct = sum(round(score) for _, score in pairs)
        complete = all(t["samples"] == t["of"] for t in types.values())
        return totals | {
            "categories": types,
            "text_recognition": sum(types[name]["correct"] for name in RECOGNITION),
            "correct": correct,
            "final_score": correct if complete else None,
        }


def _words(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def _formula(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")
