"""What a torch CUDA snapshot says: the device that ran out, the peak, who held it, what other settings would have done.

A snapshot without events is a picture of one moment: it has no peak, and nothing can be replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memprof.errors import BadValue, DataError
from memprof.records import Status
from memprof.simulator.allocator import AllocatorSettings
from memprof.snapshots.columns import highest, stretches
from memprof.snapshots.death import Death, explain
from memprof.snapshots.holding import Fragmentation, Instant, SiteHolder
from memprof.snapshots.recording import OOM, Ints, Recording, read_recordings
from memprof.snapshots.replay import ReplayCheck, Replayed, check_replay, replayed
from memprof.snapshots.sites import call_site, shown, way
from memprof.snapshots.spans import peak_reserved
from memprof.snapshots.trials import Room, Trials, WhatIf, room_of
from memprof.snapshots.versions import knows_expandable_segments

__all__ = ["SnapshotReport", "Studied", "analyse", "call_site", "check_replay", "study", "what_if"]


@dataclass(frozen=True, slots=True)
class Device:
    """One device of a file, in short. Sizes in bytes, when the snapshot was taken."""

    device: int
    events: int
    allocated_bytes: int
    reserved_bytes: int
    out_of_memory_events: int
    #: Reserved at its highest; None without events.
    peak_reserved_bytes: int | None


@dataclass(frozen=True, slots=True)
class SnapshotReport:
    """Everything that ``memprof snapshot`` tells about one device of a file. Sizes in bytes.

    What needs events is None, or empty, where ``history`` is false.
    """

    file: str
    device: int
    #: ``predicted`` where memprof wrote the file, else ``measured``.
    status: Status
    #: The version of torch that wrote it, as far as the file tells.
    torch: str
    events: int
    history: bool
    settings: str
    #: When the snapshot was taken.
    allocated_bytes: int
    reserved_bytes: int
    cached_bytes: int
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None
    #: Index of the event that set the allocated peak, -1 if that stood before the recording.
    peak_event: int | None
    #: At the allocated peak; at the end without history.
    fragmentation: Fragmentation
    #: What holders are: ``line``, ``module`` or ``op``.
    by: str
    holders: tuple[SiteHolder, ...]
    replay: ReplayCheck | None
    #: What the driver would have given in all, and how that is known.
    room: Room | None
    out_of_memory: Death | None
    what_if: tuple[WhatIf, ...]
    devices: tuple[Device, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """One JSON document, plain dicts and lists."""
        return asdict(self)


@dataclass(frozen=True)
class Studied:
    """A recording and all that was found out about it.

    Attributes:
        report: What is told of it.
        recording: The device's events and memory.
        replay: Its blocks; None without history.
        allocated: Bytes allocated after each event; empty without history.
    """

    report: SnapshotReport
    recording: Recording
    replay: Replayed | None
    allocated: Ints


def analyse(
    path: Path,
    what_ifs: Sequence[str] = (),
    top: int = 10,
    *,
    device: int | None = None,
    by: str = "line",
    room_bytes: int | None = None,
) -> SnapshotReport:
    """As :func:`study`, the report alone."""
    return study(path, what_ifs, top, device=device, by=by, room_bytes=room_bytes).report


def study(
    path: Path,
    what_ifs: Sequence[str] = (),
    top: int = 10,
    *,
    device: int | None = None,
    by: str = "line",
    room_bytes: int | None = None,
) -> Studied:
    """Read ``path`` and find out about one of its devices: the ``top`` holders, and one answer per ``what_ifs``.

    Args:
        path: The file.
        what_ifs: Each is what changes against the recorded settings: ``"expandable_segments=True"``, or several
            options with commas between them.
        top: How many holders to name.
        device: Its index; None: the one that ran out of memory last, else the fullest.
        by: What to add blocks up by: ``line``, ``module`` or ``op``.
        room_bytes: What the driver would give in what-if answers; None: what the recording tells.

    Raises:
        DataError: The file is not a snapshot, is cut short, or holds anything but plain data.
        BadValue: An entry of ``what_ifs`` is not an allocator option, or there is no such device.
        UnknownName: ``by`` is no way to add blocks up.
    """
    adding = way(by)
    recordings = [r for r in read_recordings(path) if len(r) or r.segments]
    if not recordings:
        raise DataError(f"{path}: the snapshot holds no events; call torch.cuda.memory._record_memory_history() first")
    recording = chosen(recordings, device)
    if not all(text.strip() for text in what_ifs):
        raise BadValue("an empty --what-if changes nothing; write for example expandable_segments=True")
    asked = [recording.settings.updated(text) for text in what_ifs]
    devices = tuple(_device(each) for each in recordings)
    notes = list(recording.notes)
    if any(each.expandable_segments for each in asked) and not knows_expandable_segments(recording.version):
        notes.append("expandable_segments came with torch 2.1; this was recorded by an earlier one")
    if not recording.has_history:
        if asked:
            notes.append("no what-if: without recorded events there is nothing to replay")
        instant = Instant.at_end(recording)
        report = _report(path, recording, instant, instant.holders(adding)[:top], by, devices, notes)
        return Studied(report, recording, None, np.zeros(0, dtype=np.int64))
    found = replayed(recording)
    allocated, lives = found.allocated(), found.lives
    before = int(found.granted[lives.made :].sum())
    most, peak = highest((begin, part) for begin, (part,) in stretches(allocated))
    if most <= before:
        most, peak = before, -1
    room = room_of(lives)
    limit = Room(room_bytes, "as asked for") if room_bytes is not None else room
    trials = Trials(lives, limit, recording.last_oom)
    instant = Instant.of(found, peak)
    report = _report(
        path, recording, instant, instant.holders(adding)[:top], by, devices, notes,
        peak_allocated_bytes=most,
        peak_reserved_bytes=max(lives.reserved_at_start, int(lives.reserved.max())),
        peak_event=peak,
        replay=found.check,
        room=limit,
        out_of_memory=explain(found, room, top, adding) if room is not None else None,
        what_if=tuple(trials.what_if(shown(text), settings) for text, settings in zip(what_ifs, asked, strict=True)),
    )  # fmt: skip
    return Studied(report, recording, found, allocated)


def chosen(recordings: Sequence[Recording], device: int | None) -> Recording:
    """The device asked for; else the one that ran out of memory last, else the fullest.

    Raises:
        BadValue: There is no such device in the file.
    """
    if device is not None:
        found = next((r for r in recordings if r.device == device), None)
        if found is None:
            there = ", ".join(str(r.device) for r in recordings)
            raise BadValue(f"the file has nothing of device {device}; it has: {there}")
        return found
    return max(recordings, key=lambda r: (_when_out(r), _device(r).peak_reserved_bytes or r.reserved_at_end, -r.device))


def what_if(recording: Recording, settings: AllocatorSettings) -> WhatIf:
    """What ``settings`` would have led to; see :mod:`memprof.snapshots.trials`."""
    lives = replayed(recording).lives
    return Trials(lives, room_of(lives)).what_if(str(settings) or "default", settings)


def _when_out(recording: Recording) -> int:
    """The time of the last out-of-memory event, in microseconds; -1 if there is none."""
    last = recording.last_oom
    return -1 if last is None else max(0, int(recording.times[last]) if len(recording.times) else 0)


def _device(recording: Recording) -> Device:
    peak = peak_reserved(recording) if recording.has_history else None
    return Device(
        recording.device, len(recording), recording.allocated_at_end, recording.reserved_at_end,
        sum(map(len, recording.events_of(OOM))), peak,
    )  # fmt: skip


def _report(
    path: Path,
    recording: Recording,
    instant: Instant,
    holders: tuple[SiteHolder, ...],
    by: str,
    devices: tuple[Device, ...],
    notes: Sequence[str],
    **found: Any,
) -> SnapshotReport:
    nothing = dict.fromkeys(("peak_allocated_bytes", "peak_reserved_bytes", "peak_event", "replay", "room"))
    allocated, reserved = recording.allocated_at_end, recording.reserved_at_end
    told: dict[str, Any] = nothing | {"out_of_memory": None, "what_if": ()} | found
    return SnapshotReport(
        file=shown(path.name),
        device=recording.device,
        status=recording.status,
        torch=shown(recording.version),
        events=len(recording),
        history=recording.has_history,
        settings=str(recording.settings) or "default",
        allocated_bytes=allocated,
        reserved_bytes=reserved,
        cached_bytes=reserved - allocated,
        fragmentation=instant.fragmentation(),
        by=by,
        holders=holders,
        devices=devices,
        notes=tuple(shown(note) for note in notes),
        **told,
    )


def asked_for(text: str) -> int:
    """The bytes of a card by name or size, as ``--gpu`` takes it.

    Raises:
        BadValue: It is neither.
    """
    from memprof.gpus import find_card

    card = find_card(text)
    if card.memory_bytes is None:
        raise BadValue(f"{text!r} says no size; write for example 24GiB")
    return card.memory_bytes
