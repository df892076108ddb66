"""What a run leaves behind: plain data, readable without torch.

Bytes are integers, times are seconds. A list under ``tokens`` has one entry a token: entry 0 is prefill (vision encoder
included), entry t is the t-th decode step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

if TYPE_CHECKING:
    from memprof.intervals import Interval

SCHEMA = 1

Status = Literal["measured", "predicted"]
Stack = Literal["current", "paper"]
STACKS: tuple[str, ...] = get_args(Stack)
#: Attention the language model may run; pruning writes masks that no other kind takes.
ATTENTIONS: tuple[str, ...] = ("sdpa", "eager")

#: What a byte can belong to at the instant of a peak, in drawing order. ``unexplained`` is what no part claims.
PARTS: tuple[str, ...] = (
    "kv_cache", "vision", "attention", "mlp", "logits", "pruner", "inputs", "other", "unexplained",
)  # fmt: skip


def _plain(value: Any) -> Any:
    """``value`` with records as dicts; lists of numbers stay as they are, since copying each is most of the cost."""
    if isinstance(value, _Record):
        return value.to_json()
    if isinstance(value, list) and value and isinstance(value[0], _Record):
        return [item.to_json() for item in value]
    return value


class _Record:
    """Shared by the records: to a JSON-ready dict and back, ignoring keys of later versions."""

    def to_json(self) -> dict[str, Any]:
        """This record as plain dicts and lists."""
        return {name: _plain(value) for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The record in ``data``; unknown keys are ignored."""
        known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        return cls(**{k: v for k, v in data.items() if k in known})


@dataclass
class TokenColumns(_Record):
    """One entry a token in every list.

    Attributes:
        peak_allocated_bytes: Highest allocated bytes while the token was made.
        allocated_bytes: Allocated bytes when it was done (cache and inputs still held).
        reserved_bytes: Highest bytes the caching allocator held while the token was made.
        kv_bytes: Bytes of the KV cache's storages when it was done.
        device_used_bytes: What the driver says the process uses, or None where no driver was asked.
        seconds: Wall time of the token, or None in a prediction.
    """

    peak_allocated_bytes: list[int] = field(default_factory=list)
    allocated_bytes: list[int] = field(default_factory=list)
    reserved_bytes: list[int] = field(default_factory=list)
    kv_bytes: list[int] = field(default_factory=list)
    device_used_bytes: list[int | None] = field(default_factory=list)
    seconds: list[float | None] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.peak_allocated_bytes)


@dataclass
class Holder(_Record):
    """One tensor alive at the instant of a peak."""

    bytes: int
    part: str
    module: str
    op: str
    shape: list[int]
    dtype: str
    phase: str


@dataclass
class SampleRecord(_Record):
    """One finished (or failed) sample.

    Attributes:
        id: The task's name for the sample.
        status: ``ok``, ``failed`` (see ``error``) or ``oom``.
        error: Why it did not finish, or, of one that did, why it could not be compared with the unpruned run; one line.
        width, height: Image size in pixels.
        tiles: Tiles fed to the vision tower, thumbnail included.
        visual_tokens, text_tokens: Prompt tokens of each kind.
        kept_visual_tokens: Visual tokens each decoder layer saw in prefill, one entry a layer.
        kv_tokens_planned, kv_tokens_found: KV length of each layer after prefill, as pruning planned it and as it was.
        kv_bytes_per_layer: Bytes of each layer's KV storages after prefill.
        answer: Decoded text where weights are real, else None.
        score: The task's score of the answer in [0, 1], or None.
        category: The task's category, or None.
        tokens: One entry a token.
        peak_token: Token in which the sample's highest instant fell.
        peak_phase: ``vision``, ``prefill`` or ``decode``.
        vision_peak_bytes: Highest allocated bytes while the vision encoder ran.
        peak_parts: Dynamic bytes of each part at the highest instant; they sum to ``dynamic_peak_bytes``.
        token_parts: Dynamic bytes of each part at each token's own highest instant, one entry a token; they sum to the
            token's ``peak_allocated_bytes`` less static bytes. Parts that are zero throughout are left out.
        peak_holders: The largest tensors alive at that instant.
        dynamic_peak_bytes: Highest allocated bytes minus the run's static bytes.
        fidelity: Agreement with the unpruned run on the same inputs, where weights are real.
    """

    id: str
    status: str = "ok"
    error: str | None = None
    width: int = 0
    height: int = 0
    tiles: int = 0
    visual_tokens: int = 0
    text_tokens: int = 0
    kept_visual_tokens: list[int] = field(default_factory=list)
    kv_tokens_planned: list[int] = field(default_factory=list)
    kv_tokens_found: list[int] = field(default_factory=list)
    kv_bytes_per_layer: list[int] = field(default_factory=list)
    answer: str | None = None
    score: float | None = None
    category: str | None = None
    tokens: TokenColumns = field(default_factory=TokenColumns)
    peak_token: int = 0
    peak_phase: str = ""
    vision_peak_bytes: int = 0
    peak_parts: dict[str, int] = field(default_factory=dict)
    token_parts: dict[str, list[int]] = field(default_factory=dict)
    peak_holders: list[Holder] = field(default_factory=list)
    dynamic_peak_bytes: int = 0
    fidelity: dict[str, float] | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The sample in ``data``, its nested records rebuilt."""
        sample = super().from_json(data)
        sample.tokens = TokenColumns.from_json(data.get("tokens", {}))
        sample.peak_holders = [Holder.from_json(h) for h in data.get("peak_holders", [])]
        return sample

    @property
    def ok(self) -> bool:
        """Whether the sample finished."""
        return self.status == "ok"

    @property
    def peak_allocated_bytes(self) -> int:
        """Highest allocated bytes over all tokens."""
        return max(self.tokens.peak_allocated_bytes, default=0)

    @property
    def peak_reserved_bytes(self) -> int:
        """Highest reserved bytes over all tokens."""
        return max(self.tokens.reserved_bytes, default=0)

    @property
    def kv_cache_bytes(self) -> int:
        """Highest KV cache bytes over all tokens."""
        return max(self.tokens.kv_bytes, default=0)


@dataclass
class RunSpec(_Record):
    """What was asked for: two runs with equal specs are the same experiment.

    ``method`` is a canonical spec string; ``data`` is ``bundled``, ``hub`` or a path; ``weights`` is ``random``,
    ``hub`` or a path; ``max_tiles`` is None for the model's own; ``fidelity`` is whether samples are compared with the
    unpruned run.
    """

    model: str
    method: str
    task: str
    device: str
    stack: str = "current"
    dtype: str = "bfloat16"
    attention: str = "sdpa"
    weights: str = "random"
    data: str = "bundled"
    max_new_tokens: int = 16
    max_tiles: int | None = None
    limit: int | None = None
    shard: str | None = None
    warmup: int = 1
    seed: int = 0
    gpu: str | None = None
    fidelity: bool = False


@dataclass
class RunRecord(_Record):
    """``run.json``: the experiment, where it ran, and its totals.

    Attributes:
        spec: What was asked for.
        status: ``measured`` or ``predicted``.
        environment: Versions, device, driver, dtype, attention asked for and got, allocator settings, git commit.
        static_bytes: Allocated bytes once the model is loaded and warmed up.
        static_parts: Static bytes by part (``vision``, ``language``, ``embeddings``, ``head``, ``workspaces``).
        layers: Decoder layers of the language model.
        data_label: How the data are to be named wherever they are shown.
        visual_flops_cut: Share of visual-token FLOPs the method removes, mean over samples, or None before the end.
        complete: Whether every sample asked for has a line.
        notes: Things a reader must know (no NVML, say).
    """

    spec: RunSpec
    status: Status
    environment: dict[str, Any] = field(default_factory=dict)
    static_bytes: int = 0
    static_parts: dict[str, int] = field(default_factory=dict)
    layers: int = 0
    data_label: str = ""
    visual_flops_cut: float | None = None
    complete: bool = False
    notes: list[str] = field(default_factory=list)
    totals: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The run in ``data``, its spec rebuilt."""
        run = super().from_json(data)
        run.spec = RunSpec.from_json(data["spec"])
        return run


@dataclass
class Run:
    """A run and its samples, as read from a folder or just made."""

    record: RunRecord
    samples: list[SampleRecord]
    path: str | None = None

    @property
    def finished(self) -> list[SampleRecord]:
        """Samples that ended well, in order."""
        return [s for s in self.samples if s.ok]

    @property
    def highest(self) -> SampleRecord | None:
        """The sample with the highest dynamic peak (the first of equals), or None."""
        return max(self.finished, key=lambda s: s.dynamic_peak_bytes, default=None)


def summarize(run: Run) -> dict[str, Any]:
    """One run as the object that ``--json`` prints (DESIGN: the command line). Missing numbers are None, never 0."""
    spec, record, done, top = run.record.spec, run.record, run.finished, run.highest
    accuracy, fidelity = quality(run)
    return {
        "model": spec.model,
        "method": spec.method,
        "task": spec.task,
        "data": record.data_label,
        "device": spec.device,
        "status": record.status,
        "stack": spec.stack,
        "samples": len(done),
        "failed": len(run.samples) - len(done),
        "tokens": sum(len(s.tokens) for s in done),
        "static_bytes": record.static_bytes,
        "dynamic_peak_bytes": top.dynamic_peak_bytes if top else None,
        "peak_allocated_bytes": max((s.peak_allocated_bytes for s in done), default=None),
        "peak_reserved_bytes": max((s.peak_reserved_bytes for s in done), default=None),
        "kv_cache_bytes": max((s.kv_cache_bytes for s in done), default=None),
        "parts": {p: top.peak_parts.get(p, 0) for p in PARTS} if top else None,
        "visual_flops_cut": record.visual_flops_cut,
        "accuracy": accuracy.mean if accuracy else None,
        "accuracy_interval": accuracy.to_json() if accuracy else None,
        "fidelity": {name: interval.to_json() for name, interval in fidelity.items()} or None,
        "path": run.path,
    }


def quality(run: Run) -> tuple[Interval | None, dict[str, Interval]]:
    """The mean score of a run's samples and the mean of each of their fidelity measures, with bootstrap intervals.

    None, and nothing, where weights were random or nothing ran.
    """
    from memprof.intervals import bootstrap, intervals

    scores = [s.score for s in run.finished if s.score is not None]
    return bootstrap(scores) if scores else None, intervals([s.fidelity for s in run.finished if s.fidelity])


def mean_fidelity(samples: Iterable[SampleRecord]) -> dict[str, float] | None:
    """Mean of each fidelity measure over the samples that have one, or None."""
    rows = [s.fidelity for s in samples if s.fidelity]
    return {k: sum(r[k] for r in rows) / len(rows) for k in rows[0]} if rows else None
