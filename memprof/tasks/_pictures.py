"""Where a sample's picture comes from: encoded bytes read when asked for, or drawn by memprof.

Nothing here decodes or draws before :meth:`image` is called; Pillow is imported then, not earlier.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from memprof.errors import DataError

#: What is opened: formats that Pillow decodes itself. Others, such as EPS, start another program.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "TGA", "TIFF", "WEBP")

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
        picture = self._open()
        try:
            return in_rgb(picture)
        except Exception as error:  # decoders raise almost anything on broken input
            raise self._broken(error) from None

    def _open(self) -> Image:
        try:
            return opened(self.read())
        except DataError:
            raise
        except Exception as error:
            raise self._broken(error) from None

    def _broken(self, error: Exception) -> DataError:
        return DataError(f"{self.where}: the image cannot be read: {reason(error)}")


def opened(encoded: bytes) -> Image:
    """The picture in these bytes, its header read and no pixel: in a format of :data:`FORMATS`, of bounded size.

    Raises:
        Exception: Whatever its decoder raises on broken input, and Pillow where it is too large.
    """
    from PIL import Image

    Image.init()
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(encoded), formats=[name for name in FORMATS if name in Image.OPEN])


def in_rgb(picture: Image) -> Image:
    """``picture`` in RGB, 8 bits a channel; grey values of 16 bits are scaled to 8, where Pillow would clip them."""
    import numpy as np
    from PIL import Image

    if picture.mode == "I" or picture.mode.startswith("I;16"):
        grey = np.asarray(picture)
        if picture.mode != "I" or (grey.size and grey.max() > 255):
            grey = np.minimum(grey, 65535) // 257
        picture = Image.fromarray(np.maximum(grey, 0).astype(np.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a palette's transparency
        return picture.convert("RGB")


def reason(error: Exception) -> str:
    """Why a picture cannot be read, on one line."""
    kind = type(error).__name__
    if kind == "UnidentifiedImageError":
        return f"not a picture Pillow knows in a format that memprof opens ({', '.join(FORMATS)})"
    if kind.startswith("DecompressionBomb"):
        from PIL import Image

        return f"it has more pixels than the {Image.MAX_IMAGE_PIXELS} that are safe to decode"
    return " ".join(str(error).split()) or kind


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
