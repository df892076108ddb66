"""A CUDA run predicted without CUDA: the same ``generate()`` over weights without storage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from memprof.gpus import Card, calibrated, find_card
from memprof.meters import devices_of, weights_of
from memprof.meters._traced import TracedMeter
from memprof.records import Status
from memprof.simulator.loaded import Loaded
from memprof.simulator.replay import Reading, read_cuda
from memprof.simulator.trace import Trace

if TYPE_CHECKING:
    from torch import nn

    from memprof.tracing.kernels import Kernels


class SimMeter(TracedMeter):
    """Predicts what a card would hold, from every storage's birth and death."""

    status: ClassVar[Status] = "predicted"
    about = "the same generate() over weights without storage; predicts a CUDA run anywhere"

    def __init__(self, model: nn.Module, card: Card | None = None) -> None:
        from torch import nn

        from memprof.models.weightless import CARD_OF, RealScores, vocabulary

        super().__init__(model)
        self.card = card = card or CARD_OF.get(model) or calibrated(find_card(None))
        #: Name and bytes of each weight, and whether a linear layer has a bias: what :class:`Loaded` is made of.
        self.sizes = [(name, weight.untyped_storage().nbytes()) for name, weight in weights_of(model)]
        self.biased = any(isinstance(module, nn.Linear) and module.bias is not None for module in model.modules())
        state = Loaded(self.sizes, biased=self.biased, card=card)
        self.loaded, self.lasting, self.known = state.allocator, state.lasting, state.known
        self.workspace_bytes = state.workspace_bytes
        self._scores = RealScores(vocabulary(model))
        self.weights.append(self._scores.scores)

    @classmethod
    def on(cls, model: nn.Module, gpu: str | None) -> SimMeter:
        """The meter of ``model`` on the card ``gpu`` names, or the memory it gives."""
        return cls(model, calibrated(find_card(gpu)))

    @classmethod
    def serves(cls, model: nn.Module) -> bool:
        """Whether the weights have no storage."""
        return "sim" in devices_of(model)

    @property
    def static_bytes(self) -> int:
        """Bytes of the blocks the weights are in."""
        return self.loaded.allocated

    def environment(self) -> dict[str, Any]:
        """The card that is predicted for, and where its numbers come from."""
        return self.card.environment()

    def kernels(self) -> Kernels:
        """What CUDA kernels take beyond their results."""
        from memprof.tracing.kernels import Kernels

        return Kernels(self.card)

    def open(self) -> None:
        """Enter a fresh ledger, and choose kernels as the card would."""
        super().open()
        self._dispatch = self.kernels().dispatch()
        self._dispatch.__enter__()  # type: ignore[no-untyped-call]

    def close(self) -> Reading:
        """Leave both, and read the trace."""
        self._dispatch.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        return super().close()

    def logits_processors(self) -> list[Any]:
        """Real scores for ``generate()`` to choose from."""
        return [self._scores]

    def read(self, trace: Trace) -> Reading:
        """Bytes as the caching allocator would hold them."""
        return read_cuda(trace, self.loaded, known=self.known)
