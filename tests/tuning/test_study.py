from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from stub import GIB, Stub, question

from memprof.errors import DoesNotFit, UsageError
from memprof.tuning import Question, Result, Trial, answer
from memprof.tuning.study import Session, open_storage

HERE = Path(__file__).parent


def content(rows: list[Trial]) -> list[dict[str, Any]]:
    return [row.to_json() for row in rows]


def test_one_number_is_closed_in_on() -> None:
    stub = Stub()
    asked = question("topv")
    rows = Session(asked).work(stub, 20)
    best = answer.best_of(asked, rows)
    assert best is not None
    assert len(rows) == len(stub.calls) <= 10
    keep = best.params["keep"]
    assert best.fits
    budget = asked.budget_bytes or 0
    assert Stub()(f"topv:keep={keep}", "").peak_allocated_bytes <= budget
    assert Stub()(f"topv:keep={keep * 1.005},layer=2", "").peak_allocated_bytes > budget
    front = answer.front_of(asked, rows)
    assert best in front
    peaks = [t.result.peak_allocated_bytes for t in front if t.result]
    assert peaks == sorted(peaks)


def test_an_impossible_budget_names_the_floor_and_its_holder() -> None:
    asked = question("topv", budget_bytes=int(4.1 * GIB))
    rows = Session(asked).work(Stub(), 20)
    assert answer.best_of(asked, rows) is None
    error = answer.nothing_found(asked, rows, 4 * GIB, "GiB")
    assert isinstance(error, DoesNotFit)
    assert "keep=0.02" in str(error)
    assert "floor is 4.378 GiB" in str(error)
    assert "fp32 logits" in str(error)
    assert "4.000 GiB are weights" in str(error)
    assert "weights alone" in str(answer.nothing_found(question("topv", budget_bytes=GIB), rows, 4 * GIB, "GiB"))


def test_several_methods_are_compared_at_one_budget() -> None:
    asked = question("topv", "fastv", "baseline")
    rows = Session(asked).work(Stub(), 40)
    best = answer.best_by_method(asked, rows)
    assert best["baseline"] is None  # it does not fit, and was tried once
    assert Counter(t.method.partition(":")[0] for t in rows)["baseline"] == 1
    topv, fastv = best["topv"], best["fastv"]
    assert topv is not None
    assert fastv is not None
    assert topv.params["keep"] > fastv.params["keep"]
    assert answer.best_of(asked, rows) == topv


def test_several_fields_are_sampled_and_the_seed_decides() -> None:
    asked = question("topv", "random", search=("keep", "layer"))
    rows = Session(asked).work(Stub(), 16)
    assert len(rows) == 16
    assert Counter(t.method.partition(":")[0] for t in rows) == {"topv": 8, "random": 8}  # turns are equal
    assert content(Session(asked).work(Stub(), 16)) == content(rows)
    other = question("topv", "random", search=("keep", "layer"), seed=1)
    assert content(Session(other).work(Stub(), 16)) != content(rows)
    fields = {(row["method"], row["field"]) for row in answer.sensitivity(asked, rows)}
    assert ("topv", "keep") in fields
    assert all(0 <= row["share"] <= 1 + 1e-9 for row in answer.sensitivity(asked, rows))


def test_choices_that_come_again_are_not_evaluated_again() -> None:
    asked, stub = question("topv", search=("features", "score")), Stub()
    rows = Session(asked).work(stub, 12)
    assert len(rows) == 12
    assert len(stub.calls) == len(set(stub.calls)) <= 6


@pytest.mark.parametrize("changes", [{}, {"search": ("keep", "layer")}])
def test_a_cut_session_goes_on_to_the_same_study(tmp_path: Path, changes: dict[str, Any]) -> None:
    asked = question("topv", **changes)
    whole = Session(asked).work(Stub(), 8)
    storage = f"journal://{tmp_path}/study.journal"
    Session(asked, open_storage(storage)).work(Stub(), 3)
    stub = Stub()
    again = Session(asked, open_storage(storage)).work(stub, 8)
    assert content(again) == content(whole)
    assert len(stub.calls) == len(whole) - 3


def test_out_of_memory_and_failure_are_rows(tmp_path: Path) -> None:
    stub = Stub()

    def evaluate(method: str, name: str) -> Result:
        found = stub(method, name)
        if found.kept_share > 0.6:
            return Result("oom", found.peak_allocated_bytes, kept_share=found.kept_share, error="CUDA out of memory")
        if len(stub.calls) == 3:
            return Result("failed", error="the driver went away")
        return found

    asked = question("topv", search=("keep", "layer"))
    session = Session(asked, open_storage(f"journal://{tmp_path}/s"))
    rows = session.work(evaluate, 10)
    assert len(rows) == 10
    states = Counter(row.result.status for row in rows if row.result)
    assert states["oom"] >= 1
    assert states["failed"] == 1
    for trial in session.study.trials:
        if trial.user_attrs.get("status") == "oom":
            assert trial.constraints["memory"] > 0
    best = answer.best_of(asked, rows)
    assert best is not None
    assert best.result is not None
    assert best.result.kept_share <= 0.6


@pytest.mark.parametrize("broken", [{1}, {2}, {3}, {1, 2, 3, 4}, set(range(1, 99))])
def test_a_bisection_goes_on_around_a_failure_and_ends(broken: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    stub = Stub()
    monkeypatch.setattr(Session, "_drop", lambda *_: pytest.fail("a worker alone tries nothing twice"))

    def evaluate(method: str, name: str) -> Result:
        found = stub(method, name)
        return Result("failed", error="the driver went away") if len(stub.calls) in broken else found

    asked = question("topv", "baseline")
    rows = Session(asked).work(evaluate, 40)
    assert len(rows) == len(stub.calls) == len(set(stub.calls)) <= 11
    assert sum(row.result.status == "failed" for row in rows if row.result) == min(len(broken), len(rows))
    best = answer.best_of(asked, rows)
    if len(broken) > 9:
        assert best is None
        assert str(answer.nothing_found(asked, rows, 4 * GIB, "GiB")).endswith("the driver went away")
    else:
        assert best is not None
        assert best.params["keep"] == pytest.approx(0.3435, rel=0.01)  # as where nothing fails


def test_a_failure_does_not_pass_for_a_setting_that_fits() -> None:
    stub = Stub()

    def evaluate(method: str, name: str) -> Result:
        found = stub(method, name)
        return Result("failed", error="the driver went away") if len(stub.calls) == 2 else found

    asked = question("topv", budget_bytes=int(4.1 * GIB))
    rows = Session(asked).work(evaluate, 20)
    assert [row.fits for row in rows if row.result and row.result.status == "failed"] == [None]
    assert "the floor is 4.378 GiB" in str(answer.nothing_found(asked, rows, 4 * GIB, "GiB"))


def test_another_question_is_not_mixed_in(tmp_path: Path) -> None:
    storage = f"journal://{tmp_path}/s"
    Session(question("topv"), open_storage(storage), "one").work(Stub(), 2)
    with pytest.raises(UsageError, match="budget_bytes"):
        Session(question("topv", budget_bytes=6 * GIB), open_storage(storage), "one")


def workers(storage: str, count: int = 3) -> list[subprocess.Popen[str]]:
    words = [sys.executable, "-W", "error", str(HERE / "worker.py"), storage]
    return [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(count)]


def one_is_killed(storage: str, asked: Question, trials: int) -> None:
    """Three workers, one killed with -9 in the middle of a trial: nothing is lost, nothing ends twice."""
    crew = workers(storage)
    try:
        session = None
        deadline = time.monotonic() + 120
        victim = crew[0]
        while time.monotonic() < deadline:
            time.sleep(0.2)
            if session is None:
                session = Session(asked, open_storage(storage))
            busy = [row for row in session.trials() if row.result is None and row.worker.endswith(f":{victim.pid}")]
            if busy:
                break
            if victim.poll() is not None:
                pytest.fail(f"the first worker ended: {victim.communicate()[1]}")
        else:
            pytest.fail("the first worker never began")
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        for one in crew[1:]:
            _, err = one.communicate(timeout=120)
            assert one.returncode == 0, err
    finally:
        for one in crew:
            one.kill()
            one.communicate()
    assert session is not None
    rows = session.trials()
    assert len(rows) == trials
    assert all(row.result is not None and row.whole for row in rows)
    all_trials = session.study.trials
    given_up = [t for t in all_trials if t.user_attrs.get("worker", "").endswith(f":{victim.pid}") and not t.values]
    taken_up = {t.user_attrs["taken_up_from"]: t for t in all_trials if "taken_up_from" in t.user_attrs}
    assert given_up
    for trial in given_up:
        if trial.params and "method" in trial.user_attrs:
            assert taken_up[trial.number].params == trial.params
            assert taken_up[trial.number].values is not None or taken_up[trial.number].user_attrs.get("dropped")
    assert len(taken_up) == len({t.number for t in taken_up.values()})


def test_three_workers_on_one_journal_one_of_them_killed(tmp_path: Path) -> None:
    one_is_killed(f"journal://{tmp_path}/study.journal", question("topv", search=("keep", "layer")), 12)


def test_three_workers_on_one_postgresql_one_of_them_killed(postgresql: str) -> None:
    one_is_killed(postgresql, question("topv", search=("keep", "layer")), 12)


def test_storages_that_are_none() -> None:
    with pytest.raises(UsageError, match="journal:///"):
        open_storage("study.db")
