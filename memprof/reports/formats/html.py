"""One self-contained page: curves to hover and zoom, parts stacked, samples to pick; no request to anywhere."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from memprof import __version__
from memprof.figures.facts import method_of
from memprof.figures.palette import PART_COLOURS, PART_LABELS, method_colour, task_label
from memprof.records import PARTS, Run, SampleRecord
from memprof.reports.rows import Sheet, sheets
from memprof.units import DISPLAY_UNITS


def render(runs: Sequence[Run], unit: str = "GiB") -> str:
    """The page for ``runs``: those of one model, task and stack together, one group on screen at a time.

    The browser is forbidden by the page itself to load anything or to run any script but the page's own, so a text of a
    data set can do no harm even if it got where it should not be.
    """
    drawn = [sheet for sheet in sheets(runs, unit) if any(run.finished for run in sheet.runs)]
    data = {
        "version": __version__,
        "unit": unit,
        "per_unit": DISPLAY_UNITS[unit],
        "parts": [{"key": p, "label": PART_LABELS[p], "colour": PART_COLOURS[p]} for p in PARTS],
        "groups": [_group(sheet) for sheet in drawn],
    }
    style, script, page = (_asset(name) for name in ("page.css", "page.js", "page.html"))
    holes = {
        "STYLE_HASH": _digest(style),
        "SCRIPT_HASH": _digest(script),
        "TITLE": html.escape("memprof: " + " / ".join(dict.fromkeys(s.title for s in drawn)) if drawn else "memprof"),
        "STYLE": style,
        "SCRIPT": script,
        "DATA": embed(data),
    }
    head, *pieces = page.split("@")
    filled = [holes[piece] if number % 2 == 0 else piece for number, piece in enumerate(pieces)]
    return head + "".join(filled)


def embed(data: Any) -> str:
    """JSON that may stand in a ``<script>`` element: no text in it can end the element or begin another."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _asset(name: str) -> str:
    return files("memprof.reports").joinpath("page", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _group(sheet: Sheet) -> dict[str, Any]:
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
    tab = f"{task_label(first.spec.task)}" + ("" if first.spec.stack == "current" else f", {first.spec.stack} stack")
    return {
        "tab": f"{tab}, {first.status}",
        "title": sheet.title,
        "status": first.status,
        "origin": sheet.origin,
        "remarks": sheet.remarks,
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
