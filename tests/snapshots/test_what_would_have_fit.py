"""What-if answers: the smallest card, the limit that was there, and older blocks whose size stands nowhere."""

from __future__ import annotations

import random

import numpy as np
import pytest
from made import MIB, NoMemory, Recorder, ReferenceAllocator, save

from memprof.errors import BadValue
from memprof.snapshots.recording import read_recordings
from memprof.snapshots.replay import check_replay, replayed
from memprof.snapshots.report import analyse, asked_for
from memprof.snapshots.trials import Trials, room_of


def draw_work(recorder: Recorder, seed: int, steps: int, live: list[int]) -> None:
    """Allocations and frees of sizes whose rest is often too small to split off."""
    draw = random.Random(seed)
    for _ in range(steps):
        if live and draw.random() < 0.5:
            recorder.free(live.pop(draw.randrange(len(live))))
        else:
            small = draw.randrange(1, 3 * MIB)
            large = draw.randrange(1, 5) * MIB + draw.randrange(0, 2048) * 512
            live.append(recorder.malloc(draw.choice([small, large, draw.randrange(5, 40) * MIB])))


@pytest.mark.parametrize("seed", range(40))
def test_older_blocks_get_the_sizes_under_which_all_addresses_come_out(tmp_path, seed):
    recorder, live = Recorder(), list[int]()
    draw_work(recorder, seed, 50, live)
    recorder.recording = True
    before = dict.fromkeys(live, recorder.allocator)
    draw_work(recorder, seed + 1000, 80, live)
    (recording,) = read_recordings(save(tmp_path / "made.pickle", recorder.dump()))
    found = replayed(recording)
    assert found.check.exact, found.check
    assert found.check.addresses_total > 20
    assert found.allocated()[-1] == recorder.allocator.allocated == recording.allocated_at_end
    assert found.lives.reserved[-1] == recorder.allocator.reserved
    assert len(before) >= len(found.lives.older)


def test_a_block_that_kept_a_rest_that_was_too_small_to_split(tmp_path):
    recorder = Recorder()
    first = recorder.malloc(int(4.9375 * MIB))
    fence = recorder.malloc(2 * MIB)
    recorder.free(first)
    kept = recorder.malloc(4 * MIB)  # the rest, 0.9375 MiB, stays with it
    recorder.free(fence)
    recorder.recording = True
    recorder.free(recorder.malloc(8 * MIB))
    recorder.free(kept)
    report = analyse(save(tmp_path / "made.pickle", recorder.dump()))
    assert report.replay.exact
    assert report.peak_allocated_bytes == int(12.9375 * MIB)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("expandable", [False, True])
def test_the_smallest_card_is_where_the_reference_begins_to_fit(tmp_path, seed, expandable):
    recorder, live = Recorder(), list[int]()
    recorder.recording = True
    draw_work(recorder, seed, 120, live)
    path = save(tmp_path / "made.pickle", recorder.dump())
    asked = f"expandable_segments={expandable}"
    least = analyse(path, [asked]).what_if[0].smallest_card_bytes

    def fits(room: int) -> bool:
        """Whether the same work runs in ``room``, by the reference; the device itself is large."""
        allocator = ReferenceAllocator(room, expandable=expandable)
        allocator.device = 2**40
        at: dict[int, int] = {}
        try:
            for event in recorder.events:
                if event["action"] == "alloc":
                    at[event["addr"]] = allocator.malloc(event["size"])
                elif event["action"] == "free_completed":
                    allocator.free(at.pop(event["addr"]))
        except NoMemory:
            return False
        return True

    assert fits(least)
    assert not fits(least - 2 * MIB)


def test_the_limit_comes_from_memory_that_went_back_under_pressure(tmp_path):
    recorder = Recorder(capacity=1050 * MIB)
    recorder.recording = True
    first, second = recorder.malloc(100 * MIB), recorder.malloc(350 * MIB)
    recorder.free(first)
    recorder.free(second)
    kept = [recorder.malloc(size * MIB) for size in (700, 100, 100)]
    for address in kept[:0:-1]:
        recorder.free(address)
    path = save(tmp_path / "made.pickle", recorder.dump())
    report = analyse(path, ["expandable_segments=True"])
    assert not report.room.exact
    assert 900 * MIB <= report.room.n_bytes < 1150 * MIB
    (answer,) = report.what_if
    assert answer.baseline_reserved_bytes == report.peak_reserved_bytes == 900 * MIB
    assert answer.peak_reserved_bytes <= report.room.n_bytes


def test_a_cache_that_the_user_emptied_says_nothing_of_the_limit_and_is_emptied_in_trials(tmp_path):
    recorder = Recorder()
    recorder.recording = True
    recorder.free(recorder.malloc(400 * MIB))
    recorder.empty_cache()
    kept = recorder.malloc(1 * MIB)
    recorder.malloc(300 * MIB)
    recorder.free(kept)
    (recording,) = read_recordings(save(tmp_path / "made.pickle", recorder.dump()))
    lives = replayed(recording).lives
    assert room_of(lives) is None or room_of(lives).n_bytes > 400 * MIB
    assert Trials(lives).run().peak_reserved == 400 * MIB


def test_a_lost_free_ends_a_life_where_something_else_lies(tmp_path):
    recorder = Recorder()
    recorder.recording = True
    for lost in (False, True, False, True, False):
        recorder.free(recorder.malloc(30 * MIB), lost=lost)
    (recording,) = read_recordings(save(tmp_path / "made.pickle", recorder.dump()))
    assert check_replay(recording).exact
    found = replayed(recording)
    assert found.allocated().max() == 30 * MIB
    assert Trials(found.lives).run().peak_allocated == 30 * MIB


def test_blocks_left_out_are_not_allocated(tmp_path):
    recorder = Recorder()
    older = recorder.malloc(200 * MIB, "older")
    recorder.recording = True
    recorder.malloc(100 * MIB, "kept")
    recorder.malloc(50 * MIB, "kept")
    (recording,) = read_recordings(save(tmp_path / "made.pickle", recorder.dump()))
    lives = replayed(recording).lives
    # The older block, left out, is free memory where it lay, and nothing at all in a fresh start.
    for away, fresh, there in ((0, 250, 250), (1, 300, 300), (2, 150, 200)):
        without = np.array([away])
        assert Trials(lives).run(without=without).peak_reserved == fresh * MIB
        assert Trials(lives).run(without=without, as_recorded=True).peak_reserved == there * MIB
    assert older


def test_a_card_is_a_name_or_a_size():
    assert asked_for("24GiB") == 24 * 2**30
    assert asked_for("h100") > 70 * 2**30
    with pytest.raises(BadValue):
        asked_for("h100@any")
    with pytest.raises(BadValue, match="unknown card"):
        asked_for("abacus")


def test_a_cache_emptied_after_any_event_makes_room_for_what_follows(tmp_path):
    recorder = Recorder()
    recorder.recording = True
    recorder.free(recorder.malloc(400 * MIB))
    recorder.malloc(500 * MIB)
    (recording,) = read_recordings(save(tmp_path / "made.pickle", recorder.dump()))
    trials = Trials(replayed(recording).lives)
    peaks = [trials.run(empty_at=event).peak_reserved // MIB for event in range(len(recording))]
    freed = [event["action"] for event in recorder.events].index("free_completed")
    asked = [event["action"] for event in recorder.events].index("segment_alloc", freed)
    assert peaks == [900] * freed + [500] * (asked + 1 - freed) + [900] * (len(recording) - asked - 1)


def test_another_card_does_not_change_what_the_user_did(tmp_path):
    recorder = Recorder(capacity=500 * MIB)
    recorder.recording = True
    recorder.free(recorder.malloc(400 * MIB))
    recorder.malloc(450 * MIB)  # the driver refuses, and the cache goes back
    path = save(tmp_path / "made.pickle", recorder.dump())
    (small,) = analyse(path, ["expandable_segments=False"]).what_if
    (large,) = analyse(path, ["expandable_segments=False"], room_bytes=2000 * MIB).what_if
    assert small.peak_reserved_bytes == 450 * MIB
    assert large.peak_reserved_bytes == 850 * MIB  # nothing presses there, so nothing goes back
    assert small.smallest_card_bytes == large.smallest_card_bytes == 450 * MIB
