"""What a pruner may look at: the visual tokens at the place where it prunes, and nothing it could change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from memprof.errors import UsageError


def no_projector(rows: torch.Tensor) -> torch.Tensor:
    """Stands where there is no projector: rows are handed on as they are."""
    return rows


@dataclass(frozen=True)
class View:
    """The visual tokens still alive at one pruning stage, in prompt order, tokens merged by earlier cuts among them.

    What a pruner names in its ``needs`` is an attribute of that name (:mod:`memprof.pruning.signals` says what each
    is); what it does not name is not there for it, so that nothing is kept alive for nobody.

    Attributes:
        count: How many there are: n.
        device: Where they are.
        seed: For pruners that draw at random; the same for the same sample.
        merged: How many tokens the cut is to put in beside those that stay.
        room: Bytes A TOKEN that a choice may take on the way without the peak rising: two of the widest activations of
            the layer before the cut, which has just given them back; 0 before every layer. Text is not counted, so that
            what is done in the room follows from the number of visual tokens.
        signals: The signals by name. ``positions`` and ``images`` are always among them.
        project: The model's projector from the vision tower's features to the language model's, for rows of
            ``patches`` or ``class_token`` that a pruner merges: ``(m, c)`` to ``(m, hidden)``.
    """

    count: int
    device: torch.device
    seed: int = 0
    merged: int = 0
    room: int = 0
    signals: Mapping[str, torch.Tensor] = field(default_factory=dict)
    project: Callable[[torch.Tensor], torch.Tensor] = no_projector

    def __getattr__(self, name: str) -> torch.Tensor:
        """The signal called ``name``."""
        try:
            return vars(self)["signals"][name]  # type: ignore[no-any-return]
        except KeyError:
            if name == "positions":
                raise UsageError(
                    "the method looks at where tokens lie on the picture, and the inputs do not say how its tiles lie; "
                    "give the pictures' sizes too: images=[(width, height), ...]"
                ) from None
            raise AttributeError(f"the view has no {name!r}: a pruner sees what its needs name") from None
