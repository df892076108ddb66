"""Recordings that contradict themselves: the model goes on, and no memory lies in two of its segments."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from memprof.snapshots import replay
from memprof.snapshots.recording import read_recordings
from memprof.snapshots.replay import replayed

MIB = 2**20


def event(action: str, address: int, size: int) -> dict[str, Any]:
    return {"action": action, "addr": address, "size": size, "stream": 0, "frames": []}


def again(times: int) -> dict[str, Any]:
    """A segment that is got again and again at one address, never given back, and always full."""
    events = []
    for time in range(times):
        events.append(event("segment_alloc", 2**40, 20 * MIB))
        events.append(event("alloc", 2**40 + 512 * time, 20 * MIB))
    return {"segments": [], "device_traces": [events]}


@pytest.mark.parametrize("times", [2, 5])
def test_no_memory_lies_in_two_segments(times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "again.pickle"
    file.write_bytes(pickle.dumps(again(times)))
    held: dict[int, int] = {}
    saw = replay._Player._saw_segment

    def look(player: Any, kind: str, address: int, n_bytes: int) -> None:
        if kind == "segment_alloc":
            assert not any(a < address + n_bytes and address < a + n for a, n in held.items()), "two at one address"
            held[address] = n_bytes
        elif kind == "segment_free":
            del held[address]
        saw(player, kind, address, n_bytes)

    monkeypatch.setattr(replay._Player, "_saw_segment", look)
    (recording,) = read_recordings(file)
    check = replayed(recording).check
    assert not check.exact
    assert len(held) == times
