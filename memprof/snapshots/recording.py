"""What a snapshot file holds: for every GPU the events in order, as columns, and the memory at the end of them.

The layout is that of ``torch.cuda.memory._snapshot()``, described in ``torch/cuda/memory.py`` (PyTorch 2.13). Read too
are what earlier versions wrote (2.0: stacks under ``history``, blocks without addresses, no settings; up to 2.11:
events that do not say their pool), the bare list of segments that ``torch.cuda.memory_snapshot()`` gives, and all of
these as JSON or compressed; :mod:`memprof.snapshots.plain` says how without trusting the file.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from memprof.errors import BadValue, DataError
from memprof.records import Status
from memprof.simulator.allocator import AllocatorSettings
from memprof.snapshots.columns import gathered, stretches
from memprof.snapshots.plain import ACTIONS, Events, Folder, Frame, read_plain, whole
from memprof.snapshots.versions import MIDDLE, NEW, OLD
from memprof.units import MIB

__all__ = [
    "ACTIONS", "ALLOC", "FREE_COMPLETED", "FREE_REQUESTED", "OOM", "SEGMENT_ALLOC", "SEGMENT_FREE", "SEGMENT_MAP",
    "SEGMENT_UNMAP", "Annotation", "Frame", "RecordedBlock", "RecordedSegment", "Recording", "read_recordings",
]  # fmt: skip
(
    ALLOC, FREE_REQUESTED, FREE_COMPLETED, SEGMENT_ALLOC, SEGMENT_FREE, SEGMENT_MAP, SEGMENT_UNMAP, _, OOM, _,
) = range(len(ACTIONS))  # fmt: skip
#: No device has more memory, and no address lies higher, in bytes.
MOST_BYTES, HIGHEST_ADDRESS = 2**48, 2**62

Ints = npt.NDArray[np.int64]


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


class Annotation(NamedTuple):
    """The beginning (``START``) or end (``END``) of a named range, in microseconds."""

    name: str
    stage: str
    time: int


@dataclass(frozen=True, slots=True)
class Recording:
    """One device's recording: the events in order, as columns, and the state at the end of it."""

    device: int
    settings: AllocatorSettings
    segments: tuple[RecordedSegment, ...]
    #: Index into :data:`ACTIONS`, one per event.
    actions: npt.NDArray[np.int8]
    #: Where; for an ``oom``, the bytes that the device had free.
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
    #: ``predicted`` where memprof wrote the file (:mod:`memprof.snapshots.dump`), else ``measured``.
    status: Status = "measured"
    #: Microseconds, one per event; zeros where the file says none.
    times: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    #: Index into :attr:`labels`, one per event; empty where there are none.
    label_ids: npt.NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    #: What the user had set by ``torch.cuda.memory._set_memory_metadata``; the first is empty.
    labels: tuple[str, ...] = ("",)
    #: Ends of ``record_function`` ranges.
    annotations: tuple[Annotation, ...] = ()
    #: The version of torch that wrote it, as far as the file tells.
    version: str = MIDDLE
    #: What of the file was left out, in words.
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def has_history(self) -> bool:
        """Whether any allocation or free was recorded; else it is a picture of one moment."""
        return any(map(len, self.events_of(ALLOC, FREE_REQUESTED, FREE_COMPLETED, OOM)))

    @property
    def last_oom(self) -> int | None:
        """The last event that says that memory ran out."""
        return next((int(found[-1]) for found in self.events_of(OOM, backwards=True) if len(found)), None)

    def events_of(self, *actions: int, backwards: bool = False) -> Iterator[Ints]:
        """The events of one of these kinds, a stretch at a time."""
        for begin, (part,) in stretches(self.actions, backwards=backwards):
            yield begin + np.nonzero(np.isin(part, actions))[0]

    @property
    def reserved_at_end(self) -> int:
        """Bytes got from the driver when the snapshot was taken."""
        return sum(segment.size for segment in self.segments)

    @property
    def allocated_at_end(self) -> int:
        """Bytes in blocks in use when the snapshot was taken."""
        return sum(block.size for segment in self.segments for block in segment.blocks if block.live)


def read_recordings(path: Path) -> list[Recording]:
    """Read every device of a snapshot file, in the order of the device indices.

    Raises :class:`memprof.errors.DataError`, with one line, if the file cannot be read, is cut short, is not a CUDA
    snapshot, or holds anything but plain data; nothing in the file is run.
    """
    root, folder = read_plain(path)
    try:
        return _recordings(root, folder)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except KeyError as error:
        raise DataError(f"{path}: not a CUDA memory snapshot: {error} is missing") from None
    except (TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"{path}: not a CUDA memory snapshot ({type(error).__name__})") from None


def _recordings(root: Any, folder: Folder) -> list[Recording]:
    if type(root) is list:
        root = {"segments": root, "device_traces": []}
    if type(root) is not dict or type(root.get("segments")) is not list or type(root.get("device_traces")) is not list:
        raise DataError("not a CUDA memory snapshot: it has no 'segments' and 'device_traces'")
    settings, notes = _settings(root.get("allocator_settings"))
    segments = _segments(root["segments"], folder)
    columns = _columns(folder)
    traces = _traces(root["device_traces"], len(folder.sizes))
    annotations = _annotations(root.get("external_annotations"))
    shared: dict[str, Any] = {
        "settings": settings, "stacks": tuple(folder.stacks), "labels": tuple(folder.labels),
        "status": "predicted" if "memprof" in root else "measured", "notes": tuple(notes),
        "version": _version(root, folder),
    }  # fmt: skip
    found = []
    for device in range(max([len(traces), *(number + 1 for number in segments)], default=0)):
        part = traces[device] if device < len(traces) else slice(0, 0)
        own = {name: column[part] for name, column in columns.items()}
        mine = tuple(sorted(segments.get(device, ()), key=lambda segment: segment.address))
        if not folder.pooled:
            private = {number for (_, pool), number in folder.lanes.items() if pool != (0, 0)}
            own["lane_ids"] = _pools_by_address(own, mine, private)
        found.append(
            Recording(
                device=device,
                segments=mine,
                lanes=tuple(folder.lanes),
                annotations=annotations.get(device, ()),
                **own,
                **shared,
            )
        )
    return found


def _columns(folder: Folder) -> dict[str, Any]:
    """The events' columns, if every number in them can be."""
    sizes, addresses, which = folder.sizes.whole(), folder.addresses.whole(), folder.kind_ids.whole()
    for _, (some_sizes, some_addresses) in stretches(sizes, addresses):
        if some_sizes.min() < 0 or some_sizes.max() > MOST_BYTES:
            raise DataError("an event's size cannot be: no device has so much memory")
        if some_addresses.min() < 0 or some_addresses.max() > HIGHEST_ADDRESS:
            raise DataError("an event's address cannot be")
    kinds = np.array(list(folder.kinds), dtype=np.int32).reshape(-1, 4)
    made = {"actions": "b", "stack_ids": "i", "lane_ids": "i"} | ({"label_ids": "i"} if len(folder.labels) > 1 else {})
    return {"addresses": addresses, "sizes": sizes, "times": folder.times.whole()} | {
        name: gathered(letter, (column[part] for _, (part,) in stretches(which)))
        for (name, letter), column in zip(made.items(), kinds.T, strict=False)
    }


def _traces(lists: list[Any], events: int) -> list[slice]:
    """Which rows belong to which device: they follow each other as the lists do."""
    traces, start = [], 0
    for trace in lists:
        if type(trace) is not list or any(type(part) is not Events for part in trace):
            raise DataError("a device trace holds something that is not an event")
        stop = start + sum(part.count for part in trace)
        traces.append(slice(start, stop))
        start = stop
        if start > events:
            break
    if start != events:
        raise DataError("the file holds events outside its device traces, or lists some twice")
    return traces


def _segments(records: list[Any], folder: Folder) -> dict[int, list[RecordedSegment]]:
    """Every device's segments. One that is listed twice is an error: it would be paid for each time."""
    segments: dict[int, list[RecordedSegment]] = {}
    if len({id(r) for r in records}) < len(records) or len({id(r["blocks"]) for r in records}) < len(records):
        raise DataError("a segment is listed twice")
    for record in records:
        device = whole(record.get("device", 0))
        if not 0 <= device < 1024:
            raise DataError(f"there is no device {device}")
        segments.setdefault(device, []).append(_segment(record, folder))
    return segments


def _segment(record: dict[Any, Any], folder: Folder) -> RecordedSegment:
    first, total, blocks = whole(record["address"]), whole(record["total_size"]), []
    at = first
    for block in record["blocks"]:
        size, state = whole(block["size"]), block["state"]
        if size <= 0 or type(state) is not str:
            raise DataError("a block has no size or no state")
        requested = whole(block.get("requested_size", size))
        blocks.append(RecordedBlock(at, size, requested, state != "inactive", _stack_of(block, folder)))
        at += size
    if not 0 <= first <= HIGHEST_ADDRESS or not 0 < total <= MOST_BYTES or at - first > total:
        raise DataError("a segment's blocks are more than the segment")
    small = record.get("segment_type", "large") == "small"
    expandable = bool(record.get("is_expandable", False))
    return RecordedSegment(first, total, folder.lane(record), small, expandable, tuple(blocks))


def _stack_of(block: dict[Any, Any], folder: Folder) -> int:
    """A block's stack: its own, or the newest of the ``history`` that torch 2.0 kept."""
    if "frames" in block:
        return whole(block["frames"])
    history = block.get("history")
    if type(history) is not list or not history or type(history[0]) is not dict:
        return 0
    newest = history[0].get("frames", 0)
    return newest if type(newest) is int else folder.stack(newest)


def _pools_by_address(
    own: dict[str, Any], segments: tuple[RecordedSegment, ...], private: set[int]
) -> npt.NDArray[np.int32]:
    """Each event's lane where events tell only their stream: that of the segment at its address.

    Only segments of private pools (CUDA graphs) can differ; they stay to the end, so the last snapshot knows them all.
    """
    lanes: npt.NDArray[np.int32] = own["lane_ids"]
    there = [segment for segment in segments if segment.lane in private]
    if not there or not len(lanes):
        return lanes
    starts, sizes, own_lanes = (np.array(c) for c in zip(*((s.address, s.size, s.lane) for s in there), strict=True))
    since = np.zeros(len(starts), dtype=np.int64)

    def inside() -> Iterator[tuple[Ints, Ints, npt.NDArray[np.bool_], tuple[npt.NDArray[Any], ...]]]:
        """Of each stretch its events, the last segment that begins below each, and whether it lies in that one."""
        for begin, (*columns, actions, addresses) in stretches(lanes, own["actions"], own["addresses"]):
            at = np.searchsorted(starts, addresses, side="right") - 1
            within = (at >= 0) & (addresses < (starts + sizes)[at]) & (actions < OOM)
            yield begin + np.arange(len(at)), at, within, (*columns, actions, addresses)

    for events, at, within, (_, actions, addresses) in inside():
        made = within & np.isin(actions, (SEGMENT_ALLOC, SEGMENT_MAP)) & (addresses == starts[at])
        np.maximum.at(since, at[made], events[made])
    return gathered(
        "i",
        (np.where(within & (events >= since[at]), own_lanes[at], own) for events, at, within, (own, *_) in inside()),
    )


def _annotations(records: Any) -> dict[int, tuple[Annotation, ...]]:
    """The named ranges of each device; what is not one is left out."""
    found: dict[int, list[Annotation]] = {}
    for record in records if type(records) is list else []:
        if type(record) is dict and type(name := record.get("name")) is str and type(record.get("stage")) is str:
            device = record.get("device", 0)
            if type(device) is int and type(time := record.get("time_us")) is int:
                found.setdefault(device, []).append(Annotation(name, record["stage"], time))
    return {device: tuple(sorted(each, key=lambda a: a.time)) for device, each in found.items()}


def _version(root: dict[Any, Any], folder: Folder) -> str:
    """Which torch wrote it. A snapshot does not say; its form does, in part, and memprof's own files say it."""
    about = root.get("memprof")
    environment = about.get("environment") if type(about) is dict else None
    packages = environment.get("packages") if type(environment) is dict else None
    told = packages.get("torch") if type(packages) is dict else None
    if type(told) is str:
        return told[:40]
    if folder.pooled:
        return NEW
    segments = root["segments"]
    new = "allocator_settings" in root or any("is_expandable" in record for record in segments[:1])
    old = any("history" in block or "address" not in block for record in segments[:1] for block in record["blocks"][:1])
    return OLD if old and not new else MIDDLE


#: Settings that stand in the text of options alone.
_SAID = ("large_segment_size_mb", "max_non_split_rounding_mb", "per_process_memory_fraction")


def _settings(recorded: Any) -> tuple[AllocatorSettings, list[str]]:
    """The settings that the recording ran under, defaults for what it does not say; and what is not modelled."""
    if type(recorded) is not dict:
        return AllocatorSettings(), []
    text = recorded.get("PYTORCH_CUDA_ALLOC_CONF") or recorded.get("PYTORCH_ALLOC_CONF") or ""
    said, notes = _parsed(text if type(text) is str else "")
    changes: dict[str, Any] = {name: getattr(said, name) for name in _SAID}
    limit = recorded.get("max_split_size", -1)
    if 0 < limit < MOST_BYTES:
        changes["max_split_size_mb"] = limit // MIB
    divisions = recorded.get("roundup_power2_divisions")
    if type(divisions) is dict and any(divisions.values()):
        changes["roundup_power2_divisions"] = tuple(divisions[key] for key in sorted(divisions, key=int))
    for name in ("garbage_collection_threshold", "expandable_segments"):
        if name in recorded:
            changes[name] = recorded[name]
    try:
        return AllocatorSettings(**changes), notes
    except (BadValue, TypeError) as error:
        raise DataError(f"its allocator settings are not modelled: {error}") from None


def _parsed(text: str) -> tuple[AllocatorSettings, list[str]]:
    """The options in ``text`` that the allocator's model has, and a note for each it has not."""
    try:
        return AllocatorSettings.parse(text), []
    except BadValue:
        settings, notes = AllocatorSettings(), []
        for item in text.split(","):
            try:
                settings = settings.updated(item)
            except BadValue as error:
                notes.append(str(error))
        return settings, notes[:3]
