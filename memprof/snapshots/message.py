"""The text of an out-of-memory error, read back into numbers, and what the numbers point to.

Read are the messages of PyTorch's caching allocator for CUDA and ROCm, of all versions (``c10/cuda/
CUDACachingAllocator.cpp``): up to 1.13 and 2.0 ``(GPU 0; 8.00 GiB total capacity; ...)``, from 2.1 on ``GPU 0 has a
total capacity of ...``. What PyTorch writes as GiB is 2**30 bytes, to two decimals, so sums here are as rough as that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from memprof.errors import DataError
from memprof.snapshots.death import CARD_SIZES
from memprof.units import GIB, KIB, MIB, format_bytes, unit_for

#: Longer lines are cut: no message is so long.
LONGEST_LINE = 2**16
#: How many lines after its first a message may go on for, where a log has broken it.
MOST_LINES = 4

#: No CUDA context with its kernels takes more, in bytes.
CONTEXT_AT_MOST = GIB * 3 // 2

_UNITS = {"bytes": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": 2**40}
_SIZE = r"([0-9]+(?:\.[0-9]+)?) (bytes|[KMGT]iB)"
_STARTS = re.compile(r"out of memory\. Tried to allocate " + _SIZE)
_COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_PATTERNS = {
    "asked": re.compile(r"Tried to allocate " + _SIZE),
    "capacity": re.compile(rf"total capaci?ty of {_SIZE}|{_SIZE} total capacity"),
    "free": re.compile(rf"of which {_SIZE} is free|{_SIZE} free;"),
    "allowed": re.compile(rf"{_SIZE} allowed;"),
    "allocated": re.compile(rf"{_SIZE} is allocated by PyTorch|{_SIZE} already allocated"),
    "private": re.compile(rf"with {_SIZE} allocated in private pools"),
    "unallocated": re.compile(rf"{_SIZE} is reserved by PyTorch but unallocated"),
    "reserved": re.compile(rf"{_SIZE} reserved in total by PyTorch"),
    "cached": re.compile(rf"{_SIZE} cached\)"),
    "process": re.compile(rf"this process has {_SIZE} memory in use"),
}
_DEVICE = re.compile(r"GPU ([0-9]{1,3})\b")
_OTHER = re.compile(rf"Process ([0-9]{{1,10}}) has {_SIZE} memory in use")


@dataclass(frozen=True, slots=True)
class OtherProcess:
    """Another process on the card; bytes."""

    pid: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Hint:
    """One thing to do, whether the numbers point to it, and why."""

    remedy: str
    points_to_it: bool
    why: str


@dataclass(frozen=True, slots=True)
class Message:
    """The numbers of one message, in bytes; None for what it does not say.

    Attributes:
        count: How many such messages the text holds; this is the last.
        device: The index of the GPU.
        asked: What the driver was asked for.
        capacity: All that the card has.
        free: What the driver had left.
        allowed: What the process is allowed at most, where it was limited.
        allocated: In tensors, those of private pools (CUDA graphs) included.
        private: Of that in private pools.
        unallocated: Held by PyTorch but in no tensor: cached, in pieces.
        process: All that the process has of the card, CUDA context included. In a container the message lists it among
            the others; the one whose bytes fit is taken for it.
        others: The other processes on it.
    """

    count: int
    device: int | None
    asked: int
    capacity: int | None
    free: int | None
    allowed: int | None
    allocated: int | None
    private: int | None
    unallocated: int | None
    process: int | None
    others: tuple[OtherProcess, ...]

    @property
    def reserved(self) -> int | None:
        """What PyTorch holds: allocated and unallocated."""
        if self.allocated is None:
            return None
        return self.allocated + (self.unallocated or 0)

    @property
    def by_others(self) -> int:
        """What other processes hold, as far as they are named."""
        return sum(other.bytes for other in self.others)

    @property
    def unnamed(self) -> int | None:
        """What of the card is neither free nor PyTorch's nor another process's: context, kernels, or unnamed ones."""
        if self.capacity is None or self.free is None or self.reserved is None:
            return None
        return max(0, self.capacity - self.free - self.reserved - self.by_others)

    def to_json(self) -> dict[str, object]:
        """Every number by its name."""
        told = {"reserved": self.reserved, "other_processes": self.by_others, "unnamed": self.unnamed}
        return asdict(self) | told | {"hints": [asdict(hint) for hint in hints(self)]}


def read(lines: Iterable[str]) -> Message:
    """The last message in a text, line by line as a log file gives it.

    Raises:
        DataError: There is none.
    """
    count, held, waiting = 0, "", 0
    for line in lines:
        clean = _COLOURS.sub("", line[:LONGEST_LINE]).strip()
        start = _STARTS.search(clean)
        if start:
            count, held, waiting = count + 1, clean[start.start() :], MOST_LINES
            following = _STARTS.search(held, 1)
            while following:  # several on one line
                count, held = count + 1, held[following.start() :]
                following = _STARTS.search(held, 1)
        elif waiting and not re.match(r"Traceback|\s*File ", clean):
            held, waiting = f"{held} {clean}", waiting - 1
    if not count:
        raise DataError(
            "no out-of-memory message of PyTorch in it; it reads 'CUDA out of memory. Tried to allocate ...'"
        )
    return _message(count, held)


def _message(count: int, text: str) -> Message:
    found = {name: _size(pattern.search(text)) for name, pattern in _PATTERNS.items()}
    asked, allocated, unallocated = found["asked"], found["allocated"], found["unallocated"]
    assert asked is not None
    total = found["reserved"]
    if unallocated is None and total is not None and allocated is not None:
        unallocated = max(0, total - allocated)
    if unallocated is None:
        unallocated = found["cached"]
    device = _DEVICE.search(text)
    process, capacity = found["process"], found["capacity"]
    if process is not None and capacity is not None and process > 2 * capacity:
        process = None  # what drivers under WSL report cannot be
    others = [OtherProcess(int(m[1]), _bytes(m[2], m[3])) for m in _OTHER.finditer(text)]
    if process is None and allocated is not None and "this process has" not in text:
        own = _itself(others, allocated + (unallocated or 0))
        if own is not None:
            process = own.bytes
            others.remove(own)
    return Message(
        count, int(device[1]) if device else None, asked, capacity, found["free"], found["allowed"], allocated,
        found["private"], unallocated, process, tuple(others),
    )  # fmt: skip


def _itself(processes: list[OtherProcess], reserved: int) -> OtherProcess | None:
    """The process that is this one under another number: inside a container, PyTorch does not know its own."""
    near = [
        each for each in processes if reserved <= each.bytes + MIB * 16 and each.bytes <= reserved + CONTEXT_AT_MOST
    ]
    return min(near, key=lambda each: abs(each.bytes - reserved), default=None)


def _size(found: re.Match[str] | None) -> int | None:
    if found is None:
        return None
    number, unit = [group for group in found.groups() if group is not None][:2]
    return _bytes(number, unit)


def _bytes(number: str, unit: str) -> int:
    return round(float(number[:20]) * _UNITS[unit])


# ------------------------------------------------------------------------------------------------------------- in words


def explain(message: Message) -> list[tuple[str, int, str]]:
    """``(what, bytes, what it means)`` for each number that the message gives."""
    rows = [
        ("asked", message.asked, "what the driver was asked for, in one piece: the request, rounded up to a segment"),
        ("card", message.capacity, "all the memory of the GPU"),
        ("allowed", message.allowed, "what this process may use at most: it was limited"),
        ("free", message.free, "what the driver still had when it refused"),
        ("allocated", message.allocated, "in tensors of this process"),
        ("  in private pools", message.private, "of that in pools of CUDA graphs, which nothing else can use"),
        ("reserved, unallocated", message.unallocated, "held by PyTorch, in no tensor: free pieces between tensors"),
        ("this process", message.process, "all that it has of the card, CUDA context included"),
        *((f"process {other.pid}", other.bytes, "another process on the card") for other in message.others),
        (
            "the rest",
            message.unnamed,
            "CUDA context and kernels" + ("" if message.process is not None else ", or processes that it cannot see"),
        ),
    ]
    return [(name, n_bytes, words) for name, n_bytes, words in rows if n_bytes is not None]


def hints(message: Message, unit: str | None = None) -> list[Hint]:
    """What the numbers point to, the best first; what they speak against after that."""
    found = [*_limits(message, unit), *_pieces(message, unit), *_neighbours(message, unit), _less(message, unit)]
    return sorted(found, key=lambda hint: not hint.points_to_it)


def _said(n_bytes: int, unit: str | None) -> str:
    return format_bytes(n_bytes, unit_for(n_bytes, unit), 2)


def _limits(message: Message, unit: str | None) -> list[Hint]:
    """Where no setting can help, or a limit of one's own refused."""
    asked, said = message.asked, []
    most = message.capacity
    if most is not None and asked > most:
        said.append(
            Hint(
                "ask for less at once",
                True,
                f"{_said(asked, unit)} in one piece is more than the whole card has, {_said(most, unit)}",
            )
        )
    reserved, free = message.reserved, message.free
    if message.allowed is not None and reserved is not None:
        left = message.allowed - reserved
        if asked > left and (free is None or asked <= free):
            said.append(
                Hint(
                    "raise per_process_memory_fraction",
                    True,
                    f"the card had {_said(free or 0, unit)} free, but of {_said(message.allowed, unit)} "
                    f"allowed only {_said(max(0, left), unit)} were left",
                )
            )
    elif free is not None and asked <= free:
        said.append(
            Hint(
                "look at who else takes memory at that moment",
                True,
                f"{_said(free, unit)} were free, enough for {_said(asked, unit)}: something else had it "
                "for an instant, or the driver refused for another reason",
            )
        )
    if most is not None and reserved is not None and reserved > most:
        said.append(
            Hint(
                "turn off the driver's fallback to system memory",
                True,
                f"PyTorch holds {_said(reserved, unit)} on a card of {_said(most, unit)}: the rest lies "
                "in system memory, as drivers for Windows do, and is slow",
            )
        )
    return said


def _pieces(message: Message, unit: str | None) -> list[Hint]:
    """Whether fragmentation is it."""
    cached, free = message.unallocated, message.free
    if cached is None or free is None:
        return []
    enough = cached + free >= message.asked > free
    why = f"{_said(cached, unit)} lie unused in pieces; with the {_said(free, unit)} free they are " + (
        "enough" if enough else f"less than the {_said(message.asked, unit)} asked for"
    )
    if message.asked <= free:
        why = "free memory was not what was missing"
    private = message.private or 0
    if enough and private and cached - private + free < message.asked:
        why += ", but part of it belongs to CUDA graphs"
    return [Hint("PYTORCH_ALLOC_CONF=expandable_segments:True", enough, why)]


def _neighbours(message: Message, unit: str | None) -> list[Hint]:
    """Whether other processes are it."""
    if not message.others or message.free is None:
        return []
    names = ", ".join(str(other.pid) for other in message.others[:5])
    enough = message.by_others + message.free >= message.asked > message.free
    why = f"{names} hold{'s' if len(message.others) == 1 else ''} {_said(message.by_others, unit)}"
    return [Hint("end the other processes on the card", enough, why + (", enough" if enough else ", not enough"))]


def _less(message: Message, unit: str | None) -> Hint:
    """By how much memory is short, and what card would have it."""
    if message.free is None or not message.capacity:
        return Hint("hold less", True, "the message does not say how much was free")
    missing = message.asked - message.free
    if missing <= 0:
        return Hint("hold less", False, "free memory was not what was missing")
    wanted = message.capacity + missing
    card = next((size for size in CARD_SIZES if size * GIB >= wanted and size * GIB > message.capacity * 1.05), None)
    larger = f"; or a card of {card} GiB" if card else "; no card is so large"
    return Hint(
        "hold less (smaller batch, shorter input, lower precision, fewer layers kept for backward)",
        missing > 0,
        f"{_said(missing, unit)} less, {missing / message.capacity:.0%} of the card{larger}",
    )
