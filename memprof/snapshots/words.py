"""A report in words and rows, the same for the terminal and the page."""

from __future__ import annotations

from memprof.snapshots.death import Death
from memprof.snapshots.holding import SiteHolder
from memprof.snapshots.report import SnapshotReport
from memprof.units import format_bytes

Row = tuple[str, int, str]


def counted(count: int, what: str) -> str:
    """``1 event``, ``2 events``."""
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def about(report: SnapshotReport) -> str:
    """The file in one line."""
    events = counted(report.events, "event") if report.history else "no history: a picture of one moment"
    where = f"{report.status}, GPU {report.device}, torch {report.torch}"
    return f"{report.file}: {where}, {events}, settings {report.settings}"


def others(report: SnapshotReport, unit: str) -> list[str]:
    """The devices that the report is not about, a line each."""
    return [
        f"GPU {each.device}: {format_bytes(each.reserved_bytes, unit)} reserved, "
        f"{format_bytes(each.allocated_bytes, unit)} allocated at the end, {counted(each.events, 'event')}"
        + (", ran out of memory" if each.out_of_memory_events else "")
        + f" (--device {each.device})"
        for each in report.devices
        if each.device != report.device
    ]


def death(found: Death, unit: str) -> list[str]:
    """An out-of-memory event, sentence by sentence."""
    memory = found.memory
    lines = [
        f"{found.site} asked for {format_bytes(found.asked_bytes, unit)}. The driver had "
        f"{format_bytes(found.free_bytes, unit)} free; {format_bytes(found.missing_bytes, unit)} were missing.",
        f"PyTorch had {format_bytes(memory.reserved_bytes, unit)} reserved: "
        f"{format_bytes(memory.allocated_bytes, unit)} allocated, {format_bytes(memory.cached_bytes, unit)} cached.",
    ]
    if memory.stuck_bytes:
        lines[-1] += (
            f" {format_bytes(memory.stuck_bytes, unit)} of the cached were unusable: free pieces between blocks in use "
            f"(fragmentation), the largest {format_bytes(memory.largest_free_block_bytes, unit)}."
        )
    if found.count > 1:
        lines.append(f"It is the last of {found.count:,} such events; the program went on after the others.")
    if found.metadata:
        lines.append(f"User metadata then: {found.metadata}")
    if not found.replayed:
        lines.append("The replay serves this request, so something that is not recorded took memory; trust less what "
                     "follows.")  # fmt: skip
    return lines


def holders(report: SnapshotReport) -> tuple[str, tuple[SiteHolder, ...]]:
    """A title, and who held most: when memory ran out, else at the peak, else at the end."""
    if report.out_of_memory is not None:
        return "Who held the memory when it ran out", report.out_of_memory.holders
    if report.history:
        return "Largest holders at the peak", report.holders
    return "Largest holders when the snapshot was taken", report.holders


def memory(report: SnapshotReport) -> list[Row]:
    """What, bytes, and the share of reserved."""
    at = report.fragmentation
    rows: list[tuple[str, int]] = []
    if report.peak_allocated_bytes is not None and report.peak_reserved_bytes is not None:
        rows += [
            ("peak allocated", report.peak_allocated_bytes),
            ("peak reserved", report.peak_reserved_bytes),
            ("reserved at the allocated peak", at.reserved_bytes),
        ]
    else:
        rows += [("reserved now", at.reserved_bytes), ("allocated now", at.allocated_bytes)]
    rows += [
        ("  of it cached, not allocated", at.cached_bytes),
        ("  of that stuck in segments in use", at.stuck_bytes),
        ("  largest free block", at.largest_free_block_bytes),
    ]
    share = at.reserved_bytes
    return [(name, n_bytes, f"{n_bytes / share:.1%}" if share else "-") for name, n_bytes in rows]


def room(report: SnapshotReport, unit: str) -> str:
    """Which limit the what-if answers were given under."""
    if report.room is None:
        return "No limit is known: reserved is what a card without end would have given. --gpu names one."
    most = "" if report.room.exact else "at most "
    return f"Reserved in {most}{format_bytes(report.room.n_bytes, unit)} for PyTorch ({report.room.source})."


def verdict(report: SnapshotReport) -> str:
    """How far the numbers can be trusted."""
    check = report.replay
    if check is None:
        return (
            "No history was recorded, so no peak is known and nothing was replayed. "
            "torch.cuda.memory._record_memory_history() before the work records it."
        )
    if not check.addresses_total:
        return "Replay: nothing was allocated during the recording, so there is nothing to compare."
    counts = (
        f"{check.addresses_matched:,} of {check.addresses_total:,} addresses and "
        f"{check.segments_matched:,} of {check.segments_total:,} segments"
    )
    trust = "exact" if check.exact else "not exact: trust the what-if answers less"
    return f"Replay: the model of the allocator met {counts} ({trust})."
