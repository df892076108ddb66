"""Which run is meant: by its folder, as ``latest``, or by a part of its name that no other has.

Known are the runs in ``runs/`` here, and those that this user's ``memprof run`` saved anywhere: each leaves a line in a
list beside memprof's cache. The list is a help and no record: nothing depends on it, and a run that was moved away is
left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from memprof.errors import DataError
from memprof.files import cache_folder

if TYPE_CHECKING:
    from memprof.records import Run

LATEST = "latest"
#: Where runs go that were given no folder, and what is looked through for them.
HERE = Path("runs")
#: The list of saved runs; None: in memprof's cache.
LIST: Path | None = None
_RUN_FILE = "run.json"
#: Most runs that a refusal names.
MOST_NAMED = 4


def remember(folder: Path) -> None:
    """Add ``folder`` to the list of saved runs; a list that cannot be written is no error."""
    if (saved := _list()) is not None:
        with suppress(OSError):
            saved.parent.mkdir(parents=True, exist_ok=True)
            with saved.open("a", encoding="utf-8") as file:
                file.write(f"{folder.resolve()}\n")


def members(folder: Path) -> list[Path]:
    """The run folders that ``folder`` is or holds, in order of their names."""
    return [folder] if (folder / _RUN_FILE).is_file() else sorted(p.parent for p in folder.glob(f"*/{_RUN_FILE}"))


def recent() -> list[Path]:
    """Every known folder that is or holds runs, the one written to last first."""
    found: dict[Path, Path] = {}
    for path in (*_remembered(), *(HERE.iterdir() if HERE.is_dir() else ())):
        if path.resolve() not in found and members(path):
            found[path.resolve()] = _short(path)
    return sorted(found.values(), key=lambda path: (-_written(path), path.as_posix()))


def locate(given: Path) -> Path:
    """The folder that ``given`` names.

    Raises:
        DataError: Nothing is called so, or more than one thing.
    """
    if members(given):
        return given
    known, text = recent(), given.as_posix()
    if text == LATEST or text.startswith(f"{LATEST}/"):
        if not known:
            raise DataError("there is no latest run: none is in runs/ here, and none was saved elsewhere")
        text = text[len(LATEST) + 1 :]
        return _only(text, f"{LATEST}/{text}", members(known[0])) if text else known[0]
    for candidates in (known, [one for folder in known for one in members(folder)]):
        same = [path for path in candidates if path.name == text]
        named = same or [path for path in candidates if _called(path, text)]
        if named:
            return _only(text, text, named)
    raise DataError(f"{given} holds no run, and no run has that in its name; `memprof runs` lists those there are")


def find(given: Iterable[Path]) -> list[Run]:
    """The runs that ``given`` name; shards of a run become one."""
    from memprof.store import find_runs

    return find_runs(locate(Path(one)) for one in given)


def one(given: Path) -> Run:
    """The one run that ``given`` names.

    Raises:
        DataError: It names several.
    """
    found = find([given])
    if len(found) > 1:
        names = ", ".join(str(run.path) for run in found)
        raise DataError(f"{given} holds {len(found)} runs, and one is wanted: {names}")
    return found[0]


def _only(text: str, asked: str, paths: list[Path]) -> Path:
    named = [path for path in paths if _called(path, text)]
    exact = [path for path in named if path.name == text]
    if len(exact or named) == 1:
        return (exact or named)[0]
    known = named or paths
    shown = ", ".join(path.as_posix() for path in known[:MOST_NAMED]) + ", ..." * (len(known) > MOST_NAMED)
    why = f"{asked!r} may be any of {len(named)} runs" if named else f"no run is called {asked!r}"
    raise DataError(f"{why}: {shown}")


def _called(path: Path, text: str) -> bool:
    """Whether ``text`` is a part of the path's name; with slashes, of its last names one by one: ``proving/topv``."""
    name, asked = _name(path), text.lower()
    if asked in name:
        return True
    words, parts = asked.split("/"), name.split("/")
    return 1 < len(words) <= len(parts) and all(w in p for w, p in zip(words, parts[-len(words) :], strict=True))


def _name(path: Path) -> str:
    """What a part of may be typed: the path as seen from here, of one elsewhere its last two names."""
    return "/".join(path.parts[-2:] if path.is_absolute() else path.parts).lower()


def _remembered() -> Iterator[Path]:
    if (saved := _list()) is not None:
        with suppress(OSError, UnicodeError):
            yield from map(Path, dict.fromkeys(saved.read_text(encoding="utf-8").splitlines()))


def _list() -> Path | None:
    cached = cache_folder()
    return LIST or (cached / "runs.txt" if cached is not None else None)


def _short(path: Path) -> Path:
    """``path`` as seen from here, where it lies below."""
    with suppress(ValueError):
        return path.resolve().relative_to(Path.cwd())
    return path


def _written(folder: Path) -> float:
    return max(file.stat().st_mtime for run in members(folder) for file in run.iterdir() if file.is_file())
