"""Two runs side by side: which parts, modules and tokens make the difference. Read from records alone."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from memprof.allowance import Allowance
from memprof.errors import UsageError
from memprof.gpus import card_of
from memprof.records import PARTS, Holder, Run, RunSpec, SampleRecord

#: Fields of a spec in which two runs may differ and still be compared, and what it is called when they do.
_SAID = {
    "model": "models", "task": "tasks", "data": "data", "stack": "stacks", "device": "devices", "dtype": "dtypes",
    "attention": "attention kernels", "weights": "weights", "max_tiles": "tile limits",
    "max_new_tokens": "numbers of new tokens", "images": "images in a prompt", "batch": "prompts side by side",
}  # fmt: skip
#: What a field that is None stands for.
_NONE = {"max_tiles": "the model's own", "images": "the data's own", "batch": "the data's own"}
_COLUMNS = ("peak_allocated_bytes", "allocated_bytes", "kv_bytes", "reserved_bytes")
_NUMBER = re.compile(r"\.\d+(?=\.|$)")


@dataclass(frozen=True)
class Delta:
    """Bytes of one thing in both runs; ``change`` is B minus A."""

    name: str
    a: int
    b: int

    @property
    def change(self) -> int:
        """B minus A, in bytes."""
        return self.b - self.a


@dataclass(frozen=True)
class Column:
    """Where one token curve of the compared sample differs most.

    Attributes:
        name: The column of :class:`~memprof.records.TokenColumns`, above static except for the cache.
        token: The token.
        a, b: Its bytes there.
        mean_change: B minus A, mean over the tokens that both runs made.
    """

    name: str
    token: int
    a: int
    b: int
    mean_change: float


@dataclass(frozen=True)
class Difference:
    """What :func:`diff` found. Lists are sorted by the size of the change.

    Attributes:
        a, b: What each run is: model, method, task, stack, status.
        sample_a, sample_b: The samples compared: the one where A is highest, in both runs; else each run's highest.
        static, dynamic: Bytes before, and above it at the sample's highest instant.
        parts: The dynamic bytes by part.
        static_parts: The static bytes by part.
        modules: The largest tensors alive then, by module; layers of a kind are one.
        tokens: Where the curves differ most.
        common: Samples that both runs finished; ``lower`` of them peak lower in B; ``mean_change`` is the mean change
            of their dynamic peaks.
        said: What a reader must know before comparing.
    """

    a: dict[str, Any]
    b: dict[str, Any]
    sample_a: str
    sample_b: str
    static: Delta
    dynamic: Delta
    parts: list[Delta]
    static_parts: list[Delta]
    modules: list[Delta]
    tokens: list[Column]
    common: int
    lower: int
    mean_change: float | None
    said: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As plain dicts and lists, every delta with its ``change``."""

        def plain(delta: Delta) -> dict[str, Any]:
            return {**dataclasses.asdict(delta), "change": delta.change}

        data = dataclasses.asdict(self)
        for name in ("static", "dynamic"):
            data[name] = plain(getattr(self, name))
        for name in ("parts", "static_parts", "modules"):
            data[name] = [plain(delta) for delta in getattr(self, name)]
        return data


def diff(a: Run, b: Run) -> Difference:
    """What makes the difference between ``a`` and ``b``.

    Raises:
        UsageError: A run has no finished sample, or both are the same folder.
    """
    for run in (a, b):
        if not run.finished:
            raise UsageError(f"{run.path or 'a run'} has no finished sample, so there is nothing to compare")
    if a.path is not None and a.path == b.path:
        raise UsageError(f"{a.path} is compared with itself; give two runs")
    one, other = _pair(a, b)
    static_a, static_b = (s.peak_allocated_bytes - s.dynamic_peak_bytes for s in (one, other))
    there = {s.id: s for s in b.finished} if _same_prompts(a, b) else {}
    changes = [
        there[s.id].dynamic_peak_bytes - s.dynamic_peak_bytes
        for s in a.finished
        if s.id in there and _sizes(s) == _sizes(there[s.id])
    ]
    return Difference(
        a=_about(a),
        b=_about(b),
        sample_a=one.id,
        sample_b=other.id,
        static=Delta("static", static_a, static_b),
        dynamic=Delta("dynamic", one.dynamic_peak_bytes, other.dynamic_peak_bytes),
        parts=_deltas(one.peak_parts, other.peak_parts, PARTS),
        static_parts=_deltas(a.record.static_parts, b.record.static_parts),
        modules=_deltas(_by_module(one.peak_holders), _by_module(other.peak_holders)),
        tokens=_columns(one, other, static_a, static_b),
        common=len(changes),
        lower=sum(change < 0 for change in changes),
        mean_change=sum(changes) / len(changes) if changes else None,
        said=_said(a, b, one, other),
    )


@dataclass(frozen=True)
class Growth:
    """What one sample, or the weights, take more of in another run than is allowed, or what is no longer there.

    Attributes:
        what: ``static``, ``dynamic peak``, or ``run`` where a whole run has no other (its highest dynamic peak).
        sample: The sample's id; None of what is static, and of a run.
        a, b: Bytes before and after; ``b`` is None where the sample did not finish, or is not there.
        reason: Why it did not finish; None where it is not there.
        other: The sample in B that it is held to, where that is another one; of a run, which one is missing.
    """

    what: str
    sample: str | None
    a: int
    b: int | None
    reason: str | None = None
    other: str | None = None

    @property
    def change(self) -> int | None:
        """B minus A in bytes, or None where B did not finish."""
        return None if self.b is None else self.b - self.a


def growth(a: Run, b: Run, allowed: Allowance) -> list[Growth]:
    """What grew from ``a`` to ``b`` by more than is ``allowed``, the largest first; samples that did not finish first.

    Held to it are the static bytes, and apart from them the dynamic peak of every sample of ``a``: weights are large,
    and a share of both together would let what runs above them double unseen. Of runs of different data it is each
    one's highest sample. A sample that finished in ``a`` alone has outgrown any allowance, also where ``b`` lacks it.

    Raises:
        UsageError: ``a`` has no finished sample.
    """
    if not a.finished:
        raise UsageError(f"{a.path or 'a run'} has no finished sample, so there is nothing to hold the other to")
    found = []
    if allowed.exceeded(a.record.static_bytes, b.record.static_bytes):
        found.append(Growth("static", None, a.record.static_bytes, b.record.static_bytes))
    for before, after in _held_to(a, b):
        was = before.dynamic_peak_bytes
        grown = partial(Growth, "dynamic peak", before.id, was)
        if after is None:
            found.append(grown(None))
        elif not after.ok:
            found.append(grown(None, after.error or after.status, other=_another(before, after)))
        elif allowed.exceeded(was, after.dynamic_peak_bytes):
            found.append(grown(after.dynamic_peak_bytes, other=_another(before, after)))
    return worst_first(found)


def missing(a: Run) -> list[Growth]:
    """What a whole run that has no other is to a gate: nothing, where no sample of it finished."""
    if a.highest is None:
        return []
    spec = a.record.spec
    which = f"{spec.method} on {spec.model}, {spec.task}"
    return [Growth("run", None, a.highest.dynamic_peak_bytes, None, other=which)]


def worst_first(found: Iterable[Growth]) -> list[Growth]:
    """What is no longer there or finished, then what grew most."""
    return sorted(found, key=lambda grown: (grown.b is not None, -(grown.change or 0)))


def _another(before: SampleRecord, after: SampleRecord) -> str | None:
    return after.id if after.id != before.id else None


def _held_to(a: Run, b: Run) -> list[tuple[SampleRecord, SampleRecord | None]]:
    """Each finished sample of ``a`` and the one of its name in ``b``, or None; of other data, the highest of each.

    A prompt that became longer is the same sample: that is one of the ways to grow.
    """
    if not _same_data(a, b):
        assert a.highest is not None
        return [(a.highest, b.highest or next(iter(b.samples), None))]
    there = {s.id: s for s in b.samples}
    return [(s, there.get(s.id)) for s in a.finished]


def _same_data(a: Run, b: Run) -> bool:
    x, y = a.record.spec, b.record.spec
    return (x.task, x.data) == (y.task, y.data)


def _same_prompts(a: Run, b: Run) -> bool:
    """Whether samples of one name are one prompt in both runs."""
    x, y = a.record.spec, b.record.spec
    return (x.model, x.task, x.data, x.max_tiles) == (y.model, y.task, y.data, y.max_tiles)


def _sizes(sample: SampleRecord) -> tuple[int, int]:
    return sample.visual_tokens, sample.text_tokens


def _pair(a: Run, b: Run) -> tuple[SampleRecord, SampleRecord]:
    """A's highest sample and the same in B; where B has not got it, each run's highest."""
    one, other = a.highest, b.highest
    assert one is not None
    assert other is not None
    if _same_prompts(a, b):
        other = next((s for s in b.finished if s.id == one.id and _sizes(s) == _sizes(one)), other)
    return one, other


def _about(run: Run) -> dict[str, Any]:
    spec = run.record.spec
    return {
        "path": run.path,
        **{k: getattr(spec, k) for k in ("model", "method", "task", "stack", "device", "dtype", "attention")},
        "status": run.record.status,
        "samples": len(run.finished),
    }


def _deltas(a: Mapping[str, int], b: Mapping[str, int], names: tuple[str, ...] | None = None) -> list[Delta]:
    """Changes of everything that is in ``a`` or ``b``, the largest first; what is 0 in both is left out."""
    known = names or tuple(dict.fromkeys([*a, *b]))
    deltas = [Delta(name, a.get(name, 0), b.get(name, 0)) for name in known]
    return sorted((d for d in deltas if d.a or d.b), key=lambda d: -abs(d.change))


def _by_module(holders: list[Holder]) -> dict[str, int]:
    """Bytes of each module, layers of a kind together: ``layers.*.mlp``."""
    total: dict[str, int] = {}
    for holder in holders:
        name = _NUMBER.sub(".*", holder.module) or f"({holder.part})"
        if holder.part == "kv_cache":
            name = "(KV cache)"
        total[name] = total.get(name, 0) + holder.bytes
    return total


def _columns(one: SampleRecord, other: SampleRecord, static_a: int, static_b: int) -> list[Column]:
    """For each curve, the token where it differs most."""
    found = []
    for name in _COLUMNS:
        base_a, base_b = (0, 0) if name == "kv_bytes" else (static_a, static_b)
        x = [n - base_a for n in getattr(one.tokens, name)]
        y = [n - base_b for n in getattr(other.tokens, name)]
        changes = [q - p for p, q in zip(x, y, strict=False)]
        if changes:
            at = max(range(len(changes)), key=lambda t: abs(changes[t]))
            found.append(Column(name, at, x[at], y[at], sum(changes) / len(changes)))
    return found


def _value(spec: RunSpec, key: str) -> Any:
    """A field in words."""
    value = getattr(spec, key)
    return _NONE.get(key, "none") if value is None else value


def _card(run: Run) -> str:
    """What it ran on, or was predicted for, as memprof names it where it knows it."""
    name = run.record.environment.get("gpu") or run.record.spec.gpu
    return card_of(name) or name or "none"


def _alone(a: Run, b: Run) -> Iterator[str]:
    """How many samples are in one of the runs alone."""
    for name, other, more in (("A", "B", (a, b)), ("B", "A", (b, a))):
        there = {s.id for s in more[1].samples}
        if alone := sum(s.id not in there for s in more[0].samples):
            yield f"{alone} of {len(more[0].samples)} samples of {name} {'are' if alone > 1 else 'is'} not in {other}"


def _said(a: Run, b: Run, one: SampleRecord, other: SampleRecord) -> list[str]:
    """What differs beside what is compared."""
    x, y = a.record.spec, b.record.spec
    said = [
        f"different {words}: {_value(x, key)} and {_value(y, key)}"
        for key, words in _SAID.items()
        if getattr(x, key) != getattr(y, key)
    ]
    cards = [_card(run) for run in (a, b)]
    if cards[0] != cards[1]:
        said.append(f"different cards: {cards[0]} and {cards[1]}")
    if _same_data(a, b):
        said += _alone(a, b)
    if a.record.status != b.record.status:
        said.insert(
            0, f"A is {a.record.status} and B is {b.record.status}: the difference holds the predictor's error too"
        )
    for package in ("torch", "transformers"):
        versions = [run.record.environment.get(package) for run in (a, b)]
        if all(versions) and versions[0] != versions[1]:
            said.append(f"different versions of {package}: {versions[0]} and {versions[1]}")
    if one.id != other.id or _sizes(one) != _sizes(other):
        tokens = [f"{s.id} ({s.visual_tokens:,} visual and {s.text_tokens:,} text tokens)" for s in (one, other)]
        said.append(f"different prompts: {tokens[0]} and {tokens[1]}, each run's highest")
    for name, run in (("A", a), ("B", b)):
        if not run.record.complete:
            said.append(f"{name} is not complete: {len(run.finished)} samples so far")
    return said
