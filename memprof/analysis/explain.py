"""Who holds a run's highest instant, and what would lower it.

The first half is read from the record, measured or predicted. The second is predicted always: every change is run again
on the same prompt (:mod:`memprof.analysis.whatif`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from memprof.analysis.whatif import COUNTERFACTUALS, Benches, Change, all_exact, floor
from memprof.errors import DataError, MemprofError, UnknownName
from memprof.families import Model
from memprof.forks import shared
from memprof.models import find
from memprof.plugins import split_spec
from memprof.prompts import Shape
from memprof.pruning import build_pruner, method_name
from memprof.records import ATTENTIONS, GIVEN, PARTS, Holder, Run, SampleRecord
from memprof.telling.holders import leading_part, words_for
from memprof.telling.palette import PART_LABELS, model_label
from memprof.units import format_bytes, unit_for

#: Dtypes of weights that are predicted.
DTYPES = ("bfloat16", "float16", "float32")
#: Called before each prediction with what is about to be predicted.
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Answer:
    """One change, carried out. All bytes are predicted.

    Attributes:
        name, how, exact: As in :class:`~memprof.analysis.whatif.Change`.
        dynamic_peak_bytes: The new peak, above static.
        saved_bytes: What it lies below the same prediction without the change (negative: above).
        holder: The part that holds most of it then.
        words: The same in words.
        phase: Where the new peak falls.
        refused: Why it could not be predicted, or None.
    """

    name: str
    how: str
    exact: bool
    dynamic_peak_bytes: int = 0
    saved_bytes: int = 0
    holder: str = ""
    words: str = ""
    phase: str = ""
    refused: str | None = None


@dataclass(frozen=True)
class Explanation:
    """A sample's highest instant. Bytes are absolute only where the name says allocated, reserved or device.

    Attributes:
        model, method: Titles.
        spec: What the run was.
        status: ``measured`` or ``predicted``.
        sample: Its id; ``tiles``, ``visual_tokens`` and ``text_tokens`` are its sizes.
        peak_allocated_bytes: The highest instant, in token ``token`` and phase ``phase``.
        static_bytes, static_parts: What was there before.
        dynamic_peak_bytes: The rest, split into ``parts``.
        holder: The part that holds most; ``words`` says it; ``share`` is its share of the dynamic bytes.
        rounding_bytes: What the allocator had reserved beyond what was allocated, in that token: rounding and
            fragmentation.
        context_bytes: What the driver said beyond what was reserved: the CUDA context; None where it was not asked.
        holders: The largest tensors alive then.
        predicted_peak_bytes: The same dynamic peak, predicted: what the answers are held against; None without them.
        answers: What would lower it, best first.
        floor: The least that pruning visual tokens alone can reach, or None where it does not apply.
        notes: What a reader must know.
    """

    model: str
    method: str
    spec: dict[str, Any]
    status: str
    sample: str
    tiles: int
    visual_tokens: int
    text_tokens: int
    token: int
    phase: str
    peak_allocated_bytes: int
    static_bytes: int
    static_parts: dict[str, int]
    dynamic_peak_bytes: int
    parts: dict[str, int]
    holder: str
    words: str
    share: float
    rounding_bytes: int
    context_bytes: int | None
    holders: list[Holder]
    predicted_peak_bytes: int | None = None
    answers: list[Answer] = field(default_factory=list)
    floor: Answer | None = None
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As plain dicts and lists, bytes as integers."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """The sentence, who holds it, what would lower it, and the notes: a line each."""
        unit = unit_for(self.dynamic_peak_bytes)

        def size(n_bytes: int) -> str:
            return format_bytes(n_bytes, unit, 2)

        held = sorted(((n, part) for part, n in self.parts.items() if n), reverse=True)
        lowering = [answer for answer in self.answers if not answer.refused and answer.saved_bytes > 0]
        return "\n".join(
            [
                sentence(self, size),
                f"Held by ({self.status}): {', '.join(f'{PART_LABELS[part]} {size(n)}' for n, part in held)}.",
                *(
                    f"{answer.name}: {size(answer.dynamic_peak_bytes)}, {size(answer.saved_bytes)} less (predicted"
                    f"{'' if answer.exact else '; may change answers'})."
                    for answer in lowering
                ),
                *filter(None, [floor_sentence(self, size)]),
                *(f"Note: {note}." for note in self.notes),
            ]
        )


def explain(
    run: Run,
    sample: str | None = None,
    *,
    what_if: bool = True,
    benches: Benches | None = None,
    progress: Progress | None = None,
) -> Explanation:
    """Explain the highest instant of ``run``, or of one of its samples.

    Args:
        run: As :func:`memprof.store.read_run` gives it.
        sample: A sample's id; None for the one with the highest peak.
        what_if: Also predict what would lower the peak.
        benches: One to share between runs; made if None.
        progress: Told of each prediction before it is made.

    Raises:
        DataError: The run has no finished sample, or the sizes of a task's prompt cannot be rebuilt. Where a model, or
            a program's own prompt, cannot be predicted, a note says so.
        UnknownName: No finished sample is called so.
    """
    chosen = _sample(run, sample)
    spec, columns = run.record.spec, chosen.tokens
    pruner, model = build_pruner(spec.method, spec.stack), _model_of(run)
    part = leading_part(chosen.peak_parts)
    token = chosen.peak_token
    used = columns.device_used_bytes[token] if token < len(columns.device_used_bytes) else None
    found = Explanation(
        model=model_label(spec.model) if isinstance(model, str) else model.title,
        method=pruner.title,
        spec=spec.to_json(),
        status=run.record.status,
        sample=chosen.id,
        tiles=chosen.tiles,
        visual_tokens=chosen.visual_tokens,
        text_tokens=chosen.text_tokens,
        token=token,
        phase=chosen.peak_phase,
        peak_allocated_bytes=chosen.peak_allocated_bytes,
        static_bytes=chosen.peak_allocated_bytes - chosen.dynamic_peak_bytes,
        static_parts=dict(run.record.static_parts),
        dynamic_peak_bytes=chosen.dynamic_peak_bytes,
        parts={p: chosen.peak_parts.get(p, 0) for p in PARTS},
        holder=part,
        words=words_for(part, chosen.peak_holders),
        share=chosen.peak_parts[part] / chosen.dynamic_peak_bytes,
        rounding_bytes=columns.reserved_bytes[token] - columns.peak_allocated_bytes[token],
        context_bytes=None if used is None else used - columns.reserved_bytes[token],
        holders=chosen.peak_holders,
    )
    if not what_if:
        return found
    why = model if isinstance(model, str) else _unpredictable(run, chosen)
    if isinstance(model, str) or why:
        return dataclasses.replace(found, notes=[f"what would lower it is not predicted: {why}"])
    asked = dataclasses.replace(spec, method=method_name(pruner))
    if spec.data == GIVEN:
        asked.max_new_tokens = max(1, len(columns))  # this call's own
    now = Change(asked, pruner, prompt_shape(run, chosen, model), model)
    return _answer(found, now, benches or Benches(), progress or (lambda _: None))


def _model_of(run: Run) -> Model | str:
    """The run's model, or why a program's own cannot be predicted."""
    try:
        return find.of_run(run.record)
    except MemprofError as error:
        if run.record.spec.data != GIVEN:
            raise
        return str(error)


def _unpredictable(run: Run, sample: SampleRecord) -> str | None:
    """Why a program's own call cannot be predicted again, or None where it can."""
    spec = run.record.spec
    if spec.data != GIVEN:
        return None
    if sample.shape is None:
        return "its inputs do not tell how its images stand in the prompt"
    if spec.attention not in ATTENTIONS:
        return f"its attention is {spec.attention}, and memprof predicts {' and '.join(ATTENTIONS)}"
    if spec.dtype not in DTYPES:
        return f"its weights are {spec.dtype}, and memprof predicts {', '.join(DTYPES)}"
    if sample.shape.batch > 1 and split_spec(spec.method)[0] != "baseline":
        return "pruning works on one prompt at a time"
    return None


def prompt_shape(run: Run, sample: SampleRecord, model: Model) -> Shape:
    """The sizes of a recorded sample's prompt; where an earlier version left only sums, its image is cut once more.

    Raises:
        DataError: The record's visual tokens are not those of one image of its size.
    """
    if sample.shape is not None:
        return sample.shape
    shape = model.family.shape(model, sample.width, sample.height, 0, run.record.spec.max_tiles)
    if (shape.tiles, shape.visual_tokens) != (sample.tiles, sample.visual_tokens):
        raise DataError(
            f"sample {sample.id} has {sample.visual_tokens} visual tokens and one image of its size has "
            f"{shape.visual_tokens}; its prompt cannot be rebuilt (--no-what-if explains the record alone)"
        )
    before = min(shape.text[0], sample.text_tokens)
    return dataclasses.replace(shape, text=(before, sample.text_tokens - before))


def sentence(found: Explanation, size: Callable[[int], str]) -> str:
    """One plain sentence; ``size`` writes bytes with their unit."""
    where = f"{found.phase} of sample {found.sample}"
    if found.phase == "decode":
        where = f"decode step {found.token} of sample {found.sample}"
    elif found.phase == "vision":
        where = f"the vision encoder on sample {found.sample}"
    verb = "hold" if found.words.split(" (")[0].endswith("s") or " logits " in found.words else "holds"
    return (
        f"{found.model} under {found.method} peaks at {size(found.peak_allocated_bytes)} in {where}: "
        f"{found.words} {verb} {found.share:.0%} of the {size(found.dynamic_peak_bytes)} above static."
    )


def floor_sentence(found: Explanation, size: Callable[[int], str]) -> str | None:
    """What pruning alone cannot get below, or None where that was not asked."""
    if found.floor is None or found.floor.refused:
        return None
    least = found.floor
    if least.saved_bytes <= 0:
        return f"Pruning visual tokens lowers this peak no further at any share: {least.words} would hold it."
    return f"No pruning of visual tokens gets below {size(least.dynamic_peak_bytes)}, which {least.words} would hold."


def _sample(run: Run, name: str | None) -> SampleRecord:
    chosen = run.highest if name is None else next((s for s in run.finished if s.id == name), None)
    if not run.finished:
        raise DataError(f"{run.path or 'the run'} has no finished sample to explain")
    if chosen is None:
        raise UnknownName("finished sample", str(name), (s.id for s in run.finished), most=20)
    if not chosen.peak_parts or chosen.dynamic_peak_bytes <= 0:
        raise DataError(f"sample {chosen.id} was recorded without the parts of its peak")
    return chosen


def _answer(found: Explanation, now: Change, benches: Benches, progress: Progress) -> Explanation:
    """``found`` with every counterfactual carried out."""
    progress("the run as it is")
    base = benches.memory(now).fullest.dynamic_peak_bytes
    changes = [change for counterfactual in COUNTERFACTUALS for change in counterfactual(now)]
    together, least = all_exact(now), floor(now)
    if together is not None:
        changes.append(together)
    answers = _carry_out_all(changes, base, benches, progress)
    return dataclasses.replace(
        found,
        predicted_peak_bytes=base,
        answers=sorted(answers, key=lambda answer: (answer.refused is not None, -answer.saved_bytes)),
        floor=None if least is None else _carry_out(least, base, benches, progress),
        notes=_notes(found, base),
    )


def _attention_of(change: Change) -> str:
    return change.spec.attention


def _carry_out_all(changes: list[Change], base: int, benches: Benches, progress: Progress) -> list[Answer]:
    """Every change, one kind of attention after the other, so that a model is built once for each.

    What is entered on the model takes about as long to record as all else: a copy of this process does it meanwhile.
    """

    def carry_out(some: list[Change]) -> list[Answer]:
        return [_carry_out(change, base, benches, progress) for change in sorted(some, key=_attention_of)]

    entered, plain = [c for c in changes if c.around], [c for c in changes if not c.around]
    if len({_attention_of(c) for c in changes}) > 1 or all(map(benches.knows, entered)):
        return carry_out(changes)
    found = {one.name: one for _, answers in shared(carry_out, [[], plain, entered]) for one in answers}
    return [found[change.name] for change in changes]


def _carry_out(change: Change, base: int, benches: Benches, progress: Progress) -> Answer:
    progress(change.name)
    try:
        card = benches.memory(change).fullest
    except (MemprofError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        return Answer(change.name, change.how, change.exact, refused=str(error).partition("\n")[0])
    part = leading_part(card.peak_parts)
    peak = card.dynamic_peak_bytes
    words = words_for(part, card.peak_holders)
    return Answer(change.name, change.how, change.exact, peak, base - peak, part, words, card.peak_phase)


def _notes(found: Explanation, base: int) -> list[str]:
    if found.status == "measured":
        gap = base / found.dynamic_peak_bytes - 1
        return [
            f"the peak was measured; what would lower it is predicted (this run's own prediction is {gap:+.1%} off)"
        ]
    card, notes = found.spec["gpu"], list[str]()
    if card is not None:
        notes.append(f"what would lower it is predicted without the memory limit of {card}, so that each peak is whole")
    if base != found.dynamic_peak_bytes:
        under = "under that limit, or " if card is not None else ""
        notes.append(
            f"the run was predicted {under}by another version of memprof, torch or transformers; answers use this one"
        )
    return notes
