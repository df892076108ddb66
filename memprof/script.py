"""Somebody's Python script, run as ``python SCRIPT.py ARGS`` runs it: ``__main__``, ``sys.argv``, its exit code.

What is to be done to a library is done when the script loads it (:func:`on_import`), and never before: what a script
sets up first, such as ``CUDA_VISIBLE_DEVICES``, still counts. Nothing here loads torch.
"""

from __future__ import annotations

import atexit
import importlib.util
import io
import os
import signal
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import Any, NamedTuple

from memprof.errors import UsageError


class Program(NamedTuple):
    """A script or a module that can be run.

    Attributes:
        main: The module that is ``__main__`` while it runs, still empty.
        source: Its source, or its code where it was found as a module.
        argv: ``sys.argv``.
        folder: What stands first in ``sys.path``.
    """

    main: ModuleType
    source: bytes | CodeType
    argv: list[str]
    folder: str

    @property
    def name(self) -> str:
        """The file that is run."""
        return str(self.main.__file__)


def script(path: str, arguments: Sequence[str]) -> Program:
    """The script at ``path``; of a folder or a zip file, the ``__main__.py`` in it.

    Raises:
        UsageError: There is none.
    """
    file, argv = Path(path), [path, *arguments]
    if file.is_dir() or zipfile.is_zipfile(file):
        spec = PathFinder.find_spec("__main__", [path])
        if spec is None or spec.origin is None:
            raise UsageError(f"cannot run {path}: there is no __main__.py in it")
        main = _main(os.path.abspath(spec.origin), spec, spec.loader)
        return Program(main, _code_of(spec), argv, os.path.abspath(path))
    try:
        source = file.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot run {file}: {error.strerror or error}") from None
    where = os.path.abspath(file)  # not resolved: a script that is a link is called by the link's name
    main = _main(where, None, SourceFileLoader("__main__", where))
    return Program(main, source, argv, str(file.resolve().parent))


def module(name: str, arguments: Sequence[str]) -> Program:
    """The module called ``name``, of a package its ``__main__``, as ``python -m`` finds it: also in this folder.

    Raises:
        UsageError: There is none.
    """
    sys.path.insert(0, os.getcwd())
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            name += ".__main__"
            spec = importlib.util.find_spec(name)
    except (ImportError, ValueError) as error:
        raise UsageError(f"cannot run the module {name}: {error}") from None
    finally:
        del sys.path[0]
    code = _code_of(spec) if spec is not None else None
    if spec is None or spec.origin is None or code is None:
        raise UsageError(f"no module named {name} can be run; a script is given by its path")
    return Program(_main(spec.origin, spec, spec.loader), code, [spec.origin, *arguments], os.getcwd())


def _code_of(spec: ModuleSpec) -> Any:
    """The module's code, or None where it has none (it is written in C)."""
    return getattr(spec.loader, "get_code", lambda name: None)(spec.name)


def _main(file: str, spec: ModuleSpec | None, loader: Any) -> ModuleType:
    main = ModuleType("__main__")
    main.__file__, main.__spec__, main.__loader__ = file, spec, loader
    main.__package__ = spec.parent if spec is not None else None
    vars(main).update(__builtins__=__builtins__, __cached__=None, __annotations__={})
    return main


def run(program: Program, told: Callable[[BaseException], int | None] = lambda error: None) -> int:
    """Run ``program`` in this process and give its exit code; an error that nobody caught is shown as Python shows it.

    Args:
        program: What to run.
        told: Asked about an error that nobody caught: the exit code where it was told of otherwise, None where it
            was not, and then Python's own way is taken.
    """
    sys.argv[:] = program.argv
    if not sys.flags.safe_path:
        sys.path[0] = program.folder
    sys.modules["__main__"] = program.main
    try:
        code = program.source
        if isinstance(code, bytes):
            code = compile(code, program.name, "exec", dont_inherit=True)
        exec(code, vars(program.main))
    except SystemExit as leaving:
        return _exit_code(leaving)
    except BaseException as error:
        if (known := told(error)) is not None:
            return known
        shown = _theirs(error)
        sys.excepthook(type(shown), shown, shown.__traceback__)
        if isinstance(error, KeyboardInterrupt):
            # Not now: whatever waits for the end comes first, as without memprof.
            _ENDING.append(_die_of_interrupt)
        return 1
    return 0


def _exit_code(leaving: SystemExit) -> int:
    """What Python makes of what ``sys.exit`` was given."""
    if leaving.code is None or isinstance(leaving.code, int):
        return leaving.code or 0
    print(leaving.code, file=sys.stderr)
    return 1


def _theirs(error: BaseException) -> BaseException:
    """``error``, and what it came from, with a traceback of the script's and its libraries' lines alone."""
    own, seen = Path(__file__).parent, set[int]()
    told: BaseException | None = error
    while told is not None and id(told) not in seen:
        seen.add(id(told))
        trace, lines = told.__traceback__, list[TracebackType]()
        while trace is not None:
            lines.append(trace)
            trace = trace.tb_next
        for line in reversed(lines):
            if not Path(line.tb_frame.f_code.co_filename).is_relative_to(own):
                trace = TracebackType(trace, line.tb_frame, line.tb_lasti, line.tb_lineno)
        told.__traceback__ = trace
        told = told.__cause__ or told.__context__
    return error


#: What is done once a script and all that waited for its end are done (:func:`at_the_very_end`).
_ENDING: list[Callable[[], None]] = []


def at_the_very_end(then: Callable[[], None]) -> None:
    """Call ``then`` once the script, its threads and what it registered with :mod:`atexit` are over; ask it first.

    The end of a process that the script forks is not the script's.
    """
    process = os.getpid()
    _ENDING.append(lambda: then() if os.getpid() == process else None)

    @atexit.register
    def end() -> None:
        for each in _ENDING:
            each()


def _die_of_interrupt() -> None:
    """End as Python ends on Ctrl-C: of the signal, which a shell must see to end its loop."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if os.name == "posix":
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)


def undisturbed(errors: dict[str, str]) -> None:
    """Give signals and streams back to what they were before memprof: they are the script's now.

    Args:
        errors: What a stream did with a letter that its encoding lacks, by the stream's name in :mod:`sys`.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, way in errors.items():
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=way)


class _Loaded(MetaPathFinder):
    """Calls what waits for a module once that is loaded."""

    def __init__(self, waiting: dict[str, Callable[[ModuleType], None]]) -> None:
        self.waiting = waiting

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The spec that the other finders have for a module that is waited for; None for any other module."""
        if name not in self.waiting:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((s for finder in others if (s := finder.find_spec(name, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Told(spec.loader, self.waiting[name])
        return spec


class _Told(Loader):
    """Another loader, that tells when it is done."""

    def __init__(self, loader: Any, then: Callable[[ModuleType], None]) -> None:
        self._loader, self._then = loader, then

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the other does."""
        made: ModuleType | None = self._loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        """As the other does; from then on the module has that loader again."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._then(module)


def on_import(waiting: Mapping[str, Callable[[ModuleType], None]]) -> Callable[[], None]:
    """Call each of ``waiting`` with the module of its name once that is loaded; at once where it is already.

    Returns:
        What ends the waiting.
    """
    still = {name: then for name, then in waiting.items() if name not in sys.modules}
    for name in waiting.keys() - still.keys():
        waiting[name](sys.modules[name])
    finder = _Loaded(still)
    sys.meta_path.insert(0, finder)

    def over() -> None:
        with suppress(ValueError):
            sys.meta_path.remove(finder)

    return over
