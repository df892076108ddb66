"""Every key of ``run.json`` damaged in every way: one line on reading, or an answer in every format."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest

sys.path.insert(0, str(Path(__file__).parent / "figures"))

from synthetic import make_run, write_runs

from memprof import reports
from memprof.analysis.diff import diff
from memprof.cli.diff import _markdown
from memprof.cli.runs import _row, _show
from memprof.errors import DataError
from memprof.records import Environment, RunRecord, Totals, summarize
from memprof.store import find_runs, read_run
from memprof.telling.facts import file_stems, groups

WRONG: tuple[Any, ...] = (5, -1, 1.5, 1e308, None, [], {}, [1], {"a": 1}, True, "a\x1b[31m\ud800")
GONE = object()
OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f]")
ATTENTION = {"asked": "sdpa", "got": "sdpa"}


def document() -> dict[str, Any]:
    """A whole ``run.json``: every key that a record, a spec, an environment or totals may have."""
    run = make_run("topv:keep=0.5,layer=2", samples=2, tokens=2)
    run.record.totals, run.record.samples_asked = summarize(run), 2
    known = {"packages": {"torch": "2"}, "allocator_settings": {}, "attention": ATTENTION}
    for name, hint in get_type_hints(Environment).items():
        run.record.environment[name] = known.get(name, 5 if hint == int | None else "x")
    return run.record.to_json()


def damaged() -> Iterator[tuple[str, dict[str, Any]]]:
    whole = document()
    for section in (None, "spec", "environment", "totals"):
        for key in get_type_hints(Totals) if section == "totals" else whole[section] if section else whole:
            for value in (*WRONG, GONE):
                one = copy.deepcopy(whole)
                there = one[section] if section else one
                if value is GONE:
                    del there[key]
                else:
                    there[key] = value
                yield f"{section}.{key} is {value!r}", one


def refusal(folder: Path) -> str | None:
    """What is said instead of reading the run; None where it is read."""
    try:
        read_run(folder)
    except DataError as error:
        return str(error)
    return None


def show(folder: Path) -> None:
    runs = find_runs([folder.parent])
    for name in reports.names():
        seen = reports.render(name, runs)
        assert not OBEYED.search(seen), f"{name} holds control characters"
    for group in groups(runs):
        file_stems([group])


def test_every_key_damaged_in_every_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What reading lets pass, no format, comparison, figure's name or list of runs stumbles over."""
    (bad,) = write_runs(tmp_path / "bad", [make_run("topv:keep=0.5,layer=2", samples=2, tokens=2)])
    (good,) = write_runs(tmp_path / "good", [make_run(samples=2, tokens=2)])
    whole, read, refused = read_run(good), 0, 0
    for what, one in damaged():
        (bad / "run.json").write_text(json.dumps(one))
        try:
            said = refusal(bad)
            if said is None:
                read += 1
                show(bad)
                assert "\x1b" not in _markdown([diff(read_run(bad), whole)], [], None, [], None)
                _show(_row(bad.parent), None)
                continue
        except Exception as error:
            raise AssertionError(what) from error
        refused += 1
        assert "\n" not in said, what
        assert "damaged" in said or "later memprof" in said, what
        assert "error" in _row(bad.parent), what
    assert "\x1b" not in capsys.readouterr().out
    assert min(read, refused) > 100


@pytest.mark.parametrize(("section", "key", "value"), [
    ("spec", "shard", "ok"), ("spec", "shard", "0/2"), ("spec", "shard", "3/2"), ("spec", "method", "topv:keep"),
    ("environment", "packages", "torch"), ("environment", "packages", None), ("environment", "packages", ["torch"]),
    ("environment", "gpu_context_bytes", "1"), ("environment", "gpu_context_bytes", [1]),
    ("environment", "gpu_context_bytes", -1), ("totals", "peak_allocated_bytes", "5"), (None, "static_bytes", -1),
])  # fmt: skip
def test_what_would_stumble_later_is_refused_on_reading(section: str | None, key: str, value: Any) -> None:
    one = document()
    (one[section] if section else one)[key] = value
    with pytest.raises(ValueError, match=key):
        RunRecord.from_json(one)


def test_what_later_versions_add_is_left_alone() -> None:
    one = document()
    for section in (one, one["spec"], one["environment"], one["totals"]):
        section["of_a_later_version"] = {"any": ["thing"]}
    assert RunRecord.from_json(one).environment["of_a_later_version"] == {"any": ["thing"]}
    assert set(get_type_hints(Totals)) <= set(one["totals"])
