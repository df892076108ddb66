"""Predicted against measured, token by token: how far off, where it is worst, and which allocation explains it.

A *reference* is a folder of run folders measured on a card (``scripts/record_reference.py`` makes one), and beside them
histories: all that the caching allocator did in one sample. Any measured run folder will do.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from memprof.analysis.histories import NAMED, HistoryGap, as_recording, set_against
from memprof.analysis.predicting import predicting
from memprof.bench import Bench
from memprof.environment import ALLOCATOR_SETTINGS, package_version
from memprof.errors import DataError
from memprof.families import Model
from memprof.gpus import DEFAULT, card_of
from memprof.records import Run, RunSpec, SampleRecord
from memprof.runner import complete_spec, run
from memprof.simulator.allocator import BLOCK_BYTES
from memprof.snapshots.history import HISTORY, read_history
from memprof.snapshots.recording import ALLOC, FREE_REQUESTED, Recording
from memprof.store import find_runs
from memprof.telling.facts import provenance
from memprof.units import MIB

#: Models kept ready, by name, weights and the settings they were loaded under.
Benches = dict[tuple[str, ...], Bench]



@dataclass(frozen=True)
class Goal:
    """What a measure must meet. Errors are shares: of predicted minus measured, over measured.

    Attributes:
        equal: Least share of points that are equal to the byte, or None.
        within: No point may be further off than so many bytes, or None.
        median: Largest median of the errors' sizes, or None.
        worst: Largest size of any error, or None.
        low: No error may lie below this, or None.
    """

    equal: float | None = None
    within: int | None = None
    median: float | None = None
    worst: float | None = None
    low: float | None = None

    def met(self, points: Sequence[Point]) -> bool:
        """Whether ``points`` (not empty) keep to it."""
        errors = [point.error for point in points]
        sizes = [abs(error) for error in errors]
        return (
            (self.equal is None or sum(not error for error in errors) >= self.equal * len(errors))
            and (self.within is None or max(abs(point.off) for point in points) <= self.within)
            and (self.median is None or median(sizes) <= self.median)
            and (self.worst is None or max(sizes) <= self.worst)
            and (self.low is None or min(errors) >= self.low)
        )

    def __str__(self) -> str:
        """``'equal in ≥ 85 %, worst ≤ 0.5 %, none below −0.5 %'``."""
        said = [f"equal in ≥ {100 * self.equal:.3g} %"] if self.equal is not None else []
        said += [f"off by ≤ {self.within:,} B"] if self.within is not None else []
        said += [
            f"{word} ≤ {100 * bound:.3g} %"
            for word, bound in (("median", self.median), ("worst", self.worst))
            if bound is not None
        ]
        return ", ".join(said + ([f"none below −{-100 * self.low:.3g} %"] if self.low is not None else []))


#: What is compared, and what it must meet. ``dynamic`` is each sample's peak above static, ``token_dynamic`` each
#: token's; the other columns are each token's too, and ``static`` is the run's.
#:
#: More cannot be asked of the columns that follow from addresses: what rest stays with a block, and whether one segment
#: more is needed, is decided between blocks of one size by which lies lower (:mod:`memprof.simulator.driver`). An H200
#: and an H100 under the same software do not agree either
#: (``memprof validate reference/h200 --against reference/h100``).
GOALS: dict[str, Goal] = {
    "dynamic": Goal(equal=0.8, median=0.0, worst=0.008, low=-0.008),
    "token_dynamic": Goal(equal=0.35, within=8 * MIB, median=0.005),
    "kv_cache": Goal(equal=1.0),
    "static": Goal(within=BLOCK_BYTES),
    "reserved": Goal(equal=0.75, worst=0.015),
    "allocated": Goal(worst=0.002, low=-0.002),
}
#: What versions are known to move, between the first and the second.
MOVED = {
    "transformers": [
        ("5.17", "5.23", "the vision tower's last hidden state lives to the end of generate(), 26 MiB at 13 tiles"),
    ],
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

    @property
    def off(self) -> int:
        """Predicted minus measured, in bytes."""
        return self.predicted - self.measured


@dataclass(frozen=True)
class Score:
    """A measure over many points: the share equal to the byte, the difference largest in bytes, and of the errors
    (signed shares) the median size, the largest one, the lowest one.
    """

    measure: str
    points: int
    equal: float
    furthest: int
    median: float
    worst: float
    lowest: float
    met: bool

    @classmethod
    def of(cls, measure: str, points: Iterable[Point]) -> Score | None:
        """The score of the points of ``measure``, or None where there is none."""
        own = [point for point in points if point.measure == measure]
        if not own:
            return None
        errors = [point.error for point in own]
        return cls(
            measure, len(own), sum(not error for error in errors) / len(own), max((p.off for p in own), key=abs),
            median(map(abs, errors)), max(errors, key=abs), min(errors), GOALS[measure].met(own),
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


@dataclass
class Validation:
    """What :func:`validate` found.

    Attributes:
        where: The card, driver and versions the reference was measured with; one line each where they differ.
        against: The same of the runs whose measurements stand in for predictions; empty where it was predicted.
        notes: What a reader must know first: versions that differ here and what that moves, cards and versions that
            memprof has no rules for, what the process held beside the model.
        beside_bytes: Bytes of blocks that were there beside the model, seen in a history; they are counted as static.
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
    against: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    beside_bytes: int = 0
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


#: What the figure shows, and what each measure is called there.
DRAWN = {"dynamic": "peak of a sample", "token_dynamic": "peak of a token", "reserved": "reserved at a token"}


def figure(found: Validation, name: str) -> dict[str, Any]:
    """The data of the figure of what was compared (:mod:`memprof.figures.kinds.agreement`), called ``name``.

    ``references`` has one entry, so that those of several may be put together: its label, and of each measure every
    distinct pair of bytes measured and predicted, with the number of points that it stands for.
    """
    there = found.measured[0].record.environment
    card = card_of(there.get("gpu")) or str(there.get("gpu"))
    packages = there.get("packages", {})
    here = {name: package_version(name) or "unknown" for name in ("torch", "transformers")}
    pairs = {
        called: Counter((p.measured, p.predicted) for p in found.points if p.measure == measure)
        for measure, called in DRAWN.items()
    }
    origin = provenance(found.measured)
    return {
        "schema": 1,
        "kind": "agreement",
        "name": name,
        "title": "Predicted against measured",
        "provenance": origin
        | {"status": "predicted against measured", "where": f"{origin['where']}, and predicted for it"}
        | {name: f"{packages.get(name, 'unknown')} on the card, {here[name]} predicting" for name in here},
        "references": [
            {
                "label": f"{card.upper()}, transformers {_minor(str(packages.get('transformers', 'unknown')))}",
                "measured_on": found.where,
                "predicted_under": here,
                "measures": {
                    called: {"pairs": [[a, p, n] for (a, p), n in sorted(counted.items())]}
                    for called, counted in pairs.items()
                    if counted
                },
            }
        ],
    }


def _measured(reference: Path) -> list[Run]:
    """The finished runs of a folder that were measured on a card, those of one model and attention after each other."""
    runs = [one for one in find_runs([reference]) if one.record.status == "measured"]
    runs = [one for one in runs if one.record.spec.device == "cuda" and one.finished]
    if not runs:
        raise DataError(f"{reference} holds no finished run that was measured on a card (--device cuda)")
    return sorted(runs, key=lambda one: (one.record.spec.model, one.record.spec.attention))


def validate(
    reference: Path, against: Path | None = None, progress: Callable[[str], None] = lambda _: None
) -> Validation:
    """Predict everything in ``reference`` again, without a card, and compare.

    Args:
        reference: A folder of measured runs, or a single run folder.
        against: Another folder with the same runs: what it measured stands in for the predictions. So one sees how far
            two cards agree.
        progress: Told what is compared next.

    Raises:
        DataError: There is no run measured on a card in it, or a history cannot be read.
    """
    runs = _measured(reference)
    found = Validation(list(dict.fromkeys(place_of(one) for one in runs)), context_bytes=_context(runs), measured=runs)
    histories = [] if against else sorted(reference.glob(f"*{HISTORY}"))
    others = {name_of(one): one for one in _measured(against)} if against else {}
    found.against = list(dict.fromkeys(map(place_of, others.values())))
    benches: Benches = {}
    if against is None:
        found.notes = list(dict.fromkeys(note for one in runs for note in _notes(one)))
    if histories:
        found.beside_bytes = beside(*read_history(histories[0]), benches)
        if found.beside_bytes:
            found.notes.append(
                f"beside the model the process held {found.beside_bytes:,} B (seen in {histories[0].name}): other "
                "packages' constants; counted as static"
            )
    cases: list[Case] = []
    for number, one in enumerate(runs):
        progress(f"{name_of(one)} ({number + 1} of {len(runs)})")
        if against and name_of(one) not in others:
            found.notes.append(f"{name_of(one)} is not in {against}")
            continue
        there = others.get(name_of(one)) or predict(one, benches)
        points = compare(one, there, found.beside_bytes)
        found.points += points
        found.runs[name_of(one)] = _scores(points)
        cases += [_case(*pair, point) for pair, point in zip(_pairs(one, there), _peaks(points), strict=True)]
    if not found.points:
        raise DataError(f"{against} has no run of {reference}")
    found.totals = _scores(found.points)
    found.cases = sorted(cases, key=lambda case: -abs(case.point.error))[:NAMED]
    for path in histories:
        progress(path.name)
        about, measured = read_history(path)
        predicted = foretell(about, benches)
        found.histories.append(set_against(path.name, measured, predicted))
    return found


def _notes(run: Run) -> Iterator[str]:
    """What is to be known before a run is compared with its prediction here."""
    there = run.record.environment
    if card_of(there.get("gpu")) is None:
        yield f"memprof has no rules for {there.get('gpu') or 'this card'}: predicted with the kernels of the {DEFAULT}"
    for name in ("torch", "transformers"):
        theirs, ours = str(there.get("packages", {}).get(name, "unknown")), package_version(name) or "unknown"
        if _minor(theirs) == _minor(ours):
            continue
        moves = [
            f"from {a} to {b}, {what}" for a, b, what in MOVED.get(name, []) if {_minor(theirs), _minor(ours)} == {a, b}
        ]
        known = "; ".join(moves) or "no byte is known to move between them"
        yield f"recorded under {name} {theirs}, predicted under {ours}: {known}"


def _minor(version: str) -> str:
    """``'5.17.0'`` -> ``'5.17'``."""
    return ".".join(version.split("+")[0].split(".")[:2])


def beside(about: Mapping[str, Any], recording: Recording, benches: Benches) -> int:
    """Bytes of the blocks that lasted in a recorded process and are neither the model's weights nor workspaces."""
    there = about["environment"]
    with _settings_of(there):
        bench = _bench(benches, _predicting(RunSpec.from_json(about["spec"]), there), there)
        meter: Any = bench.ready()[1]
    live = Counter(
        recording.settings.round_size(block.requested)
        for segment in recording.segments
        for block in segment.blocks
        if block.live
    )
    known = Counter(recording.settings.round_size(n_bytes) for _, n_bytes in meter.lasting.values())
    made: dict[int, int] = {}
    for action, address, size in zip(
        recording.actions.tolist(), recording.addresses.tolist(), recording.sizes.tolist(), strict=True
    ):
        if action == ALLOC:
            made[address] = recording.settings.round_size(size)
        elif action == FREE_REQUESTED:
            made.pop(address, None)
    left = live - known - Counter(made.values())
    return sum(n_bytes * count for n_bytes, count in left.items())


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
        lines = [_sizes(s, bench.model) for s in measured.finished]
        shapes.write_text("\n".join(["width,height,text_tokens,images,batch", *lines, ""]), encoding="utf-8")
        return run(spec, Path(folder, "run"), bench=bench)


def _sizes(sample: SampleRecord, model: Model) -> str:
    """A line with the sizes of a sample's prompt; raises DataError where its pictures are of several sizes."""
    shape = sample.shape
    if shape is None:
        return f"{sample.width},{sample.height},{sample.text_tokens - sum(model.template)},1,1"
    if len({(image.width, image.height) for image in shape.images}) > 1:
        raise DataError(f"sample {sample.id} shows pictures of several sizes, which validate does not predict anew")
    question = sample.text_tokens - model.family.shape_of(model, shape.images, 0).text_tokens
    return f"{sample.width},{sample.height},{question},{len(shape.images) or 1},{shape.batch}"


def _predicting(spec: RunSpec, there: Mapping[str, Any]) -> RunSpec:
    """``spec`` as a prediction for the card it was measured on."""
    return predicting(spec, gpu=spec.gpu or card_of(there.get("gpu")))


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
        benches[key] = Bench(complete_spec(spec).setup)
    return benches[key]


def compare(measured: Run, predicted: Run, beside_bytes: int = 0) -> list[Point]:
    """Everything the two runs of the same samples say, number by number; ``beside_bytes`` were there beside the model.

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
                point("allocated", here[0], there[0] + beside_bytes, token),
                point("reserved", here[1], there[1], token),
                point("kv_cache", here[2], there[2], token),
            ]
    static_bytes = predicted.record.static_bytes + beside_bytes
    return [Point("static", name, "", 0, None, measured.record.static_bytes, static_bytes), *points]


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
    done = complete_spec(_predicting(RunSpec.from_json(about["spec"]), there))
    with _settings_of(there):
        bench = _bench(benches, done.spec, there).set_up(done.setup)
        family, known = done.setup.model.family, done.setup.model
        shape = family.shape(known, about["width"], about["height"], about["text_tokens"], done.spec.max_tiles)
        bench.profile(done.ask(shape))
        meter = bench.ready()[1]
        return as_recording(meter.trace, meter.loaded)  # type: ignore[attr-defined]
