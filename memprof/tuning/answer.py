"""What the trials of a session say: the best of them, the front, the floor, and what each field does."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from memprof.errors import DoesNotFit, MemprofError
from memprof.plugins import split_spec
from memprof.tuning import Question, Trial
from memprof.units import format_bytes

#: How :func:`sensitivity` reads a field; shown wherever it is shown.
SENSITIVITY = "how much of the peak's variation lies between groups of trials with like values (correlation ratio)"
_GROUPS = 5


def best_of(question: Question, trials: Sequence[Trial]) -> Trial | None:
    """The setting to take: under a budget the one that loses least, else the cheapest within the allowed loss."""

    def rank(trial: Trial) -> tuple[float, float, int]:
        assert trial.result is not None
        cost, lost = trial.result.cost(question.objective), trial.result.forgone
        return (lost, cost, trial.number) if question.budget_bytes is not None else (cost, lost, trial.number)

    return min((trial for trial in trials if trial.good), key=rank, default=None)


def best_by_method(question: Question, trials: Sequence[Trial]) -> dict[str, Trial | None]:
    """The best setting of each method at the same budget, by the method as it was asked for."""
    return {m: best_of(question, [t for t in trials if _is(t, m, question)]) for m in question.methods}


def front_of(question: Question, trials: Sequence[Trial]) -> list[Trial]:
    """Trials that no other is better than in both cost and loss, the cheapest first; whether they fit or not."""
    whole = [(t.result.cost(question.objective), t.result.forgone, t) for t in trials if t.whole and t.result]
    front: list[Trial] = []
    least = float("inf")
    for _, lost, trial in sorted(whole, key=lambda row: (row[0], row[1], row[2].number)):
        if lost < least:
            front.append(trial)
            least = lost
    return front


def floor_of(trials: Sequence[Trial]) -> Trial | None:
    """The trial with the least peak, or None where none has one."""
    known = [t for t in trials if t.result and t.result.peak_allocated_bytes and t.result.status != "oom"]
    return min(known, key=lambda t: (t.result.peak_allocated_bytes if t.result else 0, t.number), default=None)


def nothing_found(question: Question, trials: Sequence[Trial], static_bytes: int | None, unit: str) -> MemprofError:
    """Why no trial is good, in one line: the floor and who holds it, or the least loss."""
    floor, budget = floor_of(trials), question.budget_bytes
    failed = next((t.result.error for t in trials if t.result and t.result.status == "failed"), None)
    if floor is None or floor.result is None:
        return MemprofError(f"no trial finished; the first failed with: {failed}" if failed else "no trial finished")
    if budget is not None and not any(t.fits for t in trials):
        needs = floor.result.peak_allocated_bytes
        held = f"most of what lies above the weights is held by {floor.result.held_by}"
        if static_bytes is not None:
            weights = format_bytes(static_bytes, unit)
            held = f"{weights} are weights, and of the {format_bytes(needs - static_bytes, unit)} above them {held}"
            held = held.replace("most of what lies above the weights is", "most is")
            if static_bytes > budget:
                held = f"its weights alone, {weights}, are more than that"
        return DoesNotFit(
            f"nothing tried fits {format_bytes(budget, unit)}: the floor is {format_bytes(needs, unit)} with "
            f"{floor.method}; {held}"
        )
    lost = [t.result.forgone for t in trials if t.whole and t.result and t.fits is not False]
    least = f"; the least was {min(lost):.4f}" if lost else ""
    return MemprofError(
        f"none of {len(trials)} trials loses {question.max_loss} or less{least}; allow more, or --trials"
    )


def sensitivity(question: Question, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """What each field that was searched does to the peak, by method, the strongest first.

    ``share`` is the correlation ratio: between-group over total variance of the peak, with choices as groups, and
    numbers in groups of equal size. ``span_bytes`` is the difference between the highest and the lowest group mean.
    """
    found = []
    for method, fields in question.fields.items():
        whole = [t for t in trials if t.whole and t.result and _is(t, method, question)]
        for field in fields:
            rows = [(t.params[field.name], t.result.peak_allocated_bytes) for t in whole if t.result]
            if len({value for value, _ in rows}) < 2:
                continue
            groups = _groups(rows, numbers=field.choices is None)
            every = [peak for group in groups for peak in group]
            mean = sum(every) / len(every)
            total = sum((peak - mean) ** 2 for peak in every)
            means = [sum(group) / len(group) for group in groups]
            between = sum(len(group) * (m - mean) ** 2 for group, m in zip(groups, means, strict=True))
            found.append(
                {
                    "method": method, "field": field.name, "share": between / total if total else 0.0,
                    "span_bytes": round(max(means) - min(means)), "trials": len(every),
                }
            )  # fmt: skip
    return sorted(found, key=lambda row: -row["share"])


def _groups(rows: Sequence[tuple[Any, int]], *, numbers: bool) -> list[list[int]]:
    if not numbers or len({value for value, _ in rows}) <= _GROUPS:
        return [[peak for other, peak in rows if other == value] for value in dict.fromkeys(v for v, _ in rows)]
    ordered = [peak for _, peak in sorted(rows)]
    edges = [round(i * len(ordered) / _GROUPS) for i in range(_GROUPS + 1)]
    return [ordered[a:b] for a, b in pairwise(edges) if b > a]


def _is(trial: Trial, method: str, question: Question) -> bool:
    """Whether a trial belongs to ``method``, told by its name and by what that fixes."""
    name, fixed = split_spec(method)
    there, values = split_spec(trial.method)
    if name != there:
        return False
    like = [m for m in question.methods if split_spec(m)[0] == name]
    return len(like) == 1 or all(values.get(key) == value for key, value in fixed.items())
