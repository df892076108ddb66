"""What fits is what a run on such a card says; the arithmetic of it is held in ``cli/test_tune.py``."""

from __future__ import annotations

import dataclasses

import pytest
from tiny import tiny_card

from memprof import runner
from memprof.analysis import fit as module
from memprof.analysis.fit import fit
from memprof.errors import DoesNotFit
from memprof.families import FAMILIES
from memprof.records import RunSpec
from memprof.runner import Bench, complete_spec
from memprof.simulator.cards import CARDS, CONTEXT_BYTES, find_card
from memprof.units import MIB


@pytest.fixture
def spec(monkeypatch: pytest.MonkeyPatch) -> RunSpec:
    """Baseline of a tiny InternVL, which fits into 32 MiB beside the context."""
    monkeypatch.setenv("MEMPROF_CACHE", "")
    family = FAMILIES.load("internvl")()
    card = tiny_card(family)
    monkeypatch.setattr(module, "MOST_TILES", 3)
    monkeypatch.setattr(module, "MOST_BATCH", 3)
    monkeypatch.setattr(runner, "find_model", lambda _: (family, card))
    return RunSpec(model=card.name, method="baseline", task="ai2d", device="sim", dtype="bfloat16", max_new_tokens=2)


def refused(spec: RunSpec, gpu: int, tiles: int) -> str | None:
    """What a run of the same prompt says on a card of ``gpu`` bytes."""
    spec, pruner, _ = complete_spec(dataclasses.replace(spec, gpu=str(gpu)))
    bench = Bench(spec)
    shape = bench.family.shape(bench.card, 100 * tiles, 100, 53, None)
    assert shape.tiles == tiles
    try:
        return bench.outcome(spec, pruner, shape, 0).refused
    except DoesNotFit as error:
        return str(error)


def test_what_fits_runs_and_what_does_not_is_refused(spec: RunSpec) -> None:
    found = fit(spec, find_card(str(CONTEXT_BYTES + 512 * MIB)), tiles=1)
    assert found.fits
    assert found.need.device_bytes == found.need.reserved_bytes + CONTEXT_BYTES
    assert refused(spec, found.need.device_bytes, 1) is None
    says = refused(spec, found.need.allocated_bytes + CONTEXT_BYTES - 1, 1)
    assert says is not None
    assert "are the CUDA context" in says


def test_a_card_brings_its_kernels_and_workspaces_and_not_its_limit(spec: RunSpec) -> None:
    card = dataclasses.replace(CARDS["t4"], memory_bytes=CONTEXT_BYTES + 32 * MIB)
    named, plain = fit(spec, card, tiles=2), fit(spec, find_card(str(card.memory_bytes)), tiles=2)
    assert named.static_bytes - plain.static_bytes == 8_519_680 + MIB  # cuBLAS' workspace and cuBLASLt's
    batch = {limit.name: limit for limit in named.limits}["batch"]
    assert batch.largest is not None
    assert batch.device_bytes is not None
    assert batch.device_bytes <= CONTEXT_BYTES + 32 * MIB
    assert (named.gpu, named.gpu_bytes) == ("t4", card.memory_bytes)


def test_a_measured_context_comes_before_the_assumed_one(spec: RunSpec) -> None:
    card = dataclasses.replace(find_card("1GiB"), measured={"context_bytes": 7 * MIB})
    bench = Bench(spec)
    assert fit(spec, card, tiles=1, bench=bench).context_bytes == 7 * MIB
    assert fit(spec, card, tiles=1, bench=bench, context_bytes=MIB).context_bytes == MIB
