"""Meters: where bytes come from. One file each; told when tokens and phases end, a meter answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from memprof.plugins import Registry
from memprof.records import Status

if TYPE_CHECKING:
    import torch
    from torch import nn

    from memprof.simulator.ledger import Ledger
    from memprof.simulator.replay import Reading


class Meter:
    """Base of the meters. A meter belongs to one model and serves one window at a time.

    Attributes:
        status: Whether its bytes are ``measured`` or ``predicted``.
        ledger: The ledger of the window now open, or None where parts are not told apart.
    """

    status: ClassVar[Status]
    about: ClassVar[str]

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.ledger: Ledger | None = None

    @classmethod
    def check(cls) -> None:
        """Raise :class:`~memprof.errors.DeviceUnavailable`, saying what to do, where this meter cannot run."""

    @classmethod
    def on(cls, model: nn.Module, gpu: str | None) -> Meter:
        """The meter of ``model``; ``gpu`` names the card a predicting meter is to predict for."""
        del gpu
        return cls(model)

    @classmethod
    def serves(cls, model: nn.Module) -> bool:
        """Whether this meter is the one for ``model``, judged by its weights."""
        raise NotImplementedError

    @property
    def static_bytes(self) -> int:
        """Bytes allocated while no window is open: weights, buffers, persistent workspaces."""
        raise NotImplementedError

    def environment(self) -> dict[str, Any]:
        """What this meter knows of the device: name, driver, allocator settings."""
        return {}

    def notes(self) -> list[str]:
        """What a reader of the run must know, such as a driver that could not be asked."""
        return []

    def open(self) -> None:
        """Begin a window; everything allocated from here on is dynamic."""
        raise NotImplementedError

    def mark(self) -> None:
        """A token is done."""
        raise NotImplementedError

    def phase(self, name: str) -> None:
        """What follows belongs to phase ``name``."""
        raise NotImplementedError

    def close(self) -> Reading:
        """End the window and say what was read; also called when the window ends by an exception."""
        raise NotImplementedError

    def logits_processors(self) -> list[Any]:
        """What ``generate()`` must be given to run over this meter's model."""
        return []


METERS: Registry[Meter] = Registry("memprof.meters", Meter, "device")


def meter_for(model: nn.Module) -> Meter:
    """The meter that serves ``model``: cuda for weights on a card, sim for weights without storage, else cpu."""
    return next(cls for _, cls in METERS if cls.serves(model))(model)


def weights_of(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers with their names, each storage once, in the model's order."""
    seen: set[int] = set()
    found = []
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        key = tensor.untyped_storage()._cdata
        if key not in seen:
            seen.add(key)
            found.append((name, tensor))
    return found
