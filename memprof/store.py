"""The run folder: ``run.json`` and ``samples.jsonl``, one flushed line a finished sample.

Nothing finished is ever lost: a killed run keeps every line but a torn last one, and resuming it ends with the same
bytes an unbroken run writes. This module never imports torch.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import TextIO

from memprof import files
from memprof.errors import DataError, MemprofError, RunExists, UsageError
from memprof.files import write_json
from memprof.records import SCHEMA, Run, RunRecord, SampleRecord

RUN_FILE, SAMPLES_FILE = "run.json", "samples.jsonl"


def _line(sample: SampleRecord) -> str:
    return json.dumps(sample.to_json(), ensure_ascii=False) + "\n"


def _seen(path: Path) -> list[tuple[int, ...] | None]:
    """What tells whether a run folder was written to: its files' number, time and size, None for a missing one."""
    stats = [file.stat() if file.exists() else None for file in (path / RUN_FILE, path / SAMPLES_FILE)]
    return [None if one is None else (one.st_ino, one.st_mtime_ns, one.st_size) for one in stats]


def _taken(path: Path) -> bool:
    """Whether something stands at ``path`` that is not memprof's: a file, or more than what a kill left."""
    if not path.is_dir():
        return path.exists() or path.is_symlink()
    return any(not _ours(name) for name in os.listdir(path))


def _ours(name: str) -> bool:
    """Whether a file is a half-written ``run.json`` or ``samples.jsonl``, which a kill leaves."""
    return name.lstrip(".").startswith((RUN_FILE, SAMPLES_FILE)) and name.endswith(".tmp")


class RunFolder:
    """A run folder: :meth:`open` looks, ``with`` opens it for writing, :meth:`append` adds a line, :meth:`save` totals.

    Until it is entered nothing on disk is touched, so that whoever fails before the first sample leaves nothing behind.
    """

    _lines: TextIO

    def __init__(
        self, path: Path, record: RunRecord, samples: list[SampleRecord], found: list[tuple[int, ...] | None], *,
        new: bool = False, fewer: bool = False,
    ) -> None:  # fmt: skip
        self.path, self.record, self.samples = path, record, samples
        self._new, self._fewer = new, fewer  # no run is there yet, or one with lines beyond ``samples``
        self._found, self._held = found, ExitStack()
        self._synced = 0.0

    @classmethod
    def open(
        cls, path: Path, record: RunRecord, *, resume: bool = False, force: bool = False, retry_failed: bool = False
    ) -> RunFolder:
        """The folder ``path`` for ``record``, or for the run that is there to go on with.

        Args:
            path: Of the folder; it need not exist.
            record: The run as it begins.
            resume: Go on with the run that is there, if one is.
            force: Replace the run that is there.
            retry_failed: When going on, drop the lines of samples that did not finish, so that they run again.

        Raises:
            RunExists: The folder holds a run, and neither ``resume`` nor ``force`` was given.
            UsageError: ``resume``, but the run there was another experiment, or ``path`` is not a run folder.
        """
        found = _seen(path)  # before anything is read: what is written from now on is noticed once the folder is locked
        if (path / RUN_FILE).exists() and not force:
            if not resume:
                raise RunExists(f"{path} already holds a run; --resume finishes it, --force replaces it")
            there = read_run(path)
            if there.record.spec != record.spec:
                changed = [
                    f"{k}: {v!r} there, {getattr(record.spec, k)!r} asked"
                    for k, v in there.record.spec.to_json().items()
                    if v != getattr(record.spec, k)
                ]
                raise UsageError(f"{path} holds another experiment ({'; '.join(changed)}); use another folder")
            kept = there.finished if retry_failed else there.samples
            return cls(path, there.record, kept, found, fewer=len(kept) < len(there.samples) or bool(there.healed))
        if not (path / RUN_FILE).exists() and _taken(path):
            what = "is not empty and holds no run" if path.is_dir() else "is no folder"
            raise UsageError(f"{path} {what}; use another folder")
        return cls(path, record, [], found, new=True)

    def __enter__(self) -> RunFolder:
        self.path.mkdir(parents=True, exist_ok=True)
        self._claim()
        for name in filter(_ours, os.listdir(self.path)):
            (self.path / name).unlink(missing_ok=True)
        if self._new:
            (self.path / SAMPLES_FILE).unlink(missing_ok=True)  # nothing else: a user may keep files of his own here
            self.save()
        else:
            _drop_torn_line(self.path / SAMPLES_FILE)
        if self._fewer:
            self.record.complete = False
            self.save()
            self._rewrite()
        self._lines = (self.path / SAMPLES_FILE).open("a", encoding="utf-8", errors="backslashreplace")
        return self

    def __exit__(self, *_: object) -> None:
        with self._held, self._lines:  # free and closed, also where the disk refuses the rest
            os.fsync(self._lines.fileno())

    def _claim(self) -> None:
        """Lock the folder: two writers would mix their lines. What was read of it before must still be what is there.

        Raises:
            UsageError: Another process has it, or had it in between.
        """
        try:
            self._held.enter_context(files.locked(self.path, wait=False))
        except MemprofError as error:
            raise UsageError(f"{error}; wait for it, or use another folder") from None
        if _seen(self.path) != self._found:
            self._held.close()
            raise UsageError(f"another process wrote to {self.path} in between; --resume goes on from what it did")

    @property
    def done(self) -> set[str]:
        """Ids that already have a line."""
        return {s.id for s in self.samples}

    def append(self, sample: SampleRecord) -> None:
        """Write one line and flush it: a killed process loses none. The disk is waited for once a second at most."""
        self._lines.write(_line(sample))
        self._lines.flush()
        if time.monotonic() - self._synced > 1:
            os.fsync(self._lines.fileno())
            self._synced = time.monotonic()
        self.samples.append(sample)

    def arrange(self, ids: Iterable[str]) -> None:
        """Put the lines in the order of ``ids``, as an unbroken run has them; those of other samples come last."""
        place = {name: number for number, name in enumerate(ids)}
        order = sorted(self.samples, key=lambda sample: place.get(sample.id, len(place)))
        if [s.id for s in order] != [s.id for s in self.samples]:
            self.samples[:] = order
            self._lines.close()
            self._rewrite()
            self._lines = (self.path / SAMPLES_FILE).open("a", encoding="utf-8", errors="backslashreplace")

    def _rewrite(self) -> None:
        """Write all lines anew, in one step."""
        files.replace(self.path / SAMPLES_FILE, "".join(map(_line, self.samples)))

    def save(self) -> None:
        """Rewrite ``run.json`` from :attr:`record`."""
        write_json(self.path / RUN_FILE, self.record.to_json())

    def run(self) -> Run:
        """The run as it stands."""
        return Run(self.record, self.samples, str(self.path))


def _drop_torn_line(path: Path) -> None:
    """Cut a last line that a kill left without its newline."""
    if not path.exists():
        return
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)


def read_run(path: Path | str) -> Run:
    """The run in folder ``path``.

    Raises:
        DataError: The folder is missing, is no run folder, was written by a later schema, or has a broken line.
    """
    path = Path(path)
    record = read_record(path)
    return _healed(Run(record, _read_samples(path / SAMPLES_FILE), str(path)))


def _read_samples(file: Path) -> list[SampleRecord]:
    """Every whole line; what follows the last newline is empty, or torn by a kill, maybe inside a character."""
    samples = []
    try:
        lines = files.read_bytes(file).split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    for number, line in enumerate(lines, start=1):
        where = f"{file}, line {number}"
        try:
            sample = SampleRecord.from_json(files.parse_json(line.decode(), where))
            sample.check()
            samples.append(sample)
        except ValueError as error:
            raise DataError(f"{where}: {files.first_line(error)}") from None
    return samples


def _healed(run: Run) -> Run:
    """``run`` with each sample once, and not called complete where lines are gone; both are told in ``healed``."""
    once: dict[str, SampleRecord] = {}
    for sample in run.samples:
        if sample.id not in once or (sample.ok and not once[sample.id].ok):
            once[sample.id] = sample
    twice = len(run.samples) - len(once)
    if twice:
        run.samples = list(once.values())
        run.healed.append(f"{twice} lines stood twice in {SAMPLES_FILE}, of two writers; each sample is counted once")
    counted = [run.record.totals.get(name) for name in ("samples", "failed")]
    lost = sum(n for n in counted if isinstance(n, int)) - len(run.samples)
    if run.record.complete and lost > 0:
        run.record.complete = False
        run.record.samples_asked = run.record.samples_asked or len(run.samples) + lost
        run.healed.append(f"{lost} of {len(run.samples) + lost} finished samples are gone from {SAMPLES_FILE}")
    return run


def read_record(folder: Path) -> RunRecord:
    """What ``run.json`` of a run folder says, every value of the type and form that it must have.

    Raises:
        DataError: It is missing, damaged, or of a later schema.
    """
    file = folder / RUN_FILE
    try:
        data = files.read_json(file)
    except FileNotFoundError:
        raise DataError(f"{file.parent} is not a run folder: it has no {RUN_FILE}") from None
    schema = data.get("schema", 0)
    if isinstance(schema, int) and schema > SCHEMA:
        raise DataError(f"{file.parent} was written by a later memprof (schema {schema}); update memprof")
    try:
        return RunRecord.from_json(data)
    except ValueError as error:
        raise DataError(f"{file} is damaged: {error}") from None


def find_runs(paths: Iterable[Path | str]) -> list[Run]:
    """The runs in ``paths``: each a run folder, or a folder that holds run folders. Shards of a run become one.

    Raises:
        DataError: A path holds no run.
    """
    runs = []
    for given in map(Path, paths):
        folders = [given] if (given / RUN_FILE).exists() else sorted(p.parent for p in given.glob(f"*/{RUN_FILE}"))
        if not folders:
            raise DataError(f"{given} holds no run; give a folder that `memprof run -o` wrote")
        runs += [read_run(folder) for folder in folders]
    return join_shards(runs)


def join_shards(runs: Iterable[Run]) -> list[Run]:
    """Runs that differ by their shard alone, as one run with its samples in the task's order; others as they are.

    Shards of one run lie side by side in a folder and are of one count: the same experiment of another day is another
    run.

    Raises:
        DataError: A shard is there twice.
    """
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        key: tuple[str, ...] = (f"{run.path}",)
        if run.record.spec.shard:
            whole, count = replace(run.record.spec, shard=None), run.record.spec.shard.split("/")[1]
            key = str(Path(run.path or "").parent), count, f"{whole}"
        groups.setdefault(key, []).append(run)
    return [_joined(group) if group[0].record.spec.shard else group[0] for group in groups.values()]


def _asked_of(shards: list[Run], count: int) -> int | None:
    """How many samples all ``count`` shards are to have; None where one is not there or does not know."""
    asked = [run.record.samples_asked for run in shards if run.record.samples_asked is not None]
    return sum(asked) if len(asked) == count else None


def _joined(shards: list[Run]) -> Run:
    """One run of several shards; complete only if every shard is there and complete."""
    numbered: dict[int, Run] = {}
    for run in shards:
        shard = run.record.spec.shard or "1/1"
        other = numbered.setdefault(int(shard.split("/")[0]), run)
        if other.path != run.path:
            raise DataError(f"shard {shard} of one run is in {other.path} and in {run.path}; move one of them away")
    shards = list(numbered.values())
    count = int((shards[0].record.spec.shard or "1/1").split("/")[1])
    first = numbered[min(numbered)]
    cuts = [(run.record.visual_flops_cut, len(run.finished)) for run in shards]
    known = [(cut, n) for cut, n in cuts if cut is not None and n]
    record = replace(
        first.record,
        visual_flops_cut=sum(cut * n for cut, n in known) / sum(n for _, n in known) if known else None,
        spec=replace(first.record.spec, shard=None),
        static_bytes=max(run.record.static_bytes for run in shards),
        complete=len(numbered) == count and all(run.record.complete for run in shards),
        notes=sorted({note for run in shards for note in run.record.notes}),
        samples_asked=_asked_of(shards, count),
    )
    # Shard i of n holds samples i, i + n, ...: taking one from each in turn restores the order.
    turns = zip_longest(*(numbered[i].samples for i in sorted(numbered)))
    samples = [sample for turn in turns for sample in turn if sample is not None]
    healed = [f"{run.path}: {text}" for run in shards for text in run.healed]
    if len(numbered) < count:
        healed.append(f"{len(numbered)} of {count} shards are here: {', '.join(map(str, sorted(numbered)))}")
    return Run(record, samples, str(Path(first.path or "").parent), healed)
