"""The search over pruning ratios: from a budget of bytes, or a loss that is allowed, to a setting.

``space`` knows what a method lets a search change, ``trials`` predicts or measures
one setting, ``study`` keeps the trials in an Optuna study that any number of workers share, ``answer`` reads it,
``preset`` writes down what it says.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol

from memprof.errors import BadValue, UnknownName, UsageError
from memprof.meters import METERS
from memprof.records import RunSpec
from memprof.tuning.space import Field, fields_of, searchable

#: What a session may make small beside the loss.
OBJECTIVES: tuple[str, ...] = ("memory", "flops", "time")


@dataclass(frozen=True)
class Question:
    """What a tuning session is asked: sessions with equal questions are one study.

    Attributes:
        spec: Model, task, data, device and stack of every trial; its ``method`` is not looked at.
        methods: Spec strings; what one fixes is not searched.
        budget_bytes: Highest allocated bytes at any instant, weights included, or None.
        max_loss: Most that a setting may lose (see :attr:`Result.loss`), or None.
        objective: What is made small beside the loss, one of :data:`OBJECTIVES`.
        search: Names of the fields to search, or None for those that :func:`~memprof.tuning.space.fields_of` chooses.
    """

    spec: RunSpec
    methods: tuple[str, ...]
    budget_bytes: int | None = None
    max_loss: float | None = None
    objective: str = "memory"
    search: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.budget_bytes is None and self.max_loss is None:
            raise UsageError("give --budget SIZE, or --max-loss SHARE where weights are real, or both")
        if self.objective not in OBJECTIVES:
            raise UnknownName("objective", self.objective, OBJECTIVES)
        if self.max_loss is not None and not 0 <= self.max_loss <= 1:
            raise BadValue(f"max_loss={self.max_loss} is outside [0, 1]")
        if self.max_loss is not None and not self.quality:
            raise UsageError(
                "--max-loss needs trained weights and a device that measures: --weights hub, a checkpoint's path or "
                "--model proving, with --device cuda or cpu"
            )
        if self.objective == "time" and not self.measured:
            raise UsageError("--objective time needs a device that measures; predictions have no seconds")
        known = {field.name: None for method in self.methods for field in searchable(method)}
        for name in self.search or ():
            if name not in known:
                raise UnknownName("searchable field", name, known)
        if len(set(self.methods)) < len(self.methods):
            raise UsageError("a method is given twice; write it once, its fields are searched")

    @property
    def measured(self) -> bool:
        """Whether trials are measured."""
        return METERS.load(self.spec.device).status == "measured"

    @property
    def quality(self) -> bool:
        """Whether trials measure what a setting loses: trained weights that really run."""
        return self.measured and self.spec.weights != "random"

    @property
    def fields(self) -> dict[str, tuple[Field, ...]]:
        """The fields searched, by method."""
        return {method: fields_of(method, self.search, quality=self.quality) for method in self.methods}

    @property
    def bisects(self) -> bool:
        """Whether each method is one monotone number against a budget, so that nothing needs to be sampled."""
        one_number = all(not f or (len(f) == 1 and f[0].monotone) for f in self.fields.values())
        return one_number and self.budget_bytes is not None and self.max_loss is None and self.objective == "memory"

    def to_json(self) -> dict[str, Any]:
        """This question as plain data."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Result:
    """What one setting turned out to need and to lose.

    Attributes:
        status: ``predicted``, ``measured``, ``not launched`` (predicted not to fit), ``oom``, or ``failed``.
        peak_allocated_bytes, peak_reserved_bytes: Highest over all samples, weights included; of an ``oom`` trial, over
            those that finished.
        device_bytes: As nvidia-smi would show it at its highest: reserved, and the CUDA context; None on a CPU.
        visual_flops_cut: Share of visual-token FLOPs removed, mean over samples.
        kept_share: Share of visual tokens that decoder layers see, mean over layers and samples.
        accuracy: The task's score, where answers were scored.
        agreement: Share of tokens written as the unpruned model writes them, where that was measured.
        loss: What the setting loses, where that was measured: 1 - agreement, or where tokens were not compared the
            accuracy of the unpruned model (1 where that does not run) minus its own.
        seconds: Wall time of a sample, mean, where measured.
        held_by: Who holds most of the peak above the weights, in words.
        error: One line, or None.
    """

    status: str
    peak_allocated_bytes: int = 0
    peak_reserved_bytes: int = 0
    visual_flops_cut: float = 0.0
    kept_share: float = 1.0
    accuracy: float | None = None
    agreement: float | None = None
    loss: float | None = None
    seconds: float | None = None
    held_by: str = ""
    error: str | None = None
    device_bytes: int | None = None

    def cost(self, objective: str) -> float:
        """What is made small: bytes, the share of visual-token FLOPs that is left, or seconds a sample."""
        costs = {"memory": self.peak_allocated_bytes, "flops": 1 - self.visual_flops_cut, "time": self.seconds}
        return float(costs[objective] or 0)

    @property
    def forgone(self) -> float:
        """What is lost, or where that is not measured the share of visual tokens that layers do not see."""
        return 1 - self.kept_share if self.loss is None else self.loss


class Evaluate(Protocol):
    """One setting, predicted or measured."""

    def __call__(self, method: str, name: str) -> Result:
        """What ``method``, a full spec string, needs; ``name`` is the trial's own, also when it is taken up again."""


@dataclass(frozen=True)
class Trial:
    """One row of a session.

    Attributes:
        number: Its number in the study.
        method: The full spec string.
        params: The values that were searched, by field.
        fits: Whether it keeps to the budget, or None where none was given.
        within_loss: Whether it keeps to the allowed loss, or None where none was given or nothing was measured.
        result: What was found, or None while it runs.
        worker: Who runs or ran it.
    """

    number: int
    method: str
    params: dict[str, Any]
    fits: bool | None
    within_loss: bool | None
    result: Result | None
    worker: str

    @property
    def whole(self) -> bool:
        """Whether it was evaluated to the end."""
        return self.result is not None and self.result.status in ("predicted", "measured")

    @property
    def good(self) -> bool:
        """Whether it keeps to everything that was asked."""
        return self.whole and self.fits is not False and self.within_loss is not False

    def to_json(self) -> dict[str, Any]:
        """This row as plain data."""
        found = dataclasses.asdict(self.result) if self.result is not None else {"status": "running"}
        return {
            "number": self.number, "method": self.method, "params": self.params, "fits": self.fits,
            "within_loss": self.within_loss, **found,
        }  # fmt: skip
