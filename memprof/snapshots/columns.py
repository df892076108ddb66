"""Columns of numbers, as long as a recording: in memory while they are short, then in a file without a name.

Such a file lies in the folder for temporary files (``TMPDIR`` names another) and goes with the process. What is read of
it comes through a map, so everyone sees arrays, and the system can take every page back. Whoever goes through columns
does so a stretch at a time and keeps nothing that is as long as they are: then no recording is too long for the memory.
"""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from memprof.errors import MemprofError

#: From so many bytes on, what is new of a column goes into its file.
MOST_IN_MEMORY = 2**20
#: Rows of a stretch.
STRETCH = 2**16

_TYPES: dict[str, Any] = {"b": np.int8, "i": np.int32, "q": np.int64}
#: Of every column that lies in a file and is read.
_maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


class Column:
    """A column that grows: ``kind`` is a letter of :mod:`array`. When it is whole, :meth:`whole` gives the numbers.

    Attributes:
        tail: The newest numbers, to append to; whoever does calls :meth:`settle` from time to time.
    """

    def __init__(self, kind: str) -> None:
        self.tail = array(kind)
        self._file: int | None = None
        self._filed = 0  # numbers in the file

    def __len__(self) -> int:
        return self._filed + len(self.tail)

    def extend(self, numbers: npt.NDArray[Any]) -> None:
        """Put numbers at the end."""
        self.tail.frombytes(numbers.astype(_TYPES[self.tail.typecode]).tobytes())
        self.settle()

    def settle(self) -> None:
        """Move the tail into the file if it has become long."""
        if len(self.tail) * self.tail.itemsize > MOST_IN_MEMORY:
            self._file_away()

    def _file_away(self) -> None:
        try:
            if self._file is None:
                self._file = _unnamed_file()
                weakref.finalize(self, os.close, self._file)
            with memoryview(self.tail).cast("B") as data:
                done = 0
                while done < len(data):
                    done += os.write(self._file, data[done:])
        except OSError as error:
            raise _no_room(error) from None
        self._filed += len(self.tail)
        del self.tail[:]

    def __getitem__(self, place: int) -> int:
        if place >= self._filed:
            return int(self.tail[place - self._filed])
        assert self._file is not None
        size = self.tail.itemsize
        return int.from_bytes(os.pread(self._file, size, place * size), sys.byteorder, signed=True)

    def __setitem__(self, place: int, number: int) -> None:
        if place >= self._filed:
            self.tail[place - self._filed] = number
            return
        assert self._file is not None
        size = self.tail.itemsize
        try:
            os.pwrite(self._file, number.to_bytes(size, sys.byteorder, signed=True), place * size)
        except OSError as error:
            raise _no_room(error) from None

    def whole(self) -> npt.NDArray[Any]:
        """All numbers, to be read; nothing may be put behind them any more."""
        dtype = _TYPES[self.tail.typecode]
        if self._file is None:
            return np.frombuffer(self.tail, dtype)
        self._file_away()
        mapped = mmap.mmap(self._file, len(self) * dtype().itemsize, access=mmap.ACCESS_READ)
        _maps.add(mapped)
        return np.frombuffer(mapped, dtype)


def _unnamed_file() -> int:
    with tempfile.TemporaryFile(prefix="memprof-") as file:
        return os.dup(file.fileno())


def _no_room(error: OSError) -> MemprofError:
    return MemprofError(
        f"a long recording is kept in temporary files: {error.strerror or error}; "
        "let TMPDIR name a folder with room for half as many bytes as the recording has"
    )


def gathered(kind: str, parts: Iterator[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """The column that ``parts``, one after the other, make."""
    column = Column(kind)
    for part in parts:
        column.extend(part)
    return column.whole()


def stretches(
    *columns: npt.NDArray[Any], start: int = 0, stop: int | None = None, backwards: bool = False
) -> Iterator[tuple[int, tuple[npt.NDArray[Any], ...]]]:
    """Columns of equal length a stretch at a time: where it begins, and that part of each."""
    stop = len(columns[0]) if stop is None else min(stop, len(columns[0]))
    begins = range(start, stop, STRETCH)
    for begin in reversed(begins) if backwards else begins:
        yield begin, tuple(column[begin : min(begin + STRETCH, stop)] for column in columns)
        if begin + STRETCH <= stop:
            _forget()


def highest(parts: Iterable[tuple[int, npt.NDArray[Any]]]) -> tuple[int, int]:
    """The highest number of stretches, and where it stands first; place -1 where there are no numbers.

    numpy's own search copies whatever may not be written to.
    """
    most, at = 0, -1
    for begin, part in parts:
        place = int(part.argmax())
        if at < 0 or part[place] > most:
            most, at = int(part[place]), begin + place
    return most, at


def _forget() -> None:
    """Let the system have the pages of all columns that lie in files; who reads on gets them again."""
    for mapped in list(_maps):
        mapped.madvise(mmap.MADV_DONTNEED)
