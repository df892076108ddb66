"""A Chrome trace for Perfetto (ui.perfetto.dev) or chrome://tracing: tokens as slices, bytes as counters.

``dynamic by part`` is one counter with a series a part: stacked in chrome://tracing, a track a part in Perfetto. Its
value is that of each token's own highest instant.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from memprof.records import PARTS, Run, SampleRecord
from memprof.telling import facts
from memprof.telling.palette import PART_LABELS

#: What a token lasts where nothing was timed, in microseconds.
UNTIMED_US = 1000
COUNTERS = {
    "peak allocated": "peak_allocated_bytes",
    "allocated": "allocated_bytes",
    "reserved": "reserved_bytes",
    "KV cache": "kv_bytes",
    "device used": "device_used_bytes",
}
STACKED = "dynamic by part"


def render(runs: Sequence[Run], unit: str = "GiB") -> str:
    """A process a run; its samples follow each other without a gap. Bytes, whatever ``unit`` is."""
    del unit
    events = [event for number, run in enumerate(runs) for event in _events(number + 1, run)]
    untimed = [number + 1 for number, run in enumerate(runs) if not _timed(run)]
    about = {
        "made by": "memprof",
        "clock": "tokens follow each other; samples without a gap",
        "untimed processes": untimed,
        "untimed": f"where seconds are not recorded (predictions), a token lasts {UNTIMED_US} us" if untimed else "",
        "runs": [facts.provenance([run]) for run in runs],
    }
    return json.dumps({"displayTimeUnit": "ms", "otherData": about, "traceEvents": events}, ensure_ascii=False) + "\n"


def _timed(run: Run) -> bool:
    return all(s is not None for sample in run.finished for s in sample.tokens.seconds)


def _events(pid: int, run: Run) -> Iterator[dict[str, Any]]:
    spec = run.record.spec
    clock = "" if _timed(run) else f", {UNTIMED_US // 1000} ms a token"
    name = f"{facts.method_text(run)}, {facts.data_text(run.record)}, stack {spec.stack}, {run.record.status}{clock}"
    yield {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}}
    yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": 1, "args": {"name": "samples and tokens"}}
    now = 0.0
    parts = [p for p in PARTS if any(p in sample.token_parts for sample in run.samples)]
    for sample in run.samples:
        if not sample.ok:
            args = {"sample": sample.id, "error": sample.error or ""}
            yield {
                "ph": "i",
                "name": f"sample {sample.status}",
                "pid": pid,
                "tid": 1,
                "ts": now,
                "s": "p",
                "args": args,
            }
        if len(sample.tokens):
            start = now
            for event in _sample(pid, sample, start, run.record.static_bytes, parts):
                yield event
                now = max(now, event["ts"])
    if now:
        yield from (_counter(pid, now, name, 0) for name in COUNTERS if name != "device used")
        if parts:
            yield _counters(pid, now, STACKED, {PART_LABELS[p]: 0 for p in parts})


def _sample(
    pid: int, sample: SampleRecord, start: float, static: int, parts: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """The slices and counters of one sample; the last event stands at its end.

    ``parts`` are those that the run's records hold for every token; records of earlier versions hold none, and are
    shown with the parts of the sample's highest instant alone.
    """
    tokens, now = sample.tokens, start
    lasting = [UNTIMED_US if s is None else 1e6 * s for s in tokens.seconds]
    shape = {"tiles": sample.tiles, "visual_tokens": sample.visual_tokens, "text_tokens": sample.text_tokens}
    yield _slice(pid, start, sum(lasting), sample.id, shape)
    for t, duration in enumerate(lasting):
        held = {column: getattr(tokens, column)[t] for column in COUNTERS.values()}
        yield _slice(pid, now, duration, "prefill" if t == 0 else f"decode {t}", held)
        for name, column in COUNTERS.items():
            if held[column] is not None:
                yield _counter(pid, now, name, held[column])
        yield _counter(pid, now, "static", static)
        if parts:
            every = sample.token_parts
            yield _counters(pid, now, STACKED, {PART_LABELS[p]: every[p][t] if p in every else 0 for p in parts})
        alone = t == sample.peak_token and not sample.token_parts
        if alone:
            yield from (
                _counter(pid, now, f"at the peak: {PART_LABELS[p]}", sample.peak_parts.get(p, 0)) for p in PARTS
            )
        now += duration
        if alone:
            yield from (_counter(pid, now, f"at the peak: {PART_LABELS[p]}", 0) for p in PARTS)
    yield _counter(pid, now, "static", static)


def _slice(pid: int, at: float, duration: float, name: str, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "X", "name": name, "pid": pid, "tid": 1, "ts": at, "dur": duration, "args": args}


def _counter(pid: int, at: float, name: str, n_bytes: int) -> dict[str, Any]:
    return _counters(pid, at, name, {"bytes": n_bytes})


def _counters(pid: int, at: float, name: str, series: dict[str, int]) -> dict[str, Any]:
    return {"ph": "C", "name": name, "pid": pid, "tid": 0, "ts": at, "args": series}
