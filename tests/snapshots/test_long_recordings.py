"""Recordings longer than the memory: columns in files, numbers instead of things; nothing grows with the events."""

from __future__ import annotations

import gc
import os
import pickle
import random
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from made import MIB, Recorder, save
from reference_allocator import NoMemory

from memprof.errors import MemprofError
from memprof.snapshots import chrome, columns, html
from memprof.snapshots.columns import Column, stretches
from memprof.snapshots.memo import Memo
from memprof.snapshots.plain import read_plain
from memprof.snapshots.report import analyse, study


def eventful(path: Path, seed: int) -> Path:
    """A recording with older blocks, lost and doubled frees, several lanes, an emptied cache, and often an ``oom``."""
    draw = random.Random(seed)
    recorder = Recorder(expandable=seed % 3 == 0, capacity=300 * MIB if seed % 2 else None, tell_pools=seed % 2 == 0)
    recorder.lanes |= {1: (1, (0, 0)), 2: (0, (0, 7))}
    live: list[int] = []
    for step in range(160):
        recorder.recording = step > 30
        try:
            if draw.random() < 0.04:
                recorder.empty_cache()
            elif live and draw.random() < 0.45:
                recorder.free(live.pop(draw.randrange(len(live))), lost=draw.random() < 0.1)
            else:
                size = draw.choice([draw.randrange(1, 3000), draw.randrange(1, 30 * MIB)])
                live.append(recorder.malloc(size, f"s{draw.randrange(4)}", draw.choice([0, 0, 1, 2])))
        except NoMemory:
            break
    recorder.events.insert(draw.randrange(len(recorder.events)), dict(draw.choice(recorder.events)))
    return save(path, recorder.dump(), protocol=2 + seed % 4)


@pytest.mark.parametrize("seed", range(8))
def test_files_and_short_stretches_change_no_answer(tmp_path, monkeypatch, seed):
    path, asked = eventful(tmp_path / "made.pickle", seed), ["expandable_segments=True", "max_split_size_mb=64"]
    found = []
    for most, rows in ((2**20, 2**16), (0, 7)):
        monkeypatch.setattr(columns, "MOST_IN_MEMORY", most)
        monkeypatch.setattr(columns, "STRETCH", rows)
        studied = study(path, asked)
        found.append((studied.report.to_json(), html.render(studied, "MiB"), chrome.render(studied)))
    assert found[0] == found[1]


def looped(path: Path, steps: int) -> Path:
    """A training loop as torch writes it: a completed free has the list of frames of its request."""
    recorder, live, draw = Recorder(), [], random.Random(0)
    recorder.recording = True
    known: dict[str, dict[str, object]] = {}
    for _ in range(steps):
        live.append(recorder.malloc(2**16 * draw.randrange(1, 32), f"s{draw.randrange(6)}"))
        if len(live) > 12:
            recorder.free(live.pop(draw.randrange(len(live))))
    events = recorder.events
    for before, event in zip([{}, *events], events, strict=False):
        again = event["action"] == "free_completed"
        event["frames"] = before["frames"] if again else [known.setdefault(str(f), f) for f in event["frames"]]
    return save(path, recorder.dump())


def most_bytes(path: Path) -> int:
    """The highest that a report and a page of ``path`` took, as Python and numpy count it."""
    gc.collect()  # what others left is not this one's
    tracemalloc.start()
    try:
        studied = study(path)
        assert studied.report.replay.exact
        assert html.render(studied, "MiB")
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_events(tmp_path, monkeypatch):
    monkeypatch.setattr("memprof.snapshots.plain._CHUNK", 2**14)
    monkeypatch.setattr(columns, "MOST_IN_MEMORY", 2**12)
    monkeypatch.setattr(columns, "STRETCH", 2**9)
    made = [looped(tmp_path / f"{steps}.pickle", steps) for steps in (2000, 6000)]
    few, many = (min(most_bytes(path) for _ in range(3)) for path in made)  # garbage is collected when it pleases
    assert (many - few) / (3 * 4000) < 8  # bytes an event: what a list of references alone would take


def test_a_column_in_a_file_is_the_column_in_memory(monkeypatch):
    monkeypatch.setattr(columns, "MOST_IN_MEMORY", 64)
    monkeypatch.setattr(columns, "STRETCH", 8)
    column, numbers = Column("i"), list(range(-50, 50))
    for number in numbers:
        column.tail.append(number)
        column.settle()
    column[3] = numbers[3] = 2**31 - 1
    column[99] = numbers[99] = -(2**31)
    assert [column[i] for i in range(100)] == numbers
    with pytest.raises(IndexError):
        column[100]
    whole = column.whole()
    assert whole.tolist() == numbers
    parts = [(begin, part.tolist()) for begin, (part,) in stretches(whole, start=5, stop=30)]
    assert parts == [(begin, numbers[begin : min(begin + 8, 30)]) for begin in (5, 13, 21, 29)]
    assert (
        parts == [(begin, part.tolist()) for begin, (part,) in stretches(whole, start=5, stop=30, backwards=True)][::-1]
    )


def test_a_full_disk_ends_in_one_line(tmp_path, monkeypatch):
    path = eventful(tmp_path / "made.pickle", 0)
    monkeypatch.setattr(columns, "MOST_IN_MEMORY", 0)
    with monkeypatch.context() as full:
        full.setattr(columns, "_unnamed_file", lambda: os.open("/dev/full", os.O_WRONLY))
        with pytest.raises(MemprofError, match=r"No space left on device; .*TMPDIR") as caught:
            analyse(path)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(MemprofError, match="TMPDIR"):
        analyse(path)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_whatever_was_remembered_is_found_again(tmp_path, monkeypatch, protocol):
    monkeypatch.setattr(columns, "MOST_IN_MEMORY", 2**10)
    things = [[f"text {i}", {"key": i}, (i, i), (i, str(i), i), (True, 1)] for i in range(3000)]
    data = {"segments": [], "device_traces": [], "things": [*things, *things[::-1]], "parts": [t[1:] for t in things]}
    path = tmp_path / "things.pickle"
    path.write_bytes(pickle.dumps(data, protocol=protocol))
    root, _ = read_plain(path)
    assert root == data
    assert root["things"][-1] is root["things"][0]
    assert root["parts"][7][0] is root["things"][7][1]


def test_a_place_that_is_filled_anew_holds_the_new_thing(monkeypatch):
    monkeypatch.setattr("memprof.snapshots.memo.MOST_FIRST", 1)
    memo, shared = Memo(Recorder), Recorder()
    for thing in ({}, {}, shared, "text", (1, 2)):
        memo.append(thing)
    for place in range(5):
        memo[place] = shared
        memo.append([place])
    assert [memo[place] for place in range(10)] == [shared] * 5 + [[place] for place in range(5)]
