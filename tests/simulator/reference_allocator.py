"""The caching allocator's rules once more, slowly and plainly: lists of blocks, scanned from end to end.

It exists to disagree with ``memprof.simulator.allocator`` if that one is wrong, so it shares no code with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MIB = 2**20
INFINITE = float("inf")


class NoMemory(Exception):
    pass


@dataclass(eq=False)
class Block:
    address: int
    size: int
    state: str  # live | free | unmapped
    born: int = 0


@dataclass(eq=False)
class Segment:
    small: bool
    stream: int
    base: int
    expandable: bool
    blocks: list[Block] = field(default_factory=list)  # by address, without holes

    def merge(self) -> None:
        merged: list[Block] = []
        for block in self.blocks:
            if merged and block.state != "live" and merged[-1].state == block.state:
                merged[-1].size += block.size
                merged[-1].born = max(merged[-1].born, block.born)
            else:
                merged.append(block)
        self.blocks = merged


class ReferenceAllocator:
    def __init__(
        self,
        capacity=None,
        max_split_mb=None,
        divisions=0,
        gc_threshold=0.0,
        fraction=1.0,
        expandable=False,
    ) -> None:
        self.capacity = INFINITE if capacity is None else capacity
        self.device = 2**40 if capacity is None else capacity
        self.allowed = int(capacity * fraction) if capacity is not None and fraction < 1 else None
        self.max_split = INFINITE if max_split_mb is None else max_split_mb * MIB
        self.divisions, self.gc_threshold, self.expandable = divisions, gc_threshold, expandable
        self.segments: list[Segment] = []
        self.next_address = 2**32
        self.requests = 0

    # what it holds
    @property
    def allocated(self) -> int:
        return sum(b.size for s in self.segments for b in s.blocks if b.state == "live")

    @property
    def reserved(self) -> int:
        return sum(b.size for s in self.segments for b in s.blocks if b.state != "unmapped")

    # the rules
    def round(self, n: int) -> int:
        if n < 512:
            return 512
        if self.divisions > 1 and n > 512 * self.divisions:
            floor = 1
            while floor * 2 <= n:
                floor *= 2
            step = floor // self.divisions
            return -(-n // step) * step
        return -(-n // 512) * 512

    def segment_size(self, size: int) -> int:
        if size <= MIB:
            return 2 * MIB
        return 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB

    def free_blocks(self, small: bool, stream: int) -> list[tuple[Segment, Block]]:
        found = [
            (s, b)
            for s in self.segments
            if s.small == small and s.stream == stream
            for b in s.blocks
            if b.state == "free"
        ]
        return sorted(found, key=lambda sb: (sb[1].size, sb[1].address))

    def room(self, segment: Segment, block: Block) -> int:
        i = segment.blocks.index(block)
        right = segment.blocks[i + 1] if i + 1 < len(segment.blocks) else None
        return block.size + (right.size if right and right.state == "unmapped" else 0)

    def malloc(self, n: int, stream: int = 0) -> int:
        size = self.round(n)
        small = size <= MIB
        if not small:
            self.requests += 1
        fitting = [sb for sb in self.free_blocks(small, stream) if sb[1].size >= size]
        if self.expandable:
            while len(fitting) > 1 and self.room(*fitting[1]) < self.room(*fitting[0]):
                fitting.pop(0)
        if fitting:
            got = fitting[0][1].size
            if (size < self.max_split <= got) or (size >= self.max_split and got >= size + 20 * MIB):
                fitting = []
        segment, block = fitting[0] if fitting else self.new_memory(size, small, stream)
        rest = block.size - size
        split = rest >= 512 if small or self.expandable else size < self.max_split and rest > MIB
        if split:
            i = segment.blocks.index(block)
            segment.blocks.insert(i + 1, Block(block.address + size, rest, "free", self.requests))
            block.size = size
        block.state = "live"
        return block.address

    def free(self, address: int) -> None:
        for segment in self.segments:
            for block in segment.blocks:
                if block.address == address and block.state == "live":
                    block.state, block.born = "free", self.requests
                    segment.merge()
                    return
        raise KeyError(address)

    def new_memory(self, size: int, small: bool, stream: int) -> tuple[Segment, Block]:
        if self.allowed is not None and self.gc_threshold > 0:
            self.collect_garbage()
        got = self.attempt(size, small, stream)
        if got is None and self.release_oversize(size, small, stream):
            got = self.attempt(size, small, stream)
        if got is None:
            self.empty_cache()
            got = self.attempt(size, small, stream)
        if got is None:
            raise NoMemory
        return got

    def attempt(self, size: int, small: bool, stream: int) -> tuple[Segment, Block] | None:
        request = self.segment_size(size)
        if self.allowed is not None and self.reserved + request > self.allowed:
            return None
        if self.expandable:
            return self.expand(size, small, stream)
        if self.reserved + request > self.capacity:
            return None
        address = self.next_address
        self.next_address = -(-(address + request) // (2 * MIB)) * 2 * MIB + 2 * MIB
        segment = Segment(small, stream, address, False, [Block(address, request, "free", self.requests)])
        self.segments.append(segment)
        return segment, segment.blocks[0]

    def expand(self, size: int, small: bool, stream: int) -> tuple[Segment, Block] | None:
        page = 2 * MIB if small else 20 * MIB
        found = None
        for segment in sorted(self.segments, key=lambda s: s.base):
            if (segment.small, segment.stream) != (small, stream):
                continue
            runs: list[list[Block]] = [[]]
            for block in segment.blocks:
                if block.state == "live":
                    runs.append([])
                else:
                    runs[-1].append(block)
            for run in runs:
                # Candidates start at each unmapped block, or at the free block just before it.
                for i, block in enumerate(run):
                    if block.state == "unmapped" and found is None:
                        first = i - 1 if i else i
                        if sum(b.size for b in run[first:]) >= size:
                            found = segment, run[first].address
        if found is None:
            total = -(-(self.device + self.device // 8) // page) * page
            base = self.next_address
            self.next_address = -(-(base + total) // (2 * MIB)) * 2 * MIB + 2 * MIB
            segment = Segment(small, stream, base, True, [Block(base, total, "unmapped")])
            self.segments.append(segment)
            found = segment, base
        segment, start = found
        while True:
            block = next(b for b in segment.blocks if b.address <= start < b.address + b.size)
            if block.state == "free" and block.size >= size:
                return segment, block
            if block.state == "free":
                missing = size - block.size
                block = segment.blocks[segment.blocks.index(block) + 1]
            else:
                missing = size
            pages = -(-min(missing, block.size) // page) * page
            if self.reserved + pages > self.capacity:
                return None
            i = segment.blocks.index(block)
            mapped = Block(block.address, pages, "free", self.requests)
            tail = [Block(block.address + pages, block.size - pages, "unmapped")] if block.size > pages else []
            segment.blocks[i : i + 1] = [mapped, *tail]
            segment.merge()

    def release_oversize(self, size: int, small: bool, stream: int) -> bool:
        if self.max_split == INFINITE:
            return False
        wanted = max(size, self.max_split)
        cached = self.free_blocks(small, stream)
        for segment, block in cached:
            if block.size >= wanted and not segment.expandable:
                assert len(segment.blocks) == 1
                self.segments.remove(segment)
                return True
        released = 0
        for segment, block in reversed(cached):
            if released < wanted and block.size >= self.max_split and not segment.expandable:
                released += block.size
                self.segments.remove(segment)
        return released >= wanted

    def empty_cache(self) -> None:
        for segment in list(self.segments):
            if not segment.expandable:
                if [b.state for b in segment.blocks] == ["free"]:
                    self.segments.remove(segment)
                continue
            page = 2 * MIB if segment.small else 20 * MIB
            blocks: list[Block] = []
            for block in segment.blocks:
                first = segment.base + -(-(block.address - segment.base) // page) * page
                last = segment.base + (block.address + block.size - segment.base) // page * page
                if block.state != "free" or first >= last:
                    blocks.append(block)
                    continue
                if block.address < first:
                    blocks.append(Block(block.address, first - block.address, "free", self.requests))
                blocks.append(Block(first, last - first, "unmapped"))
                if last < block.address + block.size:
                    blocks.append(Block(last, block.address + block.size - last, "free", self.requests))
            released = len(blocks) != len(segment.blocks) or any(b not in segment.blocks for b in blocks)
            segment.blocks = blocks
            segment.merge()
            if released and [b.state for b in segment.blocks] == ["unmapped"]:
                self.segments.remove(segment)

    def collect_garbage(self) -> None:
        threshold = int(self.gc_threshold * self.allowed)
        if self.reserved <= threshold:
            return
        target, reclaimed = self.reserved - threshold, 0
        while True:
            whole = [
                s for s in self.segments if not s.small and not s.expandable and [b.state for b in s.blocks] == ["free"]
            ]
            if not whole or reclaimed >= target:
                return
            mean = sum(self.requests - s.blocks[0].born for s in whole) / len(whole)
            for segment in whole:
                if self.requests - segment.blocks[0].born >= mean:
                    reclaimed += segment.blocks[0].size
                    self.segments.remove(segment)
