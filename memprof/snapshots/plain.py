"""Plain data out of a file nobody vouches for: pickles and JSON, also compressed, folded while they are read.

A pickle is a program for a small stack machine, and what makes it dangerous are the instructions that import and call.
This reader knows only the instructions that build plain data; at any other one it stops with a
:class:`memprof.errors.DataError`, so no file can make anything run. Three more things keep a file from harming:

* **keys are plain**: a dict's keys and whatever else is hashed are text or whole numbers, so no nesting is hashed;
* **bounded work**: every instruction takes a time that its own bytes pay for; nothing that is shared is gone through
  twice; nothing is compared or printed that the file nests;
* **bounded memory**: what is kept beside events may hold :data:`MOST_OBJECTS` objects.

It reads in chunks, folds each event into columns (:mod:`memprof.snapshots.columns`) as soon as its dict is complete,
and interns frames and stacks; pickle's own reader would keep every dict until the end. What is left in memory does not
grow with the events. One that looks like thousands before it, which is most of them, is read by one regular expression.
"""

from __future__ import annotations

import gzip
import importlib
import io
import json
import pickletools
import re
import struct
import zlib
from array import array
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from memprof.errors import DataError
from memprof.snapshots.columns import Column
from memprof.snapshots.memo import Memo

#: What an event can be; a column of actions holds the index into this tuple.
ACTIONS = (
    "alloc", "free_requested", "free_completed", "segment_alloc", "segment_free", "segment_map", "segment_unmap",
    "snapshot", "oom", "other",
)  # fmt: skip
#: How many objects a file may hold beside its events, and how many an event may leave behind (references).
MOST_OBJECTS, PER_EVENT = 2**21, 8
#: The longest text, in bytes; compiler contexts and user metadata are long, but not longer.
LONGEST_TEXT = 2**22
#: JSON is read whole, so it may not be longer than this many bytes.
LONGEST_JSON = 2**28
#: How many times smaller compression may have made a file; small files may have been more.
MOST_PACKED, UNPACKED_LEAST = 200, 2**26
#: How many frames a stack may have; Python itself stops at a thousand.
DEEPEST_STACK = 2**16

_CHUNK = 2**20  # bytes read at once
_MARGIN = 2**13  # bytes, more than most events take, and more than any instruction but text


@dataclass(frozen=True, slots=True)
class Frame:
    """One line of a stack, as torch recorded it."""

    filename: str
    line: int
    name: str


@dataclass(frozen=True, slots=True)
class Events:
    """Stands for so many events, one behind the other, that have gone into the columns."""

    count: int


EVENT = Events(1)


@dataclass(frozen=True, slots=True)
class StackRef:
    """A list of frames that has been interned."""

    index: int


class Kind(NamedTuple):
    """All of an event but its numbers: an index into :data:`ACTIONS` and into a folder's stacks, lanes and labels."""

    action: int
    stack: int
    lane: int
    label: int


class Folder:
    """Turns dicts into events, frames and stacks, each kept once.

    Attributes:
        kinds: What events have in common, to its number.
        kind_ids: Index into :attr:`kinds`, one an event; the columns beside it have one entry an event, too.
        addresses: Bytes; for an ``oom`` event, what the device had free.
        sizes: Bytes.
        times: Microseconds; 0 where the file says none.
        stacks: Every list of frames, once; the first is empty.
        lanes: ``(stream, pool id)`` to its number.
        labels: User metadata to its number.
        pooled: Whether events say which pool they belong to.
    """

    def __init__(self) -> None:
        self.kind_ids, self.addresses, self.sizes, self.times = Column("i"), Column("q"), Column("q"), Column("q")
        self.kinds: dict[Kind, int] = {}
        self.stacks: list[tuple[Frame, ...]] = [()]
        self.lanes: dict[tuple[int, tuple[int, int]], int] = {}
        self.labels: dict[str, int] = {"": 0}
        self.pooled = False
        self._refs = [StackRef(0)]
        self._frames: dict[tuple[str, int, str], Frame] = {}
        self._known_stacks: dict[tuple[int, ...], int] = {(): 0}

    def fold(self, record: dict[Any, Any]) -> Any:
        """What a dict stands for: an event becomes a row, a frame a :class:`Frame`, a list of frames a number."""
        if "action" in record:
            self._append_event(record)
            return EVENT
        if "filename" in record and "line" in record:
            return self._frame(record)
        if "frames" in record:
            record["frames"] = self.stack(record["frames"])
        return record

    def _frame(self, record: dict[Any, Any]) -> Frame:
        key = record["filename"], record["line"], record.get("name", "")
        if not (type(key[0]) is str and type(key[1]) is int and type(key[2]) is str):
            raise DataError("a frame is not a file name, a line and a name")
        frame = self._frames.get(key)
        if frame is None:
            frame = self._frames[key] = Frame(*key)
        return frame

    def _append_event(self, event: dict[Any, Any]) -> None:
        address = event["device_free"] if "device_free" in event else event.get("addr", 0)
        numbers = whole(address), whole(event.get("size", 0)), whole(event.get("time_us", 0))
        self.kind_ids.tail.append(self.kind(self.kind_of(event)))
        for column, number in zip((self.addresses, self.sizes, self.times), numbers, strict=True):
            column.tail.append(number)

    def settle(self) -> None:
        """Move what is long into files."""
        for column in (self.kind_ids, self.addresses, self.sizes, self.times):
            column.settle()

    def kind_of(self, event: dict[Any, Any]) -> Kind:
        """All of an event but its numbers."""
        action = event["action"]
        if type(action) is not str:
            raise DataError("an event's action is not text")
        code = ACTION_CODES.get(action, len(ACTIONS) - 1)
        return Kind(code, self.stack(event.get("frames", [])), self.lane(event), self.label(event.get("user_metadata")))

    def kind(self, kind: Kind) -> int:
        """The number of what an event shares with others."""
        return self.kinds.setdefault(kind, len(self.kinds))

    def label(self, text: Any) -> int:
        """The number of a user's own text."""
        return self.labels.setdefault(text, len(self.labels)) if type(text) is str else 0

    def lane(self, record: dict[Any, Any]) -> int:
        """The number of the (stream, pool) that an event or a segment belongs to."""
        pool: Any = record.get("pool_id")
        if pool is None:
            pool = record.get("segment_pool_id", (0, 0))
        elif pool:
            self.pooled = True
        if len(pool) != 2:
            raise DataError("the id of a memory pool is not two numbers")
        return self.lanes.setdefault(
            (whole(record.get("stream", 0)), (whole(pool[0]), whole(pool[1]))), len(self.lanes)
        )

    def stack(self, frames: Any) -> int:
        """The number of a list of frames. The list is marked, so that who shares it is not made to pay again."""
        if type(frames) is StackRef:
            return frames.index
        if type(frames) is not list:
            raise DataError("a stack is not a list of frames")
        if len(frames) == 1 and type(frames[0]) is StackRef:
            return frames[0].index
        index = self.stack_of(frames)
        frames[:] = [self._refs[index]]
        return index

    def stack_of(self, frames: list[Any]) -> int:
        """The number of ``frames``, new or known."""
        if len(frames) > DEEPEST_STACK or not all(type(frame) is Frame for frame in frames):
            raise DataError("a stack is not a list of frames")
        key = tuple(map(id, frames))  # frames are interned, so one object is one frame
        index = self._known_stacks.get(key)
        if index is None:
            index = self._known_stacks[key] = len(self.stacks)
            self.stacks.append(tuple(frames))
            self._refs.append(StackRef(index))
        return index

    def ref(self, index: int) -> StackRef:
        """What stands in the file's structure for stack number ``index``."""
        return self._refs[index]


ACTION_CODES = {name: code for code, name in enumerate(ACTIONS)}


def whole(value: Any) -> int:
    """``value`` if it is a whole number of at most 64 bits; else :class:`DataError`."""
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise DataError("not a CUDA memory snapshot: something that should be a whole number is not one")
    return value


# ------------------------------------------------------------------------------------------------------------ the files


def read_plain(path: Path) -> tuple[Any, Folder]:
    """The plain object that a file holds, and the events, stacks and lanes that were folded out of it.

    Pickles of the protocols 2 to 5 and JSON, both also compressed by gzip or zstd; which one it is, the first bytes
    say, not the name.

    Raises:
        DataError: The file cannot be read, is cut short, or holds anything but plain data; one line.
    """
    if path.exists() and not path.is_file():
        raise DataError(f"cannot read {path}: it is not a file")
    try:
        with path.open("rb", buffering=0) as file, _unpacked(file) as data:
            folder = Folder()
            packed = type(data.raw) is not io.FileIO
            longest = UNPACKED_LEAST + MOST_PACKED * path.stat().st_size if packed else None
            if data.peek(1)[:1] in b"{[ \t\r\n":
                return _read_json(data, folder), folder
            return PickleReader(cast("BinaryIO", data), folder, longest).read(), folder
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except (IndexError, struct.error, EOFError):
        raise DataError(f"{path}: the file is cut short") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: the compressed file is damaged ({error})") from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(f"{path}: not a CUDA memory snapshot ({type(error).__name__})") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None


def _unpacked(file: io.FileIO) -> io.BufferedReader:
    """``file`` as it was before somebody compressed it."""
    start = file.read(4)
    file.seek(0)
    if start[:2] == b"\x1f\x8b":
        return io.BufferedReader(cast("Any", gzip.GzipFile(fileobj=file)), _CHUNK)
    if start == b"\x28\xb5\x2f\xfd":
        return io.BufferedReader(_zstd(file), _CHUNK)
    return io.BufferedReader(file, _CHUNK)


def _zstd(file: io.FileIO) -> Any:
    """A reader of zstd by whichever package there is: Python 3.14's own, zstandard, or pyarrow."""
    with suppress(ImportError):
        return _Readable(importlib.import_module("compression.zstd").ZstdFile(file))
    with suppress(ImportError):
        return _Readable(importlib.import_module("zstandard").ZstdDecompressor().stream_reader(file))
    with suppress(ImportError):
        return _Readable(importlib.import_module("pyarrow").CompressedInputStream(file, "zstd"))
    raise DataError(
        "compressed by zstd, and no package here reads that: pip install zstandard, or unpack it by zstd -d"
    )


class _Readable(io.RawIOBase):
    """What has only ``read``, as Python's buffers want it; its own errors become ours."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._source.read(len(buffer))
        except Exception as error:  # each package has errors of its own
            raise DataError(
                f"the compressed file is damaged or cut short ({str(error)[:80].splitlines()[0]})"
            ) from None
        buffer[: len(data)] = data
        return len(data)


def _read_json(data: io.BufferedReader, folder: Folder) -> Any:
    """JSON, folded as its objects end."""
    text = data.read(LONGEST_JSON + 1)
    if len(text) > LONGEST_JSON:
        raise DataError(f"JSON of more than {LONGEST_JSON // 2**20} MiB is not read; use the pickle it was made from")
    try:
        return json.loads(text, object_hook=folder.fold)
    except json.JSONDecodeError as error:
        where = "the file is cut short" if error.pos >= len(error.doc.rstrip()) else f"not JSON ({error.msg})"
        raise DataError(where) from None
    except RecursionError:
        raise DataError("its JSON is nested too deeply for a snapshot") from None


# ----------------------------------------------------------------------------------------------------------- the pickle

#: What an event's values may be: a number; a reference to something earlier; a new list of such; a new pair of bytes.
_NUMBER = rb"K.|M..|J....|\x8a(?:\x06.{6}|\x07.{7}|\x05.{5}|\x08.{8})"
_REFERENCE = rb"j....|h."
_RUN = rb"\]\x94\((?:j....|h.)*+e"
_PAIR = rb"K.K.\x86\x94"
_VALUE = b"|".join((_PAIR, _NUMBER, _REFERENCE, _RUN, rb"\]\x94(?!\()", b"N", rb"\)"))
#: An event: an empty dict, remembered, and its items; as any may be, and the opening of one whose keys are known.
_ITEM = b"(" + _REFERENCE + b")(" + _VALUE + b")"
_OPENING = rb"\}\x94\("
_EVENT = re.compile(_OPENING + _ITEM * 4 + (b"(?:" + _ITEM + b")?") * 6 + b"u", re.DOTALL)
#: EMPTY_LIST, MEMOIZE, MARK, any number of BINGET and LONG_BINGET, APPENDS: a new list of things seen before.
_RUN_OF_REFERENCES = re.compile(_RUN, re.DOTALL)
_MOST_SHAPES, _MOST_KINDS = 8, 2**14
_INT32, _UINT32, _UINT16 = struct.Struct("<i"), struct.Struct("<I"), struct.Struct("<H")
#: Instructions for text: how many bytes their length takes.
_TEXT = {0x8C: 1, 0x58: 4, 0x8D: 8}
_CONSTANTS: dict[int, object] = {0x4E: None, 0x88: True, 0x89: False, 0x29: ()}
_NUMBERS = ("addr", "size", "time_us")


class _Shape(NamedTuple):
    """Events whose keys stand in one order.

    Attributes:
        pattern: Finds one; its groups are the values.
        numbers: Gives of the groups the address, the size and the time.
        shared: Gives of the groups whatever else there is.
        names: The key of each group.
        frames: Which of what else there is are the frames; None where there are none.
        kinds: By what they share, their :class:`Kind`'s number, and the numbers of what each leaves in the memo.
    """

    pattern: re.Pattern[bytes]
    numbers: Callable[[tuple[bytes, ...]], tuple[bytes, bytes, bytes]]
    shared: Callable[[tuple[bytes, ...]], tuple[bytes, ...]]
    names: tuple[str, ...]
    frames: int | None
    kinds: dict[tuple[bytes, ...], tuple[int, array[int]]]


class PickleReader:
    """The plain-data half of the pickle machine (protocols 2 to 5)."""

    def __init__(self, file: BinaryIO, folder: Folder, longest: int | None = None) -> None:
        self._file, self._folder, self._longest = file, folder, longest
        self._memo = Memo(Events, StackRef, Frame)
        self._where: dict[int, int] = {}  # id of a dict or list -> its place in the memo, until it is folded
        self._known_runs: dict[bytes, int] = {}
        self._shapes: list[_Shape] = []
        self._kept = self._read = 0

    def read(self) -> Any:
        """The object that the pickle describes."""
        file, memo, where, folder = self._file, self._memo, self._where, self._folder
        first = memo.first
        int32, uint32, uint16 = _INT32.unpack_from, _UINT32.unpack_from, _UINT16.unpack_from
        stack: list[Any] = []
        groups: list[int] = []
        data, at, safe = b"", 0, -1
        while True:
            if at > safe:
                # Keep a margin, so that short arguments never straddle two chunks; past the end, indexing fails.
                self._check(len(stack), len(groups))
                more = file.read(_CHUNK)
                self._read += len(more)
                data, at = data[at:] + more, 0
                safe = len(data) - _MARGIN if more else len(data)
            code = data[at]
            at += 1
            # The commonest instructions of a snapshot come first.
            if code == 0x68:  # BINGET
                stack.append(first[data[at]])
                at += 1
            elif code == 0x6A:  # LONG_BINGET
                stack.append(memo[uint32(data, at)[0]])
                at += 4
            elif code == 0x94:  # MEMOIZE
                top = stack[-1]
                if type(top) is dict or type(top) is list:
                    where[id(top)] = len(memo)
                memo.append(top)
            elif code == 0x8A:  # LONG1
                size = data[at]
                at += 1
                if size > 16:
                    raise DataError("refused: a number of more than 128 bits is no part of a snapshot")
                stack.append(int.from_bytes(data[at : at + size], "little", signed=True))
                at += size
            elif code == 0x28:  # MARK
                groups.append(len(stack))
            elif code == 0x4B:  # BININT1
                stack.append(data[at])
                at += 1
            elif code == 0x4A:  # BININT
                stack.append(int32(data, at)[0])
                at += 4
            elif code == 0x4D:  # BININT2
                stack.append(uint16(data, at)[0])
                at += 2
            elif code == 0x7D:  # EMPTY_DICT
                before = len(folder.sizes)
                stop = self._events(data, at - 1) if data[at : at + 2] == b"\x94(" else 0
                if stop < at:
                    stack.append({})
                else:
                    stack.append(Events(len(folder.sizes) - before))
                    memo.settle()
                    at = stop
            elif code == 0x75:  # SETITEMS
                start = groups.pop()
                items = stack[start:]
                del stack[start:]
                stack[-1] = self._set(stack[-1], items)
            elif code == 0x5D:  # EMPTY_LIST
                run = _RUN_OF_REFERENCES.match(data, at - 1)
                known = None if run is None else self._stack_of_run(run[0])
                if run is not None and known is not None:
                    stack.append(folder.ref(known))
                    memo.append(stack[-1])
                    at = run.end()
                else:
                    stack.append([])
            elif code == 0x65:  # APPENDS
                start = groups.pop()
                items = stack[start:]
                del stack[start:]
                self._kept += len(items)
                _put(items, _plain_list(stack[-1]))
            elif code == 0x61:  # APPEND
                item = stack.pop()
                self._kept += 1
                _put([item], _plain_list(stack[-1]))
            elif code == 0x73:  # SETITEM
                items = stack[-2:]
                del stack[-2:]
                stack[-1] = self._set(stack[-1], items)
            elif code in _TEXT:  # SHORT_BINUNICODE, BINUNICODE, BINUNICODE8
                width = _TEXT[code]
                size = int.from_bytes(data[at : at + width], "little")
                at += width
                if at + size > safe:
                    if size > LONGEST_TEXT:
                        raise DataError(f"a text of more than {LONGEST_TEXT // 2**20} MiB, or the file is cut short")
                    data, at = data[at:] + file.read(size), 0
                    safe = len(data) - _MARGIN
                if size > len(data) - at:
                    raise IndexError(at)
                stack.append(str(data[at : at + size], "utf-8", "surrogatepass"))
                self._kept += size >> 6
                at += size
            elif code in _CONSTANTS:
                stack.append(_CONSTANTS[code])
            elif code == 0x95:  # FRAME
                at += 8
            elif code == 0x80:  # PROTO
                if not 2 <= data[at] <= 5:
                    raise DataError(f"pickle protocol {data[at]} is not read; write the snapshot with 2 to 5")
                at += 1
            elif code == 0x47:  # BINFLOAT
                stack.append(struct.unpack_from(">d", data, at)[0])
                at += 8
            elif code in (0x85, 0x86, 0x87):  # TUPLE1, TUPLE2, TUPLE3
                count = code - 0x84
                items = stack[-count:]
                del stack[-count:]
                self._kept += 1
                stack.append(tuple(items))
            elif code == 0x74:  # TUPLE
                start = groups.pop()
                items = stack[start:]
                del stack[start:]
                self._kept += len(items) + 1
                stack.append(tuple(items))
            elif code in (0x71, 0x72):  # BINPUT, LONG_BINPUT
                width = 1 if code == 0x71 else 4
                index = int.from_bytes(data[at : at + width], "little")
                at += width
                top = stack[-1]
                if index > len(memo):
                    raise DataError("the pickle's memo has holes")
                if type(top) is dict or type(top) is list:
                    where[id(top)] = index
                if index == len(memo):
                    memo.append(top)
                else:
                    memo[index] = top
            elif code == 0x2E:  # STOP
                return stack.pop()
            else:
                raise DataError(f"refused: pickle instruction {_name(code)} is not plain data; nothing was run")

    def _check(self, *waiting: int) -> None:
        """Stop where the file makes more objects than a snapshot of so many events does; else make room for more."""
        if self._kept + len(self._memo) + sum(waiting) > MOST_OBJECTS + PER_EVENT * len(self._folder.sizes):
            raise DataError("refused: it holds far more than a snapshot with so many events does")
        if self._longest is not None and self._read > self._longest:
            raise DataError("refused: it unpacks to far more than a snapshot of its size does")
        self._folder.settle()
        self._memo.settle()

    def _events(self, data: bytes, at: int) -> int:
        """Fold the events that follow each other from ``at`` on; where they end, which is ``at`` if there are none."""
        folder, memo = self._folder, self._memo.numbers.tail
        columns = folder.addresses.tail, folder.sizes.tail, folder.times.tail
        last = len(data) - _MARGIN
        while at < last:
            tried = ((i, each, each.pattern.match(data, at)) for i, each in enumerate(self._shapes))
            place, shape, found = next((hit for hit in tried if hit[2] is not None), (0, None, None))
            if shape is None:
                self._learn_shape(data, at)
                return at
            if place:
                self._shapes.insert(0, self._shapes.pop(place))
            match, numbers, shared = shape.pattern.match, shape.numbers, shape.shared
            while found is not None and at < last:
                values = found.groups()
                rest = shared(values)
                known = shape.kinds.get(rest) or self._known_kind(shape, values, rest)
                if known is None:
                    return at
                for column, number in zip(columns, numbers(values), strict=True):
                    code = number[0]
                    if code == 0x8A:
                        column.append(int.from_bytes(number[2:], "little", signed=True))
                    else:
                        column.append(int.from_bytes(number[1:], "little", signed=code == 0x4A))
                folder.kind_ids.tail.append(known[0])
                memo += known[1]
                at = found.end()
                found = match(data, at)
        return at

    def _learn_shape(self, data: bytes, at: int) -> None:
        """Remember the order of the keys of what stands at ``at``, if that is an event."""
        found = _EVENT.match(data, at)
        if found is None or len(self._shapes) == _MOST_SHAPES:
            return
        parts = [part for part in found.groups() if part is not None]
        keys, values = parts[::2], parts[1::2]
        names = [self._behind(key) for key in keys]
        if not all(type(name) is str for name in names) or len({*names}) < len(names):
            return
        if not {"action", *_NUMBERS} <= {*names} or "device_free" in names or "filename" in names:
            return
        pattern = _OPENING
        for key, value, name in zip(keys, values, names, strict=True):
            if name in _NUMBERS and value[:1] not in (b"K", b"M", b"J", b"\x8a"):
                return
            pattern += re.escape(key) + b"(" + (_NUMBER if name in _NUMBERS else _VALUE) + b")"
        places = [place for place, name in enumerate(names) if name not in _NUMBERS]
        shared = itemgetter(*places) if len(places) > 1 else lambda values, place=places[0]: (values[place],)
        self._shapes.append(
            _Shape(
                re.compile(pattern + b"u", re.DOTALL),
                cast("Any", itemgetter(*(names.index(name) for name in _NUMBERS))),
                cast("Any", shared),
                tuple(names),
                [names[place] for place in places].index("frames") if "frames" in names else None,
                {},
            )
        )

    def _known_kind(
        self, shape: _Shape, values: tuple[bytes, ...], rest: tuple[bytes, ...]
    ) -> tuple[int, array[int]] | None:
        """As :meth:`_learn_kind`, known or new; frames that stand at an earlier event are known by what they are.

        A completed free refers to the frames of its own request, so no two such events have the same bytes.
        """
        place = shape.frames
        if place is not None and rest[place][0] in b"hj" and (at := _place(rest[place])) < len(self._memo):
            rest = (*rest[:place], self._memo.numbers[at].to_bytes(4, "little"), *rest[place + 1 :])
        return shape.kinds.get(rest) or self._learn_kind(shape, values, rest)

    def _learn_kind(
        self, shape: _Shape, values: tuple[bytes, ...], rest: tuple[bytes, ...]
    ) -> tuple[int, array[int]] | None:
        """What events share whose values but the numbers are ``rest``, and the numbers of what each leaves in the memo.

        None where that must be found out step by step.
        """
        record: dict[Any, Any] = {}
        left: list[Any] = [EVENT]
        for name, value in zip(shape.names, values, strict=True):
            if name in _NUMBERS:
                continue
            code = value[0]
            if code == 0x5D:
                index = 0 if len(value) == 2 else self._stack_of_run(value)
                if index is None:
                    return None
                record[name] = self._folder.ref(index)
                left.append(record[name])
            elif len(value) == 6 and value[-1] == 0x94:
                record[name] = (value[1], value[3])
                left.append(record[name])
            elif code in b"hj":
                record[name] = self._behind(value)
            elif code == 0x4E:
                record[name] = None
            elif code == 0x29:
                record[name] = ()
            else:
                record[name] = int.from_bytes(value[2 if code == 0x8A else 1 :], "little", signed=code in b"\x8aJ")
        if type(record["action"]) is not str or type(record.get("frames", StackRef(0))) is not StackRef:
            return None
        kind = self._folder.kind(self._folder.kind_of(record))
        self._kept += 4 + sum(map(len, rest)) // 64
        if len(shape.kinds) == _MOST_KINDS:
            shape.kinds.clear()
        known = shape.kinds[rest] = kind, array("i", map(self._memo.number, left))
        return known

    def _behind(self, reference: bytes) -> Any:
        """What a reference stands for; None if it stands for nothing."""
        at = _place(reference)
        return self._memo[at] if at < len(self._memo) else None

    def _stack_of_run(self, run: bytes) -> int | None:
        """The stack that these very instructions build, if they list frames that are known: most stacks come again."""
        index = self._known_runs.get(run)
        if index is None:
            frames, at = [], 3
            while run[at] != 0x65:
                wide = run[at] == 0x6A
                frames.append(self._memo[_UINT32.unpack_from(run, at + 1)[0] if wide else run[at + 1]])
                at += 5 if wide else 2
            if all(type(frame) is Frame for frame in frames):
                index = self._known_runs[run] = self._folder.stack_of(frames)
                self._kept += (len(run) >> 6) + 2
        return index

    def _set(self, target: Any, items: list[Any]) -> Any:
        """Fill a dict, and fold what it stands for when it is complete."""
        if type(target) is not dict:
            raise DataError("refused: items set on something that is not a dict; nothing was run")
        keys = items[::2]
        if not all(type(key) is str or type(key) is int for key in keys):
            raise DataError("refused: the keys of a dict are not plain; nothing was run")
        target.update(zip(keys, items[1::2], strict=True))
        frames = target.get("frames")
        folded = self._folder.fold(target)
        if type(frames) is list and frames:
            self._replace(frames, frames[0])
        if folded is target:
            self._kept += len(keys)
        else:
            self._replace(target, folded)
        return folded

    def _replace(self, old: object, new: object) -> None:
        """Put ``new`` where the memo holds ``old``, so that ``old`` can go."""
        index = self._where.pop(id(old), None)
        if index is not None:
            self._memo[index] = new


def _plain_list(target: Any) -> list[Any]:
    if type(target) is not list:
        raise DataError("refused: items appended to something that is not a list; nothing was run")
    return target


def _place(reference: bytes) -> int:
    """The place that a BINGET or LONG_BINGET asks for."""
    return int.from_bytes(reference[1:], "little")


def _put(items: list[Any], target: list[Any]) -> None:
    """Put ``items`` at the end of a list; of events only how many there are."""
    if not items or type(items[0]) is not Events:
        target += items
        return
    for item in items:
        if target and type(item) is type(target[-1]) is Events:
            target[-1] = Events(target[-1].count + item.count)
        else:
            target.append(item)


def _name(code: int) -> str:
    return next((op.name for op in pickletools.opcodes if op.code == chr(code)), f"0x{code:02x}")
