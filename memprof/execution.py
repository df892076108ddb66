"""A script's own ``generate()`` calls as the samples of run folders: a folder a model, a line a call, as they come.

``memprof exec`` and the pytest plug-in are both made of this. Nothing here loads torch before the script does.
"""

from __future__ import annotations

import dataclasses
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from memprof import catching
from memprof.errors import MemprofError, RunExists
from memprof.files import first_line
from memprof.records import Run, RunRecord, RunSpec, SampleRecord
from memprof.store import RUN_FILE, SAMPLES_FILE, RunFolder
from memprof.telling.facts import slug

if TYPE_CHECKING:
    from torch import nn

    from memprof.calls import Calls
    from memprof.models.instead import Instead


class Execution:
    """Profiles what a script generates, from the moment it loads transformers.

    Args:
        label: What the calls are called in every report.
        output: The run folder, made at the first call; with several models, one in it each. None: none is written. It
            stays where it was asked for, wherever the script goes.
        force: Replace the run that is in the folder.
        instead: Where nothing is to run: what stands in for the models that are loaded.

    Attributes:
        catch: What catches the calls.
        said: What a user must know that is in no record: calls that could not be profiled, and why, a line each.
    """

    def __init__(
        self, label: str, output: Path | None = None, *, force: bool = False, instead: Instead | None = None
    ) -> None:
        self.label, self.force, self.instead = label, force, instead
        self.output = None if output is None else output.absolute()
        self.said: list[str] = []
        self.catch = catching.Catch(self.around)
        self._calls: list[tuple[weakref.ref[Any], Calls]] = []
        self._folders: list[_Folder] = []
        self._lost: str | None = None  # why nothing more is written: what failed once is not tried again
        self._one_at_a_time = threading.Lock()

    def waiting(self) -> dict[str, Callable[[ModuleType], None]]:
        """What is to be done when a script loads which module (:func:`memprof.script.on_import`)."""
        also = self.instead.waiting() if self.instead is not None else {}
        return {catching.MODULE: self.catch, **also}

    @property
    def runs(self) -> list[Run]:
        """The run of each model that generated, in the order of their first calls."""
        return [calls.run for _, calls in self._calls if calls.run.samples]

    @property
    def uncounted(self) -> list[str]:
        """The calls of which there are no numbers: who called, and why there are none, a line each."""
        if not self._calls:  # and torch may not be there yet
            return list(self.said)
        from memprof.calls import NOT_PROFILED

        samples = (sample for run in self.runs for sample in run.samples)
        refused = (f"{s.caller}: {s.error}" for s in samples if (s.error or "").startswith(NOT_PROFILED))
        return list(dict.fromkeys((*self.said, *refused)))

    def around(
        self, model: Any, caller: str, generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What ``generate`` gives, profiled if that is possible; if it is not, the script gets what it asked for."""
        from memprof.profiler import watched

        if watched(model):  # the script profiles it by itself
            return generate(model, *args, **kwargs)
        if not self._one_at_a_time.acquire(blocking=False):
            self._say(f"{caller}: not profiled, as another thread was generating")
            return generate(model, *args, **kwargs)
        try:
            return self._profiled(model, caller, generate, args, kwargs)
        finally:
            self._one_at_a_time.release()

    def _profiled(
        self, model: Any, caller: str, generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        instead = self.instead if self.instead is not None and model in self.instead.loaded else None
        with ExitStack() as entered:
            if instead is not None:
                kwargs = entered.enter_context(instead.lending(model, kwargs))
            try:
                number, calls = self._of(model)
                entered.callback(calls.rest)  # a script that lets its model go is to be rid of it
                entered.enter_context(calls)
            except Exception as error:  # of whatever model: the script is to run
                if instead is not None:
                    raise
                self._say(f"{caller}: not profiled: {_why(error)}")
                return generate(model, *args, **kwargs)
            before = len(calls.run.samples)
            try:
                out = model.generate(*args, **kwargs)
            except Exception as error:
                if instead is None or (why := calls.refused) is None:
                    raise
                raise MemprofError(why) from error  # it needs values that nothing computed: say what needs them
            finally:
                self._keep(number, before, caller)
        if instead is not None:
            out = instead.outcome(model, calls.run.samples[before].error, out)
        return out

    def _of(self, model: nn.Module) -> tuple[int, Calls]:
        """The calls of ``model`` under what prunes it now, and their number among all: one run has one method."""
        from memprof.calls import Calls
        from memprof.pruning import method_spec
        from memprof.pruning.surgery import entered_on

        surgery = entered_on(model)
        method = "baseline" if surgery is None else method_spec(surgery.pruner)
        for at, (known, calls) in enumerate(self._calls):
            if known() is model and calls.run.record.spec.method == method:
                return at, calls.resume(model)
        calls = Calls(model, refusing=False)
        calls.run.record.data_label, calls.run.record.spec.method = self.label, method
        self._calls.append((weakref.ref(model), calls))
        return len(self._calls) - 1, calls

    def _keep(self, number: int, before: int, caller: str) -> None:
        """Say who called, and write what was called since there were ``before`` samples."""
        run = self._calls[number][1].run
        run.samples[before:] = [dataclasses.replace(sample, caller=caller) for sample in run.samples[before:]]
        if self.output is not None and self._lost is None:
            with self._writing():
                self._write(self.output, number, before)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Inside, what cannot be written is no error of the script's; :meth:`close` tells it."""
        try:
            yield
        except Exception as error:
            self._lost = _why(error)
            for folder in self._folders:
                folder.leave()

    def _write(self, output: Path, number: int, before: int) -> None:
        """Write what was called since run ``number`` had ``before`` samples."""
        run = self._calls[number][1].run
        if number == 1 and len(self._folders) == 1:  # the folder of one run becomes a folder of runs
            self._folders[0].move(self._own_folder(0))
        if number >= len(self._folders):
            self._folders.append(_Folder(self._own_folder(number) if number else output, run, force=self.force))
        self._folders[number].write(run.samples[before:])

    def _own_folder(self, number: int) -> Path:
        """A folder in :attr:`output` for the run of a model; the same checkpoint loaded again has a number behind."""
        assert self.output is not None
        names = [_name(calls.run) for _, calls in self._calls]
        again = names[:number].count(names[number])
        return self.output / (f"{names[number]}-{again + 1}" if again else names[number])

    def check(self) -> None:
        """Make sure that there is a place to write, before anything runs.

        Raises:
            RunExists: The folder holds a run, or several, that is not to be replaced.
            UsageError: It holds something else.
            MemprofError: Nothing can be written there.
        """
        if self.output is None:
            return
        try:
            if there := self.output.is_dir():
                _try(self.output)  # before what is there is removed
            self._free(self.output)
            if not there:
                _try(self.output)
        except OSError as error:
            raise MemprofError(f"cannot write to {self.output}: {_why(error)}; give another folder with -o") from None

    def _free(self, output: Path) -> None:
        for below in output.glob(f"*/{RUN_FILE}"):
            if not self.force:
                raise RunExists(f"{output} already holds runs; --force replaces them")
            for name in (RUN_FILE, SAMPLES_FILE):
                (below.parent / name).unlink(missing_ok=True)
            with suppress(OSError):  # a user may keep files of his own there
                below.parent.rmdir()
        RunFolder.open(output, RunRecord(RunSpec("", "", "", ""), "measured"), force=self.force)

    def close(self) -> None:
        """Write the totals, and note what was not seen: the script is done."""
        for line in self.catch.missed():
            self._say(line)
        if self._lost is None:
            with self._writing():
                for folder in self._folders:
                    folder.close()
        if self._lost is not None:
            saved, called = sum(each.written for each in self._folders), sum(len(run.samples) for run in self.runs)
            self._say(f"cannot write to {self.output}: {self._lost}; saved there: {saved} of {called} calls")

    @property
    def kept(self) -> bool:
        """Whether there is a run folder to be read."""
        return any(folder.written for folder in self._folders)

    def _say(self, line: str) -> None:
        if line not in self.said:
            self.said.append(line)


def _why(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{error}" if isinstance(error, MemprofError) else f"{type(error).__name__}: {first_line(error)}"


def _try(folder: Path) -> None:
    """Write a little in ``folder``, and leave nothing behind; raises OSError where that cannot be done."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()


def _name(run: Run) -> str:
    """A run's model, and its method where that is not Baseline, as part of a path."""
    spec = run.record.spec
    model = slug(spec.model.rstrip("/").rpartition("/")[2])
    return model if spec.method == "baseline" else f"{model}_{slug(spec.method)}"


class _Folder:
    """The run folder of one model, open from its first call to the script's end.

    A script may be ended by anything at any time: what was called before is there, and not called complete.
    """

    def __init__(self, path: Path, run: Run, *, force: bool) -> None:
        self._run, self.written = run, 0
        self._folder = RunFolder.open(path, self._unfinished(), force=force)
        self._folder.__enter__()

    def _unfinished(self) -> RunRecord:
        return dataclasses.replace(self._run.record, complete=False, samples_asked=None)

    def write(self, samples: list[SampleRecord]) -> None:
        """Add a line for each of ``samples``."""
        for sample in samples:
            self._folder.append(sample)
            self.written += 1
        self._folder.record = self._unfinished()
        self._folder.save()

    def move(self, path: Path) -> None:
        """Go on in ``path``, a folder inside the present one."""
        self._folder.__exit__()
        path.mkdir(parents=True)
        for name in (RUN_FILE, SAMPLES_FILE):
            (self._folder.path / name).rename(path / name)
        self._folder = RunFolder.open(path, self._folder.record, resume=True)
        self._folder.__enter__()

    def close(self) -> None:
        """Write the record as it is in the end."""
        self._folder.record = self._run.record
        self._folder.save()
        self.leave()

    def leave(self) -> None:
        """Write nothing more; what was written is there."""
        self._run.path = str(self._folder.path)
        with suppress(OSError, ValueError):
            self._folder.__exit__()
