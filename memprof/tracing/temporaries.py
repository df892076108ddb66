"""What an operator takes while it runs, in words that all tables of kernels share."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple, TypeAlias

import torch

#: Types of half precision: kernels keep float32 beside them.
HALF = (torch.float16, torch.bfloat16)


class Temporary(NamedTuple):
    """Memory an operator takes while it runs: what it is called, its shape and dtype.

    Where a name is in :data:`memprof.simulator.rules.RULES`, the bytes follow from the shape by that rule instead.
    ``brief``: it ends before the next is made; the others end when the operator does, the last made first.
    """

    op: str
    shape: tuple[int, ...]
    dtype: str = "uint8"
    brief: bool = False


class Ends(NamedTuple):
    """The end of the ``number``-th temporary of an operator, before the operator ends."""

    number: int


Steps: TypeAlias = "Iterator[Temporary | Ends]"


@cache
def name_of(dtype: torch.dtype) -> str:
    """``dtype`` without ``torch.``."""
    return str(dtype).removeprefix("torch.")
