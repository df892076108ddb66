"""A CUDA card: the allocator's own counters, the driver's figure for the process, and the ledger for who holds what."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from itertools import takewhile
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from memprof import scopes
from memprof.errors import BadValue, DeviceUnavailable, UsageError
from memprof.meters import Meter, devices_of, weights_of
from memprof.records import PARTS, Status
from memprof.simulator.allocator import BLOCK_BYTES
from memprof.simulator.replay import Reading, read_spans
from memprof.simulator.trace import Trace
from memprof.tracing.ledger import Ledger

#: While what is generated operators are told apart: ``prefill`` (caches afterwards too), ``all``, or ``none``.
ATTRIBUTIONS = ("prefill", "all", "none")


class Counters(NamedTuple):
    """What the caching allocator counts on one device, in bytes: now, and the highest since its peaks were reset."""

    allocated: int
    peak_allocated: int
    reserved: int
    peak_reserved: int


def read_counters(device: torch.device) -> Counters:
    """The counters of ``device``: one look, without flattening the hundreds of numbers torch keeps."""
    stats = torch.cuda.memory_stats_as_nested_dict(device)
    allocated, reserved = stats["allocated_bytes"]["all"], stats["reserved_bytes"]["all"]
    return Counters(allocated["current"], allocated["peak"], reserved["current"], reserved["peak"])


class PeakCounter:
    """The one set of peak counters a device has, shared by whoever measures on it.

    Reading resets them (allocated and reserved at once: torch knows no other way), so every window open around the
    innermost one is told of each peak, and what stood there before the first window is kept: :attr:`outer_bytes` and
    :attr:`outer_reserved_bytes` are what ``torch.cuda.max_memory_allocated`` and ``max_memory_reserved`` would have
    said at the end had nobody reset them. PyTorch offers no way to write a counter back.
    """

    _open: ClassVar[list[PeakCounter]] = []

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.outer_bytes = self.outer_reserved_bytes = 0
        self._allocated = self._reserved = 0

    def open(self) -> None:
        """Begin to own the counters."""
        now = self._spread()
        self.outer_bytes, self.outer_reserved_bytes = now.peak_allocated, now.peak_reserved
        self._open.append(self)
        self._restart()

    def take(self) -> Counters:
        """The counters now, with the highest since they were last taken or opened here."""
        now = self._spread()._replace(peak_allocated=self._allocated, peak_reserved=self._reserved)
        self._restart()
        return now

    def close(self) -> None:
        """Stop owning the counters."""
        self._spread()
        self._open.remove(self)

    def _restart(self) -> None:
        self._allocated = self._reserved = 0
        torch.cuda.reset_peak_memory_stats(self.device)

    def _spread(self) -> Counters:
        """Tell every window that is open on this device what the counters say now."""
        now = read_counters(self.device)
        for window in self._open:
            if window.device == self.device:
                window._allocated = max(window._allocated, now.peak_allocated)
                window._reserved = max(window._reserved, now.peak_reserved)
                window.outer_bytes = max(window.outer_bytes, now.peak_allocated)
                window.outer_reserved_bytes = max(window.outer_reserved_bytes, now.peak_reserved)
        return now


class CudaMeter(Meter):
    """Measures a model on a card.

    Allocated and reserved bytes come from the caching allocator's counters: their peaks at every change of phase and,
    after a synchronisation, at each token's end. So peak, token and phase of the peak are measured. Who held it comes
    from the ledger, at the highest instant it saw in that phase of that token; what the counters say beyond that (a
    kernel's workspace, a block's remainder) is ``unexplained``.

    Args:
        model: Weights on one card.
        attribution: While the ledger watches operators, which takes time on the host. ``prefill``: until the first
            token is done, then lifetimes and caches only: the peak lies in prefill unless hundreds of tokens are made,
            and decoding keeps its speed. ``all``: always. ``none``: never; everything dynamic is ``unexplained``.
        ask_driver: When the driver is asked for device bytes, which takes the host a while. ``changed``: for the first
            two tokens and whenever reserved bytes have changed, else the entry is None. ``always``: for every token.

    Raises:
        DeviceUnavailable: There is no card.
        UsageError: The weights lie on several cards.
    """

    status: ClassVar[Status] = "measured"
    about = "the caching allocator's counters, NVML for the process"

    def __init__(self, model: nn.Module, attribution: str = "prefill", ask_driver: str = "changed") -> None:
        super().__init__(model)
        self.check()
        for value, valid in ((attribution, ATTRIBUTIONS), (ask_driver, ("changed", "always"))):
            if value not in valid:
                raise BadValue(f"{value!r} is not one of {', '.join(valid)}")
        self.attribution, self.ask_driver = attribution, ask_driver
        self.weights = [tensor for _, tensor in weights_of(model)]
        cards = sorted({str(tensor.device) for tensor in self.weights if tensor.is_cuda})
        if len(cards) != 1:
            raise UsageError(f"the weights lie on {', '.join(cards) or 'no card'}; memprof measures one card")
        self.device = torch.device(cards[0])
        self.counter = PeakCounter(self.device)
        self._driver = Driver(self.device)
        self._static: int | None = None  # None while no window is open

    @classmethod
    def check(cls) -> None:
        """Raise DeviceUnavailable where torch sees no card."""
        if torch.cuda.is_available():
            return
        why = "this torch was built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        if torch.version.cuda is not None and (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
            why += f" (CUDA_VISIBLE_DEVICES={visible!r})"
        raise DeviceUnavailable(f"{why}; use --device sim to predict the same run, or install a CUDA build of torch")

    @classmethod
    def serves(cls, model: nn.Module) -> bool:
        """Whether weights are on a card, though others may wait elsewhere."""
        return "cuda" in devices_of(model)

    @property
    def static_bytes(self) -> int:
        """Bytes allocated now, or when the window was opened."""
        return int(torch.cuda.memory_allocated(self.device)) if self._static is None else self._static

    @property
    def scoped(self) -> bool:
        """Whether operators are watched now."""
        return isinstance(self.ledger, _RestingLedger) and not self.ledger.resting

    def environment(self) -> dict[str, Any]:
        """Card, driver, and the settings that move bytes, as the process has them."""
        properties = torch.cuda.get_device_properties(self.device)
        backend = torch.cuda.get_allocator_backend()
        return {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "driver": self._driver.version,
            "device_bytes_of": self._driver.whose,
            "allocator": backend,
            "allocator_in_force": allocator_in_force() if backend == "native" else None,
            "attribution": self.attribution,
            "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "cublas_workspace_config": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        }

    def notes(self) -> list[str]:
        """Whose device bytes are, where they are not the process's own; that parts are not told apart, if so."""
        unknown = ["parts unknown: attribution is off, so all dynamic bytes are unexplained"]
        return [note for note in (self._driver.problem,) if note] + (unknown if self.attribution == "none" else [])

    def open(self) -> None:
        """Own the peak counters and enter a ledger."""
        torch.cuda.synchronize(self.device)
        self._static = int(torch.cuda.memory_allocated(self.device))
        self._reading, self._spans = Reading(), list[_Span]()
        self._phase, self._asked_at = "prefill", -1
        self.counter.open()
        if self.attribution != "none":
            self.ledger = _RestingLedger(self.device.type, lines=self.lines)
            self.ledger.ignore(self.weights)
            self.ledger.listen()

    def given(self, tensors: Iterable[torch.Tensor]) -> None:
        """What was given is not static, and has a slot from now on."""
        assert self._static is not None
        ours = [tensor for tensor in tensors if tensor.device == self.device]
        sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in ours}
        weights = {weight.untyped_storage()._cdata for weight in self.weights}
        self._static -= sum(-(-n // BLOCK_BYTES) * BLOCK_BYTES for key, n in sizes.items() if key not in weights)
        if self.ledger is not None:
            with scopes.scope("inputs"):
                for tensor in ours:
                    self.ledger.adopt(tensor, "given")

    def mark(self) -> None:
        """Read and reset the counters."""
        torch.cuda.synchronize(self.device)
        reading, token = self._reading, len(self._reading.allocated_bytes)
        now = self._take()
        spans = [span.peaks for span in takewhile(lambda span: span.token == token, reversed(self._spans))]
        reading.peak_allocated_bytes.append(max(peaks.peak_allocated for peaks in spans))
        reading.reserved_bytes.append(max(peaks.peak_reserved for peaks in spans))
        reading.allocated_bytes.append(now.allocated)
        ask = token < 2 or now.reserved != self._asked_at or self.ask_driver == "always"
        self._asked_at = now.reserved
        reading.device_used_bytes.append(self._driver.used_bytes() if ask else None)
        if isinstance(self.ledger, _RestingLedger):
            self.ledger.trace.mark()
            if self.attribution == "prefill" and not token:
                self.ledger.rest()

    def phase(self, name: str) -> None:
        """Read and reset the counters: the highest instant of each phase is measured, not inferred."""
        self._take()
        self._phase = name
        if self.ledger is not None:
            self.ledger.trace.phase(name)

    def close(self) -> Reading:
        """Give the counters back; parts from the ledger's trace, at the place of the measured peak."""
        assert self._static is not None
        static, self._static = self._static, None
        trace, self.ledger = self.ledger.close() if self.ledger is not None else None, None
        self.counter.close()
        reading = self._reading
        spans = [span for span in self._spans if span.token < len(reading.allocated_bytes)]
        if spans:
            highest = dict[int, _Span]()  # of each token
            for span in spans:
                if span.token not in highest or span.peaks.peak_allocated > highest[span.token].peaks.peak_allocated:
                    highest[span.token] = span
            _explain(reading, list(highest.values()), trace, static)
        else:
            reading.parts = dict.fromkeys(PARTS, 0)
        seen = [span.peaks.peak_allocated for span in spans if span.phase == "vision"]
        reading.vision_peak_bytes = max(seen, default=0)
        return reading

    def _take(self) -> Counters:
        """Take the counters, and note for which stretch of the window their peaks stand."""
        begin = self._spans[-1].stop if self._spans else 0
        stop = len(self.ledger.trace.events) if self.ledger is not None else 0
        taken = self.counter.take()
        self._spans.append(_Span(begin, stop, len(self._reading.allocated_bytes), self._phase, taken))
        return taken


class _Span(NamedTuple):
    """A stretch of a window inside one token and one phase: its events in the trace, and the counters at its end."""

    begin: int
    stop: int
    token: int
    phase: str
    peaks: Counters


def _explain(reading: Reading, spans: list[_Span], trace: Trace | None, static: int) -> None:
    """Fill in token, phase, parts and holders of the peak, and every token's parts.

    They are those of the highest instant the ledger saw in each token's highest span; what the counters say beyond that
    is ``unexplained``.
    """
    top = max(spans, key=lambda span: span.peaks.peak_allocated)
    seen = Reading()
    if trace is not None:
        seen = read_spans(trace, [(span.begin, span.stop) for span in spans], spans.index(top), BLOCK_BYTES)
    columns = {part: seen.token_parts.get(part, [0] * len(spans)) for part in PARTS}
    columns["unexplained"] = [
        span.peaks.peak_allocated - static - sum(known) for span, *known in zip(spans, *columns.values(), strict=True)
    ]
    reading.peak_token, reading.peak_phase = top.token, top.phase
    reading.parts = {part: column[spans.index(top)] for part, column in columns.items()}
    reading.token_parts = {part: column for part, column in columns.items() if any(column)}
    reading.holders = seen.holders


class _RestingLedger(Ledger):
    """A ledger that can stop seeing operators: from then on it sees ends, and how large the cache has become.

    What a cache gets while resting is one slot, born anew whenever its bytes change: a slot for every tensor would take
    the host more time than the counters do.
    """

    resting = False
    _grown = _slot = 0

    def rest(self) -> None:
        """Stop seeing operators."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self.resting = True

    def claim(self, storages: Mapping[int, int], part: str) -> None:
        """Count ``storages`` to ``part``; while resting, those that are new."""
        if not self.resting:
            super().claim(storages, part)
            return
        grown = sum(-(-n // BLOCK_BYTES) for key, n in storages.items() if key not in self._slots) * BLOCK_BYTES
        if grown == self._grown:
            return
        if self._grown:
            self.trace.death(self._slot)
        if grown:
            self._slot = self.trace.birth(grown, part, ("cache", "cache"), (grown,))
        self._grown = grown

    def close(self) -> Trace:
        """The trace."""
        if self.resting:
            self.listen()
        return super().close()


def allocator_in_force() -> dict[str, Any] | None:
    """The caching allocator's settings as it runs, set by whatever way; None where this torch does not tell."""
    settings = torch.cuda.memory._snapshot().get("allocator_settings")
    return dict(settings) if settings else None


class Driver:
    """What the driver says this process uses of a card, CUDA context included.

    NVML is asked, by the card's UUID: its own numbering ignores ``CUDA_VISIBLE_DEVICES``. In a container with process
    ids of its own NVML may list this process under another id, or not at all; then, and without NVML, what
    ``cudaMemGetInfo`` says stands in, which is of the whole card. Which of the two it is, is settled once.

    Attributes:
        version: Of the driver, or None.
        whose: ``process``, or ``card``: everyone's bytes on it.
        problem: Why it is not ``process``, in one line; else empty.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.version: str | None = None
        self.problem = ""
        self._processes: Callable[[], list[Any]] | None = None
        try:
            import pynvml

            pynvml.nvmlInit()
            self.version = str(pynvml.nvmlSystemGetDriverVersion())
            handle = _handle(pynvml, str(torch.cuda.get_device_properties(device).uuid))
            self._processes = lambda: pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
            # Another namespace's process may bear this id: ours holds at least what torch has reserved.
            known = (self._own() or 0) >= max(1, torch.cuda.memory_reserved(device))
            why = "" if known else f"NVML has no figure for process {os.getpid()}; in a container its id may be another"
        except ImportError:
            why = "nvidia-ml-py is not installed (pip install 'memprof-vlm[cuda]')"
        except Exception as error:  # NVML's errors share no base class with anything else
            why = f"NVML says {error}"
        if why:
            self._processes = None
            self.problem = f"device bytes are the whole card's, of all processes: {why}"
        self.whose = "card" if why else "process"

    def used_bytes(self) -> int | None:
        """Device bytes now (see :attr:`whose`); None where the driver no longer says."""
        if self._processes is None:
            free, total = torch.cuda.mem_get_info(self.device)
            return int(total - free)
        try:
            return self._own()
        except Exception as error:
            self.problem = f"device bytes are missing in places: NVML says {error}"
            return None

    def _own(self) -> int | None:
        """Bytes NVML has for this process, or None."""
        assert self._processes is not None
        used = (p.usedGpuMemory for p in self._processes() if p.pid == os.getpid())
        return sum(int(n) for n in used if n is not None) or None


def _handle(nvml: Any, uuid: str) -> Any:
    """NVML's handle of the card, or of the slice of one (MIG), with this UUID."""
    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except nvml.NVMLError:
        return nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")
