"""A recording as a Chrome trace for Perfetto (ui.perfetto.dev): bytes as counters, annotations as slices.

``allocated by ...`` is one counter with a series a group. Where the file has no clock, an event lasts a microsecond.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from memprof.errors import DataError
from memprof.snapshots.curve import Curve, curve
from memprof.snapshots.recording import OOM
from memprof.snapshots.report import Studied
from memprof.snapshots.sites import shown, way

#: How many instants a trace keeps.
POINTS = 20_000


def render(studied: Studied) -> str:
    """The trace.

    Raises:
        DataError: The snapshot has no events.
    """
    if studied.replay is None:
        raise DataError(f"{studied.report.file} holds no events, so there is no course to draw")
    drawn = curve(studied.replay, studied.allocated, way(studied.report.by), POINTS)
    report = studied.report
    about = {
        "made by": "memprof", "file": report.file, "status": report.status,
        "clock": "microseconds as recorded" if drawn.times.any() else "one microsecond an event: none was recorded",
    }  # fmt: skip
    events = list(_events(studied, drawn))
    return json.dumps({"displayTimeUnit": "ms", "otherData": about, "traceEvents": events}, ensure_ascii=False) + "\n"


def _events(studied: Studied, drawn: Curve) -> Iterator[dict[str, Any]]:
    report, recording = studied.report, studied.recording
    pid = report.device + 1
    yield {
        "ph": "M", "name": "process_name", "pid": pid, "tid": 0,
        "args": {"name": f"GPU {report.device}, {report.file}, {report.status}"},
    }  # fmt: skip
    times = drawn.times if drawn.times.any() else drawn.events
    start = int(times[0])
    stacked = f"allocated by {report.by}"
    for i, (time, event) in enumerate(zip((times - start).tolist(), drawn.events.tolist(), strict=True)):
        level = {name: int(n) for name, n in zip(drawn.groups, drawn.levels[:, i], strict=True)}
        yield _counter(pid, time, "allocated", {"bytes": int(drawn.allocated[i])})
        yield _counter(pid, time, "reserved", {"bytes": int(drawn.reserved[i])})
        yield _counter(pid, time, stacked, level)
        if recording.actions[event] == OOM:
            args = {"asked for, bytes": int(recording.sizes[event]), "free, bytes": int(recording.addresses[event])}
            yield {"ph": "i", "name": "out of memory", "pid": pid, "tid": 1, "ts": time, "s": "g", "args": args}
    if drawn.times.any():
        for each in recording.annotations:
            phase = {"START": "B", "END": "E"}.get(each.stage)
            if phase:
                yield {"ph": phase, "name": shown(each.name), "pid": pid, "tid": 2, "ts": each.time - start}


def _counter(pid: int, time: int, name: str, series: dict[str, int]) -> dict[str, Any]:
    return {"ph": "C", "name": name, "pid": pid, "tid": 0, "ts": time, "args": series}
