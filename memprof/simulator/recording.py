"""Recorded allocator traces: read a torch CUDA snapshot safely, and keep tens of millions of events in a few columns.

``torch.cuda.memory._dump_snapshot`` writes a pickle of dicts, lists, tuples, strings and numbers. A pickle is a program
for a small stack machine, and what makes it dangerous are the instructions that import and call. This reader knows only
the instructions that build plain data; at any other one it stops with a :class:`memprof.errors.DataError`, so no file
can make anything run. It reads in chunks, folds each event into columns (about 30 bytes) as soon as its dict is
complete, and interns frames and stacks; pickle's own reader would keep every dict until the end.

The layout of a snapshot is described in ``torch/cuda/memory.py`` (``_snapshot``), PyTorch 2.13; files of older
versions, which lack ``allocator_settings``, pool ids or block addresses, are read too.
"""

from __future__ import annotations

import pickletools
import re
import struct
from array import array
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from memprof.errors import BadValue, DataError
from memprof.records import Status
from memprof.simulator.allocator import AllocatorSettings
from memprof.units import MIB

#: What an event can be; a :class:`Recording` holds the index into this tuple.
ACTIONS = (
    "alloc", "free_requested", "free_completed", "segment_alloc", "segment_free", "segment_map", "segment_unmap",
    "snapshot", "oom", "other",
)  # fmt: skip
ALLOC, FREE_REQUESTED, FREE_COMPLETED, SEGMENT_ALLOC, SEGMENT_FREE, SEGMENT_MAP, SEGMENT_UNMAP = range(7)
_ACTION_CODES = {name: code for code, name in enumerate(ACTIONS)}

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Frame:
    """One line of a stack, as torch recorded it."""

    filename: str
    line: int
    name: str


@dataclass(frozen=True, slots=True)
class RecordedBlock:
    """A block of the final snapshot. Sizes in bytes; ``stack`` indexes :attr:`Recording.stacks`."""

    address: int
    size: int
    requested: int
    live: bool
    stack: int


@dataclass(frozen=True, slots=True)
class RecordedSegment:
    """A segment of the final snapshot, with its blocks. Sizes in bytes; ``lane`` indexes :attr:`Recording.lanes`."""

    address: int
    size: int
    lane: int
    small: bool
    expandable: bool
    blocks: tuple[RecordedBlock, ...]


@dataclass(frozen=True, slots=True)
class Recording:
    """One device's recording: the events in order, as columns, and the state at the end of it."""

    device: int
    settings: AllocatorSettings
    segments: tuple[RecordedSegment, ...]
    #: Index into :data:`ACTIONS`, one per event.
    actions: npt.NDArray[np.int8]
    addresses: Ints
    #: Bytes: requested for allocations and frees, got from the driver for segments.
    sizes: Ints
    #: Index into :attr:`stacks`, one per event.
    stack_ids: npt.NDArray[np.int32]
    #: Index into :attr:`lanes`, one per event.
    lane_ids: npt.NDArray[np.int32]
    stacks: tuple[tuple[Frame, ...], ...]
    #: (stream, pool id): what shares no blocks with another lane.
    lanes: tuple[Hashable, ...]
    #: ``predicted`` where memprof wrote the file (:mod:`memprof.simulator.dump`), else ``measured``.
    status: Status = "measured"

    def __len__(self) -> int:
        return len(self.actions)


def read_recordings(path: Path) -> list[Recording]:
    """Read every device of a snapshot file, in the order of the device indices.

    Raises :class:`memprof.errors.DataError`, with one line, if the file cannot be read, is cut short, is not a CUDA
    snapshot, or holds anything but plain data; nothing in the file is run.
    """
    try:
        with path.open("rb") as file:
            reader = _PlainReader(file)
            try:
                root = reader.read()
                return _recordings(root, reader)
            except DataError as error:
                raise DataError(f"{path}: {error}") from None
            except (IndexError, struct.error):
                raise DataError(f"{path}: the file is cut short") from None
            except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
                raise DataError(f"{path}: not a CUDA memory snapshot ({type(error).__name__}: {error})") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None


class _Mark:
    """Stands for the start of a group on the stack, and for an event that has gone into the columns."""


_GROUP, _EVENT = _Mark(), _Mark()


@dataclass(frozen=True, slots=True)
class _Stack:
    """A list of frames that has been interned."""

    index: int


class _PlainReader:
    """The plain-data half of the pickle machine (protocols 2 to 5), folding events, stacks and frames as it goes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.actions, self.addresses, self.sizes = array("b"), array("q"), array("q")
        self.stack_ids, self.lane_ids = array("i"), array("i")
        self.stacks: list[tuple[Frame, ...]] = [()]
        self._handles = [_Stack(0)]
        self.lanes: dict[Hashable, int] = {}
        self._frames: dict[tuple[object, object, object], Frame] = {}
        self._known_runs: dict[bytes, _Stack] = {}
        self._known_stacks: dict[tuple[int, ...], int] = {(): 0}
        self._memo: list[Any] = []
        self._where: dict[int, int] = {}  # id of a dict or list -> its place in the memo, until it is folded

    def read(self) -> Any:
        """The object that the pickle describes."""
        file, memo, where = self._file, self._memo, self._where
        int32, uint32, uint16 = _INT32.unpack_from, _UINT32.unpack_from, _UINT16.unpack_from
        stack: list[Any] = []
        groups: list[int] = []
        data, at, safe = b"", 0, -1
        while True:
            if at > safe:
                # Keep a margin, so that short arguments never straddle two chunks; past the end, indexing fails.
                more = file.read(_CHUNK)
                data, at = data[at:] + more, 0
                safe = len(data) - _MARGIN if more else len(data)
            code = data[at]
            at += 1
            # The commonest instructions of a snapshot come first.
            if code == 0x68:  # BINGET
                stack.append(memo[data[at]])
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
                stack.append({})
            elif code == 0x75:  # SETITEMS
                start = groups.pop()
                items = stack[start:]
                del stack[start:]
                stack[-1] = self._fold(stack[-1], items)
            elif code == 0x5D:  # EMPTY_LIST
                run = _RUN_OF_REFERENCES.match(data, at)
                known = run and self._stack_of_run(run[0])
                if run and known:
                    stack.append(known)
                    memo.append(known)
                    at = run.end()
                else:
                    stack.append([])
            elif code == 0x65:  # APPENDS
                start = groups.pop()
                items = stack[start:]
                del stack[start:]
                _plain_list(stack[-1]).extend(items)
            elif code == 0x61:  # APPEND
                item = stack.pop()
                _plain_list(stack[-1]).append(item)
            elif code == 0x73:  # SETITEM
                items = stack[-2:]
                del stack[-2:]
                stack[-1] = self._fold(stack[-1], items)
            elif code in _TEXT:  # SHORT_BINUNICODE, BINUNICODE, BINUNICODE8
                width = _TEXT[code]
                size = int.from_bytes(data[at : at + width], "little")
                at += width
                if at + size > safe:
                    data, at = data[at:] + file.read(min(size, _LONGEST_TEXT)), 0
                    safe = len(data) - _MARGIN
                if size > len(data) - at:
                    raise IndexError(at)
                stack.append(str(data[at : at + size], "utf-8", "surrogatepass"))
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
                stack.append(tuple(items))
            elif code == 0x74:  # TUPLE
                start = groups.pop()
                items = stack[start:]
                del stack[start:]
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
                memo[index : index + 1] = [top]
            elif code == 0x2E:  # STOP
                return stack.pop()
            else:
                raise DataError(f"refused: pickle instruction {_name(code)} is not plain data; nothing was run")

    def _stack_of_run(self, run: bytes) -> _Stack | None:
        """The stack that these very instructions build, if they list frames that are known: most stacks come again."""
        stack = self._known_runs.get(run)
        if stack is None:
            frames, at = [], 2
            while run[at] != 0x65:
                wide = run[at] == 0x6A
                frames.append(self._memo[_UINT32.unpack_from(run, at + 1)[0] if wide else run[at + 1]])
                at += 5 if wide else 2
            if all(type(frame) is Frame for frame in frames):
                stack = self._known_runs[run] = self._handles[self._stack_id(frames)]
        return stack

    def _fold(self, target: Any, items: list[Any]) -> Any:
        """Fill a dict. An event becomes a row, a frame a :class:`Frame`, a list of frames a number."""
        if type(target) is not dict:
            raise DataError("refused: items set on something that is not a dict; nothing was run")
        target.update(zip(items[::2], items[1::2], strict=True))
        if "action" in target:
            self._append_event(target)
            return self._replace(target, _EVENT)
        if "filename" in target and "line" in target:
            key = (target["filename"], target["line"], target.get("name", ""))
            frame = self._frames.get(key)
            if frame is None:
                frame = self._frames[key] = Frame(str(key[0]), int(key[1]), str(key[2]))
            return self._replace(target, frame)
        if "frames" in target:
            target["frames"] = self._stack_id(target["frames"])
        return target

    def _replace(self, old: object, new: object) -> object:
        """Put ``new`` where the memo holds ``old``, so that ``old`` can go."""
        index = self._where.pop(id(old), None)
        if index is not None:
            self._memo[index] = new
        return new

    def _append_event(self, event: dict[str, Any]) -> None:
        self.actions.append(_ACTION_CODES.get(event["action"], len(ACTIONS) - 1))
        self.addresses.append(event.get("addr", 0))
        self.sizes.append(event.get("size", 0))
        self.stack_ids.append(self._stack_id(event.get("frames", [])))
        self.lane_ids.append(self.lane(event))

    def lane(self, record: dict[str, Any]) -> int:
        """The number of the (stream, pool) that an event or a segment belongs to."""
        pool = record.get("pool_id", record.get("segment_pool_id", (0, 0)))
        return self.lanes.setdefault((record.get("stream", 0), tuple(pool)), len(self.lanes))

    def _stack_id(self, frames: object) -> int:
        if isinstance(frames, _Stack):
            return frames.index
        if type(frames) is not list or not all(isinstance(frame, Frame) for frame in frames):
            raise DataError("a stack is not a list of frames")
        key = tuple(map(id, frames))  # frames are interned, so one object is one frame
        index = self._known_stacks.get(key)
        if index is None:
            index = self._known_stacks[key] = len(self.stacks)
            self.stacks.append(tuple(frames))
            self._handles.append(_Stack(index))
        self._replace(frames, self._handles[index])
        return index


def _plain_list(target: Any) -> list[Any]:
    if type(target) is not list:
        raise DataError("refused: items appended to something that is not a list; nothing was run")
    return target


_CHUNK = 2**20  # bytes read at once
_MARGIN = 512  # more than any instruction but text takes
_LONGEST_TEXT = 2**28
#: MEMOIZE, MARK, any number of BINGET and LONG_BINGET, APPENDS: a new list of things seen before.
_RUN_OF_REFERENCES = re.compile(rb"\x94\((?:h.|j.{4})*e", re.DOTALL)
_INT32, _UINT32, _UINT16 = struct.Struct("<i"), struct.Struct("<I"), struct.Struct("<H")
#: Instructions for text: how many bytes their length takes.
_TEXT = {0x8C: 1, 0x58: 4, 0x8D: 8}
_CONSTANTS: dict[int, object] = {0x4E: None, 0x88: True, 0x89: False, 0x29: ()}


def _name(code: int) -> str:
    return next((op.name for op in pickletools.opcodes if op.code == chr(code)), f"0x{code:02x}")


def _recordings(root: Any, reader: _PlainReader) -> list[Recording]:
    if type(root) is not dict or type(root.get("segments")) is not list or type(root.get("device_traces")) is not list:
        raise DataError("not a CUDA memory snapshot: it has no 'segments' and 'device_traces'")
    settings = _settings(root.get("allocator_settings"))
    status: Status = "predicted" if "memprof" in root else "measured"
    lane_of = reader.lane
    actions = np.frombuffer(reader.actions, dtype=np.int8)
    addresses = np.frombuffer(reader.addresses, dtype=np.int64)
    sizes = np.frombuffer(reader.sizes, dtype=np.int64)
    stack_ids = np.frombuffer(reader.stack_ids, dtype=np.int32)
    lane_ids = np.frombuffer(reader.lane_ids, dtype=np.int32)
    segments: dict[int, list[RecordedSegment]] = {}
    for record in root["segments"]:
        segment = _segment(record, lane_of(record))
        segments.setdefault(int(record.get("device", 0)), []).append(segment)
    recordings, start = [], 0
    for device, events in enumerate(root["device_traces"]):
        stop = start + len(events)
        if any(event is not _EVENT for event in events):
            raise DataError("a device trace holds something that is not an event")
        part = slice(start, stop)
        recordings.append(
            Recording(
                device=device,
                settings=settings,
                segments=tuple(sorted(segments.get(device, ()), key=lambda segment: segment.address)),
                actions=actions[part],
                addresses=addresses[part],
                sizes=sizes[part],
                stack_ids=stack_ids[part],
                lane_ids=lane_ids[part],
                stacks=tuple(reader.stacks),
                lanes=tuple(reader.lanes),
                status=status,
            )
        )
        start = stop
    if start != len(actions):
        raise DataError("the file holds events outside its device traces")
    return recordings


def _segment(record: dict[str, Any], lane: int) -> RecordedSegment:
    at, blocks = int(record["address"]), []
    for block in record["blocks"]:
        size = int(block["size"])
        live = block["state"] != "inactive"
        requested = int(block.get("requested_size", size))
        blocks.append(RecordedBlock(at, size, requested, live, int(block.get("frames", 0))))
        at += size
    small = record.get("segment_type", "large") == "small"
    expandable = bool(record.get("is_expandable", False))
    return RecordedSegment(int(record["address"]), int(record["total_size"]), lane, small, expandable, tuple(blocks))


def _settings(recorded: Any) -> AllocatorSettings:
    """The settings that the recording ran under; defaults for what it does not say."""
    if not isinstance(recorded, dict):
        return AllocatorSettings()
    changes: dict[str, Any] = {}
    limit = recorded.get("max_split_size", -1)
    if limit > 0:
        changes["max_split_size_mb"] = limit // MIB
    divisions = recorded.get("roundup_power2_divisions")
    if isinstance(divisions, dict) and any(divisions.values()):
        changes["roundup_power2_divisions"] = tuple(divisions[key] for key in sorted(divisions, key=int))
    for name in ("garbage_collection_threshold", "expandable_segments"):
        if name in recorded:
            changes[name] = recorded[name]
    text = recorded.get("PYTORCH_CUDA_ALLOC_CONF") or recorded.get("PYTORCH_ALLOC_CONF") or ""
    try:
        said = AllocatorSettings.parse(text)
        for name in ("large_segment_size_mb", "max_non_split_rounding_mb", "per_process_memory_fraction"):
            changes[name] = getattr(said, name)
        return AllocatorSettings(**changes)
    except BadValue as error:
        raise DataError(f"its allocator settings are not modelled: {error}") from None
