"""What a run leaves behind: plain data, readable without torch.

Bytes are integers, times are seconds. A list under ``tokens`` has one entry a token: entry 0 is prefill (vision encoder
included), entry t is the t-th decode step.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict, get_args

from memprof.errors import BadValue
from memprof.plain import Plain, check_values
from memprof.plugins import split_spec
from memprof.prompts import Shape

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
#: ``RunSpec.data`` and ``RunSpec.weights`` of a run that a program made with what it had: no command can make it again.
GIVEN = "given"


@dataclass
class TokenColumns(Plain):
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

    def __post_init__(self) -> None:
        """What a record says nothing of is not known, token by token."""
        for name in ("device_used_bytes", "seconds"):
            if not getattr(self, name) and len(self):
                setattr(self, name, [None] * len(self))

    def check(self) -> None:
        """Raise ValueError where a column is shorter than another, or holds what cannot be."""
        for name, column in vars(self).items():
            if len(column) != len(self):
                raise ValueError(f"tokens.{name} has {len(column)} entries, peak_allocated_bytes has {len(self)}")
            if not all(n is None or 0 <= n < math.inf for n in column):
                raise ValueError(f"tokens.{name} holds a number below 0, or none at all")


@dataclass(frozen=True)
class Token:
    """One token of one sample: a row of :class:`TokenColumns`.

    Attributes:
        sample: Id of the sample.
        token: Its number; 0 is prefill, the vision encoder included.
        peak_allocated_bytes, allocated_bytes, reserved_bytes, kv_bytes, device_used_bytes: In bytes, as in
            :class:`TokenColumns`.
        seconds: Wall time in seconds, or None in a prediction.
        parts: Dynamic bytes of each part at the token's own highest instant; parts that hold nothing are left out.
    """

    sample: str
    token: int
    peak_allocated_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    kv_bytes: int
    device_used_bytes: int | None
    seconds: float | None
    parts: dict[str, int]


@dataclass
class Holder(Plain):
    """One tensor alive at the instant of a peak.

    Attributes:
        bytes: Of its storage: as asked for on the CPU, of its block on a card.
        part: What it belongs to, one of :data:`PARTS`.
        module: Path of the module that made it; empty outside any layer.
        op: The operator that made it.
        shape, dtype: Of the first tensor on the storage.
        phase: ``vision``, ``prefill`` or ``decode``: when it was made.
        line: The line of code that made it, the innermost that is not torch's, as
            ``transformers/models/qwen2/modeling_qwen2.py:46``; empty where nobody noted it.
    """

    bytes: int
    part: str
    module: str
    op: str
    shape: list[int]
    dtype: str
    phase: str
    line: str = ""


class Peaks(Plain):
    """Of a record with columns of tokens: what is highest over all of them."""

    tokens: TokenColumns

    @property
    def peak_allocated_bytes(self) -> int:
        """Highest allocated bytes over all tokens."""
        return max(self.tokens.peak_allocated_bytes, default=0)

    @property
    def peak_reserved_bytes(self) -> int:
        """Highest reserved bytes over all tokens."""
        return max(self.tokens.reserved_bytes, default=0)


@dataclass
class CardMemory(Peaks):
    """What one card held while a sample ran; the fields are those of :class:`SampleRecord`."""

    tokens: TokenColumns
    peak_token: int
    peak_phase: str
    vision_peak_bytes: int
    peak_parts: dict[str, int]
    token_parts: dict[str, list[int]]
    peak_holders: list[Holder]
    dynamic_peak_bytes: int


@dataclass
class Memory(Plain):
    """What one prompt took: on each card, one today, and in the cache, layer by layer.

    Attributes:
        cards: The cards, in the order the model lies on them.
        kept_visual_tokens, kv_tokens_planned, kv_tokens_found, kv_bytes_per_layer: As in :class:`SampleRecord`.
        refused: The allocation a card of the size asked for would have refused, in words, or None. Then the columns end
            with the last token that was done before.
    """

    cards: list[CardMemory]
    kept_visual_tokens: list[int]
    kv_tokens_planned: list[int]
    kv_tokens_found: list[int]
    kv_bytes_per_layer: list[int]
    refused: str | None = None

    @property
    def fullest(self) -> CardMemory:
        """The card whose peak is highest; the first of equals."""
        return max(self.cards, key=lambda card: card.peak_allocated_bytes)


@dataclass
class SampleRecord(Peaks):
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
        shape: The prompt's sizes; None in records of earlier versions, which keep only their sums.
        other_cards: What the other cards held, where the model lay on several; everything above is of the fullest.
        caller: The file and line of a program that called ``generate()``, as ``demo.py:12``; None of a task's sample.
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
    shape: Shape | None = None
    other_cards: list[CardMemory] = field(default_factory=list)
    caller: str | None = None

    def of_prompt(self, shape: Shape) -> SampleRecord:
        """This record with the sizes of its prompt."""
        return replace(
            self, shape=shape, tiles=shape.tiles, visual_tokens=shape.visual_tokens, text_tokens=shape.text_tokens
        )

    def with_memory(self, memory: Memory) -> SampleRecord:
        """This record with what its prompt took."""
        fullest, cache = memory.fullest, {k: v for k, v in vars(memory).items() if k not in ("cards", "refused")}
        others = [card for card in memory.cards if card is not fullest]
        return replace(self, **cache, **vars(fullest), other_cards=others)

    @property
    def memory(self) -> Memory:
        """What its prompt took, the fullest card first."""
        own = {f.name: getattr(self, f.name) for f in fields(CardMemory)}
        cache = {f.name: getattr(self, f.name) for f in fields(Memory) if f.name not in ("cards", "refused")}
        refused = self.error if self.status == "oom" else None
        return Memory([CardMemory(**own), *self.other_cards], **cache, refused=refused)

    def rows(self) -> list[Token]:
        """One :class:`Token` for each that was made; what a column of an earlier version lacks is None."""
        columns, found = vars(self.tokens), list[Token]()
        for number in range(len(self.tokens)):
            row: dict[str, Any] = {name: column[number] if column else None for name, column in columns.items()}
            parts = {part: held[number] for part, held in self.token_parts.items() if held[number]}
            found.append(Token(self.id, number, **row, parts=parts))
        return found

    def check(self) -> None:
        """Raise ValueError where a number is none that can be: a time that is NaN, bytes below 0, a score above 1."""
        self.tokens.check()
        for card in self.other_cards:
            card.tokens.check()
        for part, held in self.token_parts.items():
            if len(held) != len(self.tokens):
                raise ValueError(f"token_parts.{part} has {len(held)} entries for {len(self.tokens)} tokens")
        for name in ("width", "height", "tiles", "visual_tokens", "text_tokens", "peak_token", "vision_peak_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, and below 0")
        for name in ("kept_visual_tokens", "kv_tokens_planned", "kv_tokens_found", "kv_bytes_per_layer"):
            if min(getattr(self, name), default=0) < 0:
                raise ValueError(f"{name} holds a number below 0")
        if self.score is not None and not 0 <= self.score <= 1:
            raise ValueError(f"the score is {self.score}, and not between 0 and 1")
        if not all(map(math.isfinite, (self.fidelity or {}).values())):
            raise ValueError("a measure of fidelity is no number")

    @property
    def ok(self) -> bool:
        """Whether the sample finished."""
        return self.status == "ok"

    @property
    def kv_cache_bytes(self) -> int:
        """Highest KV cache bytes over all tokens."""
        return max(self.tokens.kv_bytes, default=0)


@dataclass
class RunSpec(Plain):
    """What was asked for: two runs with equal specs are the same experiment.

    ``method`` is a canonical spec string; ``data`` is ``bundled``, ``hub`` or a path; ``weights`` is ``random``,
    ``hub`` or a path; both are ``given`` where a program brought its own prompts and model, and then ``max_new_tokens``
    are the most that a call made; ``max_tiles`` is None for the model's own; ``text_tokens`` is the length of every
    question where it was given, None for each sample's own; ``images`` is how many pictures every prompt shows, its
    sample's in turn, and ``batch`` how many like it run side by side, None for as the data say; ``fidelity`` is whether
    samples are compared with the unpruned run.
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
    text_tokens: int | None = None
    images: int | None = None
    batch: int | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """As of any plain data; a method or a shard that nobody can have asked for is damage as well."""
        spec = super().from_json(data)
        try:
            split_spec(spec.method)
        except BadValue as error:
            raise ValueError(f"method: {error}") from None
        if spec.shard is not None and not _is_shard(spec.shard):
            raise ValueError(f"shard is {spec.shard[:40]!r}, and not i/n with 1 <= i <= n")
        return spec


def _is_shard(text: str) -> bool:
    """Whether ``text`` is ``i/n`` with 1 <= i <= n."""
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    return found is not None and 1 <= int(found[1]) <= int(found[2])


class Environment(TypedDict, total=False):
    """What is read of :attr:`RunRecord.environment`: any key may be missing, and others may be there."""

    memprof: str | None
    git_commit: str | None
    python: str | None
    platform: str | None
    torch: str | None
    transformers: str | None
    packages: dict[str, str | None]
    allocator_settings: dict[str, str | None]
    dtype: str | None
    attention: dict[str, str | None]
    positions: str | None
    gpu: str | None
    gpu_memory_bytes: int | None
    gpu_context_bytes: int | None
    gpu_source: str | None
    compute_capability: str | None
    cuda: str | None
    cudnn: int | None
    driver: str | None
    device_bytes_of: str | None
    allocator: str | None
    attribution: str | None
    cuda_visible_devices: str | None
    cublas_workspace_config: str | None


class Totals(TypedDict, total=False):
    """What is read of :attr:`RunRecord.totals`; the rest is for other programs, and is made anew from the samples."""

    samples: int | None
    failed: int | None
    peak_allocated_bytes: int | None


@dataclass
class RunRecord(Plain):
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
        samples_asked: How many samples the run is to have; None in records of earlier versions.
        configuration: The model's ``config.json`` where ``spec.model`` alone does not find it again, else None.
        notes: Things a reader must know (no NVML, say).
        totals: What :func:`summarize` says of the run, once there are samples; bytes.
        schema: Of the file: what a later version reads it by.
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
    samples_asked: int | None = None
    configuration: dict[str, Any] | None = None
    schema: int = SCHEMA

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """As of any plain data, and what has no class of its own is looked through too: nobody behind needs to."""
        record = super().from_json(data)
        check_values(Environment, "environment", record.environment)
        check_values(Totals, "totals", record.totals)
        counts = {
            "static_bytes": record.static_bytes, "layers": record.layers, "samples_asked": record.samples_asked,
            "environment.gpu_context_bytes": record.environment.get("gpu_context_bytes"),
            **{f"static_parts.{name}": n_bytes for name, n_bytes in record.static_parts.items()},
        }  # fmt: skip
        for name, count in counts.items():
            if count is not None and count < 0:
                raise ValueError(f"{name} is {count}, and below 0")
        return record


@dataclass
class Run:
    """A run and its samples, as read from a folder or just made.

    Attributes:
        record: The experiment, where it ran, and its totals.
        samples: One record a sample, failed ones included, in order.
        path: The folder it was read from, or None.
        healed: What of the folder was damaged and how that was mended in reading it, a line each.
    """

    record: RunRecord
    samples: list[SampleRecord]
    path: str | None = None
    healed: list[str] = field(default_factory=list)

    @property
    def unfinished(self) -> str | None:
        """``'9 of 48 samples'`` where a run is not whole, in words where nobody knows how many it was to have."""
        asked = self.record.samples_asked
        if asked is not None and len(self.samples) < asked:
            return f"{len(self.samples)} of {asked} samples"
        if asked == 0:
            return "no sample falls into it"
        return "it was not finished" if self.path is not None and not self.record.complete else None

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
        "gpu": record.environment.get("gpu") or spec.gpu,
        "status": record.status,
        "stack": spec.stack,
        "samples": len(done),
        "samples_asked": record.samples_asked,
        "complete": run.unfinished is None,
        "failed": len(run.samples) - len(done),
        "tokens": sum(len(s.tokens) for s in done),
        "static_bytes": record.static_bytes,
        "dynamic_peak_bytes": top.dynamic_peak_bytes if top else None,
        "peak_allocated_bytes": max((s.peak_allocated_bytes for s in done), default=None),
        "peak_reserved_bytes": max((s.peak_reserved_bytes for s in done), default=None),
        "device_bytes": device_bytes(run),
        "kv_cache_bytes": max((s.kv_cache_bytes for s in done), default=None),
        "parts": {p: top.peak_parts.get(p, 0) for p in PARTS} if top else None,
        "visual_flops_cut": record.visual_flops_cut,
        "accuracy": accuracy.mean if accuracy else None,
        "accuracy_interval": accuracy.to_json() if accuracy else None,
        "fidelity": {name: interval.to_json() for name, interval in fidelity.items()} or None,
        "path": run.path,
    }


def device_bytes(run: Run) -> int | None:
    """The most that nvidia-smi would show of the process: static, dynamic, cached and the CUDA context.

    Measured where the driver was asked; of a prediction, what was reserved and the card's context. None on a CPU, and
    in records of earlier versions, which do not say what context was assumed.
    """
    asked = [used for s in run.finished for used in s.tokens.device_used_bytes if used is not None]
    if asked:
        return max(asked)
    context = run.record.environment.get("gpu_context_bytes")
    reserved = max((s.peak_reserved_bytes for s in run.finished), default=None)
    return None if context is None or reserved is None or run.record.status != "predicted" else reserved + context


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
