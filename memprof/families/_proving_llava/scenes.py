"""Pictures of solid things on a textured ground, and questions that count or compare them.

A picture follows from its seed alone. Like photographs, and unlike drawn strings, it has noise at all scales, light,
shadows, and things of several visual tokens, each of which says nearly what its neighbours say.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL.Image import Image

Floats = npt.NDArray[np.float32]

#: Edge of a picture in pixels.
SIZE = 64
#: Colours of things, as RGB in plain light.
COLOURS = {
    "red": (205, 45, 40), "green": (45, 155, 55), "blue": (45, 80, 210), "yellow": (230, 200, 40),
    "purple": (150, 55, 175),
}  # fmt: skip
#: Kinds of things.
KINDS = ("balls", "boxes", "cones", "rings")
#: Fewest and most things in a picture.
THINGS = (1, 5)
#: Smallest and largest half width of a thing in pixels.
RADII = (5.5, 9.5)
#: What a question that counts is answered by, by number.
NUMBERS = tuple(str(n) for n in range(THINGS[1] + 1))
#: What a question that compares is answered by where there are as many of both.
SAME = "same"
#: Pictures with seeds from here on were never trained on.
HELD_OUT = 1 << 40


@dataclass(frozen=True)
class Thing:
    """One thing of a picture.

    Attributes:
        kind, colour: Names of them.
        at: Its centre, x and y in pixels.
        alpha: How much of each pixel it covers, ``(SIZE, SIZE)`` in [0, 1].
    """

    kind: str
    colour: str
    at: tuple[float, float]
    alpha: Floats

    def has(self, word: str) -> bool:
        """Whether it is of this kind or colour."""
        return word in (self.kind, self.colour)


@dataclass(frozen=True)
class Scene:
    """A drawn picture: ``pixels`` is ``(SIZE, SIZE, 3)`` uint8; no thing hides another."""

    pixels: npt.NDArray[np.uint8]
    things: tuple[Thing, ...]

    def image(self) -> Image:
        """The picture for Pillow."""
        from PIL import Image

        return Image.fromarray(self.pixels)

    def count(self, word: str) -> int:
        """How many things are of this kind or colour."""
        return sum(thing.has(word) for thing in self.things)


@dataclass(frozen=True)
class Question:
    """A question about a scene: its text, the one right answer, and the words for what it asks after."""

    text: str
    answer: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class OwnQuestion:
    """One question of the model's own, on a picture it was never trained on. It is what a ``tasks.Picture`` is, too.

    Attributes:
        number: Which one.
        compares: Whether two colours or kinds are compared, or one counted.
    """

    number: int
    compares: bool

    @property
    def id(self) -> str:
        """A name for the sample."""
        return f"scene-{self.number:04d}"

    def question(self) -> Question:
        """What is asked, and the answer."""
        seed = HELD_OUT + self.number
        ask = compare_question if self.compares else count_question
        return ask(draw_scene(seed), np.random.default_rng([seed, 1]))

    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return SIZE, SIZE

    def image(self) -> Image:
        """The picture, drawn anew at every call."""
        return draw_scene(HELD_OUT + self.number).image()


def count_question(scene: Scene, rng: np.random.Generator) -> Question:
    """How many are of one colour or kind? Each number that is true of some word is as likely as the others."""
    words = (*COLOURS, *KINDS)
    by_count: dict[int, list[str]] = {}
    for word in words:
        by_count.setdefault(scene.count(word), []).append(word)
    count = int(rng.choice(sorted(by_count)))
    word = str(rng.choice(by_count[count]))
    return Question(f"how many {word}", NUMBERS[count], (word,))


def compare_question(scene: Scene, rng: np.random.Generator) -> Question:
    """Of which of two colours, or kinds, are there more? Of neither, half the times that this can be asked."""
    words = list(COLOURS) if rng.integers(2) else list(KINDS)
    pairs = [(a, b) for a in words for b in words if a != b and scene.count(a) + scene.count(b)]
    by_sign: dict[int, list[tuple[str, str]]] = {}
    for a, b in pairs:
        by_sign.setdefault(int(np.sign(scene.count(a) - scene.count(b))), []).append((a, b))
    unequal = [sign for sign in sorted(by_sign) if sign]
    sign = 0 if 0 in by_sign and (not unequal or rng.integers(2)) else int(rng.choice(unequal))
    a, b = by_sign[sign][int(rng.integers(len(by_sign[sign])))]
    return Question(f"more {a} or {b}", (SAME, a, b)[sign], (a, b))


# -- drawing -----------------------------------------------------------------------------------------------------------


def draw_scene(seed: int) -> Scene:
    """The picture of ``seed``."""
    rng = np.random.default_rng(seed)
    canvas = _ground(rng)
    light = rng.uniform(-1, 1), -rng.uniform(0.2, 1)
    things, grain = [], 1 + 0.1 * _noise(rng)
    for kind, colour, x, y, radius in _places(rng):
        thing, shade = _solid(kind, colour, x, y, radius, light, rng)
        _shadow(canvas, x - 0.4 * light[0] * radius, y - 0.5 * light[1] * radius, radius)
        paint = np.array(COLOURS[colour], dtype=np.float32) + rng.uniform(-18, 18, 3).astype(np.float32)
        paint = paint * np.float32(rng.uniform(0.85, 1.1)) * (shade * grain)[..., None]
        canvas += thing.alpha[..., None] * (paint - canvas)
        things.append(thing)
    canvas += 4 * rng.standard_normal(canvas.shape, dtype=np.float32)
    return Scene(canvas.clip(0, 255).astype(np.uint8), tuple(things))


def _places(rng: np.random.Generator) -> list[tuple[str, str, float, float, float]]:
    """Kind, colour, centre and half width of each thing; few colours and kinds, so that some come often."""
    colours = rng.permutation(list(COLOURS))[: int(rng.integers(1, 4))]
    kinds = rng.permutation(list(KINDS))[: int(rng.integers(1, 4))]
    found: list[tuple[str, str, float, float, float]] = []
    wanted = int(rng.integers(THINGS[0], THINGS[1] + 1))
    for _ in range(200):
        if len(found) == wanted:
            break
        radius = float(rng.uniform(*RADII))
        x, y = rng.uniform(radius + 1, SIZE - radius - 1, 2)
        if all(np.hypot(x - u, y - v) > 1.25 * (radius + r) for _, _, u, v, r in found):
            found.append((str(rng.choice(kinds)), str(rng.choice(colours)), float(x), float(y), radius))
    return found


def _ground(rng: np.random.Generator) -> Floats:
    """A ground of muted colours, often two that meet at a horizon, with noise at all scales and a slope of light."""
    rows, columns = np.mgrid[:SIZE, :SIZE].astype(np.float32) / SIZE
    canvas = np.empty((SIZE, SIZE, 3), dtype=np.float32)
    canvas[:] = rng.uniform(70, 190) + rng.uniform(-22, 22, 3)
    if rng.integers(2):
        below = rows > rng.uniform(0.15, 0.7) + rng.uniform(-0.2, 0.2) * (columns - 0.5)
        canvas[below] = rng.uniform(70, 190) + rng.uniform(-22, 22, 3)
    slope = rng.uniform(-30, 30, 2).astype(np.float32)
    canvas += (slope[0] * (rows - 0.5) + slope[1] * (columns - 0.5) + rng.uniform(10, 35) * _noise(rng))[..., None]
    for channel in range(3):
        canvas[..., channel] += 4 * _noise(rng)
    return canvas


def _noise(rng: np.random.Generator) -> Floats:
    """Noise whose amplitude falls as frequency rises, as in photographs: ``(SIZE, SIZE)``, deviation about 1."""
    total = np.zeros((SIZE, SIZE), dtype=np.float32)
    for octave, cells in enumerate((2, 4, 8, 16, 32)):
        up = _sampling(cells)
        total += 0.62 ** octave * (up @ rng.standard_normal((cells, cells), dtype=np.float32) @ up.T)
    return total * np.float32(1.2)


@cache
def _sampling(cells: int) -> Floats:
    """Weights ``(SIZE, cells)`` of linear interpolation between cell centres."""
    at = ((np.arange(SIZE, dtype=np.float32) + 0.5) * cells / SIZE - 0.5).clip(0, cells - 1)
    return (1 - np.abs(at[:, None] - np.arange(cells, dtype=np.float32))).clip(0)


def _solid(
    kind: str, colour: str, x: float, y: float, radius: float, light: tuple[float, float], rng: np.random.Generator
) -> tuple[Thing, Floats]:
    """One thing and how bright it is at each pixel, ``(SIZE, SIZE)``; where it is not, that says nothing."""
    line = np.arange(SIZE, dtype=np.float32) + np.float32(0.5)
    across, down = (line - np.float32(x)) / np.float32(radius), ((line - np.float32(y)) / np.float32(radius))[:, None]
    angle = rng.uniform(-0.35, 0.35)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u, v = across * cos + down * sin, down * cos - across * sin
    far = np.sqrt(u * u + v * v)
    lit = np.float32(light[0]) * u + np.float32(light[1]) * v
    if kind == "balls":
        inside = 1 - far
        shade = 0.62 + 0.3 * np.sqrt((1 - far * far).clip(0)) + 0.28 * lit
        shade += 0.6 * ((lit - 0.55).clip(0)) ** 2
    elif kind == "boxes":
        inside = 0.82 - np.maximum(np.abs(u), np.abs(v))
        shade = np.where(v < -0.3, 1.15, 0.8) + 0.1 * lit
    elif kind == "cones":
        half = 0.48 * (v + 0.95)
        inside = np.minimum(0.9 * (half - np.abs(u)), np.minimum(0.85 - v, v + 0.95))
        shade = 0.85 + 0.35 * np.float32(np.sign(light[0])) * (u / half.clip(1e-3)).clip(-1, 1)
    else:
        inside = 0.3 - np.abs(far - 0.7)
        shade = 0.75 + 1.2 * inside + 0.15 * lit
    alpha = (inside * np.float32(radius) + 0.5).clip(0, 1).astype(np.float32)
    return Thing(kind, colour, (x, y), alpha), shade.astype(np.float32)


def _shadow(canvas: Floats, x: float, y: float, radius: float) -> None:
    """Darken the ground about a place, softly."""
    line = np.arange(SIZE, dtype=np.float32) + np.float32(0.5)
    far = np.square((line - np.float32(x)) / radius) + np.square((line - np.float32(y)) / radius)[:, None]
    canvas *= (1 - 0.4 * np.exp(-far * far))[..., None].astype(np.float32)
