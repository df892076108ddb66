"""What one question about one picture left behind under several methods. Plain data, readable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from memprof.records import Run, SampleRecord

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL.Image import Image


@dataclass(frozen=True)
class Grid:
    """How a picture lies in tiles, and its tiles in visual tokens.

    Tokens are numbered tile by tile, row by row, the thumbnail last; and row by row within a tile.

    Attributes:
        columns, rows: Tiles the picture was cut into, thumbnail excluded.
        thumbnail: Whether the whole picture follows once more, as a tile of its own.
        across, down: Visual tokens along a tile's upper and left edge.
    """

    columns: int
    rows: int
    thumbnail: bool
    across: int
    down: int

    @property
    def tiles(self) -> int:
        """All tiles, thumbnail included."""
        return self.columns * self.rows + self.thumbnail

    @property
    def tokens(self) -> int:
        """All visual tokens."""
        return self.tiles * self.across * self.down


@dataclass(frozen=True)
class Cut:
    """One cut of a method.

    Attributes:
        layer: Decoder layers that ran before it; 0 where it came before the language model.
        kept: Visual tokens that it left, merged ones included.
        tokens: Which of the prompt's own, by number, rising; None where nothing was chosen because nothing ran.
    """

    layer: int
    kept: int
    tokens: list[int] | None


@dataclass(frozen=True)
class Answer:
    """One method's answer.

    Attributes:
        run: Where it ran and what it took: a record with one sample.
        cuts: What it pruned, cut by cut; empty for a method that prunes nothing.
        masked: Whether what it pruned was hidden by a mask and kept its memory.
    """

    run: Run
    cuts: list[Cut] = field(default_factory=list)
    masked: bool = False

    @property
    def sample(self) -> SampleRecord:
        """The one sample."""
        return self.run.samples[0]

    @property
    def text(self) -> str | None:
        """What the model said; None where it did not run or its weights are random."""
        return self.sample.answer

    @property
    def kept(self) -> int:
        """Visual tokens that the last cut left."""
        return self.cuts[-1].kept if self.cuts else self.sample.visual_tokens

    @property
    def tokens(self) -> list[int] | None:
        """Which visual tokens the last cut left; None where nothing ran."""
        if not self.sample.ok or self.run.record.status != "measured":
            return None
        return self.cuts[-1].tokens if self.cuts else [*range(self.sample.visual_tokens)]


@dataclass(frozen=True)
class Asked:
    """A question, and every method's answer.

    Attributes:
        question: As it was asked, without a chat template.
        image: Name of the picture's file.
        picture: The picture in RGB, upright.
        model, weights: What answered: the model's title, and whose weights ran.
        grid: How the picture lies in visual tokens; None where they are no grid: tiles are joined, padding is cut away.
        tiles: The picture as the model was given it, ``(tiles, height, width, 3)`` uint8; None where nothing ran or
            there is no grid.
        answers: A method each, in the order asked for, but Baseline first.
        notes: What a reader must know.
    """

    question: str
    image: str
    picture: Image
    model: str
    weights: str
    grid: Grid | None
    tiles: npt.NDArray[np.uint8] | None
    answers: list[Answer]
    notes: list[str]

    @property
    def reference(self) -> Answer | None:
        """The first answer there is: what the others are held against."""
        return next((one for one in self.answers if one.text is not None), None)
