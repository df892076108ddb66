"""What a test takes, and what it is held to."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from memprof.allowance import Allowance
from memprof.errors import BadValue, DoesNotFit, MemprofError, UnknownName, UsageError
from memprof.execution import Execution
from memprof.records import PARTS, Run
from memprof.script import on_import
from memprof.testing.baselines import WHOLES, Baselines, Taken, key_of
from memprof.testing.words import Verdict, grown, text_of
from memprof.units import parse_size

if TYPE_CHECKING:
    from memprof.profiles import Profile

#: Of a prediction that says nothing of its prompt, where the model sees: one picture of this size.
PICTURE = (1600, 1200)
#: What says of either mark what it holds to what.
_HELD = ("limit", "part", "tolerance")
#: What ``memory_prediction`` takes for itself; the rest is :func:`memprof.predict`'s.
_OWN = ("model", "card", "fits", *_HELD)


@dataclass
class Session:
    """What all tests of a session share.

    Attributes:
        baselines: Where they are.
        tolerance: What a baseline may be exceeded by, unless a mark says otherwise.
        update: Whether baselines are written instead of held to.
        written: How many were written, by file.
    """

    baselines: Baselines
    tolerance: Allowance
    update: bool
    written: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, config: pytest.Config) -> Session:
        """As the command line and the ini-file have it."""
        asked = config.getoption("--memprof-baselines")
        folder = Path(asked) if asked else config.rootpath / config.getini("memprof_baselines")
        tolerance = Allowance.of(*config.getini("memprof_tolerance"))
        return cls(Baselines(folder), tolerance, config.getoption("--memprof-update"))


class Watched:
    """The fixture ``memory_profile``: what the ``generate()`` calls of one test took so far.

    ::

        def test_answer(model, inputs, memory_profile):
            model.generate(**inputs, max_new_tokens=16)
            assert memory_profile.parts["kv_cache"] < 100 * 2**20

    Everything that :class:`memprof.Profile` has, :attr:`run` has, and so has the fixture itself: ``peak``, ``tokens``,
    ``parts``, ``table()``, ``explain()``, ``save(DIR)``.

    Attributes:
        predictions: What the marks ``memory_prediction`` predicted, in their order from the test outwards.
    """

    def __init__(self, item: pytest.Item, session: Session) -> None:
        self._item, self._session = item, session
        self._execution = Execution(f"{item.nodeid}, its calls of generate()")
        self.predictions: list[Profile] = []
        self._limits: list[dict[str, Any]] = []
        self._marks: list[tuple[dict[str, Any], Profile]] = []

    # -- what the fixture gives ----------------------------------------------------------------------------------------

    @property
    def runs(self) -> list[Profile]:
        """A profile of each model that generated."""
        from memprof.profiles import Profile

        return [Profile.of(run) for run in self._execution.runs]

    @property
    def run(self) -> Profile:
        """The profile of the one model that generated.

        Raises:
            UsageError: None did, or several, or a call could not be profiled.
        """
        self._check_all_counted()
        found = self.runs
        if len(found) != 1:
            several = ", ".join(run.record.spec.model for run in found)
            raise UsageError(f"several models generated, take memory_profile.runs: {several}" if found else NOTHING)
        return found[0]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.run, name)

    # -- what the plug-in does -----------------------------------------------------------------------------------------

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, every ``generate()`` is profiled."""
        over = on_import(self._execution.waiting())
        try:
            yield
        finally:
            over()
            self._execution.catch.undo()

    @contextmanager
    def told(self) -> Iterator[None]:
        """Fail the test in plain words, without a traceback of memprof, where memprof refuses something."""
        try:
            yield
        except MemprofError as error:
            raise pytest.fail.Exception(f"{self._item.nodeid}: {error}", pytrace=False) from None

    def prepare(self) -> None:
        """Read the marks, before anything runs; make the predictions that they ask for, and hold them to their card."""
        self._limits = [_asked(mark, set(_HELD)) for mark in self._item.iter_markers("gpu_memory")]
        asks = [_asked(mark, {*_OWN, *_PROMPT}) for mark in self._item.iter_markers("memory_prediction")]
        for asked in asks:
            found, refused = self._predicted(asked)
            fits = asked.get("fits")
            if fits is True and refused is not None:
                raise UsageError(f"predicted not to fit on {asked.get('card')}: {refused}")
            if fits is False and refused is None:
                assert found is not None
                peak = text_of(Taken.of(found, found.samples[0]).peak)
                raise UsageError(f"predicted to fit on {asked.get('card')}, with {peak} at its highest")
            if found is not None and refused is None:
                self.predictions.append(found)
                self._marks.append((asked, found))

    def _predicted(self, asked: Mapping[str, Any]) -> tuple[Profile | None, str | None]:
        """The prediction, and why the card would not hold it, or None."""
        import memprof

        if asked.get("fits") is not None and asked.get("card") is None:
            raise UsageError("memory_prediction(fits=...) says nothing without card=...")
        prompt = {name: value for name, value in asked.items() if name in _PROMPT}
        model = asked.get("model", self._item.funcargs.get("model") if hasattr(self._item, "funcargs") else None)
        if model is None:
            raise UsageError("memory_prediction() needs model=..., or a test with a fixture called model")
        if not prompt.keys() & {"images", "text_tokens", "inputs"}:
            prompt["images"] = [PICTURE] if _sees(model) else []
        try:
            found = memprof.predict(model, card=asked.get("card"), **prompt)
        except DoesNotFit as error:
            if asked.get("fits") is None:
                raise
            return None, str(error)
        sample = found.samples[0]
        if sample.ok:
            return found, None
        if asked.get("fits") is None:
            raise DoesNotFit(f"predicted not to fit on {asked.get('card')}: {sample.error}")
        return found, sample.error or sample.status

    def judge(self) -> None:
        """Hold what the test took, and what was predicted, to limits and baselines."""
        failed = []
        taken = self._taken() if self._limits else []
        for number, asked in enumerate(self._limits):
            for took, run in taken:
                failed += self._verdict(self._item.nodeid, asked, took, run, first=number == 0)
        for number, (given, run) in enumerate(self._marks):
            if given.get("fits") is not None and all(given.get(name) is None for name in _HELD):
                continue  # held to its card alone
            name = f"{self._item.nodeid} predicted" + (f" {number + 1}" if number else "")
            failed += self._verdict(name, given, Taken.of(run, run.samples[0]), run)
        if failed:
            pytest.fail("\n\n".join(map(grown, failed)), pytrace=False)

    def _taken(self) -> list[tuple[Taken, Run]]:
        """What the calls of all models took together, on each device; a call that was stopped took what it reached."""
        self._check_all_counted()
        stopped: list[str] = []
        found: dict[str, tuple[Run, list[Taken]]] = {}
        for run in self._execution.runs:
            for sample in run.samples:
                if sample.tokens or sample.status == "oom":  # which a card can be before the first token is done
                    found.setdefault(key_of(run), (run, []))[1].append(Taken.of(run, sample))
                else:
                    stopped.append(f"{sample.caller}: {sample.error}")
        if not found:
            raise UsageError(f"{NO_FORWARD}: {'; '.join(stopped)}" if stopped else NOTHING)
        return [(Taken.together(calls), run) for run, calls in found.values()]

    def _check_all_counted(self) -> None:
        """Raise UsageError where there are no numbers of a call: a gate that passes for want of them is none."""
        if uncounted := self._execution.uncounted:
            raise UsageError(f"{UNCOUNTED}: {'; '.join(uncounted)}")

    def _verdict(
        self, name: str, asked: Mapping[str, Any], took: Taken, run: Run, *, first: bool = True
    ) -> list[Verdict]:
        """What is above its limit, or its baseline; with ``--memprof-update`` the baseline is written."""
        part, limit, session = asked.get("part"), asked.get("limit"), self._session
        key, taken = key_of(run), took.highest(part)
        now, there = taken.bytes_of(part), session.baselines.read(key, name)
        before = there.highest(part) if there is not None else None
        if session.update and first:
            session.baselines.write(key, name, took)
            shown = os.path.relpath(session.baselines.file(key))
            session.written[shown] = session.written.get(shown, 0) + 1
        if limit is not None:
            most = parse_size(limit)
            return [Verdict(name, part, now, most, f"limit {limit}", taken, before, run)] if now > most else []
        if session.update:
            return []
        if before is None:
            elsewhere = session.baselines.elsewhere(name)
            known = f"; there is one for {', '.join(elsewhere)}" if elsewhere else ""
            raise UsageError(f"no baseline for {key}{known}; --memprof-update writes one")
        allowed, was = asked.get("tolerance") or session.tolerance, before.bytes_of(part)
        if not allowed.exceeded(was, now):
            return []
        most = was + allowed.bytes_of(was)
        return [Verdict(name, part, now, most, f"baseline {text_of(was)} and {allowed.text}", taken, before, run)]


NOTHING = (
    "no model of transformers generated in this test, or only in windows that it opened by itself, so there is nothing "
    "to hold to anything"
)
UNCOUNTED = "not every generate() of this test could be measured, so there is no saying what it takes"
NO_FORWARD = "no generate() of this test came to a forward, so there is nothing to hold to anything"
#: Arguments of :func:`memprof.predict` that a mark hands on.
_PROMPT = {
    "inputs", "images", "text_tokens", "method", "stack", "new_tokens", "dtype", "attention", "max_tiles", "batch",
}  # fmt: skip


def _asked(mark: pytest.Mark, valid: set[str]) -> dict[str, Any]:
    """A mark's arguments, by name, its tolerance as an :class:`~memprof.allowance.Allowance`.

    Raises:
        UsageError: One without a name, of a name that the mark does not know, or of a value that it cannot have.
    """
    if mark.args:
        raise UsageError(f"@pytest.mark.{mark.name} takes arguments by name, as limit={mark.args[0]!r}")
    unknown = sorted(set(mark.kwargs) - valid)
    if unknown:
        raise UsageError(f"@pytest.mark.{mark.name} knows no {unknown[0]!r}; valid: {', '.join(sorted(valid))}")
    asked = dict(mark.kwargs)
    _check_together(mark.name, asked)
    part, tolerance = asked.get("part"), asked.get("tolerance")
    if part is not None and part not in (*PARTS, *WHOLES):
        raise UnknownName("part", str(part), (*WHOLES, *PARTS))
    if asked.get("limit") is not None:
        asked["limit"] = str(asked["limit"])
        parse_size(asked["limit"])
    if tolerance is not None:
        texts = (tolerance,) if isinstance(tolerance, str) else tolerance
        if not isinstance(texts, tuple | list) or not all(isinstance(text, str) for text in texts):
            raise BadValue(f"tolerance={tolerance!r} is none; write for example tolerance=\"2%\" or (\"1%\", \"8MiB\")")
        asked["tolerance"] = Allowance.of(*texts)
    return asked


def _check_together(mark: str, asked: Mapping[str, Any]) -> None:
    """Raise UsageError where a mark asks for what has no meaning, or for two things of which one would not count."""
    fits = asked.get("fits")
    if fits is not None and not isinstance(fits, bool):
        raise BadValue(f"@pytest.mark.{mark}: fits={fits!r} is neither True nor False")
    if asked.get("limit") is not None and asked.get("tolerance") is not None:
        raise UsageError(f"@pytest.mark.{mark}: a tolerance is of a baseline, and a limit has none; give one")
    there = [name for name in _HELD if asked.get(name) is not None]
    if fits is False and there:
        raise UsageError(f"@pytest.mark.{mark}: what is not to fit has no {there[0]}; write a mark of its own for that")


def _sees(model: Any) -> bool:
    """Whether a model has a family that sees; one that memprof does not know says so when it is predicted."""
    from memprof.models.find import find, of_config, plain_config

    if isinstance(model, str):
        return find(model).family.sees
    return of_config(plain_config(getattr(model, "config", model))).family.sees
