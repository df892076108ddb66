from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_prompt

from memprof.bench.generate import profile_prompt
from memprof.errors import DeviceUnavailable
from memprof.gpus import CARDS, CONTEXT_BYTES
from memprof.meters import METERS, meter_for
from memprof.meters.cuda import CudaMeter
from memprof.meters.sim import SimMeter
from memprof.pruning import build_pruner
from memprof.units import GIB


def test_every_meter_says_what_its_bytes_are() -> None:
    assert {name: meter.status for name, meter in METERS} == {"cpu": "measured", "cuda": "measured", "sim": "predicted"}
    assert all(meter.about for _, meter in METERS)


def test_the_meter_follows_from_the_weights() -> None:
    assert type(meter_for(tiny_model("internvl")[2])).__name__ == "CpuMeter"
    assert type(meter_for(tiny_model("internvl", device="sim")[2])).__name__ == "SimMeter"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a card")
def test_without_a_card_cuda_says_what_to_do() -> None:
    with pytest.raises(DeviceUnavailable, match="--device sim"):
        CudaMeter.check()


def test_sim_and_cpu_see_the_same_lifetimes() -> None:
    """Bytes asked for, event by event: the storage-less run is the real one, up to what CUDA's kernels add."""
    kind, card, real = tiny_model("internvl", "eager")  # other attention is other kernels on each device
    _, _, fake = tiny_model("internvl", "eager", device="sim")
    prompt = tiny_prompt(kind, card)
    peaks = []
    for model in (real, fake):
        meter: Any = meter_for(model)
        profile_prompt(model, meter, build_pruner("baseline"), "current", prompt, new_tokens=3)
        trace = meter.trace
        seen = zip(trace.sites, trace.nbytes, strict=True)
        big = {site: n for site, n in seen if n >= 4096 and "scaled_dot_product" not in site[1]}
        peaks.append(big)
    assert peaks[0].keys() <= peaks[1].keys()
    assert all(peaks[1][site] == n for site, n in peaks[0].items())


def test_allocator_settings_of_the_environment_are_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, model = tiny_model("internvl", device="sim")
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    assert not SimMeter(model).loaded.settings.expandable_segments
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    assert SimMeter(model).loaded.settings.expandable_segments


def test_a_predicted_card_keeps_room_for_its_context() -> None:
    _, _, model = tiny_model("internvl", device="sim")
    card = CARDS["t4"]
    memory = card.memory_bytes or 0
    assert SimMeter(model, card).loaded.limit_bytes == memory - CONTEXT_BYTES
    measured = dataclasses.replace(card, measured={"context_bytes": GIB})
    assert SimMeter(model, measured).loaded.limit_bytes == memory - GIB
    assert SimMeter.on(model, "t4@any").loaded.limit_bytes is None
