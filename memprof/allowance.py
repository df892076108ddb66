"""How much memory may grow before a check fails: ``2%`` of what it was, ``32MiB``, or the larger of several."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from memprof.errors import BadValue
from memprof.units import parse_size


@dataclass(frozen=True)
class Allowance:
    """The larger of a share of what there was and a number of bytes.

    Attributes:
        share: Of the bytes before, as 0.02 for 2 %.
        n_bytes: Whatever there was before.
        text: As the user wrote it.
    """

    share: float
    n_bytes: int
    text: str

    @classmethod
    def of(cls, *texts: str) -> Self:
        """What ``texts`` allow: each a percentage or a size with its unit; the larger counts.

        Raises:
            BadValue: A text that is neither, or below 0.
        """
        shares, sizes = [0.0], [0]
        for text in texts:
            if match := re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*%\s*", text):
                shares.append(float(match.group(1)) / 100)
            else:
                sizes.append(_size(text))
        return cls(max(shares), max(sizes), " or ".join(text.strip() for text in texts))

    def bytes_of(self, before: int) -> int:
        """Bytes that ``before`` may grow by."""
        return max(int(self.share * before), self.n_bytes)

    def exceeded(self, before: int, after: int) -> bool:
        """Whether ``after`` is more than ``before`` may become."""
        return after - before > self.bytes_of(before)


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except BadValue:
        raise BadValue(f"{text!r} is no allowance; write a share such as 2% or a size such as 32MiB") from None
