from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from memprof.errors import DataError, RunExists, UsageError
from memprof.records import Holder, RunRecord, RunSpec, SampleRecord, TokenColumns, summarize
from memprof.store import RunFolder, find_runs, read_run

SPEC = RunSpec(model="m", method="baseline", task="ai2d", device="sim")


def record(**changes: object) -> RunRecord:
    return RunRecord(spec=RunSpec(**{**SPEC.to_json(), **changes}), status="predicted", static_bytes=100)


def sample(name: str, peak: int = 150) -> SampleRecord:
    columns = TokenColumns([peak, 140], [120, 121], [200, 200], [10, 11], [None, None], [None, None])
    holder = Holder(5, "mlp", "a.b", "mm", [1, 2], "float32", "prefill")
    return SampleRecord(
        id=name, tokens=columns, peak_parts={"mlp": peak - 100}, peak_holders=[holder], dynamic_peak_bytes=peak - 100
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "r", record()) as folder:
        folder.append(sample("a"))
        folder.append(SampleRecord(id="b", status="failed", error="no"))
        folder.save()
    run = read_run(tmp_path / "r")
    assert run.record == record()
    assert run.samples == [sample("a"), SampleRecord(id="b", status="failed", error="no")]
    total = summarize(run)
    assert (total["samples"], total["failed"], total["dynamic_peak_bytes"], total["tokens"]) == (1, 1, 50, 2)
    assert find_runs([tmp_path])[0].samples == run.samples


def test_each_line_is_on_disk_when_append_returns(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "r", record()) as folder:
        folder.append(sample("a"))
        assert [s.id for s in read_run(tmp_path / "r").samples] == ["a"]


def test_a_torn_line_is_dropped_and_resume_goes_on(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "r", record()) as folder:
        folder.append(sample("a"))
    lines = tmp_path / "r" / "samples.jsonl"
    whole = lines.read_bytes()
    lines.write_bytes(whole + whole[: len(whole) // 2])
    assert [s.id for s in read_run(tmp_path / "r").samples] == ["a"]
    with RunFolder.open(tmp_path / "r", record(), resume=True) as folder:
        assert folder.done == {"a"}
        folder.append(sample("b"))
    assert [s.id for s in read_run(tmp_path / "r").samples] == ["a", "b"]


def test_a_folder_is_never_overwritten_unasked(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "r", record()) as folder:
        folder.append(sample("a"))
    with pytest.raises(RunExists, match=r"--resume.*--force"):
        RunFolder.open(tmp_path / "r", record())
    with pytest.raises(UsageError, match="method: 'baseline' there, 'topv' asked"):
        RunFolder.open(tmp_path / "r", record(method="topv"), resume=True)
    with RunFolder.open(tmp_path / "r", record(method="topv"), force=True) as folder:
        assert folder.samples == []
    assert read_run(tmp_path / "r").samples == []
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    for force in (False, True):
        with pytest.raises(UsageError, match="not empty"):
            RunFolder.open(other, record(), force=force)
        with pytest.raises(UsageError, match="no folder"):
            RunFolder.open(other / "thesis.tex", record(), force=force)
    assert (other / "thesis.tex").exists()


def test_nothing_is_touched_before_a_folder_is_entered(tmp_path: Path) -> None:
    RunFolder.open(tmp_path / "new", record())
    assert not (tmp_path / "new").exists()
    with RunFolder.open(tmp_path / "r", record()) as folder:
        folder.append(sample("a"))
        folder.append(SampleRecord(id="b", status="failed", error="no"))
    before = {file.name: file.read_bytes() for file in (tmp_path / "r").iterdir()}
    RunFolder.open(tmp_path / "r", record(method="topv"), force=True)
    RunFolder.open(tmp_path / "r", record(), resume=True, retry_failed=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "r").iterdir()} == before


def test_two_writers_do_not_mix_their_lines(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "r", record()) as folder:
        folder.append(sample("a"))
        for how in ({"resume": True}, {"force": True}):
            other = RunFolder.open(tmp_path / "r", record(), **how)
            with pytest.raises(UsageError, match="another process is writing"), other:
                pass
    assert read_run(tmp_path / "r").samples == [sample("a")]
    with RunFolder.open(tmp_path / "r", record(), resume=True) as folder:
        folder.append(sample("b"))


def test_replacing_a_run_leaves_other_files(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "r", record()) as folder:
        folder.append(sample("a"))
    (tmp_path / "r" / "thesis.tex").write_text("years of work")
    with RunFolder.open(tmp_path / "r", record(), force=True):
        pass
    assert (tmp_path / "r" / "thesis.tex").exists()
    assert read_run(tmp_path / "r").samples == []


def test_failed_samples_are_retried_in_their_place(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "whole", record()) as folder:
        for name in "abcd":
            folder.append(sample(name))
    with RunFolder.open(tmp_path / "r", record()) as folder:
        folder.append(sample("a"))
        folder.append(SampleRecord(id="b", status="failed", error="no"))
        folder.append(sample("c"))
        folder.append(SampleRecord(id="d", status="oom", error="no"))
        folder.record.complete = True
        folder.save()
    with RunFolder.open(tmp_path / "r", record(), resume=True) as folder:
        assert folder.done == set("abcd")
    with RunFolder.open(tmp_path / "r", record(), resume=True, retry_failed=True) as folder:
        assert folder.done == {"a", "c"}
        there = read_run(tmp_path / "r")
        assert ([s.id for s in there.samples], there.record.complete) == (["a", "c"], False)
        folder.append(sample("b"))
        folder.arrange("abcd")
        folder.append(sample("d"))
    lines = [(tmp_path / name / "samples.jsonl").read_bytes() for name in ("r", "whole")]
    assert lines[0] == lines[1]


def test_broken_folders_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no run\.json"):
        read_run(tmp_path)
    with pytest.raises(DataError, match="holds no run"):
        find_runs([tmp_path])
    with RunFolder.open(tmp_path / "r", record()) as folder:
        folder.append(sample("a"))
    with (tmp_path / "r" / "samples.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(DataError, match=r"samples\.jsonl, line 2"):
        read_run(tmp_path / "r")
    data = json.loads((tmp_path / "r" / "run.json").read_text())
    (tmp_path / "r" / "run.json").write_text(json.dumps(data | {"schema": 99}))
    with pytest.raises(DataError, match="later memprof"):
        read_run(tmp_path / "r")


def test_shards_become_one_run(tmp_path: Path) -> None:
    for number, ids in ((2, "bdf"), (1, "aceg"), (3, "")):
        with RunFolder.open(tmp_path / f"baseline.{number}of3", record(shard=f"{number}/3")) as folder:
            for name in ids:
                folder.append(sample(name))
            folder.record.complete = True
            folder.save()
    with RunFolder.open(tmp_path / "topv", record(method="topv")):
        pass
    joined, other = find_runs([tmp_path])
    assert "".join(s.id for s in joined.samples) == "abcdefg"
    assert joined.record.spec.shard is None
    assert joined.record.complete
    assert other.record.spec.method == "topv"
    shutil.rmtree(tmp_path / "baseline.3of3")
    assert not find_runs([tmp_path])[0].record.complete


def shard(path: Path, which: str, ids: str) -> None:
    with RunFolder.open(path, record(shard=which)) as folder:
        for name in ids:
            folder.append(sample(name))
        folder.record.complete = True
        folder.save()


def test_shards_of_another_day_are_another_run(tmp_path: Path) -> None:
    for day, ids in (("monday", ("ac", "b")), ("tuesday", ("xz", "y"))):
        for number in (1, 2):
            shard(tmp_path / day / f"{number}of2", f"{number}/2", ids[number - 1])
    shard(tmp_path / "tuesday" / "3of4", "3/4", "q")
    monday, tuesday, stray = find_runs([tmp_path / "monday", tmp_path / "tuesday"])
    assert ["".join(s.id for s in run.samples) for run in (monday, tuesday, stray)] == ["abc", "xyz", "q"]
    assert (monday.record.complete, tuesday.record.complete, stray.record.complete) == (True, True, False)
    assert monday.path == str(tmp_path / "monday")


def test_a_shard_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    for name, which in (("a", "1/2"), ("b", "2/2"), ("c", "1/2")):
        shard(tmp_path / name, which, name)
    with pytest.raises(DataError, match=r"shard 1/2 of one run is in .*/a and in .*/c"):
        find_runs([tmp_path])
    found = find_runs([tmp_path / "a", tmp_path / "b", tmp_path / "b"])  # named twice is not there twice
    assert [s.id for s in found[0].samples] == ["a", "b"]


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of one sample."""
    with RunFolder.open(tmp_path / "r", record()) as made:
        made.append(sample("a"))
    return tmp_path / "r"


def without(file: Path, *keys: str) -> str:
    data = json.loads(file.read_text())
    inner = data
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    return json.dumps(data) + "\n"


def but(file: Path, value: object, *keys: str) -> str:
    data = json.loads(file.read_text())
    inner = data
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return json.dumps(data) + "\n"


DAMAGE = {
    "run.json": {
        "a list": lambda _: "[]", "nothing": lambda _: "", "empty": lambda _: "{}", "a number": lambda _: "7",
        "bad bytes": lambda _: b"\xff\xfe{", "half": lambda f: f.read_text()[:40],
        "no spec": lambda f: without(f, "spec"), "no model": lambda f: without(f, "spec", "model"),
        "a spec that is none": lambda f: but(f, [], "spec"), "words for bytes": lambda f: but(f, "x", "static_bytes"),
        "a status there is not": lambda f: but(f, "guessed", "status"),
        "words for a schema": lambda f: but(f, "x", "schema"), "very deep": lambda _: "[" * 100_000,
    },
    "samples.jsonl": {
        "a list": lambda _: "[]\n", "bad bytes": lambda _: b"\xff\xfe\n", "no id": lambda f: without(f, "id"),
        "tokens that are none": lambda f: but(f, [1], "tokens"), "words in a column":
        lambda f: but(f, ["x"], "tokens", "peak_allocated_bytes"), "a holder that is none":
        lambda f: but(f, [3], "peak_holders"), "half a number": lambda f: but(f, 1.5, "dynamic_peak_bytes"),
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kinds in DAMAGE.items() for kind in kinds])
def test_what_is_damaged_is_refused_in_one_line(name: str, kind: str, folder: Path) -> None:
    made = DAMAGE[name][kind](folder / name)
    (folder / name).write_bytes(made if isinstance(made, bytes) else made.encode())
    with pytest.raises(DataError) as raised:
        read_run(folder)
    assert str(folder / name) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_another_process_wrote_in_between_is_not_lost(tmp_path: Path) -> None:
    mine = RunFolder.open(tmp_path / "r", record())
    with RunFolder.open(tmp_path / "r", record()) as theirs:
        theirs.append(sample("a"))
    with pytest.raises(UsageError, match="in between"), mine:
        pass
    assert [s.id for s in read_run(tmp_path / "r").samples] == ["a"]
    with RunFolder.open(tmp_path / "r", record(), resume=True) as free:
        assert free.done == {"a"}


def test_columns_that_a_record_lacks_are_unknown_or_damage() -> None:
    """What no driver was asked and no clock timed is not known; bytes that are missing are no record."""
    whole = SampleRecord(id="a", tokens=TokenColumns([3, 2], [2, 2], [4, 4], [1, 1], [5, 5], [0.1, 0.1])).to_json()
    for name in ("device_used_bytes", "seconds"):
        without = {**whole, "tokens": {key: value for key, value in whole["tokens"].items() if key != name}}
        read = SampleRecord.from_json(without)
        read.check()
        assert getattr(read.tokens, name) == [None, None]
    for name in ("allocated_bytes", "reserved_bytes", "kv_bytes"):
        without = {**whole, "tokens": {key: value for key, value in whole["tokens"].items() if key != name}}
        with pytest.raises(ValueError, match=rf"tokens.{name} has 0 entries"):
            SampleRecord.from_json(without).check()
