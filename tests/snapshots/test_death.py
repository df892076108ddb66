"""Runs that ran out of memory, made here: what is told of them, and what would have let them through."""

from __future__ import annotations

import json

import pytest
from made import MIB, NoMemory, Recorder, save

from memprof.cli import main
from memprof.errors import BadValue
from memprof.snapshots.report import analyse

ROOM = 1000 * MIB


def died(work, **how) -> dict[str, object]:
    """What is recorded of ``work`` on a card that gives :data:`ROOM`, up to where it runs out."""
    recorder = Recorder(capacity=ROOM, **how)
    recorder.recording = True
    with pytest.raises(NoMemory):
        work(recorder)
    return recorder.dump()


def pieces(recorder: Recorder) -> None:
    """Free pieces between blocks in use: enough in all for what is asked at the end, none of it in one piece."""
    blocks = [recorder.malloc(90 * MIB, "first" if i % 2 else "second") for i in range(11)]
    for block in blocks[::2]:
        recorder.free(block)
        recorder.malloc(50 * MIB, "between")
    recorder.malloc(110 * MIB, "asks")


def too_much(recorder: Recorder) -> None:
    """Nothing is wasted; there is simply too much."""
    for size in (100, 200, 600):
        recorder.malloc(size * MIB, f"model{size}")
    recorder.malloc(300 * MIB, "asks", user_metadata="step 3")


def remedies(death) -> dict[str, bool]:
    return {remedy.name.split(":")[0].split(" of ")[0]: remedy.helps for remedy in death.remedies}


def test_fragmentation_is_told_and_expandable_segments_help(tmp_path):
    report = analyse(save(tmp_path / "died.pickle", died(pieces)))
    death = report.out_of_memory
    assert death.replayed
    assert death.site == "model.py:7 asks"
    assert death.asked_bytes == 110 * MIB
    assert death.memory.reserved_bytes + death.free_bytes == death.room_bytes == ROOM
    assert death.memory.stuck_bytes == death.memory.cached_bytes == death.memory.reserved_bytes - 750 * MIB
    assert death.memory.stuck_bytes + death.free_bytes >= death.asked_bytes > death.memory.largest_free_block_bytes
    found = remedies(death)
    assert found["expandable_segments"]
    assert found["a card"]
    assert not found["empty_cache() before"]
    assert report.room.n_bytes == ROOM


def test_where_there_is_too_much_settings_do_not_help(tmp_path):
    death = analyse(save(tmp_path / "died.pickle", died(too_much))).out_of_memory
    found = remedies(death)
    assert not found["expandable_segments"]
    assert not found["max_split_size_mb"]
    assert death.memory.stuck_bytes == 0
    assert death.missing_bytes == 200 * MIB
    assert next(holder.site for holder in death.holders) == "model.py:7 model600"
    (without,) = [remedy for remedy in death.remedies if remedy.name.startswith("without")]
    assert without.helps
    assert "model600" in without.name
    assert death.metadata == "step 3"


def test_the_last_of_several_counts_and_the_first_are_told(tmp_path):
    recorder = Recorder(capacity=ROOM)
    recorder.recording = True
    kept = recorder.malloc(500 * MIB, "kept")
    for size in (900, 800, 600):
        with pytest.raises(NoMemory):
            recorder.malloc(size * MIB, f"try{size}")
    recorder.free(kept)
    recorder.malloc(600 * MIB, "fits")
    report = analyse(save(tmp_path / "tries.pickle", recorder.dump()))
    assert (report.out_of_memory.count, report.out_of_memory.site) == (3, "model.py:7 try600")
    assert report.peak_allocated_bytes == 600 * MIB


def test_the_device_that_ran_out_is_chosen_else_the_fullest(tmp_path):
    busy = Recorder()
    busy.recording = True
    for _ in range(40):
        busy.free(busy.malloc(20 * MIB))
    dead, full = died(too_much), Recorder()
    full.recording = True
    full.malloc(5000 * MIB)
    report = analyse(save(tmp_path / "three.pickle", busy.dump(), dead, full.dump()))
    assert report.device == 1
    assert [device.out_of_memory_events for device in report.devices] == [0, 1, 0]
    assert analyse(save(tmp_path / "two.pickle", busy.dump(), full.dump())).device == 1
    assert analyse(save(tmp_path / "two.pickle", busy.dump(), full.dump()), device=0).device == 0
    with pytest.raises(BadValue, match="it has: 0, 1"):
        analyse(tmp_path / "two.pickle", device=7)


def test_a_graph_that_lives_gives_nothing_back(tmp_path):
    recorder = Recorder(capacity=ROOM, tell_pools=True)
    recorder.lanes[7] = (0, (0, 1))
    recorder.recording = True
    recorder.free(recorder.malloc(600 * MIB, "graph", 7))
    recorder.free(recorder.malloc(300 * MIB, "eager"))
    # The reference knows streams alone and would give the pool back; a graph's stays, and the request is refused.
    recorder._note("oom", 0, 500 * MIB, [], 0, device_free=100 * MIB)
    report = analyse(save(tmp_path / "graph.pickle", recorder.dump()))
    assert report.out_of_memory.replayed
    assert not remedies(report.out_of_memory)["expandable_segments"]


@pytest.mark.parametrize("columns", [60, 80])
def test_the_screen_tells_the_story(tmp_path, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    path = save(tmp_path / "died.pickle", died(pieces))
    with pytest.raises(SystemExit) as ended:
        main(["snapshot", str(path), "--what-if", "expandable_segments=True", "--flame"])
    assert not ended.value.code
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns
    said = " ".join(out.split())
    for words in (
        "GPU 0 ran out of memory", "model.py:7 asks asked for 0.107 GiB", "fragmentation", "yes expandable_segments",
        "Who held the memory when it ran out", "(what was reserved and free when memory ran out)", "Flames",
    ):  # fmt: skip
        assert words in said


def test_json_has_it_all(tmp_path, capsys):
    path = save(tmp_path / "died.pickle", died(pieces))
    with pytest.raises(SystemExit):
        main(["snapshot", str(path), "--json", "--what-if", "max_split_size_mb=64"])
    document = json.loads(capsys.readouterr().out)
    death = document["out_of_memory"]
    assert {"asked_bytes", "free_bytes", "memory", "holders", "remedies", "site"} <= set(death)
    assert document["what_if"][0]["fits"] in (True, False)
    assert document["room"]["n_bytes"] == ROOM
