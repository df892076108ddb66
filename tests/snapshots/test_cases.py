"""Inputs that memprof once took badly, with the answers that are right; they lie beside the project."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memprof.cli import main
from memprof.snapshots.lives import trace_lives
from memprof.snapshots.recording import ALLOC, read_recordings
from memprof.snapshots.report import analyse
from memprof.snapshots.trials import Trials
from memprof.units import GIB, MIB

CASES = Path(__file__).resolve().parents[3] / "shared" / "cases"
SNAPSHOTS, HOSTILE = CASES / "snapshots", CASES / "hostile"

needs_cases = pytest.mark.skipif(not SNAPSHOTS.is_dir(), reason="../shared/cases is not at hand")
needs_hostile = pytest.mark.skipif(not HOSTILE.is_dir(), reason="../shared/cases is not at hand")
ASKED = "expandable_segments=True"


def command(capsys, *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["snapshot", *map(str, words)])
    return (int(ended.value.code or 0), *capsys.readouterr())


@needs_cases
def test_the_gpu_that_ran_out_is_told_first(capsys):
    path = SNAPSHOTS / "oom_on_the_quieter_gpu.pickle"
    report = analyse(path, [ASKED])
    assert report.device == 1
    death = report.out_of_memory
    assert (death.site, death.asked_bytes, death.free_bytes) == ("model.py:44 forward", 5 * GIB, 90 * MIB)
    assert [(h.site, h.bytes) for h in death.holders] == [("model.py:31 forward", 30 * GIB)]
    assert [each.device for each in report.devices] == [0, 1]
    code, out, _ = command(capsys, path, "--what-if", ASKED)
    assert code == 0
    assert "GPU 1 ran out of memory" in out
    assert "GPU 0: 0.215 GiB reserved" in out
    assert analyse(path, device=0).out_of_memory is None


@needs_cases
def test_what_if_knows_the_card(capsys):
    path = SNAPSHOTS / "whatif_without_the_cards_limit.pickle"
    (answer,) = analyse(path, [ASKED]).what_if
    assert answer.smallest_card_bytes == answer.baseline_smallest_card_bytes == 900 * MIB
    assert answer.saved_bytes == 0
    assert answer.peak_reserved_bytes <= 1050 * MIB
    assert command(capsys, path, "--what-if", ASKED)[0] == 0


@needs_cases
def test_no_history_is_a_picture_of_one_moment(capsys):
    path = SNAPSHOTS / "no_history.pickle"
    code, out, _ = command(capsys, path, "--what-if", ASKED)
    assert code == 0
    said = " ".join(out.split())
    assert "no history: a picture of one moment" in said
    assert "reserved now 3.027" in said
    assert "cached, not allocated 2.930" in said
    assert "No history was recorded, so no peak is known and nothing was replayed" in said
    for wrong in ("peak allocated", "(as recorded)", "exact"):
        assert wrong not in said
    code, out, _ = command(capsys, path, "--json")
    document = json.loads(out)
    assert document["peak_allocated_bytes"] is document["replay"] is document["peak_event"] is None
    assert document["history"] is False


@needs_cases
def test_stacks_of_torch_2_0(capsys):
    path = SNAPSHOTS / "torch_2_0_history.pickle"
    report = analyse(path)
    assert [(h.site, h.bytes) for h in report.holders] == [("model.py:31 forward", 100 * MIB)]
    assert report.torch == "2.0 or earlier"
    assert "model.py:31 forward   0.098" in command(capsys, path)[1]


@needs_cases
def test_a_bare_list_of_segments():
    report = analyse(SNAPSHOTS / "list_of_segments.pickle", [ASKED])
    assert (report.allocated_bytes, report.reserved_bytes) == (104857600, 3145728000 + 104857600)
    assert not report.history


@needs_cases
def test_a_block_that_held_more_than_was_asked():
    report = analyse(SNAPSHOTS / "block_size_before_the_recording.pickle", [ASKED])
    assert report.peak_allocated_bytes == int(12.9375 * MIB)
    assert (report.replay.addresses_matched, report.replay.addresses_total) == (1, 1)


@needs_cases
def test_growth_that_pytorch_193400_measured():
    path = SNAPSHOTS / "expandable_with_max_split.pickle"
    asked = "max_split_size_mb=128,expandable_segments=True"
    (recording,) = read_recordings(path)
    settings = recording.settings.updated(asked)
    lives = trace_lives(recording)
    # One block stays; then every cycle makes two large ones and a small one that stays, and frees the large ones.
    allocs = [i for i, action in enumerate(recording.actions.tolist()) if action == ALLOC]
    stops = [allocs[1 + 3 * (cycle + 1)] for cycle in range(0, 101, 20)]
    levels = [Trials(lives, stop=stop).run(settings).peak_reserved // MIB for stop in stops]
    assert levels == [220, 2980, 5760, 8520, 11300, 14060]
    report = analyse(path, [asked], room_bytes=16_304 * MIB)
    assert 15_900 * MIB <= report.what_if[0].peak_reserved_bytes <= 16_304 * MIB
    assert report.what_if[0].fits


@needs_hostile
@pytest.mark.parametrize("name", ["snapshot_memo_bomb", "snapshot_expand_keyerror"])
def test_a_hostile_file_ends_in_one_line(capsys, name):
    code, out, err = command(capsys, HOSTILE / f"{name}.pickle", "--what-if", ASKED)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert "Traceback" not in err


@needs_hostile
def test_control_characters_are_shown_as_text(capsys):
    for words in ([], ["--flame"], ["--json"], ["--by", "module"]):
        code, out, _ = command(capsys, HOSTILE / "snapshot_ansi.pickle", *words)
        assert code == 0
        assert not {character for character in out if ord(character) < 32} - {"\n"}
        assert "\x9b" not in out
        assert "[bold" in out  # markup is text, too
