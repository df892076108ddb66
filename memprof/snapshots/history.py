"""A history on disk: a recording of one sample's allocations, small enough to be committed beside the run it is of."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memprof import files
from memprof.errors import DataError
from memprof.simulator.allocator import AllocatorSettings
from memprof.snapshots.recording import Frame, RecordedBlock, RecordedSegment, Recording
from memprof.snapshots.report import call_site

#: A history's file ends so.
HISTORY = ".history.json.gz"


def write_history(path: Path, about: Mapping[str, Any], recording: Recording) -> None:
    """Write what :func:`read_history` reads: columns of numbers, and of each stack the line it is best known by."""
    known: dict[tuple[str, int, str], int] = {}
    lines = [_best(frames) for frames in recording.stacks]
    to = [known.setdefault(line, len(known)) for line in lines]
    data = {
        "schema": 1,
        "about": dict(about),
        "settings": str(recording.settings),
        "actions": recording.actions.tolist(),
        "addresses": np.diff(recording.addresses, prepend=0).tolist(),
        "sizes": recording.sizes.tolist(),
        "lines": [list(line) for line in known],
        "made_by": [to[stack] for stack in recording.stack_ids.tolist()],
        "lanes": recording.lanes,
        "in_lane": recording.lane_ids.tolist(),
        "segments": [
            [s.address, s.size, s.lane, s.small, s.expandable, [[b.size, b.requested, b.live] for b in s.blocks]]
            for s in recording.segments
        ],
    }
    text = json.dumps(data, separators=(",", ":")).encode()
    files.replace(path, gzip.compress(text, 9, mtime=0))


def _best(frames: Sequence[Frame]) -> tuple[str, int, str]:
    """File, line and function of :func:`memprof.snapshots.report.call_site`."""
    if frames and not frames[0].line:
        return frames[0].filename, 0, frames[0].name
    match = re.fullmatch(r"(.*):(\d+) (.*)", call_site(frames))
    return (match[1], int(match[2]), match[3]) if match else ("", 0, call_site(frames))


def read_history(path: Path) -> tuple[dict[str, Any], Recording]:
    """What a history is about, and the recording.

    ``about`` holds ``spec``, ``environment``, ``width``, ``height`` and ``text_tokens`` (of the question alone).

    Raises:
        DataError: The file is no history.
    """
    try:
        data = json.loads(gzip.decompress(path.read_bytes()))
        lines = [Frame(str(file), int(line), str(name)) for file, line, name in data["lines"]]
        recording = Recording(
            device=0,
            settings=AllocatorSettings.parse(data["settings"]),
            segments=tuple(_segment(*segment) for segment in data["segments"]),
            actions=np.asarray(data["actions"], dtype=np.int8),
            addresses=np.cumsum(np.asarray(data["addresses"], dtype=np.int64)),
            sizes=np.asarray(data["sizes"], dtype=np.int64),
            stack_ids=np.asarray(data["made_by"], dtype=np.int32),
            lane_ids=np.asarray(data["in_lane"], dtype=np.int32),
            stacks=tuple((line,) for line in lines),
            lanes=tuple((stream, tuple(pool)) for stream, pool in data["lanes"]),
        )
        return data["about"], recording
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no history of an allocator: {error}") from None


def _segment(
    address: int, size: int, lane: int, small: bool, expandable: bool, blocks: Iterable[tuple[int, int, bool]]
) -> RecordedSegment:
    found, at = [], address
    for n_bytes, requested, live in blocks:
        found.append(RecordedBlock(at, n_bytes, requested, live, 0))
        at += n_bytes
    return RecordedSegment(address, size, lane, small, expandable, tuple(found))
