from __future__ import annotations

import json
import tracemalloc
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memprof.simulator.allocator import AllocatorSettings, CachingAllocator
from memprof.simulator.filling import joined
from memprof.simulator.folding import FOLDED_TOKENS, STEPS_BEFORE, Recording, fold
from memprof.simulator.program import Program
from memprof.simulator.reach import Reach, Span
from memprof.simulator.replay import read_cuda, read_stretches
from memprof.simulator.selection import Passage
from memprof.simulator.sizes import AXES, Irregular, Sizes
from memprof.simulator.trace import Trace
from memprof.simulator.unfolding import Unfolded
from memprof.units import MIB


def made_up(
    tokens: int, layers: int, n: int, *, odd_token: int = -1, odd_layer: int = -1, wide: int = 8, leaks: bool = False,
    window: int | None = None, by_prompt: int = 0,
) -> Recording:
    """A model by hand: each layer replaces its cache and the hidden state; the head makes scores of all positions.

    A position takes ``wide`` numbers of a layer's cache; where it ``leaks``, something of every token is never freed.
    A cache has up to ``window`` positions, and from there on a mask is made. A step takes ``by_prompt`` bytes for each
    token of the prompt.
    """
    trace, entered = Trace(), list[list[int]]()
    trace.phase("prefill")
    cache: dict[int, int] = {}
    for token in range(tokens):
        if token == 1:
            trace.phase("decode")
        rows, length = (n, n) if not token else (1, n + token)
        hidden = trace.birth(rows * 8, "other", ("", "embed"), (rows, 4), "bfloat16")
        entered.append([])
        if window is not None and length >= window:
            trace.death(trace.birth(length, "other", ("", "mask"), (length,), "uint8"))
            length = window
        if by_prompt:
            trace.death(trace.birth(by_prompt * n, "other", ("", "prompt"), (by_prompt * n,), "uint8"))
        for layer in range(layers):
            entered[-1].append(len(trace.events))
            name = f"model.layers.{layer}"
            if layer == odd_layer:
                trace.death(trace.birth(512, "other", (name, "odd"), (512,), "uint8"))
            kv = trace.birth(length * 2 * wide, "kv_cache", (name, "cat"), (1, length, wide), "bfloat16")
            if token:
                trace.death(cache[layer])
            cache[layer] = kv
            out = trace.birth(rows * 8, "mlp", (f"{name}.mlp", "mm"), (rows, 4), "bfloat16")
            trace.death(hidden)
            hidden = out
        entered[-1].append(len(trace.events))
        if token == odd_token:
            trace.death(trace.birth(1, "other", ("", "odd"), (1,), "uint8"))
        if leaks:
            trace.birth(700, "other", ("", "kept"), (700,), "uint8")
        scores = trace.birth(rows * 400, "logits", ("head", "mm"), (rows, 100), "float32")
        trace.death(hidden)
        trace.death(scores)
        trace.mark()
    return Recording(trace, entered, head_layers=2, prefix="model.layers")


def program(*points: tuple[int, int], **kind: Any) -> Program:
    out = Program()
    for n, tokens in points:
        out.add((n, tokens), fold(made_up(tokens, 5, n, **kind), fold_layers=True))
    return out


POINTS = ((10, 5), (40, 6), (23, 5), (31, 6))


@pytest.mark.parametrize(("layers", "tokens", "n"), [(5, 5, 10), (12, 16, 17), (40, 30, 25), (6, 7, 40)])
def test_layers_and_steps_unfold(layers: int, tokens: int, n: int) -> None:
    ours = program(*POINTS).unfold(layers, tokens).trace((n, tokens))
    real = made_up(tokens, layers, n).trace
    assert ours == real


@pytest.mark.parametrize("leaks", [False, True])
@pytest.mark.parametrize("conf", ["", "expandable_segments:True"])
@pytest.mark.parametrize("at_once", [3, 7, 64])
def test_stretches_are_read_as_the_whole_is(at_once: int, conf: str, leaks: bool) -> None:
    """On any card and by any rules, also where the card refuses in the middle of a stretch."""
    tokens, n, kind = 40, 25, {"wide": 8_192, "leaks": leaks}
    settings = AllocatorSettings.parse(conf)
    real = made_up(tokens, 9, n, **kind).trace
    free = read_cuda(real, CachingAllocator(settings))
    unfolded, refused = program(*POINTS, **kind).unfold(9, tokens, at_once=at_once), list[bool]()
    layers, kv_bytes = unfolded.caches((n, tokens))
    assert [[cached.nbytes for cached in layer] for layer in layers] == [[n * 2 * 8_192]] * 9
    assert kv_bytes == [9 * 2 * 8_192 * (n + token) for token in range(tokens)]
    for limit in (None, free.reserved_bytes[-1], free.reserved_bytes[-1] - 1, free.reserved_bytes[20] - 1, 2 * MIB):
        start = CachingAllocator(settings, limit)
        start.malloc(700)
        ours = read_stretches(lambda: unfolded.stretches((n, tokens)), start)
        assert ours == read_cuda(real, start)
        refused.append(ours.refused is not None)
    assert refused[0] is False
    assert refused[-1] is True


def filled(n: int, tokens: int, window: int, **kind: Any) -> Unfolded:
    """The program of an answer in which a window fills: from a prompt shortly before it, and one far from it."""
    step, behind = window - n, tokens - (window - n)
    ahead, near = max(0, step - STEPS_BEFORE), Program()
    for more in (FOLDED_TOKENS, FOLDED_TOKENS + 1) if behind > FOLDED_TOKENS + 1 else (behind,):
        recording = made_up(step - ahead + more, 5, n + ahead, window=window, **kind)
        near.add((n + ahead, step - ahead + more), fold(recording, fold_layers=True, filled=step - ahead))
    if step < STEPS_BEFORE:
        return near.unfold(9, tokens, filled=step)
    own, lengths = program((n, 5), (n, 6), **kind), (n, tokens)
    return joined(own, lengths, near, (n + ahead, tokens - ahead), ahead=ahead, depth=9, tokens=tokens, filled=step)


@pytest.mark.parametrize("step", [1, 2, 3, 5, 6, 7, 20, 31])
@pytest.mark.parametrize("behind", [1, 2, 4, 5, 6, 7, 8, 40])
@pytest.mark.parametrize("at_once", [4, 64])
def test_a_window_that_fills_in_an_answer(
    step: int, behind: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memprof.simulator.unfolding.AT_ONCE", at_once)
    n, tokens, kind = 50 - step, step + behind, {"wide": 8_192}
    real = read_cuda(made_up(tokens, 9, n, window=50, **kind).trace, CachingAllocator())
    ours, own = filled(n, tokens, 50, **kind), (n, tokens)
    assert read_stretches(lambda: ours.stretches(own), CachingAllocator()) == real
    assert ours.caches(own)[1] == [9 * 2 * 8_192 * min(50, n + token) for token in range(tokens)]


def test_steps_that_know_the_prompt_are_not_told_by_a_longer_one() -> None:
    with pytest.raises(Irregular, match="not what the number of its tokens says"):
        filled(20, 60, 50, by_prompt=3)


def test_memory_does_not_grow_with_tokens() -> None:
    """Beyond what the answer itself says of each token, some 0.5 kB."""
    took, made = dict[int, int](), program(*POINTS, wide=8_192)
    for tokens in (200, 4_000):
        tracemalloc.start()
        try:
            unfolded = made.unfold(12, tokens)
            reading = read_stretches(lambda: unfolded.stretches((25, tokens)), CachingAllocator())  # noqa: B023
            took[tokens] = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert len(reading.allocated_bytes) == tokens
    assert took[4_000] - took[200] < 1_000 * (4_000 - 200)


def test_a_test_of_other_tokens_alone_says_nothing_of_other_prompts() -> None:
    reach = Reach()
    assert [reach.add(point) for point in ((10, 5), (40, 6), (10, 6))] == [True, True, True]
    assert reach.covers((10, 6)), "this very prompt was recorded"
    assert not reach.covers((10, 16))
    assert not reach.add((40, 5))
    assert reach.covers((10, 16))
    assert reach.covers((40, 16))
    assert not reach.covers((25, 16))
    assert not reach.add((31, 5))
    assert reach.covers((25, 16))
    assert not reach.covers((41, 16))
    again = Reach.of(reach.span.vectors, reach.seen)
    assert again.covers((25, 16))
    with pytest.raises(ValueError, match="not the points"):
        Reach.of(reach.span.vectors[:2], reach.seen)


def test_it_survives_the_disk() -> None:
    before = program(*POINTS)
    after = Program.from_json(json.loads(json.dumps(before.to_json())))
    assert after.structure == before.structure
    assert after.unfold(9, 12).trace((20, 12)) == before.unfold(9, 12).trace((20, 12))
    assert after.reach.covers((20, 12))


def test_what_it_answers_for() -> None:
    untested = program(*POINTS[:2])
    assert not untested.reach.covers((20, 16))
    tested = program(*POINTS)
    assert tested.reach.covers((20, 16))
    assert not tested.reach.covers((9, 16))
    assert not tested.reach.covers((41, 16))


def test_what_comes_out_in_fractions_is_not_answered_for() -> None:
    """A tensor that does not grow evenly, where the recording that shows it was never put to the test."""
    sizes = Sizes()
    for lengths, rows in (((1, 6, 5), 0), ((127, 517, 6), 253), ((126, 517, 5), 251)):
        sizes.add(lengths, np.full((1, AXES), rows, dtype=np.int64))
    sizes.add((125, 517, 5), np.full((1, AXES), 249, dtype=np.int64))
    sizes.add((124, 517, 5), np.full((1, AXES), 247, dtype=np.int64))  # a test, of those that lie in a row
    assert sizes.reach.covers((17, 58, 5))
    assert not sizes.whole((17, 58, 5))
    with pytest.raises(Irregular, match="no whole numbers"):
        sizes.at((17, 58, 5))
    assert sizes.whole((100, 517, 5))
    assert sizes.at((100, 517, 5))[0, 0] == 199


def test_what_does_not_repeat_is_refused() -> None:
    with pytest.raises(Irregular, match="differ"):
        fold(made_up(7, 5, 10, odd_token=3), fold_layers=True)
    with pytest.raises(Irregular, match="differ"):
        fold(made_up(5, 5, 10, odd_layer=3), fold_layers=True)
    with pytest.raises(Irregular, match="do not fold"):
        fold(made_up(5, 6, 10), fold_layers=True)
    one, other = program(POINTS[0]), fold(made_up(5, 5, 20, odd_layer=0), fold_layers=True)
    with pytest.raises(Irregular, match="different events"):
        one.add((20, 5), other)


def test_a_wrong_word_is_found_out() -> None:
    tested = program(*POINTS)
    lying = fold(made_up(5, 5, 26), fold_layers=True)
    with pytest.raises(Irregular, match="wrong"):
        tested.add((25, 5), lying)


def test_few_tokens_are_not_folded() -> None:
    tokens = FOLDED_TOKENS - 1
    out = Program()
    for n in (10, 20, 15):
        out.add((n, tokens), fold(made_up(tokens, 5, n), fold_layers=True))
    assert out.unfold(8, tokens).trace((13, tokens)) == made_up(tokens, 8, 13).trace


def test_a_selection_frees_nothing_that_it_was_given() -> None:
    trace = Trace()
    given = trace.birth(8, "other", ("", ""), (8,))
    made = trace.birth(8, "pruner", ("", ""), (8,))
    gone = trace.birth(4, "pruner", ("", ""), (4,))
    trace.death(gone)
    passage = Passage.of(trace, 1, 4)
    assert passage.course.events == (0, 1, ~1)
    assert passage.course.survivors == (0,)
    trace.death(given)
    del made
    with pytest.raises(Irregular, match="given"):
        Passage.of(trace, 1, 5)


@given(st.lists(st.tuples(*[st.integers(-50, 50)] * 3), min_size=1, max_size=8), st.data())
def test_weights_make_the_vector(vectors: list[tuple[int, int, int]], data: st.DataObject) -> None:
    span = Span()
    for vector in vectors:
        known = span.weights(vector)
        assert span.add(vector) == (known is None)
    for vector in vectors:
        weights = span.weights(vector)
        assert weights is not None
        assert sum(weights) == 1
        made = [sum((w * v[i] for w, v in zip(weights, span.vectors, strict=True)), Fraction(0)) for i in range(3)]
        assert made == list(vector)
    assert len(span.vectors) <= 4
