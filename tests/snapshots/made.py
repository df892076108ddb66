"""Made snapshots: the reference allocator is driven, and what torch would record is written down."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "simulator"))
from reference_allocator import NoMemory, ReferenceAllocator

MIB = 2**20


def frames(site: str) -> list[dict[str, object]]:
    return [
        {"filename": "CUDACachingAllocator.cpp", "line": 0, "name": "malloc"},
        {"filename": "/opt/site-packages/torch/nn/modules/linear.py", "line": 125, "name": "forward"},
        {"filename": "/home/user/model.py", "line": 7, "name": site},
    ]


class Recorder:
    """Drives the reference allocator, and writes down what torch would."""

    def __init__(
        self,
        *,
        expandable: bool = False,
        capacity: int | None = None,
        max_split_mb: int | None = None,
        tell_pools: bool = False,
    ) -> None:
        self.tell_pools = tell_pools
        self.allocator = ReferenceAllocator(capacity, max_split_mb, expandable=expandable)
        self.expandable, self.capacity, self.max_split_mb = expandable, capacity, max_split_mb
        self.events: list[dict[str, object]] = []
        self.asked: dict[int, tuple[int, str]] = {}
        self.recording = False
        self.clock = 1_000_000
        #: What stands for a stream and a private pool in the reference allocator: it knows streams alone.
        self.lanes: dict[int, tuple[int, tuple[int, int]]] = {0: (0, (0, 0))}
        self.where: dict[int, int] = {}
        self.peak_allocated = self.peak_reserved = 0

    def _note(
        self, action: str, address: int, size: int, frames: list[dict[str, object]], lane: int = 0, **more: object
    ) -> None:
        self.clock += 7
        if self.recording:
            stream, pool = self.lanes[lane]
            event = {"action": action, "addr": address, "size": size, "stream": stream, "time_us": self.clock}
            self.events.append(event | {"frames": frames} | ({"pool_id": pool} if self.tell_pools else {}) | more)
            self.peak_allocated = max(self.peak_allocated, self.allocator.allocated)
            self.peak_reserved = max(self.peak_reserved, self.allocator.reserved)

    def _mapped(self) -> set[tuple[int, int]]:
        page = 2 * MIB if self.expandable else 0
        found = set()
        for segment in self.allocator.segments:
            if not segment.expandable:
                found.add((segment.base, sum(block.size for block in segment.blocks)))
                continue
            page = 2 * MIB if segment.small else 20 * MIB
            for block in segment.blocks:
                if block.state != "unmapped":
                    first = (block.address - segment.base) // page
                    last = -(-(block.address + block.size - segment.base) // page)
                    found |= {(segment.base + i * page, page) for i in range(first, last)}
        return found

    def _note_segments(self, before: set[tuple[int, int]], site: str, lane: int = 0) -> None:
        after = self._mapped()
        kinds = ("segment_unmap", "segment_map") if self.expandable else ("segment_free", "segment_alloc")
        for kind, ranges in zip(kinds, (before - after, after - before), strict=True):
            for address, size in joined(sorted(ranges)) if self.expandable else sorted(ranges):
                self._note(kind, address, size, frames(site), lane)

    def malloc(self, size: int, site: str = "forward", lane: int = 0, **more: object) -> int:
        before = self._mapped()
        try:
            address = self.allocator.malloc(size, lane)
        except NoMemory:
            self._note_segments(before, site, lane)
            assert self.capacity is not None
            free = self.capacity - self.allocator.reserved
            self._note("oom", 0, self.allocator.round(size), frames(site), lane, device_free=free, **more)
            del self.events[-1]["addr"]
            raise
        self._note_segments(before, site, lane)
        self._note("alloc", address, size, frames(site), lane, **more)
        self.asked[address], self.where[address] = (size, site), lane
        return address

    def free(self, address: int, *, lost: bool = False) -> None:
        size, site = self.asked.pop(address)
        lane = self.where[address]
        if not lost:
            self._note("free_requested", address, size, frames(site), lane)
        self.allocator.free(address)
        if not lost:
            self._note("free_completed", address, size, frames(site), lane)

    def empty_cache(self) -> None:
        before = self._mapped()
        self.allocator.empty_cache()
        self._note_segments(before, "empty_cache")

    def dump(self) -> dict[str, object]:
        segments = []
        for segment in self.allocator.segments:
            runs: list[list[object]] = [[]]
            for block in segment.blocks:
                if block.state == "unmapped":
                    runs.append([])
                else:
                    runs[-1].append(block)
            for run in filter(None, runs):
                blocks = [
                    {
                        "address": block.address,
                        "size": block.size,
                        "requested_size": self.asked.get(block.address, (block.size, ""))[0],
                        "state": "active_allocated" if block.state == "live" else "inactive",
                        "frames": frames(self.asked[block.address][1]) if block.state == "live" else [],
                    }
                    for block in run
                ]
                segments.append(
                    {
                        "device": 0,
                        "address": run[0].address,
                        "total_size": sum(block.size for block in run),
                        "stream": self.lanes[segment.stream][0],
                        "segment_type": "small" if segment.small else "large",
                        "segment_pool_id": self.lanes[segment.stream][1],
                        "is_expandable": segment.expandable,
                        "blocks": blocks,
                    }
                )
        return {
            "segments": segments,
            "device_traces": [self.events],
            "allocator_settings": {
                "expandable_segments": self.expandable,
                "max_split_size": self.max_split_mb * MIB if self.max_split_mb else -1,
            },
        }


def joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for address, size in ranges:
        if joined and sum(joined[-1]) == address and size == 20 * MIB:
            joined[-1] = joined[-1][0], joined[-1][1] + size
        else:
            joined.append((address, size))
    return joined


def save(path: Path, *dumps: dict[str, object], protocol: int = 4) -> Path:
    """A file with one device for each of ``dumps``."""
    whole = {
        "segments": [segment | {"device": i} for i, dump in enumerate(dumps) for segment in dump["segments"]],
        "device_traces": [dump["device_traces"][0] for dump in dumps],
        "allocator_settings": dumps[0]["allocator_settings"],
    }
    path.write_bytes(pickle.dumps(whole, protocol=protocol))
    return path
