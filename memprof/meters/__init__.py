"""Meters: where bytes come from. One file each; told when tokens and phases end, a meter answers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from memprof.errors import UsageError
from memprof.plugins import Registry
from memprof.records import Status

if TYPE_CHECKING:
    import torch
    from torch import nn

    from memprof.simulator.replay import Reading
    from memprof.tracing.ledger import Ledger


class Meter:
    """Base of the meters. A meter belongs to one model and serves one window at a time.

    Attributes:
        status: Whether its bytes are ``measured`` or ``predicted``.
        ledger: The ledger of the window now open, or None where parts are not told apart.
    """

    status: ClassVar[Status]
    about: ClassVar[str]
    #: Bytes that a predicting meter knows to be kept as workspaces.
    workspace_bytes: int = 0

    #: Whether the ledger notes the line of code behind each tensor.
    lines: bool = False

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

    @property
    def scoped(self) -> bool:
        """Whether anyone reads the scopes now: who asks for memory (:mod:`memprof.scopes`)."""
        return self.ledger is not None

    def environment(self) -> dict[str, Any]:
        """What this meter knows of the device: name, driver, allocator settings."""
        return {}

    def notes(self) -> list[str]:
        """What a reader of the run must know, such as a driver that could not be asked."""
        return []

    def open(self) -> None:
        """Begin a window; everything allocated from here on is dynamic."""
        raise NotImplementedError

    def given(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count to the window just opened what was made before it and handed to ``generate()``: it is ``inputs``.

        Nothing, unless the meter's bytes are those of real tensors.
        """

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
    """The meter that serves ``model``: cuda for weights on a card, sim for weights without storage, else cpu.

    Raises:
        UsageError: No weight of it is anywhere that memprof reads.
    """
    found = next((cls for _, cls in METERS if cls.serves(model)), None)
    if found is None:
        where = sorted({tensor.device.type for tensor in model.parameters()}) or ["nowhere: it has none"]
        raise UsageError(
            f"the weights of {type(model).__name__} are on {', '.join(where)}, where nothing can be measured; load "
            "them to cuda or cpu, or predict with memprof.weightless(config)"
        )
    return found(model)


def devices_of(model: nn.Module) -> set[str]:
    """Where the weights are: ``sim`` for those without storage; none for those on the meta device (offloaded)."""
    from torch._subclasses.fake_tensor import FakeTensor

    kinds = {"sim" if isinstance(tensor, FakeTensor) else str(tensor.device.type) for tensor in model.parameters()}
    return kinds - {"meta"}


def weights_of(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers with their names, each storage once, in the model's order.

    One that is made of other tensors, as quantised ones are, counts with each of them; one on the meta device, where an
    offloaded weight leaves its shape, holds nothing.
    """
    seen: set[int] = set()
    found = []
    for name, whole in [*model.named_parameters(), *model.named_buffers()]:
        for tensor in _parts(whole):
            key = tensor.untyped_storage()._cdata
            if key not in seen and tensor.device.type != "meta":
                seen.add(key)
                found.append((name, tensor))
    return found


def static_parts(model: nn.Module, meter: Meter, rest: str | None = None) -> dict[str, int]:
    """Bytes of the weights, by what they are for, and of the workspaces a predicting meter knows of.

    ``rest`` is what is beside them: rounding, and on a card workspaces, which cannot be told apart, unless told.
    """
    from memprof.anatomy import anatomy

    where = anatomy(model)
    weights = [(where.weight_group(name), tensor.untyped_storage().nbytes()) for name, tensor in weights_of(model)]
    rest = rest or ("rounding" if meter.status == "predicted" else "workspaces and rounding")
    return parts_of(weights, meter.workspace_bytes, meter.static_bytes, rest)


def parts_of(weights: Iterable[tuple[str, int]], workspaces: int, total: int, rest: str) -> dict[str, int]:
    """The same of weights by what each is for, its bytes beside it."""
    parts = dict.fromkeys(("vision", "language", "embeddings", "head"), 0)
    for group, n_bytes in weights:
        parts[group] += n_bytes
    if workspaces:
        parts["workspaces"] = workspaces
    if beside := total - sum(parts.values()):
        parts[rest] = beside
    return parts


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """``tensor``, or those it is made of."""
    inner = getattr(tensor, "__tensor_flatten__", None)
    return [tensor] if inner is None else [part for name in inner()[0] for part in _parts(getattr(tensor, name))]
