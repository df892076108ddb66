"""A predicted run for PyTorch's memory viewer: its prompt is predicted again, and every allocation written down."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memprof.analysis.explain import prompt_shape
from memprof.analysis.predicting import predicting
from memprof.anatomy import anatomy
from memprof.bench import Bench
from memprof.bench.generate import profile_prompt
from memprof.environment import environment
from memprof.errors import DataError, MemprofError, UnknownName, UsageError
from memprof.files import replace
from memprof.forecasts import Setup
from memprof.meters import weights_of
from memprof.meters.sim import SimMeter
from memprof.models import find
from memprof.pruning import build_pruner
from memprof.records import Run, SampleRecord
from memprof.snapshots.dump import Lasting, dump
from memprof.version import VERSION

#: The viewer reads pickles of the protocols 2 to 4.
PROTOCOL = 4


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        sample: Its id.
        events: How many events the file holds.
        notes: What a reader of the file must know.
    """

    sample: str
    events: int
    notes: list[str] = field(default_factory=list)


def export(run: Run, path: Path, sample: str | None = None) -> Exported:
    """Write a snapshot of one sample of a predicted ``run`` to ``path``.

    Args:
        run: As :func:`memprof.store.read_run` gives it.
        path: The file; opens in pytorch.org/memory_viz, by ``torch.cuda._memory_viz`` and by ``memprof snapshot``.
        sample: A sample's id; None for the one with the highest peak.

    Raises:
        UsageError: The run was measured: it records no allocations.
        UnknownName: No sample is called so.
        DataError: The run has no sample to predict again, or its prompt's sizes cannot be rebuilt.
    """
    if run.record.status != "predicted":
        raise UsageError(
            f"{run.path or 'the run'} was measured, and a record holds no single allocations: let torch record them by "
            "torch.cuda.memory._record_memory_history(), or predict the run (--device sim) and export that"
        )
    chosen = _sample(run, sample)
    snapshot, predicted = _predict(run, chosen)
    try:
        replace(path, pickle.dumps(snapshot, protocol=PROTOCOL))
    except OSError as error:
        raise MemprofError(f"cannot write {path}: {error.strerror or error}") from None
    recorded = {"allocated": chosen.peak_allocated_bytes, "reserved": chosen.peak_reserved_bytes}
    apart = [f"{predicted[k]:,} bytes {k}, not {recorded[k]:,}" for k in recorded if predicted[k] != recorded[k]]
    notes = [
        f"the file's peak is not the record's ({'; '.join(apart)}): the run was predicted by another version of "
        "memprof, torch or transformers, or under other allocator settings"
    ]
    return Exported(chosen.id, len(snapshot["device_traces"][0]), notes if apart else [])


def _sample(run: Run, name: str | None) -> SampleRecord:
    """The sample called ``name``, or the highest; one that a card would refuse counts, one that failed does not."""
    there = [s for s in run.samples if s.status in ("ok", "oom") and s.visual_tokens + s.text_tokens]
    if not there:
        raise DataError(f"{run.path or 'the run'} has no sample to predict again")
    if name is None:
        return max(there, key=lambda s: s.dynamic_peak_bytes)
    chosen = next((s for s in there if s.id == name), None)
    if chosen is None:
        raise UnknownName("sample", name, (s.id for s in there), most=20)
    return chosen


def _predict(run: Run, sample: SampleRecord) -> tuple[dict[str, Any], dict[str, int]]:
    """The snapshot of ``sample``, and its highest allocated and reserved bytes."""
    spec = predicting(run.record.spec)
    pruner = build_pruner(spec.method, spec.stack)
    known = find.of_run(run.record)
    model, meter = Bench(Setup.of(spec, known)).ready()
    assert isinstance(meter, SimMeter)
    prompt = known.family.drawn(known, prompt_shape(run, sample, known), spec.seed)
    columns = profile_prompt(
        model, meter, pruner, spec.stack, prompt, new_tokens=spec.max_new_tokens, seed=spec.seed
    ).memory.fullest.tokens
    assert meter.trace is not None
    where, names = anatomy(model), {name for name, _ in weights_of(model)}
    lasting = {
        address: Lasting(name, where.weight_group(name) if name in names else "workspaces", n_bytes)
        for address, (name, n_bytes) in meter.lasting.items()
    }
    title = f"{known.title} under {pruner.title}, stack {spec.stack}, sample {sample.id}"
    about = {
        "version": VERSION, "spec": spec.to_json(), "sample": sample.id,
        "environment": environment() | meter.environment(),
    }  # fmt: skip
    snapshot = dump(meter.trace, meter.loaded, lasting, title, about)
    peaks = {"allocated": columns.peak_allocated_bytes, "reserved": columns.reserved_bytes}
    return snapshot, {what: max(column, default=0) for what, column in peaks.items()}
