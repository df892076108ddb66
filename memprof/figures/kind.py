"""What a kind of figure is: a way from runs to data, and from data to a picture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from memprof.records import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from memprof.figures.style import Look


class Kind(ABC):
    """One kind of figure; the file's name is its name."""

    @abstractmethod
    def plan(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """The data of each figure of this kind that ``runs`` give rise to (none is fine).

        Every run has a finished sample. A figure's data begin with :func:`memprof.telling.facts.header` and hold all
        that :meth:`paint` shows, in bytes.
        """

    @abstractmethod
    def paint(self, data: dict[str, Any], look: Look) -> Figure:
        """Paint ``data``; the same data and look give the same picture, byte for byte."""
