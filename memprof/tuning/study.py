"""The trials of a session, in an Optuna study: shared by workers, taken up again after a kill.

Optuna is the queue, the store and the sampler. What is added here: trial n of a study is drawn from the seed and n
alone, so that a session that was cut gives the same study as an unbroken one; and whoever still works takes up trials
that a killed worker left behind.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import socket
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, cast

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from memprof.bracket import next_value
from memprof.errors import MemprofError, UsageError
from memprof.tuning import Evaluate, Question, Result, Trial
from memprof.tuning.space import Field, with_values
from memprof.units import MIB

#: A worker says that it lives every so many seconds, and counts as dead after that many without a word.
BEAT_SECONDS, GRACE_SECONDS = 10.0, 60.0
#: How long a worker that waits for others waits before it looks again.
POLL_SECONDS = 0.5
_DONE = (TrialState.COMPLETE, TrialState.PRUNED)
_LIVE = (TrialState.RUNNING, TrialState.WAITING)


def open_storage(url: str) -> Any:
    """The Optuna storage at ``url``: ``journal:///path/file`` for one machine or a shared disk, else a database's URL.

    Raises:
        MemprofError: The database cannot be reached, or its driver is not installed.
    """
    if url.startswith("journal://"):
        path = url.removeprefix("journal://")
        try:
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
            return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(path))
        except OSError as error:
            raise MemprofError(f"cannot open {path}: {error.strerror or error}") from None
    if "://" not in url:
        raise UsageError(f"{url!r} is no storage URL; write journal:///path/file or postgresql://user@host/database")
    kind = url.partition("://")[0]
    if kind == "postgresql" and find_spec("psycopg") is None and find_spec("psycopg2") is not None:
        url = url.replace("postgresql://", "postgresql+psycopg2://", 1)  # SQLAlchemy 2.1 looks for psycopg alone
    for again in (True, True, False):
        try:
            return optuna.storages.RDBStorage(url)
        except ImportError:
            drivers = {"postgresql": "psycopg2-binary", "mysql": "pymysql"}
            hint = f": pip install {drivers[kind]}" if kind in drivers else ""
            raise MemprofError(f"a storage at {kind}:// needs SQLAlchemy and a driver{hint}") from None
        except Exception as error:  # the driver's own errors
            if not again:  # workers that start together may all try to make the tables
                raise MemprofError(f"cannot open the storage: {str(error).strip().partition(chr(10))[0]}") from None
            time.sleep(random.random())
    raise AssertionError


def study_name(question: Question) -> str:
    """A name that questions share only if they are equal, so that workers asked alike find one another."""
    text = json.dumps(question.to_json(), sort_keys=True)
    return f"{question.spec.model}_{question.spec.task}_{zlib.crc32(text.encode()):08x}"


class Session:
    """One worker of a study.

    Args:
        question: What is asked.
        storage: An Optuna storage, or None for one in memory.
        name: The study's name in the storage.
        grace: Seconds without a word after which another machine's worker counts as dead.

    Raises:
        UsageError: The study there was asked something else.
    """

    def __init__(
        self, question: Question, storage: Any = None, name: str = "memprof", *, grace: float = GRACE_SECONDS
    ) -> None:
        self.question, self.grace = question, grace
        self.worker = f"{_host()}:{os.getpid()}"
        self._heard: dict[int, tuple[Any, float]] = {}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.study = optuna.create_study(
            study_name=name, storage=storage, load_if_exists=True, directions=["minimize", "minimize"],
            sampler=_Bisection(question) if question.bisects else _Sampling(question),
        )  # fmt: skip
        asked = json.loads(json.dumps(question.to_json()))
        there = self.study.user_attrs.get("question")
        if there is None:
            self._begin(asked)
        elif there != asked:
            changed = [k for k in asked if there.get(k) != asked[k]]
            raise UsageError(f"study {name!r} was asked something else ({', '.join(changed)}); use another --study")

    def _begin(self, asked: Mapping[str, Any]) -> None:
        """Say what the study is for; a sampled one starts from each method's floor and from its defaults."""
        self.study.set_user_attr("question", asked)
        names = ["peak_allocated_bytes", "flops_left", "seconds"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # experimental for years
            cost = names[("memory", "flops", "time").index(self.question.objective)]
            self.study.set_metric_names([cost, "loss" if self.question.quality else "share_pruned"])
        if self.question.bisects:
            return
        for method, fields in self.question.fields.items():
            for start in ("floor", "default"):
                values = {_key(self.question, method, f.name): getattr(f, start) for f in fields}
                self.study.enqueue_trial(self._method_param(method) | values, skip_if_exists=True)

    def work(self, evaluate: Evaluate, trials: int, tell: Callable[[list[Trial]], None] | None = None) -> list[Trial]:
        """Evaluate settings, with whoever else works, until the study holds ``trials`` or nothing is left to try.

        Args:
            evaluate: Predicts or measures one setting.
            trials: Trials that the study is to hold in all.
            tell: Called with all trials whenever one begins or ends.
        """
        while True:
            self._take_up()
            states = [t.state for t in self._trials()]
            room = sum(s in (*_DONE, *_LIVE) for s in states) + self._failures() < trials
            if TrialState.WAITING in states or (room and not self._all_known()):
                self._one(evaluate, trials, tell)
            elif TrialState.RUNNING in states:
                time.sleep(POLL_SECONDS)  # others still work; should one die, its trial is ours
            else:
                return self.trials()

    def trials(self) -> list[Trial]:
        """Every trial that counts, in the order in which they began."""
        counts = (*_DONE, TrialState.RUNNING)
        return [_row(self.question, t) for t in self._trials() if t.state in counts or _failed(t)]

    def _trials(self) -> list[FrozenTrial]:
        return cast(list[FrozenTrial], self.study.get_trials(deepcopy=False))

    def _failures(self) -> int:
        return sum(map(_failed, self._trials()))

    def _all_known(self) -> bool:
        sampler = self.study.sampler
        return isinstance(sampler, _Bisection) and sampler.choose(self._trials()) is None

    def _one(self, evaluate: Evaluate, trials: int, tell: Callable[[list[Trial]], None] | None) -> None:
        """Ask for one setting, evaluate it, write it down."""
        trial = self.study.ask()
        trial.set_user_attr("worker", self.worker)
        try:
            method, _ = self._suggest(trial)
        except _NothingLeft:
            self._drop(trial, "nothing was left to try")
            return
        mine = [t for t in self._trials() if t.number < trial.number and (t.state in (*_DONE, *_LIVE) or _failed(t))]
        if len(mine) >= trials:
            self._drop(trial, "another worker had the last trial")
            return
        twins = [t for t in mine if t.user_attrs.get("method") == method]
        if twins and self.question.bisects:
            self._drop(trial, "another worker tries it")
            return
        trial.set_user_attr("method", method)
        name = trial.user_attrs.get("folder") or f"{trial.number:04d}_{method.replace(':', '_').replace(',', '_')}"
        trial.set_user_attr("folder", name)
        if tell is not None:
            tell(self.trials())
        known = next((_result_of(t) for t in twins if t.state in _DONE), None)
        with self._alive(trial):
            result = known or evaluate(method, name)
        self._write(trial, result)
        if tell is not None:
            tell(self.trials())

    def _suggest(self, trial: Any) -> tuple[str, dict[str, Any]]:
        methods = self.question.methods
        given = methods[0] if len(methods) == 1 else trial.suggest_categorical("method", methods)
        params = {}
        for field in self.question.fields[given]:
            key = _key(self.question, given, field.name)
            params[field.name] = field.tidy(_draw(trial, key, field))
        return with_values(given, params), params

    def _method_param(self, method: str) -> dict[str, str]:
        return {"method": method} if len(self.question.methods) > 1 else {}

    def _write(self, trial: Any, result: Result) -> None:
        """Write down a result; what was over the budget, or out of memory, as a violated constraint."""
        question = self.question
        for key, value in dataclasses.asdict(result).items():
            trial.set_user_attr(key, value)
        over = _over(question, result)
        values = None
        try:
            if over is not None:
                trial.set_constraint("memory", over / (question.budget_bytes or MIB))
            if question.max_loss is not None and result.loss is not None:
                trial.set_constraint("loss", result.loss - question.max_loss)
            if result.status in ("predicted", "measured"):
                values = [result.cost(question.objective), result.forgone]
            state = TrialState.FAIL if result.status == "failed" else TrialState.PRUNED
            self.study.tell(trial, values, TrialState.COMPLETE if values else state)
        except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
            pass  # we were taken for dead, and the trial was given to another worker: it counts once, as theirs

    def _drop(self, trial: Any, why: str) -> None:
        """Give a trial back that was not evaluated."""
        trial.set_user_attr("dropped", why)
        self.study.tell(trial, state=TrialState.FAIL)

    @contextmanager
    def _alive(self, trial: Any) -> Iterator[None]:
        """Say every few seconds that this worker lives, as long as it evaluates."""
        over = threading.Event()

        def beat() -> None:
            count = 0
            while not over.wait(min(BEAT_SECONDS, self.grace / 3)):
                count += 1
                try:
                    trial.set_user_attr("beat", count)
                except Exception:  # taken over, or a storage out of reach for a moment: the evaluation goes on
                    continue

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _take_up(self) -> None:
        """Put trials of dead workers back in the queue. The storage lets one worker alone end a trial."""
        for trial in self._trials():
            if trial.state == TrialState.RUNNING and self._dead(trial):
                try:
                    self.study.tell(trial.number, state=TrialState.FAIL)
                except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
                    continue
                kept = {"folder": trial.user_attrs["folder"]} if "folder" in trial.user_attrs else {}
                if trial.params:
                    self.study.enqueue_trial(trial.params, user_attrs={**kept, "taken_up_from": trial.number})

    def _dead(self, trial: FrozenTrial) -> bool:
        """Whether a running trial's worker is gone: by its process on this machine, by its silence elsewhere."""
        host, _, pid = str(trial.user_attrs.get("worker", "")).rpartition(":")
        if host == _host() and pid.isdigit():
            return int(pid) != os.getpid() and not _runs(int(pid))
        beat, now = trial.user_attrs.get("beat"), time.monotonic()
        heard, since = self._heard.setdefault(trial.number, (beat, now))
        if heard != beat:
            self._heard[trial.number] = (beat, now)
            return False
        return now - since > self.grace


class _NothingLeft(Exception):
    """A search over one number has come to its end."""


class _Bisection(BaseSampler):  # type: ignore[misc]
    """Closes in on the largest value of each method's one number that fits."""

    def __init__(self, question: Question) -> None:
        self.question = question

    def infer_relative_search_space(self, study: Any, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Nothing is drawn together."""
        return {}

    def sample_relative(
        self, study: Any, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Nothing is drawn together."""
        return {}

    def sample_independent(self, study: Any, trial: FrozenTrial, name: str, distribution: BaseDistribution) -> Any:
        """The method with most to learn, then its value."""
        others = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
        if name == "method":
            chosen = self.choose(others)
            if chosen is None:
                raise _NothingLeft
            return chosen[0]
        method = trial.params.get("method", self.question.methods[0])
        value = self.next_of(method, others)
        if value is None:
            raise _NothingLeft
        return value

    def choose(self, trials: Sequence[FrozenTrial]) -> tuple[str, float | None] | None:
        """Of the methods that are not known yet the one evaluated least, and its next value; None at the end."""
        open_ = [
            (len(self._seen(method, trials)) + sum(map(_failed, self._of(method, trials))), method, value)
            for method, fields in self.question.fields.items()
            if (value := self.next_of(method, trials)) is not None or (not fields and not self._tried(method, trials))
        ]
        return min(open_, key=lambda o: o[0])[1:] if open_ else None

    def next_of(self, method: str, trials: Sequence[FrozenTrial]) -> float | None:
        """The value of ``method``'s number to evaluate next."""
        fields = self.question.fields[method]
        if not fields:
            return None
        field, key = fields[0], _key(self.question, method, fields[0].name)
        mine = [t for t in self._of(method, trials) if key in t.params]
        # What failed says nothing of memory, and would fail again: as what others evaluate, it is not to be tried.
        busy = [field.tidy(t.params[key]) for t in mine if t.state in _LIVE or _failed(t)]
        return next_value(self._seen(method, trials), field.low, field.high, step=field.step, busy=busy)

    def _seen(self, method: str, trials: Sequence[FrozenTrial]) -> list[tuple[float, float]]:
        field = next(iter(self.question.fields[method]), None)
        key = _key(self.question, method, field.name) if field else ""
        done = [t for t in self._of(method, trials) if t.state in _DONE]
        done.sort(key=lambda t: t.datetime_complete or t.datetime_start)
        return [
            (field.tidy(t.params[key]) if field else 0.0, _over(self.question, _result_of(t)) or 0.0)
            for t in done
            if not field or key in t.params
        ]

    def _of(self, method: str, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        if len(self.question.methods) == 1:
            return list(trials)
        return [t for t in trials if t.params.get("method") == method]

    def _tried(self, method: str, trials: Sequence[FrozenTrial]) -> bool:
        return any(t.state in (*_DONE, *_LIVE) or _failed(t) for t in self._of(method, trials))


class _Sampling(BaseSampler):  # type: ignore[misc]
    """TPE, seeded anew for each trial by its number; methods take turns, so that all of them get equal trials."""

    def __init__(self, question: Question) -> None:
        self.question = question

    def infer_relative_search_space(self, study: Any, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """What TPE draws together, the method left out."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seed = random.Random(f"{self.question.spec.seed}/{trial.number}").getrandbits(32)
            self._tpe = TPESampler(seed=seed)
        space = self._tpe.infer_relative_search_space(study, trial)
        return {name: distribution for name, distribution in space.items() if name != "method"}

    def sample_relative(
        self, study: Any, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """TPE's draw."""
        return cast(dict[str, Any], self._tpe.sample_relative(study, trial, search_space))

    def sample_independent(self, study: Any, trial: FrozenTrial, name: str, distribution: BaseDistribution) -> Any:
        """The method whose turn it is, else TPE's draw."""
        if name == "method":
            return self.question.methods[trial.number % len(self.question.methods)]
        return self._tpe.sample_independent(study, trial, name, distribution)


def _host() -> str:
    """This machine, and the space in which its process numbers hold."""
    try:
        return f"{socket.gethostname()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:  # what was killed and not yet waited for is still in the table
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return True


def _key(question: Question, method: str, field: str) -> str:
    """A parameter's name in the study: the field's own, and before it the method's where there are several."""
    return field if len(question.methods) == 1 else f"{method}.{field}"


def _draw(trial: Any, key: str, field: Field) -> Any:
    if field.choices is not None:
        return trial.suggest_categorical(key, field.choices)
    if field.step == 1:
        return trial.suggest_int(key, int(field.low), int(field.high))
    return trial.suggest_float(key, field.low, field.high)


def _over(question: Question, result: Result) -> float | None:
    """Bytes above the budget; None without one, and for what failed and says nothing of memory.

    Above 0 in any case for what ran out of memory or was not launched.
    """
    if result.status in ("oom", "not launched"):
        return float(max(result.peak_allocated_bytes - (question.budget_bytes or 0), MIB))
    if question.budget_bytes is None or result.status == "failed":
        return None
    return float(result.peak_allocated_bytes - question.budget_bytes)


def _failed(trial: FrozenTrial) -> bool:
    """Whether a trial was evaluated and failed, rather than given back."""
    return bool(trial.state == TrialState.FAIL and trial.user_attrs.get("status") == "failed")


def _result_of(trial: FrozenTrial) -> Result:
    names = {field.name for field in dataclasses.fields(Result)}
    return Result(**{k: v for k, v in trial.user_attrs.items() if k in names})


def _row(question: Question, trial: FrozenTrial) -> Trial:
    method = trial.params.get("method", question.methods[0])
    params = {
        f.name: f.tidy(trial.params[key])
        for f in question.fields[method]
        if (key := _key(question, method, f.name)) in trial.params
    }
    result = _result_of(trial) if trial.state != TrialState.RUNNING else None
    over = _over(question, result) if result is not None else None
    within = (
        None if question.max_loss is None or result is None or result.loss is None else result.loss <= question.max_loss
    )
    spec, fits = trial.user_attrs.get("method", method), None if over is None else over <= 0
    return Trial(trial.number, spec, params, fits, within, result, trial.user_attrs.get("worker", ""))
