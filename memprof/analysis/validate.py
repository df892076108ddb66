"""Predicted against measured, token by token: how far off, where it is worst, and which allocation explains it.

A *reference* is a folder of run folders measured on a card (``scripts/record_reference.py`` makes one), and beside them
histories: all that the caching allocator did in one sample. Any measured run folder will do.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from memprof.analysis.predicting import predicting
from memprof.analysis.snapshot import call_site
from memprof.environment import ALLOCATOR_SETTINGS
from memprof.errors import DataError
from memprof.records import Run, RunSpec, SampleRecord
from memprof.runner import Bench, complete_spec, make_prompt, profile_prompt, run
from memprof.simulator.allocator import AllocatorSettings, CachingAllocator
from memprof.simulator.cards import CARDS
from memprof.simulator.recording import (
    ALLOC,
    FREE_COMPLETED,
    FREE_REQUESTED,
    Frame,
    RecordedBlock,
    RecordedSegment,
    Recording,
)
from memprof.simulator.trace import Trace
from memprof.store import find_runs

#: Models kept ready, by name, weights and the settings they were loaded under.
Benches = dict[tuple[str, ...], Bench]

#: A history's file ends so.
HISTORY = ".history.json.gz"
#: How many cases, parts and sizes a report names.
NAMED = 8


@dataclass(frozen=True)
class Goal:
    """What a measure must meet, as shares: of predicted minus measured, over measured.

    Attributes:
        median: Largest median of the errors' sizes, or None.
        worst: Largest size of any error, or None.
        low: No error may lie below this, or None.
    """

    median: float | None = None
    worst: float | None = None
    low: float | None = None

    def met(self, errors: Sequence[float]) -> bool:
        """Whether ``errors`` (not empty) keep to it."""
        sizes = [abs(error) for error in errors]
        return (
            (self.median is None or median(sizes) <= self.median)
            and (self.worst is None or max(sizes) <= self.worst)
            and (self.low is None or min(errors) >= self.low)
        )

    def __str__(self) -> str:
        """``'median ≤ 1 %, worst ≤ 3 %, none below −1 %'``."""
        said = [
            f"{word} ≤ {100 * bound:.3g} %"
            for word, bound in (("median", self.median), ("worst", self.worst))
            if bound is not None
        ]
        return ", ".join(said + ([f"none below −{-100 * self.low:.3g} %"] if self.low is not None else []))


_DYNAMIC = Goal(median=0.01, worst=0.03, low=-0.01)
#: What is compared, and what it must meet. ``dynamic`` is each sample's peak above static, ``token_dynamic`` each
#: token's; the other columns are each token's too, and ``static`` is the run's.
GOALS: dict[str, Goal] = {
    "dynamic": _DYNAMIC,
    "token_dynamic": _DYNAMIC,
    "kv_cache": Goal(worst=0.0),
    "static": Goal(worst=0.001),
    "reserved": Goal(worst=0.03),
    "allocated": Goal(low=-0.01),
}


@dataclass(frozen=True)
class Point:
    """One number, measured and predicted, in bytes. ``token`` is None for what is a sample's or a run's."""

    measure: str
    run: str
    sample: str
    tiles: int
    token: int | None
    measured: int
    predicted: int

    @property
    def error(self) -> float:
        """Predicted minus measured, as a share of measured."""
        if self.predicted == self.measured:
            return 0.0
        return (self.predicted - self.measured) / self.measured if self.measured else math.inf


@dataclass(frozen=True)
class Score:
    """A measure over many points: the median size of the errors, the largest one, the lowest one (signed shares)."""

    measure: str
    points: int
    median: float
    worst: float
    lowest: float
    met: bool

    @classmethod
    def of(cls, measure: str, points: Iterable[Point]) -> Score | None:
        """The score of the points of ``measure``, or None where there is none."""
        errors = [point.error for point in points if point.measure == measure]
        if not errors:
            return None
        return cls(
            measure, len(errors), median(map(abs, errors)), max(errors, key=abs), min(errors),
            GOALS[measure].met(errors),
        )  # fmt: skip


@dataclass(frozen=True)
class Gap:
    """Bytes of one thing, measured and predicted."""

    name: str
    measured: int
    predicted: int

    @property
    def change(self) -> int:
        """Predicted minus measured."""
        return self.predicted - self.measured


@dataclass(frozen=True)
class Case:
    """A sample whose dynamic peak is among the worst predicted, and who makes the difference.

    Attributes:
        point: The peak, measured and predicted.
        phases: Phase of the peak, measured and predicted.
        parts: The dynamic bytes by part at each peak, largest difference first.
        holders: The largest tensors at each peak by module and operator (layers of a kind are one), likewise.
    """

    point: Point
    phases: tuple[str, str]
    parts: list[Gap]
    holders: list[Gap]


@dataclass(frozen=True)
class Size:
    """Blocks of one size in a history: how many were held at its peak, how many were made, and who made most of them.

    ``bytes`` is what a request is rounded up to.
    """

    bytes: int
    held_measured: int
    held_predicted: int
    made_measured: int
    made_predicted: int
    site: str

    @property
    def change(self) -> int:
        """Bytes held at the predicted peak minus those at the measured one."""
        return (self.held_predicted - self.held_measured) * self.bytes


@dataclass(frozen=True)
class HistoryGap:
    """How a recorded history differs from the predicted one, size by size, largest difference at the peak first."""

    file: str
    peak_measured: int
    peak_predicted: int
    sizes: list[Size]


@dataclass
class Validation:
    """What :func:`validate` found.

    Attributes:
        where: The card, driver and versions the reference was measured with; one line each where they differ.
        context_bytes: Least and most that the driver said a process used beyond what its allocator held; None where no
            driver was asked about the process alone. No prediction: ``memprof fit`` adds it.
        totals: One score a measure, over everything.
        runs: Scores of each run, by what it is called.
        points: Everything compared.
        measured: The runs of the reference.
        cases: The worst predicted dynamic peaks.
        histories: What the recorded histories say.
    """

    where: list[str] = field(default_factory=list)
    context_bytes: tuple[int, int] | None = None
    totals: list[Score] = field(default_factory=list)
    runs: dict[str, list[Score]] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    measured: list[Run] = field(default_factory=list)
    cases: list[Case] = field(default_factory=list)
    histories: list[HistoryGap] = field(default_factory=list)

    @property
    def met(self) -> bool:
        """Whether every goal is."""
        return all(score.met for score in self.totals)

    def to_json(self) -> dict[str, Any]:
        """As plain dicts and lists, without the points and the runs."""
        plain = asdict(replace(self, points=[], measured=[]))
        del plain["points"], plain["measured"]
        for case, plain_case in zip(self.cases, plain["cases"], strict=True):
            plain_case["point"]["error"] = case.point.error
        return {"schema": 1, "met": self.met, "goals": {name: str(goal) for name, goal in GOALS.items()}, **plain}


def validate(reference: Path) -> Validation:
    """Predict everything in ``reference`` again, without a card, and compare.

    Raises:
        DataError: There is no run measured on a card in it, or a history cannot be read.
    """
    runs = [one for one in find_runs([reference]) if one.record.status == "measured"]
    runs = [one for one in runs if one.record.spec.device == "cuda" and one.finished]
    if not runs:
        raise DataError(f"{reference} holds no finished run that was measured on a card (--device cuda)")
    found = Validation(list(dict.fromkeys(place_of(one) for one in runs)), _context(runs), measured=runs)
    benches: Benches = {}
    cases: list[Case] = []
    # Runs of one model and attention follow each other, so that each model is built once.
    for one in sorted(runs, key=lambda one: (one.record.spec.model, one.record.spec.attention)):
        there = predict(one, benches)
        points = compare(one, there)
        found.points += points
        found.runs[name_of(one)] = _scores(points)
        cases += [_case(*pair, point) for pair, point in zip(_pairs(one, there), _peaks(points), strict=True)]
    found.totals = _scores(found.points)
    found.cases = sorted(cases, key=lambda case: -abs(case.point.error))[:NAMED]
    for path in sorted(reference.glob(f"*{HISTORY}")):
        about, measured = read_history(path)
        predicted = foretell(about, benches)
        found.histories.append(set_against(path.name, measured, predicted))
    return found


def name_of(run: Run) -> str:
    """``'internvl2-2b topv:keep=0.5,layer=2 paper'``."""
    spec = run.record.spec
    return f"{spec.model} {spec.method} {spec.stack}"


def place_of(run: Run) -> str:
    """Card, driver and versions, in one line."""
    there = run.record.environment
    packages = there.get("packages", {})
    words = [
        there.get("gpu") or run.record.spec.device,
        f"driver {there['driver']}" if there.get("driver") else "driver unknown",
        *(f"{name} {packages[name]}" for name in ("torch", "transformers") if name in packages),
    ]
    return ", ".join(map(str, words))


def _context(runs: Iterable[Run]) -> tuple[int, int] | None:
    beyond = [
        used - reserved
        for one in runs
        if one.record.environment.get("device_bytes_of") == "process"
        for sample in one.finished
        for used, reserved in zip(sample.tokens.device_used_bytes, sample.tokens.reserved_bytes, strict=True)
        if used is not None
    ]
    return (min(beyond), max(beyond)) if beyond else None


# ----------------------------------------------------------------------------------------------------- predict, compare


def predict(measured: Run, benches: Benches) -> Run:
    """The same samples, predicted: only their sizes are taken over. ``benches`` are kept from call to call."""
    there = measured.record.environment
    spec = _predicting(measured.record.spec, there)
    with tempfile.TemporaryDirectory() as folder, _settings_of(there):
        shapes = Path(folder, "shapes.csv")
        spec = replace(spec, data=str(shapes), limit=None, shard=None)
        bench = _bench(benches, spec, there)
        template = sum(bench.card.template)
        lines = [f"{s.width},{s.height},{s.text_tokens - template}" for s in measured.finished]
        shapes.write_text("\n".join(["width,height,text_tokens", *lines, ""]), encoding="utf-8")
        return run(spec, Path(folder, "run"), bench=bench)


def _predicting(spec: RunSpec, there: Mapping[str, Any]) -> RunSpec:
    """``spec`` as a prediction for the card it was measured on."""
    return predicting(spec, gpu=spec.gpu or card_of(there.get("gpu")))


def card_of(gpu: str | None) -> str | None:
    """The name memprof has for what torch calls ``gpu``: ``'NVIDIA H100 80GB HBM3'`` -> ``'h100'``; None if none."""
    words = re.split(r"[\s-]+", (gpu or "").lower())
    said = {*words, *(a + b for a, b in pairwise(words))}
    return max((name for name in CARDS if set(name.split("-")) <= said), key=len, default=None)


@contextmanager
def _settings_of(there: Mapping[str, Any]) -> Iterator[None]:
    """Allocator settings as they were in the environment ``there``, and none that were not."""
    names, was = [*ALLOCATOR_SETTINGS, "CUBLAS_WORKSPACE_CONFIG"], os.environ.copy()
    asked = {**there.get("allocator_settings", {}), "CUBLAS_WORKSPACE_CONFIG": there.get("cublas_workspace_config")}
    try:
        for name in names:
            os.environ.pop(name, None)
            if asked.get(name):
                os.environ[name] = asked[name]
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
            if name in was:
                os.environ[name] = was[name]


def _bench(benches: Benches, spec: RunSpec, there: Mapping[str, Any]) -> Bench:
    """The bench of a model under the settings of ``there``, kept from call to call."""
    key = spec.model, spec.weights, json.dumps([there.get("allocator_settings"), there.get("cublas_workspace_config")])
    if key not in benches:
        benches[key] = Bench(spec)
    return benches[key]


def compare(measured: Run, predicted: Run) -> list[Point]:
    """Everything the two runs of the same samples say, number by number.

    Tokens that only one of them made are left out. Raises DataError where the prediction of a sample failed.
    """
    name, points = name_of(measured), []
    for one, other in _pairs(measured, predicted):

        def point(measure: str, a: int, b: int, token: int | None = None, sample: SampleRecord = one) -> Point:
            return Point(measure, name, sample.id, sample.tiles, token, a, b)

        static = [s.peak_allocated_bytes - s.dynamic_peak_bytes for s in (one, other)]
        points.append(point("dynamic", one.dynamic_peak_bytes, other.dynamic_peak_bytes))
        columns = zip(_columns(one), _columns(other), strict=False)
        for token, (here, there) in enumerate(columns):
            points.append(point("token_dynamic", here[0] - static[0], there[0] - static[1], token))
            points += [
                point(measure, a, b, token)
                for measure, a, b in zip(("allocated", "reserved", "kv_cache"), here, there, strict=True)
            ]
    whole = Point("static", name, "", 0, None, measured.record.static_bytes, predicted.record.static_bytes)
    return [whole, *points]


def _columns(sample: SampleRecord) -> list[tuple[int, int, int]]:
    """Peak allocated, reserved and KV bytes of each token."""
    t = sample.tokens
    return list(zip(t.peak_allocated_bytes, t.reserved_bytes, t.kv_bytes, strict=True))


def _pairs(measured: Run, predicted: Run) -> list[tuple[SampleRecord, SampleRecord]]:
    for sample in predicted.samples:
        if not sample.ok:
            raise DataError(f"{name_of(measured)}: a prediction failed: {sample.error}")
    return list(zip(measured.finished, predicted.samples, strict=True))


def _peaks(points: Iterable[Point]) -> list[Point]:
    return [point for point in points if point.measure == "dynamic"]


def _scores(points: Sequence[Point]) -> list[Score]:
    return [score for measure in GOALS if (score := Score.of(measure, points)) is not None]


def _case(measured: SampleRecord, predicted: SampleRecord, point: Point) -> Case:
    return Case(
        point,
        (measured.peak_phase, predicted.peak_phase),
        _gaps(measured.peak_parts, predicted.peak_parts),
        _gaps(_by_module(measured), _by_module(predicted)),
    )


def _by_module(sample: SampleRecord) -> Counter[str]:
    """Bytes of the largest tensors at the peak, by module and operator; layers of a kind are one."""
    found: Counter[str] = Counter()
    for holder in sample.peak_holders:
        module = re.sub(r"\.\d+(?=\.|$)", ".*", holder.module) or "(prompt)"
        found[f"{module} {holder.op.removeprefix('aten.').partition('.')[0]} {holder.dtype}"] += holder.bytes
    return found


def _gaps(measured: Mapping[str, int], predicted: Mapping[str, int]) -> list[Gap]:
    gaps = [Gap(name, measured.get(name, 0), predicted.get(name, 0)) for name in {**measured, **predicted}]
    return sorted((gap for gap in gaps if gap.change), key=lambda gap: -abs(gap.change))[:NAMED]


# ------------------------------------------------------------------------------------------------------------ histories


def foretell(about: Mapping[str, Any], benches: Benches) -> Recording:
    """The history that is predicted for the sample a history is ``about``."""
    there = about["environment"]
    spec, pruner, _ = complete_spec(_predicting(RunSpec.from_json(about["spec"]), there))
    with _settings_of(there):
        bench = _bench(benches, spec, there)
        model, meter = bench.ready(spec)
        shape = bench.family.shape(bench.card, about["width"], about["height"], about["text_tokens"], spec.max_tiles)
        prompt = make_prompt(bench.family, bench.card, shape, seed=spec.seed)
        profile_prompt(model, meter, pruner, spec.stack, prompt, new_tokens=spec.max_new_tokens)
        return as_recording(meter.trace, meter.loaded)  # type: ignore[attr-defined]


def as_recording(trace: Trace, start: CachingAllocator) -> Recording:
    """What a card would have recorded of ``trace``, beginning from the state ``start`` (left as it is)."""
    allocator, at = start.copy(), dict[int, int]()
    events: list[tuple[int, int, int, int]] = []
    stacks: dict[tuple[str, str], int] = {}
    for event in trace.events[: trace.marks[-1]] if trace.marks else trace.events:
        slot = max(event, ~event)
        n_bytes, stack = trace.nbytes[slot], stacks.setdefault(trace.sites[slot], len(stacks) + 1)
        if event >= 0 and n_bytes:
            at[slot] = allocator.malloc(n_bytes)
            events.append((ALLOC, at[slot], n_bytes, stack))
        elif slot in at:
            address = at.pop(slot)
            allocator.free(address)
            events += [(action, address, n_bytes, 0) for action in (FREE_REQUESTED, FREE_COMPLETED)]
    columns = np.asarray(events, dtype=np.int64).reshape(-1, 4)
    return Recording(
        device=0, settings=start.settings, segments=(), actions=columns[:, 0].astype(np.int8), addresses=columns[:, 1],
        sizes=columns[:, 2], stack_ids=columns[:, 3].astype(np.int32), lane_ids=np.zeros(len(columns), dtype=np.int32),
        stacks=((), *((Frame(module, 0, op),) for module, op in stacks)), lanes=((0, (0, 0)),),
    )  # fmt: skip


@dataclass
class _Walk:
    """A recording gone through: blocks made by size, those held at its peak, and who made them."""

    made: Counter[int] = field(default_factory=Counter)
    held: Counter[int] = field(default_factory=Counter)
    sites: dict[int, Counter[str]] = field(default_factory=dict)
    peak: int = 0

    @classmethod
    def of(cls, recording: Recording) -> _Walk:
        """What was allocated before the recording began is left out."""
        walk, now, at, live = cls(), 0, dict[int, int](), Counter[int]()
        events = zip(
            recording.actions.tolist(), recording.addresses.tolist(), recording.sizes.tolist(),
            recording.stack_ids.tolist(), strict=True,
        )  # fmt: skip
        for action, address, n_bytes, stack in events:
            if action == ALLOC:
                size = at[address] = recording.settings.round_size(n_bytes)
                walk.made[size] += 1
                walk.sites.setdefault(size, Counter())[_site(recording.stacks[stack])] += 1
                live[size] += 1
                now += size
                if now > walk.peak:
                    walk.peak, walk.held = now, live.copy()
            elif action == FREE_REQUESTED and address in at:
                size = at.pop(address)
                live[size] -= 1
                now -= size
        return walk


def _site(frames: Sequence[Frame]) -> str:
    """The line that made an allocation, or the module and operator predicted to."""
    return f"{frames[0].filename} {frames[0].name}" if frames and not frames[0].line else call_site(frames)


def set_against(file: str, measured: Recording, predicted: Recording) -> HistoryGap:
    """Where two histories of one sample differ: every size of which not as many blocks were made, or held at the peak.

    A size that one of them never made is an allocation that is missing from the other, and its site says which.
    """
    a, b = _Walk.of(measured), _Walk.of(predicted)
    sizes = [
        Size(
            n_bytes, a.held[n_bytes], b.held[n_bytes], a.made[n_bytes], b.made[n_bytes],
            (a.sites.get(n_bytes) or b.sites[n_bytes]).most_common(1)[0][0],
        )
        for n_bytes in {**a.made, **b.made}
        if a.made[n_bytes] != b.made[n_bytes] or a.held[n_bytes] != b.held[n_bytes]
    ]  # fmt: skip
    sizes.sort(key=lambda size: (-abs(size.change), -abs(size.made_predicted - size.made_measured) * size.bytes))
    return HistoryGap(file, a.peak, b.peak, sizes[:NAMED])


def write_history(path: Path, about: Mapping[str, Any], recording: Recording) -> None:
    """Write what :func:`read_history` reads: columns of numbers, and of each stack the line it is best known by."""
    known: dict[tuple[str, int, str], int] = {}
    lines = [_best(frames) for frames in recording.stacks]
    to = [known.setdefault(line, len(known)) for line in lines]
    data = {
        "schema": 1,
        "about": dict(about),
        "settings": str(recording.settings),
        "actions": recording.actions.tolist(),
        "addresses": np.diff(recording.addresses, prepend=0).tolist(),
        "sizes": recording.sizes.tolist(),
        "lines": [list(line) for line in known],
        "made_by": [to[stack] for stack in recording.stack_ids.tolist()],
        "lanes": recording.lanes,
        "in_lane": recording.lane_ids.tolist(),
        "segments": [
            [s.address, s.size, s.lane, s.small, s.expandable, [[b.size, b.requested, b.live] for b in s.blocks]]
            for s in recording.segments
        ],
    }
    text = json.dumps(data, separators=(",", ":")).encode()
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(gzip.compress(text, 9, mtime=0))
    temporary.replace(path)


def _best(frames: Sequence[Frame]) -> tuple[str, int, str]:
    """File, line and function of :func:`memprof.analysis.snapshot.call_site`."""
    if frames and not frames[0].line:
        return frames[0].filename, 0, frames[0].name
    match = re.fullmatch(r"(.*):(\d+) (.*)", call_site(frames))
    return (match[1], int(match[2]), match[3]) if match else ("", 0, call_site(frames))


def read_history(path: Path) -> tuple[dict[str, Any], Recording]:
    """What a history is about, and the recording.

    ``about`` holds ``spec``, ``environment``, ``width``, ``height`` and ``text_tokens`` (of the question alone).

    Raises:
        DataError: The file is no history.
    """
    try:
        data = json.loads(gzip.decompress(path.read_bytes()))
        lines = [Frame(str(file), int(line), str(name)) for file, line, name in data["lines"]]
        recording = Recording(
            device=0,
            settings=AllocatorSettings.parse(data["settings"]),
            segments=tuple(_segment(*segment) for segment in data["segments"]),
            actions=np.asarray(data["actions"], dtype=np.int8),
            addresses=np.cumsum(np.asarray(data["addresses"], dtype=np.int64)),
            sizes=np.asarray(data["sizes"], dtype=np.int64),
            stack_ids=np.asarray(data["made_by"], dtype=np.int32),
            lane_ids=np.asarray(data["in_lane"], dtype=np.int32),
            stacks=tuple((line,) for line in lines),
            lanes=tuple((stream, tuple(pool)) for stream, pool in data["lanes"]),
        )
        return data["about"], recording
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no history of an allocator: {error}") from None


def _segment(
    address: int, size: int, lane: int, small: bool, expandable: bool, blocks: Iterable[tuple[int, int, bool]]
) -> RecordedSegment:
    found, at = [], address
    for n_bytes, requested, live in blocks:
        found.append(RecordedBlock(at, n_bytes, requested, live, 0))
        at += n_bytes
    return RecordedSegment(address, size, lane, small, expandable, tuple(found))
