"""Pictures of two inked strings in clutter, and questions about them: all that the proving model can read.

A picture follows from its seed alone and is drawn from a bitmap font, so it is the same on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL.Image import Image

#: Edge of a picture in pixels.
SIZE = 80
#: Inks a string may be written in, as RGB.
INKS = {
    "red": (205, 30, 35), "green": (20, 135, 45), "blue": (30, 65, 205),
    "purple": (140, 30, 165), "orange": (235, 125, 10), "black": (20, 20, 24),
}  # fmt: skip
#: The classic 5x7 font: five columns a character, lowest bit on top.
_FONT = {
    "E": "7f49494941", "F": "7f09090901", "H": "7f0808087f", "J": "2040413f01", "K": "7f08142241",
    "L": "7f40404040", "M": "7f020c027f", "N": "7f0408107f", "P": "7f09090906", "R": "7f09192946",
    "T": "01017f0101", "U": "3f4040403f", "V": "1f2040201f", "X": "6314081463", "Y": "0708700807",
    "Z": "6151494543", "2": "4261514946", "3": "2141454b31", "4": "1814127f10", "7": "0171090503",
}  # fmt: skip
#: Characters a string may have.
CHARACTERS = "".join(_FONT)
#: Shortest and longest string.
LENGTHS = (4, 6)
#: Pictures with seeds from here on were never trained on.
HELD_OUT = 1 << 40


@dataclass(frozen=True)
class Line:
    """One string of a picture.

    Attributes:
        ink: Name of its ink.
        text: Its characters.
        boxes: Left, top, right, bottom of each character, ``(len(text), 4)`` in pixels.
    """

    ink: str
    text: str
    boxes: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Scene:
    """A drawn picture: ``pixels`` is ``(SIZE, SIZE, 3)`` uint8; two lines, no ink twice."""

    pixels: npt.NDArray[np.uint8]
    lines: tuple[Line, Line]

    def image(self) -> Image:
        """The picture for Pillow."""
        from PIL import Image

        return Image.fromarray(self.pixels)


@dataclass(frozen=True)
class Question:
    """A question about a scene: its text, the one right answer, and which line it is about."""

    text: str
    answer: str
    line: int


@dataclass(frozen=True)
class OwnQuestion:
    """One question of the model's own, on a picture it was never trained on. It is what a ``tasks.Picture`` is, too.

    Attributes:
        number: Which one.
        last: Whether the last character is asked for, or the whole string.
    """

    number: int
    last: bool

    @property
    def id(self) -> str:
        """A name for the sample."""
        return f"drawn-{self.number:04d}"

    def question(self) -> Question:
        """What is asked, and the answer."""
        scene, line = draw_scene(HELD_OUT + self.number), self.number % 2
        return last_question(scene, line) if self.last else read_question(scene, line)

    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return SIZE, SIZE

    def image(self) -> Image:
        """The picture, drawn anew at every call."""
        return draw_scene(HELD_OUT + self.number).image()


def draw_scene(seed: int) -> Scene:
    """The picture of ``seed``."""
    rng = np.random.default_rng(seed)
    canvas = np.empty((SIZE, SIZE, 3), dtype=np.float32)
    canvas[:] = rng.uniform(225, 255, 3)
    inks = [str(ink) for ink in rng.permutation(list(INKS))]
    _clutter(canvas, inks[2:], rng)
    heights = rng.integers(10, 15, 2)
    room = SIZE - int(heights.sum()) - 6
    above, between = np.sort(rng.integers(0, room + 1, 2))
    tops = (2 + int(above), 4 + int(between) + int(heights[0]))
    lines = [
        _write(canvas, ink, top, int(height), rng) for ink, top, height in zip(inks[:2], tops, heights, strict=True)
    ]
    canvas += 6 * rng.standard_normal(canvas.shape, dtype=np.float32)
    return Scene(canvas.clip(0, 255).astype(np.uint8), (lines[0], lines[1]))


def read_question(scene: Scene, line: int) -> Question:
    """What does the string in this ink say?"""
    return Question(f"read {scene.lines[line].ink}", scene.lines[line].text, line)


def last_question(scene: Scene, line: int) -> Question:
    """What is the last character of the string in this ink, the others being given? One token answers."""
    text = scene.lines[line].text
    return Question(" ".join(("read", scene.lines[line].ink, *text[:-1])), text[-1], line)


def _write(canvas: npt.NDArray[np.float32], ink: str, top: int, height: int, rng: np.random.Generator) -> Line:
    """One string at a random place of the row that begins at ``top``."""
    count = int(rng.integers(LENGTHS[0], LENGTHS[1] + 1))
    text = "".join(str(c) for c in rng.choice(list(CHARACTERS), count))
    pitch = int(rng.integers(10, 13))
    width = min(pitch - 2, 9)
    left = int(rng.integers(2, SIZE - 2 - count * pitch + 1))
    colour = np.array(INKS[ink], dtype=np.float32) + rng.uniform(-12, 12, 3).astype(np.float32)
    boxes = []
    for i, character in enumerate(text):
        box = (left + i * pitch, top, left + i * pitch + width, top + height)
        alpha = _glyph(character, width, height)[..., None]
        cell = canvas[box[1] : box[3], box[0] : box[2]]
        cell += alpha * (colour - cell)
        boxes.append(box)
    return Line(ink, text, np.array(boxes, dtype=np.int64))


@cache
def _glyph(character: str, width: int, height: int) -> npt.NDArray[np.float32]:
    """Coverage of a character, ``(height, width)`` in [0, 1], by bilinear sampling of its bitmap."""
    columns = bytes.fromhex(_FONT[character])
    bitmap = np.array([[column >> row & 1 for column in columns] for row in range(7)], dtype=np.float32)
    down, across = _sampling(height, 7), _sampling(width, 5)
    soft = down @ bitmap @ across.T
    return (np.float32(1.6) * soft - np.float32(0.3)).clip(0, 1)


def _sampling(pixels: int, cells: int) -> npt.NDArray[np.float32]:
    """Weights ``(pixels, cells)`` of linear interpolation between cell centres."""
    at = (np.arange(pixels, dtype=np.float32) + 0.5) * cells / pixels - 0.5
    return (1 - np.abs(at.clip(0, cells - 1)[:, None] - np.arange(cells, dtype=np.float32))).clip(0)


def _clutter(canvas: npt.NDArray[np.float32], inks: list[str], rng: np.random.Generator) -> None:
    """Pale patches, grey strokes, and specks in inks that no string has."""
    line = np.arange(SIZE, dtype=np.float32)
    for _ in range(int(rng.integers(3, 7))):
        left, top = rng.integers(-10, SIZE - 5, 2)
        right, bottom = left + rng.integers(8, 40), top + rng.integers(8, 40)
        canvas[max(0, top) : bottom, max(0, left) : right] = rng.uniform(190, 255, 3)
    for _ in range(int(rng.integers(4, 9))):
        x0, y0 = rng.uniform(0, SIZE, 2)
        angle, length, width = rng.uniform(0, np.pi), rng.uniform(6, 30), rng.uniform(0.5, 1.1)
        x, y = line - np.float32(x0), (line - np.float32(y0))[:, None]
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        canvas[(np.abs(y * cos - x * sin) < width) & (np.abs(x * cos + y * sin) < length / 2)] = rng.uniform(100, 200)
    for _ in range(int(rng.integers(6, 14))):
        left, top = rng.integers(0, SIZE - 3, 2)
        size = rng.integers(1, 4, 2)
        colour = INKS[inks[int(rng.integers(len(inks)))]]
        canvas[top : top + size[1], left : left + size[0]] = colour
