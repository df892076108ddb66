"""What every format says of a question's answers, as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from memprof.asked import Answer, Asked, Grid
from memprof.reports.answers.words import Marked, mark, readable
from memprof.reports.rows import number, percent, plain
from memprof.telling import facts

HEAD = ("method", "kept", "new tokens", "peak", "dynamic peak", "saved", "KV cache", "FLOPs cut", "status")
#: Said of the answer that the others are held against.
_REFERENCE = "what the others are compared with"


@dataclass(frozen=True)
class Column:
    """One method as text.

    Attributes:
        label: Its short name, unlike the others'.
        method: Its registered name, which decides its colour.
        answer: What the model said, marked against the reference; None where it said nothing.
        compared: How it differs from the reference, in words.
        kept: What it kept, in words.
        error: Why it failed, or None.
        tokens: Which visual tokens it kept; None where that is not known.
    """

    label: str
    method: str
    answer: Marked | None
    compared: str
    kept: str
    error: str | None
    tokens: list[int] | None


@dataclass(frozen=True)
class Sheet:
    """A question and its answers as text.

    Attributes:
        question: As it was asked.
        title: Model, picture and stack.
        heading: The title, with status and unit.
        columns: A method each.
        rows: The table below :data:`HEAD`, a row a method.
        remarks: What a reader must know.
        origin: Where the numbers come from.
    """

    question: str
    title: str
    heading: str
    columns: list[Column]
    rows: list[list[str]]
    remarks: list[str]
    origin: str


def sheet(asked: Asked, unit: str) -> Sheet:
    """``asked`` as text, bytes in ``unit``."""
    runs = [one.run for one in asked.answers]
    names, origin = facts.labels(runs), facts.provenance(runs)
    reference = asked.reference
    first = names[asked.answers.index(reference)] if reference else ""
    phrases = facts.provenance_lines(origin)
    width, height = asked.picture.size
    title = f"{asked.model} on {plain(asked.image, 60)} ({width} × {height}), stack {origin['stack']}"
    return Sheet(
        question=readable(asked.question.strip()),
        title=title,
        heading=f"{title}, {origin['status']} ({unit})",
        columns=[_column(asked, one, name, first) for one, name in zip(asked.answers, names, strict=True)],
        rows=[_row(asked, one, name, unit) for one, name in zip(asked.answers, names, strict=True)],
        remarks=[plain(note) for note in asked.notes],
        origin=" · ".join([*origin["methods"], plain(asked.weights), *phrases[3 + len(origin["methods"]) :]]),
    )


def kept_text(answer: Answer) -> str:
    """``'128 of 256 visual tokens, from layer 2 on'``."""
    every = answer.sample.visual_tokens
    if not answer.cuts:
        return f"all {every} visual tokens"
    cut, share = answer.cuts[-1], f"{answer.kept} of {every} visual tokens"
    where = f"after {cut.layer} layers" if cut.layer else "before the language model"
    if len(answer.cuts) > 1:
        where = f"after the last of {len(answer.cuts)} cuts ({', '.join(str(each.kept) for each in answer.cuts)})"
    return f"{share}, {where}" + ("; the others are masked, not dropped" if answer.masked else "")


def key_text(asked: Asked) -> str:
    """How the pictures are to be read."""
    return "kept visual tokens are clear, dropped ones veiled" + (
        "; on the right the thumbnail" if asked.grid and asked.grid.thumbnail else ""
    )


def compared_text(answer: Marked, first: str) -> str:
    """``'3 of 18 words differ from Baseline'``."""
    if answer.same:
        return f"the same as {first}"
    many = "s" if answer.units != 1 else ""
    said = [f"{answer.differing} of {answer.units} {answer.unit}{many} differ from {first}"] if answer.differing else []
    if answer.missing:
        said.append(f"{answer.missing} of {first}'s {answer.unit}s left out")
    return ", ".join(said)


def legend(column: Column, asked: Asked) -> list[str]:
    """What stands below a method's picture, where the picture may be taken from its place."""
    lines = [f"{column.label} keeps {column.kept}", key_text(asked)]
    if asked.answers[0].run.record.spec.weights == "random":
        lines.append(plain(asked.weights))
    return lines


def as_json(asked: Asked) -> Mapping[str, object]:
    """All of it for a program: bytes, tokens by number."""
    from memprof.records import SCHEMA, summarize

    reference = asked.reference
    grid = asked.grid
    return {
        "schema": SCHEMA,
        "question": asked.question,
        "image": {"name": asked.image, "width": asked.picture.width, "height": asked.picture.height},
        "model": asked.model,
        "weights": asked.weights,
        "grid": None if grid is None else {**dataclasses.asdict(grid), "side": _side(grid)},
        "answers": [
            {
                **summarize(one.run),
                "ok": one.sample.ok,
                "error": one.sample.error,
                "answer": one.text,
                "differing": None
                if one.text is None or reference is None
                else mark(one.text, reference.text or "").differing,
                "new_tokens": len(one.sample.tokens),
                "visual_tokens": one.sample.visual_tokens,
                "cuts": [{"layer": cut.layer, "kept": cut.kept, "tokens": cut.tokens} for cut in one.cuts],
            }
            for one in asked.answers
        ],
        "notes": asked.notes,
    }


def _side(grid: Grid) -> int | None:
    """Tokens along each edge of a tile that is a square."""
    return grid.across if grid.across == grid.down else None


def _column(asked: Asked, one: Answer, name: str, first: str) -> Column:
    reference = asked.reference
    answer, compared = None, ""
    if one.text is not None and reference is not None:
        answer = mark(readable(one.text), readable(reference.text or ""))
        alone = sum(other.text is not None for other in asked.answers) == 1
        compared = compared_text(answer, first) if one is not reference else "" if alone else _REFERENCE
    error = None if one.sample.ok else f"{one.sample.status}: {plain(one.sample.error or 'no reason recorded')}"
    return Column(name, facts.method_of(one.run), answer, compared, kept_text(one), error, one.tokens)


def _row(asked: Asked, one: Answer, name: str, unit: str) -> list[str]:
    from memprof.records import summarize

    total, group = summarize(one.run), [each.run for each in asked.answers]
    peak, sizes = total["peak_allocated_bytes"], [total["dynamic_peak_bytes"], total["kv_cache_bytes"]]
    dynamic, cache = (number(size, unit) for size in sizes)
    return [
        name, f"{one.kept}/{one.sample.visual_tokens}", str(len(one.sample.tokens)) if one.sample.ok else "-",
        number(peak, unit), dynamic, percent(facts.saving(one.run, group)), cache, percent(total["visual_flops_cut"]),
        one.run.record.status if one.sample.ok else one.sample.status,
    ]  # fmt: skip
