"""A CUDA card: the allocator's own counters, the driver's figure for the process, and the ledger for who holds what."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import torch
from torch import nn

from memprof.errors import DeviceUnavailable
from memprof.meters import Meter, weights_of
from memprof.records import PARTS, Status
from memprof.simulator.allocator import BLOCK_BYTES
from memprof.simulator.ledger import Ledger
from memprof.simulator.replay import Reading, read_plain


class PeakCounter:
    """The one peak counter a device has, shared by whoever measures on it.

    Reading resets it, so every window open around the innermost one is told of each peak, and what stood in the
    counter before the first window is kept: :attr:`outer_bytes` is what ``torch.cuda.max_memory_allocated`` would
    have said at the end had nobody reset it. PyTorch offers no way to write the counter back.
    """

    _open: ClassVar[list[PeakCounter]] = []

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.outer_bytes = 0
        self._peak = 0

    def open(self) -> None:
        """Begin to own the counter."""
        self._spread()
        self.outer_bytes = torch.cuda.max_memory_allocated(self.device)
        self._open.append(self)
        torch.cuda.reset_peak_memory_stats(self.device)
        self._peak = 0

    def take(self) -> int:
        """Highest allocated bytes since the counter was last taken or opened."""
        self._spread()
        peak, self._peak = self._peak, 0
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    def close(self) -> None:
        """Stop owning the counter."""
        self._spread()
        self._open.remove(self)

    def _spread(self) -> None:
        """Tell every window that is open on this device what the counter says now."""
        peak = torch.cuda.max_memory_allocated(self.device)
        for counter in self._open:
            if counter.device == self.device:
                counter._peak = max(counter._peak, peak)
                counter.outer_bytes = max(counter.outer_bytes, peak)


class CudaMeter(Meter):
    """Measures a model on a card.

    Allocated and reserved come from the caching allocator's counters, read after a synchronisation at each token's end.
    Parts come from the ledger at the highest instant it saw; what the counters say beyond that is ``unexplained``.
    """

    status: ClassVar[Status] = "measured"
    about = "the caching allocator's counters, NVML for the process"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.check()
        self.weights = [tensor for _, tensor in weights_of(model)]
        self.device = self.weights[0].device
        self.counter = PeakCounter(self.device)
        self._driver = _Driver(self.device)
        self._static = 0

    @classmethod
    def check(cls) -> None:
        """Raise DeviceUnavailable where torch sees no card."""
        if torch.cuda.is_available():
            return
        why = "this torch was built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        raise DeviceUnavailable(f"{why}; use --device sim to predict the same run, or install a CUDA build of torch")

    @classmethod
    def serves(cls, model: nn.Module) -> bool:
        """Whether the weights are on a card."""
        return next(model.parameters()).device.type == "cuda"

    @property
    def static_bytes(self) -> int:
        """Bytes allocated now, or when the window was opened."""
        return self._static if self.ledger is not None else int(torch.cuda.memory_allocated(self.device))

    def environment(self) -> dict[str, Any]:
        """Card, driver, and the allocator settings as the process sees them."""
        properties = torch.cuda.get_device_properties(self.device)
        return {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "driver": self._driver.version(),
            "allocator": torch.cuda.get_allocator_backend(),
            "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        }

    def notes(self) -> list[str]:
        """That the driver could not be asked, if so."""
        return [self._driver.problem] if self._driver.problem else []

    def open(self) -> None:
        """Own the peak counter and enter a ledger."""
        torch.cuda.synchronize(self.device)
        self._static = int(torch.cuda.memory_allocated(self.device))
        self._reading = Reading()
        self.counter.open()
        self.ledger = Ledger("cuda")
        self.ledger.ignore(self.weights)
        self.ledger.listen()

    def mark(self) -> None:
        """Read and reset the counters."""
        assert self.ledger is not None
        torch.cuda.synchronize(self.device)
        stats = torch.cuda.memory_stats(self.device)
        self._reading.reserved_bytes.append(int(stats["reserved_bytes.all.peak"]))
        self._reading.allocated_bytes.append(int(stats["allocated_bytes.all.current"]))
        self._reading.peak_allocated_bytes.append(self.counter.take())
        self._reading.device_used_bytes.append(self._driver.used_bytes())
        self.ledger.trace.mark()

    def phase(self, name: str) -> None:
        """Note the phase; the vision encoder's own peak is read off the ledger."""
        assert self.ledger is not None
        self.ledger.trace.phase(name)

    def close(self) -> Reading:
        """Give the counter back; parts from the ledger's trace."""
        assert self.ledger is not None
        traced = read_plain(self.ledger.close(), self._static, BLOCK_BYTES)
        self.ledger = None
        self.counter.close()
        reading = self._reading
        reading.peak_token = max(
            range(len(reading.peak_allocated_bytes)), key=reading.peak_allocated_bytes.__getitem__, default=0
        )
        reading.peak_phase, reading.holders = traced.peak_phase, traced.holders
        reading.vision_peak_bytes = traced.vision_peak_bytes
        dynamic = max(reading.peak_allocated_bytes, default=self._static) - self._static
        reading.parts = traced.parts or dict.fromkeys(PARTS, 0)
        reading.parts["unexplained"] = dynamic - sum(v for k, v in reading.parts.items() if k != "unexplained")
        return reading


class _Driver:
    """What the driver says this process uses, through NVML; without NVML, a note."""

    def __init__(self, device: torch.device) -> None:
        self.problem = ""
        self._handle: Any = None
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self._nvml, self._handle = pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)
        except ImportError:
            self.problem = "device bytes unknown: nvidia-ml-py is not installed (pip install 'memprof-vlm[cuda]')"
        except Exception as error:  # NVML's errors share no base class with anything else
            self.problem = f"device bytes unknown: NVML says {error}"

    def version(self) -> str | None:
        """Driver version, or None."""
        return str(self._nvml.nvmlSystemGetDriverVersion()) if self._handle is not None else None

    def used_bytes(self) -> int | None:
        """Bytes this process uses on the card, CUDA context included; None where the driver does not say."""
        if self._handle is None:
            return None
        try:
            processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        except Exception as error:
            self.problem, self._handle = f"device bytes unknown: NVML says {error}", None
            return None
        used = [p.usedGpuMemory for p in processes if p.pid == os.getpid()]
        return int(used[0]) if used and used[0] is not None else None
