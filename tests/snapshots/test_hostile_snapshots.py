"""Files that mean harm: nothing runs, nothing hangs, nothing fills the memory; each ends in one line or an answer."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from made import MIB, Recorder, frames, save

from memprof.errors import DataError, MemprofError
from memprof.snapshots.recording import read_recordings
from memprof.snapshots.report import analyse
from memprof.snapshots.sites import shown

START = b"\x80\x04"


def answered(path: Path, *what_ifs: str) -> bool:
    """Whether there was an answer; else it ended in one line, and nothing else will do."""
    said = ""
    try:
        analyse(path, what_ifs)
    except MemprofError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 400
    return not said


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def nested(levels: int, close: bytes, inner: bytes = b"K\x01") -> bytes:
    """A value wrapped so many times that whoever follows it falls off the stack."""
    return inner + close * levels


def snapshot_with(value: bytes, where: str) -> bytes:
    """A pickle whose only event has ``value`` in one place."""
    fields = {"filename": text("a.py"), "line": b"K\x01", "name": text("f"), "key": text("more")}
    fields |= {where: value} if where in fields else {}
    frame = b"}(" + b"".join(text(k) + fields[k] for k in ("filename", "line", "name")) + fields["key"] + b"K\x01u"
    event = {
        "action": text("alloc"),
        "addr": b"K\x01",
        "size": b"K\x01",
        "stream": b"K\x00",
        "frames": b"](" + frame + b"e",
    }
    event |= {where: value} if where in (*event, "pool_id", "user_metadata", "time_us") else {}
    body = b"}(" + b"".join(text(k) + v for k, v in event.items()) + b"u"
    settings = b"}(" + text("max_split_size") + (value if where == "settings" else b"J\xff\xff\xff\xff") + b"u"
    return (
        START + b"}(" + text("segments") + b"]" + text("device_traces") + b"](](" + body + b"ee"
        + text("allocator_settings") + settings + b"u."
    )  # fmt: skip


def doubled(levels: int) -> bytes:
    """A tuple whose parts are the same tuple, and so on: 2**levels leaves in a few bytes."""
    made = b"K\x01\x94"
    for level in range(levels):
        made += b"h" + bytes([level]) + b"h" + bytes([level]) + b"\x86\x94"
    return made


PLACES = [
    "filename", "line", "name", "key", "action", "addr", "size", "stream", "pool_id", "time_us", "frames", "settings",
    "user_metadata",
]  # fmt: skip
VALUES = {
    "doubled": doubled(30), "deep": nested(200_000, b"\x85"), "less deep": nested(3000, b"\x85"), "none": b"N",
    "huge": b"\x8a\xff" + b"\x7f" * 255, "nan": b"G" + struct.pack(">d", float("nan")), "text": text("\x1b[2J[bold]"),
}  # fmt: skip


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_odd_values_anywhere_end_in_one_line_or_an_answer(tmp_path, where, value):
    path = tmp_path / "odd.pickle"
    path.write_bytes(snapshot_with(value, where))
    answered(path, "expandable_segments=True")


LIMITS = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_AS, (3 * 2**29, 3 * 2**29))  # the libraries' own reservations are 0.4 GiB of it
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
from memprof.errors import MemprofError
from memprof.snapshots.report import analyse
try:
    print("answer", analyse(Path(sys.argv[1])).events)
except MemprofError as error:
    print("error", str(error).splitlines())
"""


def bounded(path: Path) -> str:
    """What is said of ``path`` within 1.5 GiB of addresses and twenty seconds; anything else is a failure."""
    done = subprocess.run([sys.executable, "-c", LIMITS, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-600:]
    return done.stdout


BOMBS = {
    "doubled root": START + doubled(60) + b"}(" + text("segments") + b"h\x3c" + text("device_traces") + b"]u.",
    "list of itself": START + b"]\x94(" + b"h\x00" * 3_000_000 + b"e.",
    "nones": START + b"N" * 30_000_000,
    "memo": START + b"K\x07\x94" + b"\x94" * 30_000_000,
    "marks": START + b"(" * 30_000_000,
    "lists": START + b"]" * 20_000_000,
    "dicts": START + b"}" * 20_000_000,
    "open dicts": START + b"}\x94(" * 5_000_000,
    "open lists": START + b"]\x94(" * 5_000_000,
    "texts": START + (b"X" + struct.pack("<I", 2**20) + b"a" * 2**20) * 300,
    "frames": START + (b"\x95" + b"\x00" * 8) * 3_000_000,
    "json lists": b"[" * 20_000_000,
    "json dicts": b'{"segments":' * 2_000_000,
}


@pytest.mark.parametrize("content", BOMBS.values(), ids=BOMBS)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_bombs_end_soon_and_in_little_memory(tmp_path, content, packed):
    path = tmp_path / "bomb"
    path.write_bytes(gzip.compress(content, 1) if packed else content)
    assert "error" in bounded(path)


def test_a_segment_or_a_trace_that_is_listed_again_and_again_is_refused(tmp_path):
    recorder = Recorder()
    recorder.recording = True
    recorder.malloc(MIB)
    made = recorder.dump()
    shared, blocks = made["segments"][0], made["segments"][0]["blocks"]
    twice = [shared, {**shared, "address": 1, "blocks": blocks}]
    trace = made["device_traces"][0]
    for changed in ({"segments": [shared] * 1000}, {"segments": twice}, {"device_traces": [trace] * 1000}):
        path = tmp_path / "again.pickle"
        path.write_bytes(pickle.dumps(made | changed))
        with pytest.raises(DataError, match="twice"):
            read_recordings(path)


def test_a_stack_that_many_events_share_is_paid_for_once(tmp_path):
    # Kept under two names in the memo, a list of many frames is met unfolded by each event that uses the other name.
    frame = b"}(" + text("filename") + text("a.py") + text("line") + b"K\x01" + text("name") + text("f") + b"u\x94"
    stack = b"]\x94\x94(" + b"h\x00" * 30_000 + b"e"
    event = b"}(" + text("action") + text("alloc") + text("addr") + b"K\x01" + text("size") + b"K\x01" + text("frames")
    events = b"](" + (event + b"h\x01u") * 30_000 + b"e"
    content = (
        START
        + frame
        + b"0" * 0
        + stack
        + b"}("
        + text("segments")
        + b"]"
        + text("device_traces")
        + b"]("
        + events
        + b"eu."
    )
    path = tmp_path / "shared.pickle"
    path.write_bytes(content)
    assert "30000" in bounded(path) or "error" in bounded(path)


@pytest.mark.parametrize("changes", [
    {"addr": -1}, {"addr": 2**63 - 1}, {"size": -5}, {"size": 2**62}, {"size": 2**70}, {"size": 1.5}, {"size": True},
    {"size": "5"}, {"stream": None}, {"stream": [1]}, {"frames": 3}, {"frames": [[]]}, {"pool_id": (1,)},
    {"pool_id": 3}, {"time_us": "now"}, {"action": 3}, {"action": ("alloc",)}, {"device_free": "x"},
    {"user_metadata": [1]},
])  # fmt: skip
@pytest.mark.parametrize("write", [pickle.dumps, lambda d: json.dumps(d).encode()], ids=["pickle", "json"])
def test_numbers_and_types_that_cannot_be_end_in_one_line(tmp_path, changes, write):
    event = {"action": "alloc", "addr": 512, "size": 512, "stream": 0, "time_us": 1, "frames": frames("f")}
    path = tmp_path / "odd"
    path.write_bytes(write({"segments": [], "device_traces": [[event | changes]]}))
    if answered(path):
        assert changes.keys() <= {"user_metadata", "pool_id"}


@pytest.mark.parametrize("change", [
    {"blocks": 3}, {"blocks": [{}]}, {"blocks": [{"size": -1, "state": "inactive"}]}, {"address": 2**63},
    {"total_size": 0},
    {"blocks": [{"size": 2**40, "state": "inactive"}]}, {"device": -1}, {"device": 10**6}, {"device": "0"},
    {"blocks": [{"size": 5, "state": 3}]}, {"blocks": [{"size": 5, "state": "inactive", "history": 3}]},
])  # fmt: skip
def test_segments_that_cannot_be_end_in_one_line(tmp_path, change):
    segment = {"address": 512, "total_size": 512, "blocks": [{"size": 512, "state": "inactive"}], "stream": 0}
    path = tmp_path / "odd.pickle"
    path.write_bytes(pickle.dumps({"segments": [segment | change], "device_traces": []}))
    if answered(path):
        assert change["blocks"][0]["size"] == 5


def test_mutations_of_a_good_file_never_end_in_anything_but_an_answer_or_one_line(tmp_path):
    recorder, draw = Recorder(capacity=900 * MIB), random.Random(0)
    recorder.recording = True
    live = []
    for i in range(60):
        if live and draw.random() < 0.4:
            recorder.free(live.pop())
        else:
            live.append(recorder.malloc(draw.randrange(1, 20 * MIB), f"s{i % 3}"))
    whole = save(tmp_path / "good.pickle", recorder.dump()).read_bytes()
    written = json.dumps(recorder.dump()).encode()
    path, kept = tmp_path / "changed", 0
    for number in range(1500):
        content = bytearray(written if number % 3 == 0 else whole)
        for _ in range(draw.randrange(1, 6)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(content)
        kept += answered(path, *["expandable_segments=True"] * (number % 10 == 0))
    assert 0 < kept < 1500


def test_what_a_terminal_would_obey_is_written_out():
    nasty = "\x1b[31m\x9b2J\x07\u202eexe.fdp\u2028\ud800\tend"
    assert shown(nasty) == "\\x1b[31m\\x9b2J\\x07\\u202eexe.fdp\\u2028\\ud800\\tend"
    assert len(shown("a" * 10_000)) == 120


def test_what_is_no_file_is_refused_unread(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (tmp_path, pipe, Path(os.devnull), tmp_path / "nowhere"):
        with pytest.raises(DataError, match="cannot read"):
            read_recordings(path)
