"""Bytes to text and back. Data are always bytes; only the screen has units."""

from __future__ import annotations

import re

from memprof.errors import BadValue

KIB, MIB, GIB = 2**10, 2**20, 2**30

#: Units a user may ask for on screen, in bytes. ``GiB`` is binary, ``GB`` decimal; they are never mixed in one table.
DISPLAY_UNITS: dict[str, int] = {"GiB": GIB, "GB": 10**9, "MiB": MIB, "MB": 10**6, "KiB": KIB}

#: A number without a unit that has more digits is one of bytes.
MOST_DIGITS = 5

_PARSE = {
    "": 1, "b": 1,
    "kib": KIB, "mib": MIB, "gib": GIB, "tib": 2**40,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip


def check_unit(unit: str) -> str:
    """Return ``unit`` if it is a display unit, else raise :class:`BadValue`."""
    if unit not in DISPLAY_UNITS:
        raise BadValue(f"unknown unit {unit!r}; valid: {', '.join(DISPLAY_UNITS)}")
    return unit


def unit_for(n_bytes: float, asked: str | None = None, least: float | None = None) -> str:
    """The unit ``asked`` for, or the one that shows ``n_bytes`` well: GiB, but MiB below a tenth of one.

    Where ``n_bytes`` is so small, and what is to be read beside it, ``least``, below a tenth of a MiB, it is KiB.

    Raises:
        BadValue: ``asked`` is no display unit.
    """
    if asked is not None:
        return check_unit(asked)
    if n_bytes > GIB / 10:
        return "GiB"
    return "KiB" if 0 < (n_bytes if least is None else least) < MIB / 10 else "MiB"


def in_unit(n_bytes: float, unit: str = "GiB") -> float:
    """``n_bytes`` as a number of ``unit``."""
    return n_bytes / DISPLAY_UNITS[unit]


def format_bytes(n_bytes: float, unit: str = "GiB", digits: int = 3) -> str:
    """``4411521024`` -> ``'4.109 GiB'``. The unit always stands beside the number."""
    return f"{in_unit(n_bytes, unit):.{digits}f} {unit}"


def say_bytes(n_bytes: float) -> str:
    """The same in words of a sentence, in the unit that shows the number well: ``'2.0 MiB'``, ``'0.527 GiB'``."""
    if n_bytes < MIB:
        return f"{n_bytes / KIB:,.1f} KiB" if n_bytes >= KIB else f"{n_bytes:.0f} B"
    return format_bytes(n_bytes) if unit_for(n_bytes) == "GiB" else format_bytes(n_bytes, "MiB", 1)


def parse_size(text: str) -> int:
    """A size with its unit, in bytes; a bare number, which nobody means as bytes, is refused."""
    if re.fullmatch(r"\s*[0-9.]+\s*", text):
        number = text.strip()
        bytes_meant = len(number.partition(".")[0]) > MOST_DIGITS
        hint = f"{number}B, or 5GiB or 512MiB" if bytes_meant else f"{number}GiB or {number}MiB"
        raise BadValue(f"{text!r} has no unit; write for example {hint}")
    return parse_bytes(text)


def parse_bytes(text: str) -> int:
    """``'5.2GiB'``, ``'8 GB'``, ``'4096'`` -> bytes (int).

    A bare number is bytes. ``G`` alone is refused, because it would be read both ways.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    scale = _PARSE.get(match.group(2).lower()) if match else None
    if match is None or scale is None:
        raise BadValue(f"cannot read {text!r} as a size; write for example 5GiB, 8GB or 512MiB")
    return int(float(match.group(1)) * scale)
