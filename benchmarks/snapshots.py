"""How long ``memprof snapshot`` takes, and how much host memory, as recordings grow.

The files are made here: a loop of allocations and frees through memprof's own allocator, written event by event as
torch writes them (a dict an event, a list of some thirty frames each, everything that came before by reference, as is
the list of a completed free, which is that of the request). Each point is a process of its own, watched from outside.
Its memory is told twice: resident, the highest that the system counted, and what of it is the process's own (RssAnon,
the highest of many looks), which is what the system cannot take back and what must not grow with the events. Written to
``benchmarks/results``::

    python benchmarks/snapshots.py            # 0.1, 1 and 10 million events
    python benchmarks/snapshots.py --events 1000000
    python benchmarks/snapshots.py --make FILE --events 1000000   # the file alone
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, BinaryIO

RESULTS = Path(__file__).parent / "results"
SIZES = (100_000, 1_000_000, 10_000_000)
#: Distinct stacks, frames of a stack, and distinct frames: what a training step of a language model has, about.
STACKS, DEPTH, FRAMES = 2_000, 30, 1_500
LIVE = 1_500
MIB = 2**20
#: So often a process is looked at.
LOOK_EVERY_S = 0.01


class PickleWriter:
    """Protocol 4 by hand, so that ten million events never stand in memory at once."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._parts, self._memo = file, [b"\x80\x04"], 0
        self._known: dict[Any, bytes] = {}
        self._newest = b""  # the reference to the list of frames that was written last

    def remember(self, key: Any) -> None:
        """Write MEMOIZE for what was just written, under ``key`` (None: never asked for again)."""
        self._parts.append(b"\x94")
        if key is not None:
            self._known[key] = self._reference()
        self._memo += 1

    def _reference(self) -> bytes:
        """The instruction that asks for the next place of the memo, later."""
        return b"h" + bytes([self._memo]) if self._memo < 256 else b"j" + struct.pack("<I", self._memo)

    def raw(self, ops: bytes) -> None:
        self._parts.append(ops)
        if len(self._parts) > 100_000:
            self.flush()

    def flush(self) -> None:
        self._file.write(b"".join(self._parts))
        self._parts.clear()

    def text(self, value: str) -> None:
        if value in self._known:
            self.raw(self._known[value])
        else:
            coded = value.encode()
            self.raw(b"\x8c" + bytes([len(coded)]) + coded)
            self.remember(value)

    def number(self, value: int) -> None:
        if 0 <= value < 256:
            self.raw(b"K" + bytes([value]))
        elif 0 <= value < 65536:
            self.raw(b"M" + struct.pack("<H", value))
        elif -(2**31) <= value < 2**31:
            self.raw(b"J" + struct.pack("<i", value))
        else:
            n_bytes = value.bit_length() // 8 + 1
            self.raw(b"\x8a" + bytes([n_bytes]) + value.to_bytes(n_bytes, "little", signed=True))

    def frame(self, index: int) -> None:
        key = ("frame", index)
        if key in self._known:
            self.raw(self._known[key])
            return
        self.raw(b"}")
        self.remember(key)
        self.raw(b"(")
        for name, value in (("name", f"function_{index}"), ("filename", f"/app/part_{index % 40}.py")):
            self.text(name)
            self.text(value)
        self.text("line")
        self.number(index)
        self.raw(b"u")

    def frames_again(self) -> None:
        self.raw(self._newest)

    def frames(self, stack: tuple[int, ...]) -> None:
        self.raw(b"]")
        self._newest = self._reference()
        self.remember(None)
        self.raw(b"(")
        for index in stack:
            self.frame(index)
        self.raw(b"e")


def make(path: Path, events: int) -> None:
    """A recording of about ``events`` events: a loop whose allocations are partly small and partly large."""
    from memprof.simulator.allocator import CachingAllocator

    draw = random.Random(0)
    stacks = [tuple(draw.randrange(FRAMES) for _ in range(DEPTH)) for _ in range(STACKS)]
    written = 0

    with path.open("wb") as file:
        writer = PickleWriter(file)

        def event(action: str, address: int, n_bytes: int, stack: int) -> None:
            nonlocal written
            if written and written % 1000 == 0:
                writer.raw(b"e(")
            written += 1
            writer.raw(b"}")
            writer.remember(None)
            writer.raw(b"(")
            writer.text("action")
            writer.text(action)
            for name, value in (("addr", address), ("size", n_bytes), ("stream", 0), ("time_us", 10**15 + 7 * written)):
                writer.text(name)
                writer.number(value)
            writer.text("frames")
            if action == "free_completed":
                writer.frames_again()
            else:
                writer.frames(stacks[stack])
            writer.raw(b"u")

        now = 0
        allocator = CachingAllocator(on_segment=lambda kind, a, n: event(kind, a, n, now))
        live: list[tuple[int, int, int]] = []
        writer.raw(b"}")
        writer.remember(None)
        writer.raw(b"(")
        writer.text("device_traces")
        writer.raw(b"]")
        writer.remember(None)
        writer.raw(b"(]")
        writer.remember(None)
        writer.raw(b"(")
        while written < events:
            now = draw.randrange(STACKS)
            size = draw.randrange(1, 9 * MIB) if now % 4 == 0 else draw.randrange(1, 200_000)
            address = allocator.malloc(size)
            event("alloc", address, size, now)
            live.append((address, size, now))
            while len(live) > LIVE or (live and draw.random() < 0.4):
                at = draw.randrange(len(live))
                live[at], live[-1] = live[-1], live[at]
                address, size, stack = live.pop()
                event("free_requested", address, size, stack)
                allocator.free(address)
                event("free_completed", address, size, stack)
        writer.raw(b"ee")
        held = {address: (size, stack) for address, size, stack in live}
        writer.text("segments")
        writer.raw(b"]")
        writer.remember(None)
        writer.raw(b"(")
        for small in (True, False):
            for address, blocks in allocator.segments(small=small):
                _segment(writer, address, blocks, small, held, stacks)
        writer.raw(b"eu.")
        writer.flush()


def _segment(writer: PickleWriter, address: int, blocks: Any, small: bool, held: Any, stacks: Any) -> None:
    writer.raw(b"}")
    writer.remember(None)
    writer.raw(b"(")
    total = sum(size for size, _ in blocks)
    for name, value in (("device", 0), ("address", address), ("total_size", total), ("stream", 0)):
        writer.text(name)
        writer.number(value)
    writer.text("segment_type")
    writer.text("small" if small else "large")
    writer.text("blocks")
    writer.raw(b"]")
    writer.remember(None)
    writer.raw(b"(")
    for size, state in blocks:
        writer.raw(b"}")
        writer.remember(None)
        writer.raw(b"(")
        requested, stack = held.get(address, (0, None))
        for name, value in (("address", address), ("size", size), ("requested_size", requested)):
            writer.text(name)
            writer.number(value)
        writer.text("state")
        writer.text("active_allocated" if state else "inactive")
        if stack is not None:
            writer.text("frames")
            writer.frames(stacks[stack])
        writer.raw(b"u")
        address += size
    writer.raw(b"eu")


def measure(path: Path, words: list[str]) -> dict[str, float]:
    """Seconds, and the highest bytes of memory, of ``memprof snapshot`` on ``path`` in a process of its own."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "memprof", "snapshot", str(path), "--json", *words]
    with tempfile.TemporaryFile() as answer:
        child = subprocess.Popen(command, stdout=answer)
        own_bytes = 0
        while (ended := os.wait4(child.pid, os.WNOHANG))[0] == 0:
            own_bytes = max(own_bytes, _own_bytes(child.pid))
            time.sleep(LOOK_EVERY_S)
        seconds = time.perf_counter() - start
        _, status, usage = ended
        child.returncode = os.waitstatus_to_exitcode(status)
        assert child.returncode == 0
        answer.seek(0)
        check = json.load(answer)["replay"]
    return {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "host_bytes": usage.ru_maxrss * 1024,
        "own_bytes": own_bytes,
        "exact": check["addresses_matched"] == check["addresses_total"] > 0,
    }


def _own_bytes(pid: int) -> int:
    """Resident bytes of a process that stand in no file; 0 where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def main() -> None:
    """Make the files, measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--events", type=int, action="append")
    parser.add_argument("--make", type=Path)
    asked = parser.parse_args()
    if asked.make:
        make(asked.make, (asked.events or [SIZES[1]])[0])
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for events in asked.events or SIZES:
            path = Path(folder) / "made.pickle"
            make(path, events)
            row = {"events": events, "file_bytes": path.stat().st_size}
            row |= {"report": measure(path, []), "page": measure(path, ["--html", "-o", f"{folder}/page.html"])}
            rows.append(row)
            sys.stderr.write(f"{json.dumps(row)}\n")
    if not asked.events:
        about = {
            "python": platform.python_version(),
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0]),
        }
        RESULTS.joinpath("snapshots.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
        RESULTS.joinpath("snapshots.md").write_text(table(rows, about))


def table(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The results for people."""
    lines = [
        "# `memprof snapshot` on long recordings", "",
        f"Made by `python benchmarks/snapshots.py` (Python {about['python']}, {about['cores']} cores, load "
        f"{about['load']}: where that is more than the cores, the machine was busy, and CPU seconds count).", "",
        "Host memory is the highest resident set, and of it the process's own: what the system cannot take back.", "",
        "| events | file, MiB | report, s | CPU, s | host memory, MiB | own, MiB "
        "| with page, s | CPU, s | host memory, MiB | own, MiB |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for row in rows:
        cells = [f"{row['events']:,}", f"{row['file_bytes'] / MIB:,.0f}"]
        for what in ("report", "page"):
            cells += [f"{row[what][time]:.1f}" for time in ("seconds", "cpu_seconds")]
            cells += [f"{row[what][memory] / MIB:,.0f}" for memory in ("host_bytes", "own_bytes")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
