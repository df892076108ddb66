"""What the meters without counters share: everything they say is read off the ledger's trace."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memprof.meters import Meter, weights_of
from memprof.simulator.replay import Reading
from memprof.simulator.trace import Trace

if TYPE_CHECKING:
    from torch import nn

    from memprof.tracing.kernels import Kernels


class TracedMeter(Meter):
    """A meter that keeps a ledger on CPU tensors and reads its trace when the window ends."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.weights = [tensor for _, tensor in weights_of(model)]
        #: The trace of the window that ended last.
        self.trace: Trace | None = None

    def kernels(self) -> Kernels | None:
        """What operators take beyond what dispatch shows, or None where nothing is modelled."""
        return None

    def read(self, trace: Trace) -> Reading:
        """Turn the trace of a window into a reading."""
        raise NotImplementedError

    def open(self) -> None:
        """Enter a fresh ledger."""
        from memprof.tracing.ledger import Ledger

        self.ledger = Ledger("cpu", self.kernels(), lines=self.lines)
        self.ledger.ignore(self.weights)
        self.ledger.listen()

    def mark(self) -> None:
        """Note the end of a token in the trace."""
        assert self.ledger is not None
        self.ledger.trace.mark()

    def phase(self, name: str) -> None:
        """Note the phase in the trace."""
        assert self.ledger is not None
        self.ledger.trace.phase(name)

    def close(self) -> Reading:
        """Leave the ledger and read its trace."""
        assert self.ledger is not None
        self.trace, self.ledger = self.ledger.close(), None
        return self.read(self.trace)
