"""Reading pool by pool, the small one piece by piece, says what one replay of everything says."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memprof.records import PARTS
from memprof.simulator.allocator import AllocatorSettings, CachingAllocator
from memprof.simulator.replay import Timeline, read_cuda, read_plain, read_spans
from memprof.simulator.small_pool import Known
from memprof.simulator.trace import Trace
from memprof.units import GIB, MIB, parse_bytes


def a_trace(seed: int, tokens: int, largest: int) -> Trace:
    draw, trace, live = random.Random(seed), Trace(), list[int]()
    trace.phase("vision")
    for token in range(tokens):
        if token == 1:
            trace.phase("decode")
        for _ in range(draw.randint(0, 120)):
            if live and draw.random() < 0.5:
                trace.death(live.pop(draw.randrange(len(live))))
            else:
                size = int(draw.choice((1, 0.02, 0.001)) * draw.randint(0, largest))
                live.append(trace.birth(size, draw.choice(PARTS), (f"m{token}", "op"), (size,)))
        trace.mark()
    return trace


def whole(trace: Trace, start: CachingAllocator) -> tuple[list[int], list[int], list[int]]:
    """Peak, end and reserved of each token, from one replay of everything."""
    served = start.copy().replay(trace.events, trace.nbytes, trace.marks[:-1])
    return list(served.peak_allocated), list(served.allocated), list(served.peak_reserved)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from([3_000, 600_000, 5 * MIB, 40 * MIB]))
def test_pool_by_pool_is_one_replay(seed: int, tokens: int, largest: int) -> None:
    start = CachingAllocator()
    for size in (3 * MIB, 700, 12_345_678, 900_000):
        start.malloc(size)
    trace = a_trace(seed, tokens, largest)
    reading = read_cuda(trace, start)
    assert (reading.peak_allocated_bytes, reading.allocated_bytes, reading.reserved_bytes) == whole(trace, start)
    assert sum(reading.parts.values()) in (0, max(reading.peak_allocated_bytes) - start.allocated)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(0, 12), st.sampled_from([1, 7, 10_000]))
def test_however_it_is_cut_and_whatever_is_remembered(seed: int, cuts: int, most: int) -> None:
    """Traces alike but for their sizes, read one after another with one memory and with joints anywhere."""
    start, draw = CachingAllocator(), random.Random(seed)
    for size in (3 * MIB, 700, 900_000, 600_000, 512):
        start.malloc(size)
    memory = Known(start)
    memory.MOST = most
    first = a_trace(seed, 4, 600_000)
    line = Timeline(first, [draw.randint(0, len(first.events)) for _ in range(cuts)])
    for sizes in (first.nbytes, first.nbytes, [n // 3 for n in first.nbytes], [2 * n for n in first.nbytes]):
        trace = replace(first, nbytes=sizes)
        reading = read_cuda(trace, start, line, memory)
        assert (reading.peak_allocated_bytes, reading.allocated_bytes, reading.reserved_bytes) == whole(trace, start)


def test_a_layer_that_comes_again_is_served_once() -> None:
    """Fifty layers alike, of eight tokens: the small pool is served a few of them, and remembers the rest."""
    trace, joints, held = Trace(), list[int](), list[int]()
    for _ in range(8):
        held = [trace.birth(4_096, "other", ("", "embed"))]
        for _ in range(50):
            a = trace.birth(8_192, "mlp", ("", "up"))
            b = trace.birth(4_096, "attention", ("", "down"))
            trace.death(a)
            trace.death(held.pop())
            held.append(b)
            joints.append(len(trace.events))
        trace.death(held.pop())
        trace.mark()
    memory = Known(CachingAllocator())
    reading = read_cuda(trace, CachingAllocator(), Timeline(trace, joints), memory)
    assert reading.reserved_bytes == [2 * MIB] * 8
    assert len(memory._after) < 20


@pytest.mark.parametrize("text", ["expandable_segments:True", "max_split_size_mb:64", "roundup_power2_divisions:4"])
def test_other_rules_are_replayed_whole(text: str) -> None:
    start, trace = CachingAllocator(AllocatorSettings.parse(text)), a_trace(3, 4, 30 * MIB)
    reading = read_cuda(trace, start)
    assert (reading.peak_allocated_bytes, reading.allocated_bytes, reading.reserved_bytes) == whole(trace, start)


def test_a_refusal_ends_the_reading_at_the_last_finished_token() -> None:
    trace = a_trace(5, 5, 30 * MIB)
    free = read_cuda(trace, CachingAllocator())
    roomy = read_cuda(trace, CachingAllocator(capacity_bytes=free.reserved_bytes[-1]))
    assert roomy == free
    tight = read_cuda(trace, CachingAllocator(capacity_bytes=max(free.peak_allocated_bytes) // 2))
    done = len(tight.peak_allocated_bytes)
    assert tight.refused is not None
    assert f" of token {done}, asking for " in tight.refused
    told = [parse_bytes(size) for size in re.findall(r" ([0-9.]+ \w+)", tight.refused.partition("held then: ")[2])]
    allocated = re.search(r"([0-9.]+ \w+) allocated", tight.refused)
    assert allocated is not None
    assert sum(told) == pytest.approx(parse_bytes(allocated[1]), abs=0.0005 * GIB * (len(told) + 1))
    assert done < 5
    assert tight.peak_allocated_bytes == free.peak_allocated_bytes[:done]
    assert len(tight.reserved_bytes) == len(tight.device_used_bytes) == done


def test_without_an_allocator() -> None:
    trace = Trace()
    trace.phase("prefill")
    a = trace.birth(100, "inputs", ("", "a"), (100,))
    trace.mark()
    trace.birth(1_000, "mlp", ("", "b"), (10, 100))
    trace.death(a)
    trace.mark()
    reading = read_plain(trace, 5)
    assert reading.peak_allocated_bytes == [105, 1_105]
    assert reading.allocated_bytes == [105, 1_005]
    assert reading.parts["mlp"] == 1_000
    assert [holder.op for holder in reading.holders] == ["b", "a"]
    assert read_plain(trace, 0, rounding=512).peak_allocated_bytes == [512, 512 + 1_024]
    assert read_plain(Trace(), 7).peak_allocated_bytes == []


def held_at_its_highest(trace: Trace, begin: int, stop: int, rounding: int) -> dict[int, int]:
    """Slots and their bytes at the highest instant inside a span, by walking from the first event."""
    held: dict[int, int] = {}
    most, highest = -1, dict[int, int]()
    for count in range(stop + 1):
        if count:
            event = trace.events[count - 1]
            if event >= 0:
                held[event] = -(-trace.nbytes[event] // rounding) * rounding
            else:
                del held[~event]
        if count >= begin and sum(held.values()) > most:
            most, highest = sum(held.values()), dict(held)
    return highest


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_spans_are_read_in_one_pass_as_each_by_itself(seed: int, tokens: int) -> None:
    trace = a_trace(seed, tokens, 40_000)
    draw = random.Random(seed)
    ends = [0, *trace.marks]
    spans = [(draw.randint(ends[i], ends[i + 1]), ends[i + 1]) for i in range(tokens)]
    top = draw.randrange(tokens)
    reading = read_spans(trace, spans, top, 512)
    for number, span in enumerate(spans):
        held = held_at_its_highest(trace, *span, 512)
        parts = dict.fromkeys(PARTS, 0)
        for slot, size in held.items():
            parts[trace.parts[slot]] += size
        assert {p: reading.token_parts.get(p, [0] * tokens)[number] for p in PARTS} == parts
        if number == top and held:
            assert reading.parts == parts
            assert [h.bytes for h in reading.holders] == sorted(held.values(), reverse=True)[:24]
