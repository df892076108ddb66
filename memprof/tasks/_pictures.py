"""Where a sample's picture comes from: encoded bytes read when asked for, or drawn by memprof.

Nothing here decodes or draws before :meth:`image` is called; Pillow is imported then, not earlier.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from memprof.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image


class Picture(Protocol):
    """Something with a size in pixels that can become an RGB image."""

    def size(self) -> tuple[int, int]:
        """Width and height in pixels; (0, 0) where the picture is broken."""

    def image(self) -> Image:
        """The picture in RGB; raises :class:`DataError` where it is broken."""


@dataclass(frozen=True)
class Encoded:
    """A picture in a file format.

    Attributes:
        read: Gives the encoded bytes; may raise OSError, ValueError or DataError.
        where: How messages name it, e.g. ``my.tsv, line 3``.
    """

    read: Callable[[], bytes]
    where: str

    def size(self) -> tuple[int, int]:
        """Width and height from the header alone; EXIF rotation is not applied, as in the published code."""
        try:
            return self._open().size
        except DataError:
            return (0, 0)

    def image(self) -> Image:
        """The decoded picture in RGB."""
        opened = self._open()
        try:
            return opened.convert("RGB")
        except Exception as error:  # decoders raise almost anything on broken input
            raise self._broken(error) from None

    def _open(self) -> Image:
        from PIL import Image

        try:
            return Image.open(io.BytesIO(self.read()))
        except DataError:
            raise
        except Exception as error:
            raise self._broken(error) from None

    def _broken(self, error: Exception) -> DataError:
        reason = "not a picture Pillow knows" if type(error).__name__ == "UnidentifiedImageError" else str(error)
        return DataError(f"{self.where}: the image cannot be read: {reason}")


@dataclass(frozen=True)
class Drawn:
    """A picture that memprof draws: what is drawn follows from ``scene``, ``seed`` and the size alone."""

    width: int
    height: int
    seed: str
    scene: Mapping[str, Any] | None = None

    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return (self.width, self.height)

    def image(self) -> Image:
        """The picture, drawn anew at every call."""
        from memprof.tasks._draw import draw

        return draw(self.width, self.height, self.scene, seed=self.seed)
