"""Tasks: samples, prompts and scores. One file a task; ``TASKS`` finds them by file name.

A sample is a picture, a question and the answers that count. The picture is decoded or drawn only when it is asked for,
so a prediction over shapes touches no pixel. Nothing here imports torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from memprof import limits
from memprof.errors import BadRow, BadValue, DataError
from memprof.plugins import Registry
from memprof.tasks import _sources
from memprof.tasks._pictures import Picture

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["TASKS", "Sample", "Task"]


@dataclass(frozen=True)
class Sample:
    """One question about one picture.

    Attributes:
        id: Unique within its data.
        width, height: Size of the (first) picture in pixels; 0 and 0 where its header cannot be read.
        question: The prompt body as the published evaluation builds it, without any chat template. Empty for shapes
            read from a CSV.
        text_tokens: Tokens of ``question`` alone, without a chat template, which the model family adds. None where only
            the model's tokenizer can tell. Bundled samples carry InternLM2's count, a CSV carries its own.
        answers: The answers that count; empty where nothing can be scored.
        category: The data set's category, or None.
        picture: Where the picture comes from; use :meth:`image`.
        others: Pictures shown behind it in the same prompt.
        batch: Prompts like this one that run side by side.
    """

    id: str
    width: int
    height: int
    question: str
    text_tokens: int | None
    answers: tuple[str, ...]
    category: str | None
    picture: Picture = field(repr=False, compare=False)
    others: tuple[Picture, ...] = field(default=(), repr=False, compare=False)
    batch: int = 1

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """All pictures of the prompt, in order."""
        return self.picture, *self.others

    def sizes(self) -> list[tuple[int, int]]:
        """Width and height of each picture in pixels; 0 and 0 of one whose header cannot be read."""
        return [(self.width, self.height), *(picture.size() for picture in self.others)]

    def image(self) -> Image:
        """The picture in RGB, decoded or drawn at every call.

        Raises:
            DataError: The picture is missing or broken; the message names its row.
        """
        return self.picture.image()


class Task(ABC):
    """What every task shares. A task is one file with one public subclass; its fields, if any, are its settings.

    Attributes:
        title: Name as written in tables and figures.
        paper: Who published it.
        metric: What :meth:`score` is.
        max_new_tokens: Tokens to generate unless told otherwise.
        hub: Data set and split on the hub, or None.
    """

    title: ClassVar[str]
    paper: ClassVar[str]
    metric: ClassVar[str]
    max_new_tokens: ClassVar[int] = 16
    hub: ClassVar[tuple[str, str] | None] = None

    @abstractmethod
    def prompt(self, row: Mapping[str, Any]) -> str:
        """The prompt body of a row. A KeyError or ValueError becomes a :class:`DataError` that names the row."""

    @abstractmethod
    def answers(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """The answers of a row that count; errors as in :meth:`prompt`."""

    @abstractmethod
    def score(self, prediction: str, sample: Sample) -> float:
        """The published rule's score of ``prediction``, in [0, 1]. Only for a sample that has answers."""

    def category(self, row: Mapping[str, Any]) -> str | None:
        """The category of a row, or None."""
        return row.get("category")

    def text_tokens(self, row: Mapping[str, Any]) -> int | None:
        """Tokens of the prompt body where the bundled row says so, else None."""
        return row.get("text_tokens")

    def usual_text_tokens(self) -> int:
        """Tokens of a question where nobody counted: the mean of the bundled ones, rounded up."""
        rows = _sources.bundled(self.name)["samples"]
        counts = [count for row in rows if (count := self.text_tokens(row)) is not None]
        return -(-sum(counts) // len(counts))

    @property
    def name(self) -> str:
        """The name by which ``TASKS`` finds it."""
        return type(self).__module__.rpartition(".")[2].replace("_", "-")

    def samples(
        self, data: str = "bundled", limit: int | None = None, text_tokens: int | None = None
    ) -> Sequence[Sample]:
        """The first ``limit`` samples of ``data``, each made when it is indexed.

        Args:
            data: ``bundled``, ``hub``, or a path (.csv of shapes, .tsv, .parquet, .jsonl, a folder with one of the
                last two).
            limit: How many at most, or None for all.
            text_tokens: Of each row of a .csv that says none; None: each must say it.

        Raises:
            DataError: The data cannot be read. Rows are looked at here until one is sound, so a wrong file shows before
                a model is loaded. A broken picture is no such error: its sample is there, and its ``image()`` raises.
            BadValue: ``limit`` is none that there can be, or the task has no data set on the hub.
        """
        limits.check("limit", limit)
        make, rows = self._sample, self._rows(data, limit, text_tokens)
        if _is_shapes(data):
            make = _shape
        samples = _sources.Lazy(len(rows), lambda index: make(rows[index]))
        _first_that_can_be_read(samples)
        return samples

    def label(self, data: str = "bundled") -> str:
        """How ``data`` are to be named wherever a number from them is shown."""
        if data == "bundled":
            file = _sources.bundled(self.name)
            return f"{self.title} bundled sample ({len(file['samples'])} {file['shapes']}, drawn pictures)"
        if data == "hub":
            return f"{self.title} ({', '.join(self._hub())})"
        name = Path(data).name or data
        if _is_shapes(data) and not data.lower().endswith(".csv"):
            return f"pictures in {name}"
        return f"shapes from {name}" if _is_shapes(data) else f"{self.title} ({name})"

    def aggregate(self, scores: Iterable[tuple[str | None, float]]) -> dict[str, Any]:
        """The task's totals from pairs of category and score, one a scored sample.

        Returns:
            ``metric``, ``samples``, ``score`` (the mean, None where there is none) and, where there are categories,
            ``categories`` with the same two of each.
        """
        by_category: dict[str | None, list[float]] = {}
        for category, score in scores:
            by_category.setdefault(category, []).append(score)
        every = [score for group in by_category.values() for score in group]
        totals: dict[str, Any] = {"metric": self.metric, "samples": len(every), "score": _mean(every)}
        named = {c: {"samples": len(g), "score": _mean(g)} for c, g in by_category.items() if c is not None}
        return totals | ({"categories": named} if named else {})

    def _rows(self, data: str, limit: int | None, text_tokens: int | None) -> Sequence[_sources.Row]:
        if data == "bundled":
            return _sources.read_bundled(self.name, limit)
        if data == "hub":
            return _sources.read_hub(*self._hub(), limit)
        return _sources.read_path(Path(data), limit, text_tokens)

    def _hub(self) -> tuple[str, str]:
        if self.hub is None:
            raise BadValue(f"task {self.name} has no data set on the hub; use --data bundled or a path")
        return self.hub

    def _sample(self, row: _sources.Row) -> Sample:
        try:
            if not isinstance(given := row.values.get("question", ""), str):
                raise ValueError(f"the question is {given!r:.60} and no text")
            question, answers = self.prompt(row.values), self.answers(row.values)
            category, tokens = self.category(row.values), self.text_tokens(row.values)
            category, tokens = None if category is None else str(category), _tokens(tokens)
        except KeyError as error:
            raise BadRow(f"{row.where}: no column {error.args[0]!r}; it has {', '.join(row.values)}", row.id) from None
        except (ValueError, TypeError, AttributeError, IndexError) as error:  # what a null in a row comes to
            raise BadRow(f"{row.where}: {error}", row.id) from None
        return Sample(row.id, *row.picture.size(), question, tokens, answers, category, row.picture, row.others)


def _tokens(count: Any) -> int | None:
    """A row's own count of tokens, checked; None where it has none."""
    least, most = limits.LIMITS["text_tokens"]
    if count is not None and (type(count) is not int or not least <= count <= most):
        raise ValueError(f"text_tokens is {count!r:.40}, and not a whole number from {least} to {most}")
    return count


def _shape(row: _sources.Row) -> Sample:
    """A sample that is a shape and no more."""
    tokens, batch = row.values["text_tokens"], row.values.get("batch", 1)
    return Sample(row.id, *row.picture.size(), "", tokens, (), None, row.picture, row.others, batch)


def _is_shapes(data: str) -> bool:
    return data.lower().endswith(".csv") or bool(data not in ("bundled", "hub") and _sources.pictures_in(Path(data)))


def _first_that_can_be_read(samples: Sequence[Sample]) -> Sample:
    """The first sound sample; the first one's error where there is none among all of them."""
    first: DataError | None = None
    for number in range(len(samples)):
        try:
            return samples[number]
        except DataError as error:
            first = first or error
    assert first is not None
    raise first


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


TASKS: Registry[Task] = Registry("memprof.tasks", Task, "task")  # type: ignore[type-abstract]
