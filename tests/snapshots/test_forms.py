"""Snapshots of every age and form: each made here, told from what torch wrote then."""

from __future__ import annotations

import gzip
import json
import pickle
import random
from pathlib import Path

import pytest
from made import MIB, Recorder, save

from memprof.errors import DataError
from memprof.snapshots import plain
from memprof.snapshots.recording import read_recordings
from memprof.snapshots.report import analyse

PRIVATE = 7


def worked(*, tell_pools: bool = False) -> Recorder:
    """Some work that leaves something allocated, on two streams and in one private pool."""
    recorder = Recorder(tell_pools=tell_pools)
    recorder.lanes |= {1: (11, (0, 0)), PRIVATE: (0, (0, 1))}
    draw, live = random.Random(3), [recorder.malloc(7 * MIB, "load")]
    recorder.recording = True
    for step in range(120):
        if len(live) > 6 and draw.random() < 0.5:
            recorder.free(live.pop(draw.randrange(len(live))))
        lane = (0, 0, 1, PRIVATE)[step % 4]
        live.append(recorder.malloc(draw.randrange(1, 30 * MIB), f"step{step % 3}", lane))
    return recorder


@pytest.fixture
def dump() -> dict[str, object]:
    return worked().dump()


def told(path: Path) -> dict[str, object]:
    return analyse(path, ["expandable_segments=True"]).to_json() | {"file": ""}


@pytest.mark.parametrize(("tell", "version"), [(False, "2.1 or later"), (True, "2.12 or later")])
def test_streams_and_private_pools_replay_exactly_whether_or_not_events_tell_their_pool(tmp_path, tell, version):
    report = analyse(save(tmp_path / "made.pickle", worked(tell_pools=tell).dump()))
    assert report.replay.exact
    assert report.replay.addresses_total == 120
    assert report.torch == version


@pytest.mark.parametrize("pack", [lambda data: data, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("write", [pickle.dumps, lambda d: json.dumps(d).encode()], ids=["pickle", "json"])
def test_packed_and_json_say_the_same(tmp_path, dump, pack, write):
    path, other = save(tmp_path / "made.pickle", dump), tmp_path / "other"
    other.write_bytes(pack(write(pickle.loads(path.read_bytes()))))
    assert told(other) == told(path)


def test_zstd_says_the_same(tmp_path, dump):
    arrow = pytest.importorskip("pyarrow")
    path, other = save(tmp_path / "made.pickle", dump), tmp_path / "made.pickle.zst"
    with arrow.CompressedOutputStream(str(other), "zstd") as out:
        out.write(path.read_bytes())
    assert told(other) == told(path)


def test_zstd_that_is_damaged_is_one_line(tmp_path, dump):
    arrow = pytest.importorskip("pyarrow")
    path = tmp_path / "made.zst"
    with arrow.CompressedOutputStream(str(path), "zstd") as out:
        out.write(pickle.dumps(dump))
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:80] + b"\x00\x01\x02\x03" * 3 + whole[92:]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match="damaged or cut short") as caught:
            read_recordings(path)
        assert "\n" not in str(caught.value)


def test_zstd_without_a_package_says_what_to_do(tmp_path, monkeypatch):
    def nothing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(plain.importlib, "import_module", nothing)
    path = tmp_path / "made.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd and more")
    with pytest.raises(DataError, match="pip install zstandard"):
        read_recordings(path)


def test_a_packed_file_that_is_damaged_is_one_line(tmp_path, dump):
    whole = gzip.compress(pickle.dumps(dump))
    path = tmp_path / "made.gz"
    for broken in (
        whole[: len(whole) // 2],
        whole[:30] + b"\x00\xff\x13" + whole[33:],
        b"\x1f\x8b",
        b"\x1f\x8bnothing",
    ):
        path.write_bytes(broken)
        with pytest.raises(DataError) as caught:
            read_recordings(path)
        assert "\n" not in str(caught.value)


def test_stacks_under_history_and_blocks_without_addresses(tmp_path):
    recorder = Recorder()
    kept = [recorder.malloc(30 * MIB, "load"), recorder.malloc(5 * MIB, "keep")]
    old = recorder.dump()
    for segment in old["segments"]:
        for key in ("segment_pool_id", "is_expandable"):
            del segment[key]
        for block in segment["blocks"]:
            frames = block.pop("frames")
            del block["address"]
            if block["state"] != "inactive":
                older = {"addr": 1, "real_size": 1, "frames": [{"filename": "never.py", "line": 1, "name": "shown"}]}
                block["history"] = [{"addr": 1, "real_size": block["size"], "frames": frames}, older]
    path = tmp_path / "old.pickle"
    path.write_bytes(
        pickle.dumps({"segments": old["segments"], "device_traces": [[{"action": "snapshot", "size": 0}]]})
    )
    report = analyse(path)
    assert {holder.site for holder in report.holders} == {"model.py:7 load", "model.py:7 keep"}
    assert report.allocated_bytes == 35 * MIB == sum(holder.bytes for holder in report.holders)
    assert not report.history
    assert report.torch == "2.0 or earlier"
    assert len(kept) == 2


def test_a_picture_of_one_moment_has_no_peak_and_no_what_if(tmp_path):
    recorder = Recorder()
    recorder.free(recorder.malloc(300 * MIB))
    recorder.malloc(5 * MIB)
    made = recorder.dump()
    for content in (made, made["segments"]):
        path = tmp_path / "now.pickle"
        path.write_bytes(pickle.dumps(content))
        report = analyse(path, ["expandable_segments=True"])
        assert (report.allocated_bytes, report.cached_bytes) == (5 * MIB, 295 * MIB)
        assert report.what_if == ()
        assert report.replay is report.peak_allocated_bytes is report.out_of_memory is None
        assert "no what-if" in report.notes[0]


def test_metadata_and_annotations_are_read(tmp_path):
    recorder = Recorder()
    recorder.recording = True
    for i in range(3):
        recorder.malloc(MIB, "forward", user_metadata=f"step {i // 2}", compile_context="N/A")
    made = recorder.dump() | {
        "external_annotations": [
            {"name": "step", "stage": stage, "device": 0, "time_us": time} for stage, time in (("END", 9), ("START", 5))
        ]
    }
    path = tmp_path / "made.pickle"
    path.write_bytes(pickle.dumps(made))
    (recording,) = read_recordings(path)
    labels = [recording.labels[i] for i in recording.label_ids.tolist() if recording.labels[i]]
    assert labels == ["step 0", "step 0", "step 1"]
    assert [(a.name, a.stage) for a in recording.annotations] == [("step", "START"), ("step", "END")]


def test_settings_that_are_not_modelled_are_told_and_do_not_stop_the_reading(tmp_path, dump):
    dump["allocator_settings"] |= {"PYTORCH_CUDA_ALLOC_CONF": "new_option:3,max_non_split_rounding_mb:64"}
    report = analyse(save(tmp_path / "made.pickle", dump))
    assert "new_option" in report.notes[0]
    assert report.settings == "max_non_split_rounding_mb:64"


def test_a_file_that_says_its_torch_is_believed(tmp_path, dump):
    path = tmp_path / "made.pickle"
    about = {"memprof": {"environment": {"packages": {"torch": "2.0.1"}}}}
    path.write_bytes(pickle.dumps(dump | about))
    report = analyse(path, ["expandable_segments=True"])
    assert report.torch == "2.0.1"
    assert report.status == "predicted"
    assert any("came with torch 2.1" in note for note in report.notes)


def test_events_read_at_once_and_step_by_step_are_the_same(tmp_path, dump, monkeypatch):
    path = save(tmp_path / "made.pickle", dump)
    fast = read_recordings(path)[0]
    monkeypatch.setattr(plain, "_MOST_SHAPES", 0)
    slow = read_recordings(path)[0]
    assert fast.stacks == slow.stacks
    for column in ("actions", "addresses", "sizes", "times", "stack_ids", "lane_ids"):
        assert getattr(fast, column).tolist() == getattr(slow, column).tolist()
