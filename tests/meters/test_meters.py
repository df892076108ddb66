from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_prompt

from memprof.errors import DeviceUnavailable
from memprof.meters import METERS, meter_for
from memprof.meters.cuda import CudaMeter, PeakCounter
from memprof.meters.sim import SimMeter
from memprof.pruning import build_pruner
from memprof.runner import profile_prompt


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
    kind, card, real = tiny_model("internvl")
    _, _, fake = tiny_model("internvl", device="sim")
    prompt = tiny_prompt(kind, card)
    peaks = []
    for model in (real, fake):
        meter: Any = meter_for(model)
        profile_prompt(model, meter, build_pruner("baseline"), "current", prompt, new_tokens=3)
        trace = meter.trace
        big = {site: n for site, n in zip(trace.sites, trace.nbytes, strict=True) if n >= 4096}
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


class _Card:
    """A device's peak counter, with memory going up and down by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.peak = 0
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: self.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: setattr(self, "peak", self.now))

    def hold(self, n: int) -> None:
        self.now = n
        self.peak = max(self.peak, n)


def test_one_peak_counter_serves_nested_windows_and_the_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    card, device = _Card(monkeypatch), torch.device("cpu")
    card.hold(70)
    card.hold(10)
    outer, inner = PeakCounter(device), PeakCounter(device)
    outer.open()
    assert outer.outer_bytes == 70
    card.hold(30)
    card.hold(10)
    inner.open()
    card.hold(50)
    card.hold(10)
    assert inner.take() == 50
    card.hold(20)
    assert inner.take() == 20
    inner.close()
    assert outer.take() == 50, "the outer window sees the inner one's peak"
    assert outer.take() == 20, "and what is held now"
    outer.close()
    assert outer.outer_bytes == 70, "what an outside reader would have seen"
