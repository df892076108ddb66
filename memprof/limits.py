"""What a prompt may be at most, whoever asks: a row of data, an option, Python. Beyond it lies a slip of the pen."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from typing import Any

from memprof.errors import BadValue

#: The least and the most of each number that can be asked for. What is recorded of a token stays in memory until its
#: sample is done, so a prompt's new tokens have a limit; tiles have one as all ways to lay so many are looked at.
LIMITS: dict[str, tuple[int, int]] = {
    "width": (1, 1_000_000), "height": (1, 1_000_000), "text_tokens": (0, 1_000_000), "images": (1, 1_000),
    "batch": (1, 10_000), "tiles": (1, 256), "max_tiles": (1, 256), "new_tokens": (1, 32_768),
    "max_new_tokens": (1, 32_768), "limit": (1, 2**31),
}  # fmt: skip
#: Tokens of all prompts that run side by side: what each number allows, all of them together would not end.
MOST_IN_ALL = 2**22
#: What to write for images in Python.
_SIZES = "write width and height of each in pixels, as images=[(1600, 1200)]"


def check(name: str, value: Any) -> None:
    """Raise BadValue where no ``name`` can be ``value``; None is what the model or the data say."""
    if value is None:
        return
    least, most = LIMITS[name]
    if not _whole(value):
        raise BadValue(f"{name}={value!r:.60} is not a whole number")
    if value < least:
        raise BadValue(f"{name}={value} is below {least}")
    if value > most:
        raise BadValue(f"{name}={value} is above the limit of {most}")


def check_sizes(images: Any) -> None:
    """Raise BadValue where ``images`` are not pairs of width and height that a picture can have."""
    if isinstance(images, str | bytes) or not isinstance(images, Iterable):
        raise BadValue(f"images={images!r:.60} are no sizes; {_SIZES}")
    given = list(images)
    if len(given) > LIMITS["images"][1]:
        raise BadValue(f"{len(given)} images are above the limit of {LIMITS['images'][1]}")
    for size in given:
        pair = tuple(size) if isinstance(size, Iterable) else ()
        if len(pair) != 2 or not all(map(_whole, pair)):
            raise BadValue(f"{size!r:.60} is no size of an image; {_SIZES}")
        for name, edge in zip(("width", "height"), pair, strict=True):
            check(name, edge)


def check_whole(tokens: int, batch: int) -> None:
    """Raise BadValue where ``batch`` prompts of so many ``tokens`` side by side are too many in all."""
    if tokens * batch > MOST_IN_ALL:
        raise BadValue(
            f"{batch} prompt{'s' * (batch > 1)} of {tokens} tokens are {tokens * batch} in all, above the limit of "
            f"{MOST_IN_ALL}"
        )


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
