"""The one place that reads and writes memprof's files: whole or not at all, and one writer at a time.

A reader sees the old content or the new, never half of one. What cannot be read is a :class:`DataError` of one line
that names the file; what can be made anew is set aside first (:func:`set_aside`). Nothing here loads torch.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from memprof import alone
from memprof.errors import DataError, MemprofError

#: A file beyond this is none of memprof's: records of long runs have some hundred MiB.
MOST_BYTES = 2**31


def read_text(path: Path) -> str:
    """What ``path`` holds.

    Raises:
        FileNotFoundError: Nothing is there.
        DataError: It cannot be read, or is no UTF-8.
    """
    try:
        return read_bytes(path).decode()
    except ValueError as error:
        raise DataError(f"cannot read {path}: {first_line(error)}") from None


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """What file ``path`` holds: never a device or a pipe, which may have no end, and never beyond ``most`` bytes.

    Raises:
        FileNotFoundError: Nothing is there.
        DataError: It cannot be read, is no file, or is longer.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DataError(f"cannot read {path}: it is {kind_of(path)}")
        # O_NONBLOCK, as a pipe may have taken its place: opening one that nobody writes to waits for ever.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise DataError(f"cannot read {path}: it has {size} bytes; no such file has more than {most}")
            return file.read()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {first_line(error)}") from None


def kind_of(path: Path) -> str:
    """What stands at ``path`` in place of a file, in words; ``a file`` where it is one."""
    kinds = {"a folder": Path.is_dir, "a device": lambda p: p.is_char_device() or p.is_block_device(),
             "a pipe": Path.is_fifo, "a socket": Path.is_socket, "a file": Path.is_file}  # fmt: skip
    return next((name for name, holds in kinds.items() if holds(path)), "not there")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        FileNotFoundError: Nothing is there.
        DataError: It cannot be read, or holds no JSON object.
    """
    return parse_json(read_text(path), str(path))


def parse_json(text: str, where: str) -> dict[str, Any]:
    """The JSON object that ``text`` is; raises DataError, which says ``where`` it stands, if it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} cannot be read as JSON: {first_line(error)}") from None
    if not isinstance(found, dict):
        raise DataError(f"{where} holds no JSON object")
    return found


def replace(path: Path, content: str | bytes) -> None:
    """Make ``content`` what ``path`` holds, in one step; its folder is made if it is missing.

    Whatever ends the process, the file is the old one or the new one, and no other writer's half is taken for it. A
    link is followed; what is no file (a pipe, a terminal) is written to.

    Raises:
        OSError: It cannot be written; the old file is as it was.
    """
    # Halves of characters, which no encoding has, are written out; in JSON that is what they are.
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    number, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(number, "wb") as file:
            file.write(data)
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


def _umask() -> int:
    """The mask of this process: a temporary file is private, and what is written in its place is not to be."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, data: Any) -> None:
    """Write ``data`` to ``path`` in one step."""
    replace(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def set_aside(path: Path) -> Path | None:
    """Rename a file that cannot be read, for somebody to look at; its new path, or None if that was not possible."""
    aside = path.with_name(f"{path.name}.damaged")
    try:
        os.replace(path, aside)
    except OSError:
        return None
    return aside


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold ``path``, a folder, or a file that is made if it is missing, against every other process that locks it.

    A file system without locks holds nobody up. A copy of this process does not hold it: the lock ends with its taker.

    Raises:
        MemprofError: Another process has it, and ``wait`` is false.
    """
    number = alone.keep(os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666))
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise MemprofError(f"another process is writing to {path}") from None
        except OSError:
            pass
        yield
    finally:
        alone.close(number)


def cache_folder() -> Path | None:
    """What memprof keeps between runs: ``MEMPROF_CACHE``, or ``memprof`` in ``XDG_CACHE_HOME`` or ``~/.cache``.

    None where ``MEMPROF_CACHE`` is empty: then nothing is kept.
    """
    asked = os.environ.get("MEMPROF_CACHE")
    if asked is not None:
        return Path(asked) if asked else None
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memprof"


def first_line(error: BaseException) -> str:
    """What ``error`` says, on one line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
