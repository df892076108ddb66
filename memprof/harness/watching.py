"""What the adapters share: each sample a harness asks of a model is profiled, and is a line of a run folder.

A harness calls ``generate()`` somewhere deep in its own code, in ways of its own: in inference mode, and taking
whatever is raised for a wrong answer.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memprof.calls import GROWN, Calls
from memprof.environment import rank_shard
from memprof.errors import MemprofError, UsageError
from memprof.records import RunRecord, SampleRecord, summarize
from memprof.store import RunFolder, read_run


class Watch:
    """The runs of one evaluation: a folder a task below ``folder``, and one more for each process where there are many.

    Attributes:
        folder: Where the runs go. None of its tasks may hold a run yet.
        error: What memprof itself refused, once it did. Harnesses take every exception for a wrong answer; whoever
            owns the watch raises this one anew, so that a score is never what memprof made of it.
    """

    def __init__(self, folder: Path, harness: str) -> None:
        self.folder, self.harness = folder, harness
        self.error: MemprofError | None = None
        self._open: dict[str, RunFolder] = {}
        self._entered = ExitStack()
        self._named: dict[tuple[str, str], int] = {}

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._entered:
            for folder in self._open.values():
                self._finish(folder, whole=kind is None)

    @contextmanager
    def sample(self, owner: Any, task: str, name: str) -> Iterator[Asked]:
        """Profile what is generated inside, and write a line for it.

        Args:
            owner: The harness's own object around a model, or the model.
            task: The harness's name of the task.
            name: Its name of the sample; the second of a name in a task is called ``name.2``.

        Raises:
            MemprofError: ``owner`` has no transformers model in this process; or what ran cannot be counted.
        """
        self.check()  # the harness took it for a wrong answer, and goes on
        count = self._named[task, name] = self._named.get((task, name), 0) + 1
        named = name if count == 1 else f"{name}.{count}"
        try:
            asked = Asked(model_of(owner))
            with asked:
                yield asked
            asked.check()
        except MemprofError as error:
            self.error = error
            raise
        except Exception:  # of the model's own, say out of memory; its line says so
            self._write(task, asked, named)
            raise
        self._write(task, asked, named)

    def _write(self, task: str, asked: Asked, name: str) -> None:
        if asked.highest is None:
            return
        line = dataclasses.replace(asked.highest, id=name, answer=asked.answer)
        folder = self._open.get(task) or self._begin(task, asked)
        record, static = folder.record, asked.calls.run.record.static_bytes
        if static != record.static_bytes:
            record.notes = list(dict.fromkeys([*record.notes, GROWN]))
            record.static_bytes = min(static, record.static_bytes)  # what was there in any case
        folder.append(line)

    def _begin(self, task: str, asked: Asked) -> RunFolder:
        """Open the run of ``task`` once there is a first line."""
        record, shard = asked.calls.run.record, rank_shard()
        spec = dataclasses.replace(
            record.spec, task=task, data=self.harness, max_new_tokens=asked.new_tokens,
            shard=shard[0] if shard else None,
        )  # fmt: skip
        record = dataclasses.replace(record, spec=spec, data_label=f"{task} as {self.harness} asks it", totals={})
        record.complete, record.samples_asked = False, None
        folder = RunFolder.open(_place(self.folder, task, spec.shard), record)
        self._open[task] = self._entered.enter_context(folder)
        return folder

    def _finish(self, folder: RunFolder, *, whole: bool) -> None:
        folder.record.complete, folder.record.samples_asked = whole, len(folder.samples) if whole else None
        folder.record.totals = summarize(folder.run())
        folder.save()

    def check(self) -> None:
        """Raise what memprof itself refused."""
        if self.error is not None:
            raise self.error


@contextmanager
def many_samples() -> Iterator[None]:
    """Garbage is collected before every sample: inside, that need not walk through all that was there before."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def check_new(folder: Path) -> None:
    """Raise UsageError where something lies in ``folder``: a model is not loaded first to find that out.

    Of several processes another may have begun already; each looks for runs of its own.
    """
    mine = "*" if (shard := rank_shard()) is None else f"*{_suffix(shard[0])}"
    if folder.is_file() or any(folder.glob(mine)):
        raise UsageError(f"{folder} is not empty; name a new folder for the memory of this evaluation")


def _suffix(shard: str) -> str:
    return f"-{shard.replace('/', '-of-')}"


def _place(folder: Path, task: str, shard: str | None) -> Path:
    """The run folder of ``task`` below ``folder``: each of several processes writes its own."""
    name = "".join(c if c.isalnum() or c in "._-" else "_" for c in task)
    return folder / (name if shard is None else name + _suffix(shard))


class Asked:
    """One sample while it is asked.

    Attributes:
        calls: What it generated.
        answer: What the harness made of it; set by the adapter.
        new_tokens: ``max_new_tokens`` of its ``generate()``; 0 where that was not said.
    """

    def __init__(self, model: Any) -> None:
        self.calls, self._model = Calls(model), model
        self.answer: str | None = None
        self.new_tokens = 0
        self._refused: MemprofError | None = None

    @property
    def highest(self) -> SampleRecord | None:
        """Of everything that was generated, what peaked highest; None where nothing was."""
        return max(self.calls.run.samples, key=lambda call: call.peak_allocated_bytes, default=None)

    def __enter__(self) -> Asked:
        self.calls.__enter__()
        self._profiled = self._model.generate
        self._model.generate = self._outside  # calls takes it off the model again
        return self

    def __exit__(self, *what: Any) -> None:
        self.calls.__exit__(*what)

    def _outside(self, *args: Any, **kwargs: Any) -> Any:
        self.new_tokens = int(kwargs.get("max_new_tokens") or 0)
        try:
            # Harnesses generate in inference mode, where operators cannot all be seen. What is allocated is the same.
            with torch.inference_mode(False), torch.no_grad():
                return self._profiled(*args, **kwargs)
        except MemprofError as error:
            self._refused = error
            raise

    def check(self) -> None:
        """Raise what the profiler refused, or would have had it seen anything."""
        if self._refused is not None:
            raise self._refused
        if any(call.ok and not len(call.tokens) for call in self.calls.run.samples):
            raise MemprofError(
                f"{type(self._model).__name__}.generate() ran, but its forward did not: memprof watches models of "
                "transformers' own classes, and this one generates with a model inside"
            )


def model_of(owner: Any) -> nn.Module:
    """The transformers model of a harness's object, or the object where it is one.

    Raises:
        UsageError: None is there: the harness asks a server, or another library than transformers.
    """
    held: list[Any] = [owner]
    for name in ("model", "_model", *(name for name in vars(owner) if name not in ("model", "_model"))):
        held.append(getattr(owner, name, None))
    for found in held:
        if isinstance(found, nn.Module) and callable(getattr(found, "generate", None)):
            return found
    raise UsageError(
        f"{type(owner).__name__} holds no transformers model in this process: memprof watches generate() of one, and "
        "no server, API or other engine"
    )


def memories(folder: Path, task: str, *, own: bool = False) -> dict[str, dict[str, Any]]:
    """What stands beside each score of ``task``, by the sample's name, as far as it was written below ``folder``.

    Args:
        folder: Of a :class:`Watch`.
        task: The harness's name of it.
        own: Only what this process wrote; else what all processes did.
    """
    shards: list[str | None] = [None]
    if (shard := rank_shard()) is not None:
        count = int(shard[0].split("/")[1])
        shards = [shard[0]] if own else [f"{number}/{count}" for number in range(1, count + 1)]
    places = [_place(folder, task, one) for one in shards]
    runs = [read_run(place) for place in places if place.is_dir()]
    return {sample.id: _memory(sample, run.record) for run in runs for sample in run.samples}


def _memory(sample: SampleRecord, record: RunRecord) -> dict[str, Any]:
    """What stands beside a score: bytes, and which kind of numbers they are."""
    return {
        "status": record.status,
        "device": record.spec.device,
        "peak_allocated_bytes": sample.peak_allocated_bytes,
        "peak_reserved_bytes": sample.peak_reserved_bytes,
        "dynamic_peak_bytes": sample.dynamic_peak_bytes,
        "kv_cache_bytes": sample.kv_cache_bytes,
        "peak_phase": sample.peak_phase,
        "parts": {part: held for part, held in sample.peak_parts.items() if held},
        "error": sample.error,
    }
