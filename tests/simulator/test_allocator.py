"""The allocator model, rule by rule, then against the slow reference, then its bulk way in against its plain one."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_allocator import NoMemory, ReferenceAllocator

from memprof.errors import BadValue, OutOfMemory
from memprof.simulator.allocator import AllocatorSettings, CachingAllocator
from memprof.units import GIB, KIB, MIB

# ------------------------------------------------------------------------------------------------------------ settings


def test_parse_reads_the_syntax_of_pytorch_alloc_conf():
    parsed = AllocatorSettings.parse("expandable_segments:True, max_split_size_mb:128,garbage_collection_threshold:0.8")
    assert parsed == AllocatorSettings(128, 0, 0.8, True)
    assert AllocatorSettings.parse("") == AllocatorSettings()
    assert AllocatorSettings.parse("backend:native,pinned_use_background_threads:True") == AllocatorSettings()
    assert AllocatorSettings.parse("roundup_power2_divisions:4").roundup_power2_divisions == 4


def test_parse_reads_divisions_by_size():
    # The example of PyTorch's own test (c10/test/core/AllocatorConfig_test.cpp).
    parsed = AllocatorSettings.parse("roundup_power2_divisions:[64:8,128:2,256:4,512:2,1024:4,>:1]")
    assert parsed.roundup_power2_divisions == (8,) * 7 + (2, 4, 2, 4) + (1,) * 5
    assert AllocatorSettings.parse(str(parsed)) == parsed


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nonsense:1", "unknown allocator option 'nonsense'"),
        ("max_split_size_mb:big", "cannot read allocator option 'max_split_size_mb:big'"),
        ("max_split_size_mb", "cannot read allocator option"),
        ("max_split_size_mb:19", "must be at least 20"),
        ("garbage_collection_threshold:1.5", r"must lie in \(0, 1\)"),
        ("per_process_memory_fraction:0", r"must lie in \(0, 1\]"),
        ("expandable_segments:yes", "cannot read allocator option"),
        ("roundup_power2_divisions:3", "powers of two"),
        ("roundup_power2_divisions:[100:2]", "cannot read allocator option"),
        ("roundup_power2_divisions:[64:2", "unbalanced brackets"),
        ("large_segment_size_mb:10", "must be more than 10"),
        ("backend:cudaMallocAsync", "only 'native'"),
    ],
)
def test_parse_refuses_in_one_line(text, says):
    with pytest.raises(BadValue, match=says) as caught:
        AllocatorSettings.parse(text)
    assert "\n" not in str(caught.value)


def test_updated_takes_the_command_lines_equals_sign_and_keeps_the_rest():
    recorded = AllocatorSettings(max_split_size_mb=64)
    assert recorded.updated("expandable_segments=True") == AllocatorSettings(64, expandable_segments=True)


# ------------------------------------------------------------------------------------------------------------ rounding


@pytest.mark.parametrize(("asked", "block"), [(0, 0), (1, 512), (512, 512), (513, 1024), (10**9 + 1, 10**9 + 512)])
def test_sizes_round_up_to_512_bytes(asked, block):
    assert AllocatorSettings().round_size(asked) == block


@pytest.mark.parametrize(
    ("asked", "block"), [(1200, 1536), (2048, 2048), (2049, 2560), (1100 * KIB, 1280 * KIB), (1537 * MIB, 1792 * MIB)]
)
def test_sizes_round_up_to_a_division_of_a_power_of_two(asked, block):
    # 1200 is not above 512 x 4, so it rounds by blocks; the others by quarters of the power of two below.
    assert AllocatorSettings(roundup_power2_divisions=4).round_size(asked) == block


@given(st.lists(st.integers(0, 2**33), max_size=20), st.sampled_from([0, 1, 2, 8, (0, 2, 4, 8) * 4]))
def test_rounding_many_is_rounding_each(sizes, divisions):
    rules = AllocatorSettings(roundup_power2_divisions=divisions)
    assert rules.round_sizes(np.array(sizes, dtype=np.int64)).tolist() == [rules.round_size(size) for size in sizes]


# ------------------------------------------------------------------------------------------------- pools, fit and split


@pytest.mark.parametrize(
    ("asked", "segment"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (25 * MIB + 1, 26 * MIB),
    ],
)
def test_a_new_segment_has_the_size_of_its_pool(asked, segment):
    allocator = CachingAllocator()
    allocator.malloc(asked)
    assert allocator.reserved == segment


def test_small_and_large_requests_never_share_a_segment():
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(5 * MIB))
    allocator.malloc(512)
    assert allocator.reserved == 22 * MIB


def test_streams_never_share_a_segment():
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(5 * MIB, stream=1))
    allocator.malloc(5 * MIB, stream=2)
    assert allocator.reserved == 40 * MIB


def test_the_smallest_block_that_fits_is_taken_and_the_lowest_among_equals():
    allocator = CachingAllocator()
    large, first, _, second, _ = (allocator.malloc(n * MIB) for n in (30, 12, 11, 12, 11))
    for address in (large, second, first):
        allocator.free(address)
    assert allocator.malloc(12 * MIB) == first
    assert allocator.malloc(12 * MIB) == second
    assert allocator.malloc(12 * MIB) == large


def test_a_small_block_is_split_down_to_512_bytes():
    allocator = CachingAllocator()
    first = allocator.malloc(2 * MIB // 2)
    assert allocator.malloc(512) == first + MIB
    assert allocator.allocated == MIB + 512


def test_a_large_rest_of_one_mib_or_less_stays_with_the_block_and_counts_as_allocated():
    allocator = CachingAllocator()
    allocator.malloc(11 * MIB)  # its segment is 12 MiB: the rest is exactly 1 MiB
    assert allocator.allocated == 12 * MIB
    allocator = CachingAllocator()
    address = allocator.malloc(11 * MIB - 512)  # a rest of 1 MiB + 512 B is split off
    assert allocator.allocated == allocator.size_of(address) == 11 * MIB - 512


def test_a_freed_block_joins_its_free_neighbours():
    allocator = CachingAllocator()
    blocks = [allocator.malloc(4 * MIB) for _ in range(5)]
    for i in (0, 2, 4, 1, 3):
        allocator.free(blocks[i])
    assert [block.size for block in allocator.free_blocks()] == [20 * MIB]
    assert allocator.malloc(20 * MIB) == blocks[0]


def test_nothing_is_allocated_for_zero_bytes():
    allocator = CachingAllocator()
    address = allocator.malloc(0)
    allocator.free(address)
    assert (address, allocator.reserved, allocator.allocated) == (0, 0, 0)


def test_freeing_what_is_not_allocated_is_refused():
    allocator = CachingAllocator()
    address = allocator.malloc(1)
    allocator.free(address)
    with pytest.raises(BadValue, match="is not allocated"):
        allocator.free(address)


def test_peaks_stand_until_they_are_reset():
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(30 * MIB))
    allocator.empty_cache()
    assert (allocator.peak_allocated, allocator.peak_reserved) == (30 * MIB, 30 * MIB)
    allocator.reset_peaks()
    assert (allocator.peak_allocated, allocator.peak_reserved) == (0, 0)


# ------------------------------------------------------------------------------------------------------------- pressure


def test_empty_cache_returns_whole_segments_only():
    allocator = CachingAllocator()
    kept, freed = allocator.malloc(5 * MIB), allocator.malloc(5 * MIB)
    whole = allocator.malloc(30 * MIB)
    allocator.free(freed)
    allocator.free(whole)
    allocator.empty_cache()
    assert allocator.reserved == 20 * MIB
    allocator.free(kept)
    allocator.empty_cache()
    assert allocator.reserved == 0


def test_the_cache_is_released_before_a_request_fails():
    allocator = CachingAllocator(capacity_bytes=100 * MIB)
    allocator.free(allocator.malloc(60 * MIB))
    allocator.malloc(80 * MIB)  # would need 140 MiB with the cached 60
    assert allocator.reserved == 80 * MIB


def test_out_of_memory_names_the_allocation_that_did_not_fit():
    allocator = CachingAllocator(capacity_bytes=GIB)
    allocator.malloc(600 * MIB)
    with pytest.raises(
        OutOfMemory, match=r"allocating 0.500 GiB needs a segment of 0.500 GiB; of 1.000 GiB, 0.586 GiB"
    ):
        allocator.malloc(512 * MIB)
    assert allocator.refused is not None
    assert allocator.refused.requested_bytes == 512 * MIB
    assert (allocator.allocated, allocator.reserved) == (600 * MIB, 600 * MIB)
    allocator.malloc(400 * MIB)  # the allocator goes on, as torch's does


def test_the_context_is_not_for_segments_and_a_share_is_of_the_whole_device():
    allocator = CachingAllocator(None, GIB, 500 * MIB)
    assert allocator.limit_bytes == 524 * MIB
    allocator.malloc(500 * MIB)
    with pytest.raises(OutOfMemory, match=r"of 1.000 GiB, 0.488 GiB are the CUDA context, 0.488 GiB are reserved"):
        allocator.malloc(30 * MIB)
    for share, limit, says in ((0.5, 512, "of 0.500 GiB, 0 B are reserved"), (0.75, 524, "of 1.000 GiB, 0.488")):
        allocator = CachingAllocator(AllocatorSettings(per_process_memory_fraction=share), GIB, 500 * MIB)
        assert allocator.limit_bytes == limit * MIB
        with pytest.raises(OutOfMemory, match=says):
            allocator.malloc(600 * MIB)
    with pytest.raises(OutOfMemory, match=r"the CUDA context alone takes 0.488 GiB, and there are 8.0 MiB"):
        CachingAllocator(None, 8 * MIB, 500 * MIB).malloc(1)


def test_oversize_blocks_are_neither_split_nor_given_to_small_requests():
    allocator = CachingAllocator(AllocatorSettings(max_split_size_mb=32))
    big = allocator.malloc(64 * MIB)
    allocator.free(big)
    assert allocator.malloc(25 * MIB) != big
    assert allocator.malloc(50 * MIB) == big  # within 20 MiB of the request: handed out whole
    assert allocator.size_of(big) == 64 * MIB
    allocator.free(big)
    assert allocator.malloc(44 * MIB) != big  # 20 MiB more than asked: no longer


def test_under_pressure_oversize_blocks_go_first_and_only_as_many_as_needed():
    allocator = CachingAllocator(AllocatorSettings(max_split_size_mb=20), capacity_bytes=200 * MIB)
    addresses = [allocator.malloc(n * MIB) for n in (80, 60, 30)]
    for address in addresses:
        allocator.free(address)
    allocator.malloc(120 * MIB)  # nothing that large is cached: 80, then 60 go; 30 stays
    assert allocator.reserved == 150 * MIB


def test_garbage_is_collected_only_where_a_memory_fraction_is_set():
    # PyTorch 2.13 reads the threshold against the allowed memory, which only a fraction below 1 sets.
    def reserved(fraction):
        rules = AllocatorSettings(garbage_collection_threshold=0.5, per_process_memory_fraction=fraction)
        allocator = CachingAllocator(rules, capacity_bytes=200 * MIB)
        old, new = allocator.malloc(40 * MIB), allocator.malloc(60 * MIB)
        allocator.free(old)
        for _ in range(3):
            allocator.free(new)
            new = allocator.malloc(60 * MIB)
        allocator.malloc(70 * MIB)
        return allocator.reserved

    assert reserved(1.0) == 170 * MIB
    assert reserved(0.95) == 130 * MIB  # the 40 MiB that had waited longest went before the 70 came


# -------------------------------------------------------------------------------------------------- expandable segments


def test_expandable_segments_grow_by_pages_and_leave_no_holes():
    allocator = CachingAllocator(AllocatorSettings(expandable_segments=True))
    first = allocator.malloc(30 * MIB)
    assert allocator.reserved == 40 * MIB
    assert allocator.malloc(30 * MIB) == first + 30 * MIB
    assert allocator.reserved == 60 * MIB
    allocator.malloc(512)
    assert allocator.reserved == 62 * MIB


def test_wholly_free_pages_are_unmapped_and_mapped_again_lowest_first():
    allocator = CachingAllocator(AllocatorSettings(expandable_segments=True))
    first, second, third = (allocator.malloc(50 * MIB) for _ in range(3))
    allocator.free(second)  # 50 to 100 MiB: the pages at 60 and 80 lie wholly inside
    allocator.empty_cache()
    assert allocator.reserved == 120 * MIB
    assert allocator.malloc(45 * MIB) == second
    assert allocator.reserved == 160 * MIB
    assert (first, third) == (second - 50 * MIB, second + 50 * MIB)


def test_expandable_segments_meet_the_limit_by_page():
    allocator = CachingAllocator(AllocatorSettings(expandable_segments=True), capacity_bytes=50 * MIB)
    allocator.malloc(38 * MIB)
    with pytest.raises(OutOfMemory):
        allocator.malloc(11 * MIB)
    allocator.malloc(2 * MIB)


# ----------------------------------------------------------------------------------------------- against the reference

_SIZES = st.one_of(
    st.sampled_from([1, 512, MIB, MIB + 1, 10 * MIB, 20 * MIB, 19 * MIB, 11 * MIB]),
    st.integers(1, MIB),
    st.integers(MIB, 130 * MIB),
)
_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("malloc"), _SIZES, st.sampled_from([0, 0, 0, 1])),
        st.tuples(st.just("again"), st.integers(0, 99), st.just(0)),
        st.tuples(st.just("free"), st.integers(0, 99), st.just(0)),
        st.tuples(st.just("empty_cache"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


def _agree(steps, rules, capacity):
    """Run steps through model and reference; every address and both sums must agree after each."""
    model = CachingAllocator(rules, capacity)
    reference = ReferenceAllocator(
        capacity,
        rules.max_split_size_mb,
        rules.roundup_power2_divisions,
        rules.garbage_collection_threshold,
        rules.per_process_memory_fraction,
        rules.expandable_segments,
    )
    live: list[int] = []
    seen: list[int] = []
    for kind, number, stream in steps:
        if kind == "free":
            if live:
                address = live.pop(number % len(live))
                model.free(address)
                reference.free(address)
        elif kind == "empty_cache":
            model.empty_cache()
            reference.empty_cache()
        else:
            size = number if kind == "malloc" or not seen else seen[number % len(seen)]
            size = max(size, 1)
            seen.append(size)
            try:
                expected = reference.malloc(size, stream)
            except NoMemory:
                with pytest.raises(OutOfMemory):
                    model.malloc(size, stream)
            else:
                assert model.malloc(size, stream) == expected
                live.append(expected)
        assert (model.allocated, model.reserved) == (reference.allocated, reference.reserved)
    cached = sorted((block.address, block.size) for block in model.free_blocks())
    assert cached == sorted((b.address, b.size) for s in reference.segments for b in s.blocks if b.state == "free")


@settings(max_examples=200, deadline=None)
@given(
    steps=_STEPS,
    capacity=st.sampled_from([None, 100 * MIB, 200 * MIB, 333 * MIB]),
    max_split=st.sampled_from([None, None, 20, 32, 64]),
    divisions=st.sampled_from([0, 0, 4, 8]),
    threshold=st.sampled_from([0.0, 0.3, 0.6]),
    fraction=st.sampled_from([1.0, 0.5, 0.9]),
    expandable=st.booleans(),
)
def test_every_decision_is_the_references(steps, capacity, max_split, divisions, threshold, fraction, expandable):
    _agree(steps, AllocatorSettings(max_split, divisions, threshold, expandable, fraction), capacity)


@pytest.mark.parametrize("seed", range(80))
def test_every_decision_is_the_references_over_long_runs_full_of_ties(seed):
    # Few sizes that tile each other, so that equal free blocks and equal rests are the rule.
    rng = random.Random(seed)
    unit = rng.choice([512, 3 * MIB, 5 * MIB])
    sizes = [unit * rng.randrange(1, 7) for _ in range(4)]
    steps = []
    for _ in range(150):
        kind = rng.choices(["malloc", "free", "empty_cache"], [53, 45, 2])[0]
        number = rng.choice(sizes) if kind == "malloc" else rng.randrange(1000)
        steps.append((kind, number, rng.choice([0, 0, 0, 1]) if kind == "malloc" else 0))
    capacity = rng.choice([None, 100 * MIB, 200 * MIB])
    _agree(steps, AllocatorSettings(expandable_segments=seed % 2 == 1), capacity)


# ----------------------------------------------------------------------------------------------------------------- bulk


def _program(seed, length=400):
    rng = random.Random(seed)
    order, sizes, live = [], [], []
    while len(order) < length:
        if live and rng.random() < 0.45:
            order.append(~live.pop(rng.randrange(len(live))))
        else:
            live.append(len(sizes))
            order.append(len(sizes))
            sizes.append(rng.choice([0, 100, 5000, 3 * MIB, 12 * MIB, rng.randrange(1, 60 * MIB)]))
    return order, sizes


@pytest.mark.parametrize("text", ["", "expandable_segments:True", "max_split_size_mb:20", "roundup_power2_divisions:4"])
@pytest.mark.parametrize("capacity", [None, 512 * MIB])
def test_replay_says_what_malloc_and_free_say(text, capacity):
    order, sizes = _program(text + str(capacity))
    marks = [100, 101, 250]
    plain = CachingAllocator(AllocatorSettings.parse(text), capacity)
    peaks, ends, peak_events, at = [], [], [], {}
    refused = None
    for index, number in enumerate(order):
        if index in (0, *marks):
            plain.reset_peaks()
            peaks.append(None), ends.append(None), peak_events.append(-1)
        before = plain.peak_allocated
        try:
            if number >= 0:
                at[number] = plain.malloc(sizes[number])
            else:
                plain.free(at[~number])
        except OutOfMemory:
            refused = index
        if plain.peak_allocated > before:
            peak_events[-1] = index
        peaks[-1] = (plain.peak_allocated, plain.peak_reserved)
        ends[-1] = (plain.allocated, plain.reserved)
        if refused is not None:
            break
    bulk = CachingAllocator(AllocatorSettings.parse(text), capacity)
    said = bulk.replay(order, np.array(sizes), marks)
    assert list(zip(said.peak_allocated, said.peak_reserved, strict=True)) == peaks
    assert list(zip(said.allocated, said.reserved, strict=True)) == ends
    assert list(said.peak_events) == peak_events
    assert said.refused_event == refused
    assert (said.refused is None) == (refused is None)
    highest = max(said.peak_allocated)
    assert said.peak_event == said.peak_events[said.peak_allocated.index(highest)]


def test_a_copy_goes_its_own_way():
    warm = CachingAllocator(AllocatorSettings(expandable_segments=True))
    warm.free(warm.malloc(30 * MIB))
    twin = warm.copy()
    assert twin.malloc(100 * MIB) == warm.malloc(100 * MIB)
    twin.malloc(300 * MIB)
    assert (warm.allocated, twin.allocated) == (100 * MIB, 400 * MIB)
    assert (warm.reserved, twin.reserved) == (100 * MIB, 400 * MIB)


def test_what_a_replay_leaves_can_be_freed():
    allocator = CachingAllocator()
    allocator.replay([0, 1, ~0], [MIB, 3 * MIB])
    twin = CachingAllocator()
    twin.malloc(MIB)
    allocator.free(twin.malloc(3 * MIB))
    assert allocator.allocated == 0


def test_a_refusal_ends_the_replay_and_keeps_what_was_finished():
    allocator = CachingAllocator(capacity_bytes=100 * MIB)
    said = allocator.replay([0, 1, 2], [40 * MIB, 40 * MIB, 40 * MIB], windows=[1, 2])
    assert said.peak_allocated == (40 * MIB, 80 * MIB, 80 * MIB)
    assert said.refused_event == 2
    assert said.refused is not None
    assert said.refused.requested_bytes == 40 * MIB
