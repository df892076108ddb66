"""The rows that tables show, as text: one a run, those that may be compared together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from memprof.figures import facts
from memprof.figures.palette import PART_LABELS
from memprof.intervals import Interval
from memprof.records import PARTS, Run, quality, summarize
from memprof.units import in_unit

MISSING = "-"
DIGITS = {"GiB": 3, "GB": 3, "MiB": 1, "MB": 1}


@dataclass(frozen=True)
class Sheet:
    """Runs that are compared, as text.

    Attributes:
        title: Model, data, samples, stack.
        heading: The title, with status and unit.
        head: The columns' names; the first is the method.
        rows: A row a run.
        parts_head: The columns' names of the parts' table.
        parts: The parts' table, of the same shape: dynamic bytes at the highest instant.
        quality_head: The columns' names of the quality table.
        quality: What was lost, a row a run; empty where nothing was scored or compared.
        remarks: A line for each failed sample, one where savings are over fewer samples, and each note of a run.
        origin: Where the numbers come from.
        runs: The runs, a row each.
    """

    title: str
    heading: str
    head: list[str]
    rows: list[list[str]]
    parts_head: list[str]
    parts: list[list[str]]
    quality_head: list[str]
    quality: list[list[str]]
    remarks: list[str]
    origin: str
    runs: list[Run]


def plain(text: str, most: int = 200) -> str:
    """Text of a data set made safe for a line: no control characters, no line breaks, not endless."""
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return line if len(line) <= most else line[: most - 1] + "…"


def number(n_bytes: int | None, unit: str) -> str:
    """Bytes as a number of ``unit``, whose name stands in the title; what would round to nothing is ``<0.001``."""
    if n_bytes is None:
        return MISSING
    text, least = f"{in_unit(n_bytes, unit):.{DIGITS[unit]}f}", f"{10.0 ** -DIGITS[unit]:.{DIGITS[unit]}f}"
    return f"<{least}" if n_bytes > 0 and float(text) == 0 else text


def percent(share: float | None) -> str:
    """``0.456`` -> ``'45.6 %'``."""
    return MISSING if share is None else f"{100 * share:.1f} %".replace("-", "−")


def sheets(runs: Sequence[Run], unit: str) -> Iterator[Sheet]:
    """A sheet for every group of runs that may be compared."""
    for group in facts.groups(runs):
        yield _sheet(group, unit)


def _sheet(group: list[Run], unit: str) -> Sheet:
    names, totals = facts.labels(group), [summarize(run) for run in group]
    head = ["method", "keep/pruned", "static", "dynamic peak", "saved", "KV cache", "reserved", "FLOPs cut", "status"]
    rows = [
        [
            name, facts.keep_text(run), number(total["static_bytes"], unit), number(total["dynamic_peak_bytes"], unit),
            percent(facts.saving(run, group)), number(total["kv_cache_bytes"], unit),
            number(total["peak_reserved_bytes"], unit), percent(total["visual_flops_cut"]), run.record.status,
        ]
        for name, run, total in zip(names, group, totals, strict=True)
    ]  # fmt: skip
    held = [p for p in PARTS if any(total["parts"] and total["parts"][p] for total in totals)]
    parts = [
        [name, *(number(total["parts"][p] if total["parts"] else None, unit) for p in held),
         number(total["dynamic_peak_bytes"], unit)]
        for name, total in zip(names, totals, strict=True)
    ]  # fmt: skip
    losses = [quality(run) for run in group]
    known = any(accuracy or fidelity for accuracy, fidelity in losses)
    origin = facts.provenance(group)
    phrases = facts.provenance_lines(origin)
    many = len(origin["methods"])
    return Sheet(
        title=f"{origin['model']} on {phrases[1 + many]}, stack {origin['stack']}",
        heading=f"{origin['model']} on {phrases[1 + many]}, stack {origin['stack']}, {origin['status']} ({unit})",
        head=head,
        rows=rows,
        parts_head=["method", *(PART_LABELS[p] for p in held), "dynamic peak"],
        parts=parts,
        quality_head=QUALITY_HEAD,
        quality=[_quality(name, run, *loss) for name, run, loss in zip(names, group, losses, strict=True)] * known,
        remarks=_remarks(group, names),
        origin=" · ".join([*origin["methods"], *phrases[3 + many :]]),
        runs=group,
    )


#: Fidelity's columns stand for :data:`memprof.analysis.fidelity.MEASURES`.
QUALITY_HEAD = ["method", "right", "score %", "same tokens %", "same answers %", "KL, nats"]


def _quality(name: str, run: Run, accuracy: Interval | None, fidelity: Mapping[str, Interval]) -> list[str]:
    """A mean says over how many samples it is where that is not all that finished."""
    scores = [s.score for s in run.finished if s.score is not None]

    def cell(interval: Interval | None, scale: float, digits: int) -> str:
        text = spread(interval, scale, digits)
        return text if interval is None or interval.samples == len(run.finished) else f"{text} (n={interval.samples})"

    return [
        name,
        f"{sum(scores):g}/{len(scores)}" if scores else MISSING,
        cell(accuracy, 100, 1),
        cell(fidelity.get("agreement"), 100, 1),
        cell(fidelity.get("exact"), 100, 1),
        cell(fidelity.get("kl"), 1, 3),
    ]


def spread(interval: Interval | None, scale: float, digits: int) -> str:
    """``'93.8 [87.5, 98.4]'``: the mean and its bootstrap interval, times ``scale``."""
    if interval is None:
        return MISSING
    mean, low, high = (f"{scale * value:.{digits}f}" for value in (interval.mean, interval.low, interval.high))
    return f"{mean} [{low}, {high}]"


def _remarks(group: Sequence[Run], names: Sequence[str]) -> list[str]:
    """Failed samples, each with the methods that it failed under, what savings are over, then the runs' notes."""
    failed: dict[str, list[str]] = {}
    for name, run in zip(names, group, strict=True):
        for sample in run.samples:
            if not sample.ok:
                reason = plain(sample.error or "no reason recorded")
                failed.setdefault(f"sample {plain(sample.id, 60)} {sample.status}: {reason}", []).append(name)
    notes = dict.fromkeys(plain(note) for run in group for note in run.record.notes)
    losses = [f"{text} ({', '.join(under)})" for text, under in failed.items()]
    savings = [f"{text}; other columns: over all that each finished" for text in facts.comparisons(group)]
    return [*losses, *savings, *notes]
