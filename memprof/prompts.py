"""What a prompt is: its images as the model is given them, its text, what beside its ids goes into ``generate()``.

Bytes follow from sizes alone, so a prompt may be nothing but sizes (:class:`Shape`), which a run's record keeps: nobody
has to cut an image a second time to know what was asked. Nothing here loads torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

from memprof.plain import Plain

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True)
class Image(Plain):
    """One image as the model is given it.

    Attributes:
        grids: Visual tokens across and down each view of it: its tiles row by row, then what shows the whole once more.
        columns, rows: How the tiles lie; views beyond ``columns * rows`` show the whole image.
        marks: Text tokens that the model writes between the views; the placeholder of each visual token is none.
        width, height: Of the picture in pixels; 0 where only its tokens are known.
        views: What the vision tower is fed, where it is not one view a grid: several tiles may be one grid together.
        kind: Tells apart images that the model goes through in other steps, as the family numbers them.
    """

    grids: tuple[tuple[int, int], ...]
    columns: int = 1
    rows: int = 1
    marks: int = 0
    width: int = 0
    height: int = 0
    views: int = 0
    kind: int = 0

    @property
    def tiles(self) -> int:
        """Views fed to the vision tower."""
        return self.views or len(self.grids)

    @cached_property
    def tokens(self) -> int:
        """Visual tokens."""
        return sum(map(prod, self.grids))

    @property
    def thumbnail(self) -> bool:
        """Whether the whole image follows its tiles once more."""
        return self.tiles > self.columns * self.rows

    def like(self) -> Image:
        """The image that stands for all whose bytes are the same: how tiles lie, and pixels cut away, move none."""
        return replace(self, columns=self.tiles, rows=1, width=0, height=0)


@dataclass(frozen=True)
class Shape(Plain):
    """The sizes a prompt's bytes follow from.

    Attributes:
        images: Its images, in order; none in a prompt of text alone.
        text: Text tokens before the first image, between each two, and behind the last: one entry more than images.
        lengths: What else sizes grow with, beside the tokens: the family says
            (:meth:`memprof.families.Family.lengths`); for most the number of tiles. Programs are polynomials in these.
        batch: Prompts of these sizes that run side by side; all other numbers are of one of them.
    """

    images: tuple[Image, ...]
    text: tuple[int, ...]
    lengths: tuple[int, ...]
    batch: int = 1

    def __post_init__(self) -> None:
        if len(self.text) != len(self.images) + 1:
            raise ValueError(f"a prompt of {len(self.images)} images has {len(self.images) + 1} texts, not {self.text}")

    @property
    def tiles(self) -> int:
        """Views of all images."""
        return sum(image.tiles for image in self.images)

    @cached_property
    def visual_tokens(self) -> int:
        """Visual tokens of all images."""
        return sum(image.tokens for image in self.images)

    @property
    def text_tokens(self) -> int:
        """All prompt tokens that are not visual."""
        return sum(self.text) + sum(image.marks for image in self.images)

    @property
    def length(self) -> int:
        """All prompt tokens."""
        return self.visual_tokens + self.text_tokens

    def like(self) -> Shape:
        """The shape that stands for all whose bytes are the same."""
        return replace(self, images=tuple(image.like() for image in self.images))

    def longer(self, tokens: int) -> Shape:
        """With so many more text tokens at its end (fewer, where negative)."""
        return replace(self, text=(*self.text[:-1], self.text[-1] + tokens))


@dataclass(frozen=True)
class Input:
    """Something that ``generate()`` is given beside ids and mask.

    Attributes:
        shape: Of the tensor, for one prompt; prompts side by side are one behind the other along its first dimension.
        dtype: Name of its dtype; ``model``: that of the weights.
        values: Its numbers, or None where only its size is known. Small tables that decide shapes are always known.
    """

    shape: tuple[int, ...]
    dtype: str = "model"
    values: npt.NDArray[Any] | None = None

    @classmethod
    def of(cls, values: npt.NDArray[Any], dtype: str = "model") -> Input:
        """An input of known numbers."""
        return cls(values.shape, dtype, values)


@dataclass(frozen=True)
class Places:
    """Where the visual tokens of a prompt are.

    Attributes:
        length: Prompt tokens, visual and text.
        index: Their places in the prompt, ``(n,)`` int64, rising.
        positions: Their centres on their image, ``(n, 2)`` float32, in units of the image's edges; None where nobody
            said how an image's tiles lie.
        images: Number of the image each belongs to, ``(n,)`` int64.
        by_view: Whether they are the vision tower's patches, view by view and row by row, pooled or not; else nothing
            that the tower knows of a patch is known of a token.
    """

    length: int
    index: npt.NDArray[np.int64]
    positions: npt.NDArray[np.float32] | None
    images: npt.NDArray[np.int64]
    by_view: bool = True

    def unplaced(self) -> Places:
        """The same where nobody said how tiles lie."""
        return replace(self, positions=None)


@dataclass(frozen=True)
class Prompt:
    """One prompt on the host.

    Attributes:
        shape: Its sizes: all that is known of a prompt nobody has written.
        ids: Its tokens, or None.
        inputs: What ``generate()`` is given beside them, by name; empty while ``ids`` are None.
        places: Where its visual tokens are, or None while ``ids`` are.
    """

    shape: Shape
    ids: list[int] | None = None
    inputs: Mapping[str, Input] = field(default_factory=dict)
    places: Places | None = None
