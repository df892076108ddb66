"""Model families: one file each. A family knows its models, their prompts, and where each visual token lies.

Nothing here imports torch at module level: ``memprof list`` reads families without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from memprof.errors import UnknownName
from memprof.families._tiling import IMAGENET_MEAN, IMAGENET_STD, denormalise
from memprof.plugins import Registry

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Card:
    """One model: what its bytes follow from.

    Attributes:
        name: memprof's name for it, e.g. ``internvl2-2b``.
        title: Its name in figures, e.g. ``InternVL2-2B``.
        hub: Hub repository whose weights ``--weights hub`` loads.
        dtype: The dtype it was published in.
        source: Where the numbers of its configuration come from.
        text, vision, extra: Arguments of the text, vision and top-level configuration.
        template: Tokens the chat template puts before the first and after the last visual token, question excluded.
        max_tiles: Largest number of tiles without thumbnail, or 1 where the family does not tile.
    """

    name: str
    title: str
    hub: str
    dtype: str
    source: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    extra: Mapping[str, Any] = field(default_factory=dict)
    template: tuple[int, int] = (0, 0)
    max_tiles: int = 1


@dataclass(frozen=True)
class PromptShape:
    """The sizes a prompt's bytes follow from.

    Attributes:
        tiles: Images fed to the vision tower, thumbnail included; 0 for a prompt without an image.
        columns, rows: The grid of tiles the image was cut into, thumbnail excluded.
        visual_tokens: Visual tokens in the prompt.
        before: Text tokens before the first visual token.
        after: Text tokens after the last one.
        batch: Prompts of these sizes that run side by side; the numbers above are of one of them.
    """

    tiles: int
    columns: int
    rows: int
    visual_tokens: int
    before: int
    after: int
    batch: int = 1

    @property
    def text_tokens(self) -> int:
        """All prompt tokens that are not visual."""
        return self.before + self.after

    @property
    def length(self) -> int:
        """All prompt tokens."""
        return self.before + self.visual_tokens + self.after


class Family:
    """Base of the families. Subclasses fill :attr:`cards` and the methods below."""

    title: ClassVar[str]
    cards: ClassVar[Mapping[str, Card]]
    #: Patch grid side of one tile after the projector: a tile gives ``side * side`` visual tokens.
    thumbnails: ClassVar[bool] = False
    #: Mean and deviation, in RGB from 0 to 1, that :meth:`pixels` normalises by.
    normalised_by: ClassVar[tuple[tuple[float, ...], tuple[float, ...]]] = (IMAGENET_MEAN, IMAGENET_STD)

    def config(self, card: Card) -> PreTrainedConfig:
        """The transformers configuration of ``card``."""
        raise NotImplementedError

    def shape(self, card: Card, width: int, height: int, question_tokens: int, max_tiles: int | None) -> PromptShape:
        """Sizes of the prompt that asks ``question_tokens`` about one image of ``width`` x ``height`` pixels."""
        raise NotImplementedError

    def side(self, card: Card) -> int:
        """Visual tokens along one edge of a tile."""
        raise NotImplementedError

    def pixels(
        self, card: Card, shape: PromptShape, image: Image.Image | None
    ) -> npt.NDArray[np.float32] | tuple[int, ...]:
        """Pixel values ``(tiles, 3, size, size)``, normalised; only that shape where ``image`` is None."""
        raise NotImplementedError

    def seen(self, pixels: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        """The image as the model is given it, from :meth:`pixels`: RGB tiles, ``(tiles, size, size, 3)``."""
        return denormalise(pixels, *self.normalised_by)

    def prompt(self, card: Card, question: str, shape: PromptShape, tokenizer: Any) -> list[int]:
        """Token ids of the whole prompt, by the checkpoint's own tokenizer (see :mod:`memprof.families._text`)."""
        raise NotImplementedError

    def image_token(self, card: Card) -> int:
        """Id of the placeholder of a visual token."""
        raise NotImplementedError

    def visual_positions(self, card: Card, shape: PromptShape) -> npt.NDArray[np.float32]:
        """Centre of each visual token on the whole image, ``(visual_tokens, 2)`` as x, y in units of the image's edges.

        Tokens of a tile run row by row. The thumbnail's tokens lie over the same image at a coarser pitch. The TopV
        paper leaves images of several tiles open: memprof chose one coordinate system for all of them, so that
        neighbours across a tile's edge are neighbours.
        """
        side = self.side(card)
        within = (np.arange(side, dtype=np.float32) + 0.5) / side
        y, x = np.meshgrid(within, within, indexing="ij")
        tile = np.stack([x.ravel(), y.ravel()], axis=1)
        grid = np.array([shape.columns, shape.rows], dtype=np.float32)
        tiles = [
            (tile + np.array([column, row], dtype=np.float32)) / grid
            for row in range(shape.rows)
            for column in range(shape.columns)
        ]
        if shape.tiles > shape.columns * shape.rows:
            tiles.append(tile)
        return np.concatenate(tiles) if shape.tiles else np.zeros((0, 2), dtype=np.float32)


FAMILIES: Registry[Family] = Registry("memprof.families", Family, "family")


def all_cards() -> dict[str, tuple[Family, Card]]:
    """Every model memprof knows by name, with its family."""
    return {card.name: (family, card) for _, cls in FAMILIES for family in (cls(),) for card in cls.cards.values()}


def find_model(name: str) -> tuple[Family, Card]:
    """The family and card of the model called ``name``; raises :class:`UnknownName` with the valid names."""
    cards = all_cards()
    if name.lower() not in cards:
        raise UnknownName("model", name, cards)
    return cards[name.lower()]
