"""The published methods worked out a second time, in plain loops, at seeds and sizes that no fixture has.

Written from what is known of their code, number by number, in double precision; nothing of memprof is used but the
methods under test.
"""

from __future__ import annotations

import math

import pytest
import torch
from views import a_view

from memprof.pruning.methods.cdpruner import CDPruner
from memprof.pruning.methods.dart import DART
from memprof.pruning.methods.holov import HoloV
from memprof.pruning.methods.sparsevlm import clustered, rated
from memprof.pruning.methods.vispruner import VisPruner

seeds = pytest.mark.parametrize("seed", range(4))


def drawn(*size: int, seed: int) -> torch.Tensor:
    """Numbers of a normal distribution, float32."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def cosine(a: list[float], b: list[float]) -> float:
    """Of two vectors."""
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def falling(values: list[float]) -> list[int]:
    """Places of ``values``, the largest first."""
    return sorted(range(len(values)), key=lambda i: -values[i])


@seeds
@pytest.mark.parametrize(("n", "budget", "share"), [(36, 12, 0.5), (49, 25, 0.4), (64, 48, 0.75), (30, 10, 0.0)])
def test_vispruner_the_long_way(n: int, budget: int, share: float, seed: int) -> None:
    attention, patches = drawn(n, seed=seed).softmax(0), drawn(n, 12, seed=seed + 100)
    score, rows = attention.double().tolist(), patches.double().tolist()
    important = int(budget * share)
    order = falling(score)
    rest = order[important:]
    while len(rest) > budget - important:
        first, second = rest[0::2], rest[1::2]
        drop = min(8, len(rest) - (budget - important), len(first))
        likest = falling([max(cosine(rows[i], rows[j]) for j in second) for i in first])
        rest = [first[place] for place in likest[drop:]] + second
    chosen = VisPruner(important=share).select(a_view(vision=attention, patches=patches), budget).tolist()
    assert chosen == order[:important] + rest


@seeds
@pytest.mark.parametrize(("n", "budget"), [(36, 9), (50, 24), (64, 40)])
def test_cdpruner_the_long_way(n: int, budget: int, seed: int) -> None:
    tokens, image, text = drawn(n, 80, seed=seed), drawn(n, 20, seed=seed + 7), drawn(2, 20, seed=seed + 9)
    rows, seen, asked = (t.double().tolist() for t in (tokens, image, text))
    raw = [-sum(cosine(patch, words) for words in asked) / len(asked) for patch in seen]
    relevance = [(r - min(raw) + 1e-6) / (max(raw) - min(raw)) for r in raw]
    kernel = [[relevance[i] * cosine(rows[i], rows[j]) * relevance[j] for j in range(n)] for i in range(n)]
    gains, explained, order = [kernel[i][i] for i in range(n)], list[list[float]](), list[int]()
    for _ in range(budget):
        best = max((i for i in range(n) if i not in order), key=lambda i: gains[i])
        row = [
            (kernel[best][i] - sum(e[best] * e[i] for e in explained)) / math.sqrt(gains[best]) for i in range(n)
        ]
        gains = [gain - e * e for gain, e in zip(gains, row, strict=True)]
        explained.append(row)
        order.append(best)
    view = a_view(source=tokens, clip_image=image, clip_text=text)
    assert CDPruner(relevance="clip").select(view, budget).tolist() == order


@seeds
@pytest.mark.parametrize(("n", "budget", "crops"), [(36, 10, 4), (50, 20, 7), (64, 33, 5), (40, 12, 1)])
def test_holov_the_long_way(n: int, budget: int, crops: int, seed: int) -> None:
    tokens, attention = drawn(n, 10, seed=seed), (2 * drawn(n, seed=seed + 1)).softmax(0)
    rows, received = tokens.double().tolist(), attention.double().tolist()
    runs, start = list[list[int]](), 0
    for i in range(crops):
        size = n // crops + (i < n % crops)
        runs.append(list(range(start, start + size)))
        start += size
    scores = []
    for run in runs:
        spread = []
        for i in run:
            alike = [0.0 if i == j else cosine(rows[i], rows[j]) for j in run]
            mean = sum(alike) / (len(run) - 1)
            spread.append(sum((a - mean) ** 2 for a in alike) / (len(run) - 1))
        strong = [1000 * received[i] for i in run]
        scale = (sum(strong) / len(run)) / (sum(spread) / len(run) + 1e-6)
        scores.append(sum(a + 0.09 * v * scale for a, v in zip(strong, spread, strict=True)) / len(run))
    weight = [score / (sum(scores) + 1e-6) for score in scores]
    quota = [math.floor(w * budget) for w in weight]
    for i in falling(weight)[: budget - sum(quota)]:
        quota[i] += 1
    expected = list[int]()
    for run, count in zip(runs, quota, strict=True):
        by_attention = sorted(run, key=lambda i: -received[i])
        expected += run if count >= len(run) else by_attention[:count]
    surplus = [i for i in falling(received) if i not in expected]
    expected += surplus[: budget - len(expected)]
    assert HoloV(crops=crops).select(a_view(source=tokens, vision=attention), budget).tolist() == expected


@seeds
@pytest.mark.parametrize(
    ("n", "text", "keep", "pivots"), [(36, 9, 0.5, (4, 4)), (60, 12, 0.3, (3, 2)), (48, 6, 0.7, (1, 6))]
)
def test_dart_the_long_way(n: int, text: int, keep: float, pivots: tuple[int, int], seed: int) -> None:
    state, keys = drawn(n + text, 16, seed=seed), drawn(n + text, 24, seed=seed + 5)
    rows, norms = state.double().tolist(), keys.double().abs().sum(1).tolist()
    image = falling(norms[:n])[: pivots[0]]
    words = falling(norms[n:])[: pivots[1]]
    each = int(n * keep / sum(pivots))
    taken = list(image)
    for turn in [*image, *(n + word for word in words)]:
        free = [i for i in range(n) if i not in taken]
        taken += sorted(free, key=lambda i: cosine(rows[turn], rows[i]))[:each]
    view = a_view(
        normed=state[:n], normed_text=state[n:], key_norms=keys[:n].abs().sum(1), text_key_norms=keys[n:].abs().sum(1)
    )
    pruner = DART(keep=keep, image_pivots=pivots[0], text_pivots=pivots[1])
    (stage,) = pruner.stages(n, 8)
    assert stage.kept == pivots[0] + each * sum(pivots)
    assert pruner.select(view, stage.kept).tolist() == taken


@seeds
@pytest.mark.parametrize(("m", "clusters"), [(12, 2), (35, 4), (60, 7), (5, 1)])
def test_sparsevlm_clusters_the_long_way(m: int, clusters: int, seed: int) -> None:
    tokens = drawn(m, 9, seed=seed)
    # Densities of nearest neighbours tie: noise that float32 tells apart beside 1 decides.
    noise = torch.randperm(m, generator=torch.Generator().manual_seed(seed + 3)) / m
    rows = tokens.double().tolist()
    apart = [[math.dist(a, b) / 3.0 for b in rows] for a in rows]
    density = [
        math.exp(-sum(d * d for d in sorted(row)[:clusters]) / clusters) + 1e-6 * float(noise[i])
        for i, row in enumerate(apart)
    ]
    widest = max(map(max, apart))
    separation = [
        min((apart[i][j] for j in range(m) if density[j] > density[i]), default=widest) for i in range(m)
    ]
    centres = falling([s * d for s, d in zip(separation, density, strict=True)])[:clusters]
    nearest = [min(range(clusters), key=lambda c, row=row: row[centres[c]]) for row in apart]
    of = [centres.index(i) if i in centres else nearest[i] for i in range(m)]
    found = clustered(tokens, clusters, noise)
    assert found.centres.tolist() == centres
    assert found.of.tolist() == of
    for c in range(clusters):
        mine = [row for row, own in zip(rows, of, strict=True) if own == c]
        mean = [sum(column) / (len(mine) + 1e-6) for column in zip(*mine, strict=True)]
        assert found.merged[c].tolist() == pytest.approx(mean, abs=1e-5)


@seeds
def test_sparsevlm_scores_the_long_way(seed: int) -> None:
    heads, text, n = 3, 7, 20
    rows, match = drawn(heads, text, n, seed=seed).softmax(2), drawn(text, seed=seed).softmax(0)
    raters = [t for t in range(text) if float(match[t]) > float(match.mean())]
    expected = [
        sum(float(rows[h, t, j]) for h in range(heads) for t in raters) / (heads * len(raters)) for j in range(n)
    ]
    assert rated(rows, match).tolist() == pytest.approx(expected, rel=1e-5)
