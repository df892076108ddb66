"""One self-contained page: curves to hover and zoom, parts stacked, samples to pick; no request to anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from typing import Any

from memprof.records import PARTS, Run, SampleRecord
from memprof.reports.pages import page
from memprof.reports.rows import Sheet, plain, sheets
from memprof.telling.facts import data_title, method_of
from memprof.telling.holders import leading_part, words_for
from memprof.telling.palette import PART_COLOURS, PART_LABELS, method_colour
from memprof.telling.words import WORDS
from memprof.units import DISPLAY_UNITS, format_bytes
from memprof.version import VERSION


def render(runs: Sequence[Run], unit: str = "GiB") -> str:
    """The page for ``runs``: those of one model, task and stack together, one group on screen at a time."""
    drawn = [sheet for sheet in sheets(runs, unit) if any(run.finished for run in sheet.runs)]
    data = {
        "version": VERSION,
        "date": f"{date.today():%Y-%m-%d}",
        "words": WORDS,
        "unit": unit,
        "per_unit": DISPLAY_UNITS[unit],
        "parts": [{"key": p, "label": PART_LABELS[p], "colour": PART_COLOURS[p]} for p in PARTS],
        "groups": [_group(sheet, unit) for sheet in drawn],
    }
    title = "memprof: " + " / ".join(dict.fromkeys(s.title for s in drawn)) if drawn else "memprof"
    return page("memprof.reports", title, data)


def _group(sheet: Sheet, unit: str) -> dict[str, Any]:
    runs = sheet.runs
    first = runs[0].record
    by_id = [{sample.id: sample for sample in run.samples} for run in runs]
    order = list(dict.fromkeys(sample.id for run in runs for sample in run.samples))
    samples: list[dict[str, Any]] = []
    at = 0
    for name in order:
        found = [there[name] for there in by_id if name in there]
        count = max(len(s.tokens) if s.ok else 0 for s in found)
        category = next((s.category for s in found if s.category), None)
        samples.append({"id": name, "start": at, "tokens": count, "failed": not count, "category": category})
        at += count
    tab = f"{data_title(first)}" + ("" if first.spec.stack == "current" else f", {first.spec.stack} stack")
    return {
        "tab": f"{tab}, {first.status}",
        "title": sheet.title,
        "status": first.status,
        "origin": sheet.origin,
        "remarks": sheet.remarks,
        "said": [line for run, row in zip(runs, sheet.rows, strict=True) if (line := _said(run, row[0], unit))],
        "head": sheet.head,
        "rows": sheet.rows,
        "quality_head": sheet.quality_head,
        "quality": sheet.quality,
        "static": first.static_bytes,
        "tokens": at,
        "samples": samples,
        "runs": [
            _run(run, row[0], [(there.get(s["id"]), s["tokens"]) for s in samples])
            for run, row, there in zip(runs, sheet.rows, by_id, strict=True)
        ],
    }


def _said(run: Run, label: str, unit: str) -> str | None:
    """Who holds a run's highest instant, in one sentence; None where nothing finished."""
    top = run.highest
    if top is None or not top.peak_parts or not top.dynamic_peak_bytes:
        return None
    part = leading_part(top.peak_parts)
    share = top.peak_parts[part] / top.dynamic_peak_bytes
    where = "the vision encoder" if top.peak_phase == "vision" else top.peak_phase or f"token {top.peak_token}"
    return (
        f"{label} peaks in {where} of sample {plain(top.id, 60)}: {format_bytes(top.peak_allocated_bytes, unit, 2)} "
        f"allocated, {format_bytes(top.dynamic_peak_bytes, unit, 2)} of it above static, {share:.0%} of that in "
        f"{words_for(part, top.peak_holders)}."
    )


def _run(run: Run, label: str, samples: list[tuple[SampleRecord | None, int]]) -> dict[str, Any]:
    static, top = run.record.static_bytes, run.highest
    peak: list[int | None] = []
    for sample, room in samples:
        row = [b - static for b in sample.tokens.peak_allocated_bytes] if sample and sample.ok else []
        peak += row + [None] * (room - len(row))
    return {
        "label": label,
        "colour": method_colour(method_of(run)),
        "dynamic": top.dynamic_peak_bytes if top else 0,
        "top": top.id if top else None,
        "peak": peak,
        "samples": [_sample(sample, static) if sample else None for sample, _ in samples],
    }


def _sample(sample: SampleRecord, static: int) -> dict[str, Any]:
    if not sample.ok:
        return {"status": sample.status, "error": sample.error or "no reason recorded", "parts": None}
    return {
        "status": sample.status,
        "width": sample.width,
        "height": sample.height,
        "tiles": sample.tiles,
        "visual": sample.visual_tokens,
        "text": sample.text_tokens,
        "kept": min(sample.kept_visual_tokens, default=None),
        "answer": sample.answer,
        "score": sample.score,
        "at": sample.peak_token,
        "phase": sample.peak_phase,
        "dynamic": sample.dynamic_peak_bytes,
        "parts": {part: size for part, size in sample.peak_parts.items() if size},
        "peak": [b - static for b in sample.tokens.peak_allocated_bytes],
        # Records of earlier versions hold parts at the sample's highest instant alone.
        "every": sample.token_parts or None,
        "held": None if sample.token_parts else [b - static for b in sample.tokens.allocated_bytes],
        "kv": None if sample.token_parts else sample.tokens.kv_bytes,
    }
