"""The rows that tables show, as text: one a run, those that may be compared together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memprof.intervals import Interval
from memprof.records import PARTS, Run, SampleRecord, quality, summarize
from memprof.telling import facts
from memprof.telling.holders import leading_part, words_for
from memprof.telling.palette import PART_LABELS
from memprof.units import DISPLAY_UNITS, GIB, format_bytes, in_unit, unit_for

MISSING = "-"
DIGITS = {"GiB": 3, "GB": 3, "MiB": 1, "MB": 1, "KiB": 1}


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
        callers: A row for each line of a program that called ``generate()`` (:data:`CALLERS_HEAD`); empty where samples
            are a task's.
        quality_head: The columns' names of the quality table.
        quality: What was lost, a row a run; empty where nothing was scored or compared.
        remarks: A line for each failed sample, one where savings are over fewer samples, and each note of a run.
        origin: Where the numbers come from.
        legend: What the columns count, in words.
        runs: The runs, a row each.
    """

    title: str
    heading: str
    head: list[str]
    rows: list[list[str]]
    parts_head: list[str]
    parts: list[list[str]]
    callers: list[list[str]]
    quality_head: list[str]
    quality: list[list[str]]
    remarks: list[str]
    origin: str
    legend: list[str]
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


def _peak(n_bytes: int | None, total: Mapping[str, Any], unit: str) -> str:
    """A highest value; where samples failed it is that of those that finished, and no more than a lower bound."""
    text = number(n_bytes, unit)
    if not total["failed"] or n_bytes is None:
        return text
    return f"≥ {number(0, unit) if text.startswith('<') else text}"


def percent(share: float | None) -> str:
    """``0.456`` -> ``'45.6 %'``."""
    return MISSING if share is None else f"{100 * share:.1f} %".replace("-", "−")


def unit_of(runs: Sequence[Run], asked: str | None = None) -> str:
    """The unit ``asked`` for, or one in which the highest peak, and each run's dynamic peak and KV cache, are read."""
    done = [run.finished for run in runs if run.finished]
    highest = max((sample.peak_allocated_bytes for some in done for sample in some), default=GIB)
    cells = [
        max(n) for some in done for n in zip(*((s.dynamic_peak_bytes, s.kv_cache_bytes) for s in some), strict=True)
    ]
    return unit_for(highest, asked, min(filter(None, cells), default=None))


def sheets(runs: Sequence[Run], unit: str) -> Iterator[Sheet]:
    """A sheet for every group of runs that may be compared."""
    for group in facts.groups(runs):
        yield _sheet(group, unit)


def _sheet(group: list[Run], unit: str) -> Sheet:
    names, totals = facts.labels(group), [summarize(run) for run in group]
    head = ["method", "keep/pruned", "static", "dynamic peak", "saved", "KV cache", "reserved", "total", "FLOPs cut"]
    rows = [
        [
            name, facts.keep_text(run), number(total["static_bytes"], unit),
            *(_peak(total[key], total, unit) for key in ("dynamic_peak_bytes",)),
            percent(facts.saving(run, group)),
            *(_peak(total[key], total, unit) for key in ("kv_cache_bytes", "peak_reserved_bytes", "device_bytes")),
            percent(total["visual_flops_cut"]),
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
        heading=f"{origin['model']} on {phrases[1 + many]}, stack {origin['stack']}, {phrases[4 + many]}, in {unit}",
        head=head,
        rows=rows,
        parts_head=["method", *(PART_LABELS[p] for p in held), "dynamic peak"],
        parts=parts,
        callers=_callers(group, unit),
        quality_head=QUALITY_HEAD,
        quality=[_quality(name, run, *loss) for name, run, loss in zip(names, group, losses, strict=True)] * known,
        remarks=_remarks(group, names, unit),
        origin=" · ".join([*origin["methods"], *phrases[3 + many :]]),
        legend=_legend(group),
        runs=group,
    )


#: What a part is counted at, which the table's columns are not.
PARTS_TITLE = "What holds each dynamic peak, at that instant"
KV_CACHE = "KV cache: the most that a token left; at the peak (memprof explain) there may be less of it, or more"
_LEGEND = (
    "dynamic peak: highest allocated above static",
    KV_CACHE,
    "reserved: static + dynamic + cached by the allocator",
)


def _legend(group: Sequence[Run]) -> list[str]:
    """The columns' definitions, and what the total is of these runs."""
    totals = [summarize(run)["device_bytes"] for run in group]
    if any(totals):
        measured = any(run.record.status == "measured" for run in group)
        context = {int(c) for run in group if (c := run.record.environment.get("gpu_context_bytes")) is not None}
        assumed = f" of {min(context) / 2**20:.0f} MiB" if len(context) == 1 and not measured else ""
        return [*_LEGEND, f"total: with the CUDA context{assumed}, as nvidia-smi shows it"]
    why = "no driver was asked" if any(run.finished for run in group) else "no sample finished"
    return [*_LEGEND, f"total: not known, as {why}"]


#: What is told of each line of a program that called ``generate()``.
CALLERS_HEAD = ["called from", "calls", "prompt", "made", "dynamic peak", "KV cache", "most held by"]
CALLERS_TITLE = (
    "Who called generate(): the longest prompt and answer in tokens, the highest bytes (where one failed, up to there)"
)


def _callers(group: Sequence[Run], unit: str) -> list[list[str]]:
    """A row for each caller's calls that finished, and one for those that failed, in the order of first calls."""
    found: dict[str, tuple[list[SampleRecord], list[SampleRecord]]] = {}
    for run in group:
        for sample in run.samples:
            if sample.caller is not None:
                found.setdefault(sample.caller, ([], []))[not sample.ok].append(sample)
    return [_caller(name, samples, unit) for name, both in found.items() for samples in both if samples]


def _made(sample: SampleRecord) -> int:
    """Tokens that were done; of a call that failed the last row is the token it failed in."""
    return max(0, len(sample.tokens) - (sample.status == "failed"))


def _caller(name: str, samples: Sequence[SampleRecord], unit: str) -> list[str]:
    top = max(samples, key=lambda s: s.dynamic_peak_bytes)
    # Where one ended inside a token, the cache is what it held there.
    cache = max(s.kv_cache_bytes if s.ok else max(s.kv_cache_bytes, s.peak_parts.get("kv_cache", 0)) for s in samples)
    return [
        plain(name, 60), f"{len(samples)}" + " failed" * (not top.ok),
        f"{max(s.visual_tokens + s.text_tokens for s in samples):,}", f"{max(map(_made, samples)):,}",
        number(top.dynamic_peak_bytes, unit), number(cache, unit),
        PART_LABELS[leading_part(top.peak_parts)] if any(top.peak_parts.values()) else MISSING,
    ]  # fmt: skip


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


def _above(name: str, run: Run, group: Sequence[Run], unit: str) -> str | None:
    """Why a run needs more than Baseline, where it does: the part that grew most, and what it is."""
    saved, top = facts.saving(run, group), run.highest
    base = next((one.highest for one in group if facts.method_of(one) == facts.BASELINE), None)
    if saved is None or saved >= 0 or top is None or base is None:
        return None
    grown = {part: top.peak_parts.get(part, 0) - base.peak_parts.get(part, 0) for part in PARTS}
    part = max(PARTS, key=lambda one: grown[one])
    if grown[part] < DISPLAY_UNITS[unit] / 10:  # in the table's unit, or in a smaller one of its kind
        unit = {"GB": "MB", "MB": "MB"}.get(unit) or unit_for(grown[part])
    more = format_bytes(grown[part], unit, 2)
    return f"{name} is above Baseline: at its peak, {words_for(part, top.peak_holders)}: {more} more than Baseline's"


def _counts(group: Sequence[Run], names: Sequence[str]) -> str:
    """``'TopV 3 of 43'``, for each run in which samples failed."""
    lost = [(name, len(run.samples), len(run.finished)) for name, run in zip(names, group, strict=True)]
    return ", ".join(f"{name} {of - done} of {of}" for name, of, done in lost if done < of)


def _remarks(group: Sequence[Run], names: Sequence[str], unit: str) -> list[str]:
    """What is not whole, failed samples with the methods that they failed under, what savings are over, and notes."""
    failed: dict[str, list[str]] = {}
    for name, run in zip(names, group, strict=True):
        for sample in run.samples:
            if not sample.ok:
                reason = plain(sample.error or "no reason recorded", 500)
                failed.setdefault(f"sample {plain(sample.id, 60)} {sample.status}: {reason}", []).append(name)
    notes = dict.fromkeys(plain(note) for run in group for note in run.record.notes)
    losses = [f"≥: of the samples that finished, and no peak of all; failed: {_counts(group, names)}"] * bool(failed)
    if len(group) > 1 and all(facts.method_of(run) != facts.BASELINE for run in group):
        losses.append("saved: no Baseline among these runs; add --method baseline")
    losses += [line for name, run in zip(names, group, strict=True) if (line := _above(name, run, group, unit))]
    savings = [f"{text}; other columns: over all that each finished" for text in facts.comparisons(group)]
    each = [f"{text} ({', '.join(under)})" for text, under in failed.items()]
    return [*_folders(group, names), *map(plain, facts.unfinished(group)), *losses, *savings, *notes, *each]


def _folders(group: Sequence[Run], names: Sequence[str]) -> list[str]:
    """A line that says which folder each row is, where their names alone do not."""
    paths = [Path(run.path) for run in group if run.path]
    alike = [name for name in names if f"{name} #2" in names]
    if not alike or len(paths) < len(group):
        return []
    beside = len({path.parent for path in paths}) == 1
    shown = [path.name if beside else f"{path}" for path in paths]
    rows = [f"{name} is {path}" for name, path in zip(names, shown, strict=True) if name.partition(" #")[0] in alike]
    return [plain("; ".join(rows), 1000)]
