"""One setting, predicted in this process or measured in a fresh one."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from memprof.analysis.predicting import predicting
from memprof.bench import Bench
from memprof.bench.outcome import Outcome
from memprof.environment import RANK_VARIABLES
from memprof.errors import DataError, MemprofError
from memprof.gpus import calibrated, card_of, find_card
from memprof.prompts import Shape
from memprof.pruning import Pruner, visual_flops_cut, visual_tokens_per_layer
from memprof.records import Run, RunSpec, SampleRecord, mean_fidelity, summarize
from memprof.runner import complete_spec, samples_of
from memprof.store import RUN_FILE, read_run
from memprof.tasks import Sample
from memprof.telling.holders import leading_part, words_for
from memprof.tuning import Evaluate, Question, Result

#: Exit code of a run that ran out of memory (:mod:`memprof.errors`).
_OOM = 5


class Predictor:
    """What settings would need on a card, from the distinct prompts of a task.

    Where a sample has a question and no count of its tokens, the tokenizer that the run itself would need counts them.

    Raises:
        DataError: No sample can be read.
        WeightsError: Tokens are to be counted, and there is no tokenizer.
    """

    def __init__(self, spec: RunSpec, bench: Bench | None = None) -> None:
        self.spec, self.unpruned, task, setup = complete_spec(predicting(spec, shard=None, method="baseline"))
        self.bench = bench.set_up(setup) if bench is not None else Bench(setup)
        samples, _ = samples_of(setup.model, task, self.spec)
        self.shapes: Counter[Shape] = Counter(
            self.bench.prompt(sample, self.spec.max_tiles).shape
            for sample in _readable(samples)
            if sample.width > 0 and sample.height > 0
        )
        if not self.shapes:
            raise DataError("no sample can be read to predict from; use --data FILE.csv")

    def __call__(self, method: str, name: str = "") -> Result:
        """What ``method`` would need; its FLOPs and kept tokens follow from its settings alone."""
        del name
        done = complete_spec(dataclasses.replace(self.spec, method=method))
        asks = [done.ask(shape) for shape in self.shapes]
        with self.bench.set_up(done.setup).ahead(asks):
            outcomes = [self.bench.outcome(ask) for ask in asks]
        highest = max(outcomes, key=_peak)
        reserved = max(one.memory.fullest.peak_reserved_bytes for one in outcomes)
        cut, kept = self._shares(done.pruner)
        return Result(
            "predicted",
            peak_allocated_bytes=_peak(highest),
            peak_reserved_bytes=reserved,
            device_bytes=reserved + calibrated(find_card(done.spec.gpu)).context_bytes,
            visual_flops_cut=cut,
            kept_share=kept,
            held_by=_held_by(highest),
        )

    @property
    def static_bytes(self) -> int:
        """Bytes of the weights."""
        return self.bench.standing(self.unpruned, self.spec.stack).static_bytes

    def _shares(self, pruner: Pruner) -> tuple[float, float]:
        model, layers = self.bench.model, self.bench.model.layers
        cut = kept = 0.0
        for shape, count in self.shapes.items():
            seen = visual_tokens_per_layer(pruner.stages(shape.visual_tokens, layers), shape.visual_tokens, layers)
            cut += count * visual_flops_cut(seen, shape.visual_tokens, model.hidden, model.ffn)
            kept += count * (sum(seen) / (layers * shape.visual_tokens) if shape.visual_tokens else 1.0)
        return cut / self.shapes.total(), kept / self.shapes.total()


def _readable(samples: Sequence[Sample]) -> Iterator[Sample]:
    """Samples whose rows can be read; a run writes down the others."""
    for number in range(len(samples)):
        try:
            yield samples[number]
        except MemprofError:
            continue


def _peak(outcome: Outcome) -> int:
    return outcome.memory.fullest.peak_allocated_bytes


def _held_by(outcome: Outcome) -> str:
    card = outcome.memory.fullest
    return words_for(leading_part(card.peak_parts), card.peak_holders)


class Measurer:
    """Runs a setting with ``memprof run`` in a process of its own, unless it is predicted not to fit.

    Args:
        question: What is asked.
        folder: Where the run folders go; a trial that was interrupted goes on in its own.
        predict: Predicts a setting, or None where predictions do not speak for the device (``cpu``).
        card_bytes: What the card can give this process, or None where that is not known.
    """

    def __init__(
        self, question: Question, folder: Path, predict: Evaluate | None, card_bytes: int | None = None
    ) -> None:
        self.question, self.folder, self.predict, self.card_bytes = question, folder, predict, card_bytes
        self._unpruned: float | None = None

    def __call__(self, method: str, name: str) -> Result:
        """What ``method`` needs and loses."""
        if self.predict is not None:
            predicted = self.predict(method, name)
            budget = self.question.budget_bytes
            if (budget is not None and predicted.peak_allocated_bytes > budget) or (
                self.card_bytes is not None and predicted.peak_reserved_bytes > self.card_bytes
            ):
                return dataclasses.replace(predicted, status="not launched")
        return self._with_loss(self._measure(method, self.folder / name))

    def _measure(self, method: str, folder: Path) -> Result:
        # A worker may be one rank of many; its trial is a whole run, not that rank's shard of it.
        alone = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
        done = subprocess.run(self._words(method, folder), capture_output=True, text=True, check=False, env=alone)
        says = done.stderr.strip().rpartition("\n")[2]
        try:
            run = read_run(folder)
        except MemprofError:
            return Result("failed", error=says or f"the trial's process ended with {done.returncode}")
        if not run.finished:
            return Result("oom" if done.returncode == _OOM else "failed", error=says)
        short = any(sample.status == "oom" for sample in run.samples)
        status = "oom" if short else "measured" if done.returncode == 0 else "failed"
        return _result(run, status, says if status != "measured" else None)

    def _words(self, method: str, folder: Path) -> list[str]:
        spec = self.question.spec
        words = [
            sys.executable, "-m", "memprof.tuning._child", "run", "--model", spec.model, "--method", method, "--task",
            spec.task, "--device", spec.device, "--stack", spec.stack, "--dtype", spec.dtype, "--attention",
            spec.attention, "--weights", spec.weights, "--data", spec.data, "--max-new-tokens",
            str(spec.max_new_tokens), "--warmup", str(spec.warmup), "--seed", str(spec.seed), "--quiet", "--unlisted",
            "-o", str(folder),
        ]  # fmt: skip
        words.append("--fidelity" if self.question.quality else "--no-fidelity")
        words += ["--max-tiles", str(spec.max_tiles)] if spec.max_tiles is not None else []
        words += ["--limit", str(spec.limit)] if spec.limit is not None else []
        return [*words, "--resume"] if (folder / RUN_FILE).exists() else words

    def _with_loss(self, result: Result) -> Result:
        """Its loss against the unpruned model, which is measured once where answers are scored."""
        if not self.question.quality or result.status != "measured":
            return result
        if result.agreement is not None:
            return dataclasses.replace(result, loss=1 - result.agreement)
        if result.accuracy is None:
            return dataclasses.replace(result, status="failed", error="no answer was scored or compared")
        return dataclasses.replace(result, loss=max(0.0, self._reference() - result.accuracy))

    def _reference(self) -> float:
        """Accuracy of the unpruned model, by whichever worker measured it first; 1 where it does not run."""
        if self._unpruned is None:
            done = (read_run(file.parent) for file in sorted(self.folder.glob(f"unpruned*/{RUN_FILE}")))
            known = [summarize(run)["accuracy"] for run in done if run.record.complete]
            if not known:
                known = [self._measure("baseline", self.folder / f"unpruned_{os.getpid()}").accuracy]
            self._unpruned = 1.0 if known[0] is None else float(known[0])
        return self._unpruned


def _result(run: Run, status: str, error: str | None) -> Result:
    total, top = summarize(run), run.highest
    assert top is not None
    compared = mean_fidelity(run.finished)
    return Result(
        status,
        peak_allocated_bytes=total["peak_allocated_bytes"],
        peak_reserved_bytes=total["peak_reserved_bytes"],
        device_bytes=total["device_bytes"],
        visual_flops_cut=total["visual_flops_cut"] or 0.0,
        kept_share=sum(map(_kept, run.finished)) / len(run.finished),
        accuracy=total["accuracy"],
        agreement=compared["agreement"] if compared else None,
        seconds=_seconds(run.finished),
        held_by=words_for(leading_part(top.peak_parts), top.peak_holders),
        error=error,
    )


def _kept(sample: SampleRecord) -> float:
    whole = len(sample.kept_visual_tokens) * sample.visual_tokens
    return sum(sample.kept_visual_tokens) / whole if whole else 1.0


def _seconds(samples: list[SampleRecord]) -> float | None:
    timed = [[s for s in sample.tokens.seconds if s is not None] for sample in samples]
    return sum(map(sum, timed)) / len(timed) if any(timed) else None


def card_bytes() -> int | None:
    """What the first card that a process sees can give it beside its context; None where NVML cannot be asked.

    NVML is asked because it opens no context of its own on the card, as torch would. It numbers every card there is, so
    ``CUDA_VISIBLE_DEVICES`` is read here; of a card in slices (MIG) CUDA takes the first, where none is named.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0].strip()
        if first.startswith(("GPU-", "MIG-")):
            there = pynvml.nvmlDeviceGetHandleByUUID(first)
        else:
            there = pynvml.nvmlDeviceGetHandleByIndex(int(first))  # none is visible where that is no number
        if not first.startswith("MIG-") and _sliced(pynvml, there):
            there = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(there, 0)
        card = calibrated(find_card(card_of(str(pynvml.nvmlDeviceGetName(there)))))
        return int(pynvml.nvmlDeviceGetMemoryInfo(there).total) - card.context_bytes
    except Exception:  # NVML's errors share no base class; without it, the budget alone decides
        return None


def _sliced(nvml: Any, card: Any) -> bool:
    """Whether a card is in slices (MIG); most cannot be."""
    try:
        return bool(nvml.nvmlDeviceGetMigMode(card)[0])
    except nvml.NVMLError:
        return False
