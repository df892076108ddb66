"""Every way memprof can fail on purpose, and the exit code each one means.

The tree::

    MemprofError            1  something failed; the message says what to do
    ├── UsageError          2  the request itself is wrong
    │   ├── UnknownName     2  no such method, field, task, model, device ...
    │   ├── BadValue        2  a value outside its range
    │   ├── LacksAttention  2  transformers has not this attention for the model
    │   └── RunExists       2  a run folder is already there
    ├── DataError           1  a file or data set cannot be read
    │   └── BadRow          1  a row of it is no sample
    ├── WeightsError        1  a checkpoint is missing, truncated or foreign
    ├── DeviceUnavailable   1  the device asked for is not on this machine
    ├── GateFailed          3  an audit or validation gate did not hold
    ├── DoesNotFit          4  predicted not to fit the budget or the card
    └── OutOfMemory         5  ran out of device memory; the record is written

``memprof.cli.main`` is the one place that turns an error into an exit code.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from itertools import takewhile


class MemprofError(Exception):
    """A failure with one clear line for the user; ``exit_code`` ends the process."""

    exit_code = 1


class UsageError(MemprofError):
    """The request is wrong; asking again differently can succeed."""

    exit_code = 2


class LacksAttention(UsageError):
    """Transformers has not the attention that was asked for, or that is usual, for this model."""


class UnknownName(UsageError):
    """A name that is not registered; the message lists the names that are, and says how many more than ``most``."""

    def __init__(self, kind: str, name: str, valid: Iterable[str], most: int | None = None) -> None:
        names = sorted(valid)
        more = f", ... and {len(names) - most} more" if most is not None and len(names) > most else ""
        super().__init__(f"unknown {kind} {name!r}{did_you_mean(name, names)}; valid: {', '.join(names[:most])}{more}")
        self.kind, self.name, self.valid = kind, name, names


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """`` (did you mean 'a' or 'b'?)``: up to three of ``valid``, best first; nothing where none is near.

    What begins with ``name`` comes first, the shortest of it before; then what is spelt like it, and of that what
    begins with more of the same letters.
    """
    known = {one.lower(): one for one in valid}
    low = name.lower()
    longer = sorted((one for one in known if low and one.startswith(low)), key=lambda one: (len(one), one))
    near = get_close_matches(low, known, n=12)
    near.sort(key=lambda one: -_shared(low, one))  # a stable sort: of equals, the nearest
    found = [f"{known[one]!r}" for one in dict.fromkeys([*longer, *near])][:3]
    if not found:
        return ""
    return f" (did you mean {' or '.join(filter(None, (', '.join(found[:-1]), found[-1])))}?)"


def _shared(one: str, other: str) -> int:
    """Letters that both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


class BadValue(UsageError):
    """A value outside the range its field allows."""


class RunExists(UsageError):
    """The run folder exists and neither ``--resume`` nor ``--force`` was given."""


class DataError(MemprofError):
    """A data file or data set cannot be read."""


class BadRow(DataError):
    """A row of data is no sample; ``id`` is what it is called there."""

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.id = name


class WeightsError(MemprofError):
    """A checkpoint is missing, truncated, or not the model asked for."""


class DeviceUnavailable(MemprofError):
    """The device asked for is not on this machine."""


class GateFailed(MemprofError):
    """A gate (audit, validation) did not hold."""

    exit_code = 3


class DoesNotFit(MemprofError):
    """Predicted not to fit the budget or the card."""

    exit_code = 4


class OutOfMemory(MemprofError):
    """Device memory ran out; everything finished before is recorded."""

    exit_code = 5
