"""How figures look: sizes, fonts, the frame every figure shares, and saving without a trace of when.

A figure is set like a column of type. From the top: a title, a key, the drawing, and a caption line that says where the
numbers come from. All lengths are points (1/72 in) on the printed page, scaled as one for slides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.textpath import text_to_path

from memprof.errors import BadValue
from memprof.telling.facts import provenance_lines
from memprof.telling.palette import INK, MUTED, RULE
from memprof.units import in_unit

HATCH = "////////"


@dataclass(frozen=True)
class Style:
    """Widths in inches, what a point of the print style measures in this one, and whether it is as wide as a slide."""

    single: float
    double: float
    scale: float
    dpi: int
    wide: bool = False


STYLES: dict[str, Style] = {
    "print": Style(single=3.35, double=6.9, scale=1.0, dpi=300),
    "slides": Style(single=6.4, double=13.333, scale=1.85, dpi=160, wide=True),
}
#: Names that styles had before; a stack is called paper as well.
ALIASES = {"paper": "print"}
WIDTHS: tuple[str, ...] = ("single", "double")


@dataclass(frozen=True)
class Look:
    """One style at one width, with the unit of what it shows.

    Attributes:
        style: The style's name.
        width: Width of the figure in points.
        scale: Points of this style for one of the paper's.
        dpi: Dots an inch in PNG.
        unit: The display unit.
        titled: Whether the figure carries its title.
        caption: Whether it carries where its numbers come from.
        least: The least height in points: a slide's, of a figure as wide as one.
    """

    style: str
    width: float
    scale: float
    dpi: int
    unit: str
    titled: bool = True
    caption: bool = True
    least: float = 0.0

    @classmethod
    def of(cls, style: str = "print", width: str = "single", unit: str = "GiB", *, caption: bool = True) -> Look:
        """The look called ``style`` at ``width``; raises :class:`BadValue` for unknown names.

        Without a ``caption`` a figure for print has no title either: both stand in the paper's own caption.
        """
        style = ALIASES.get(style, style)
        if style not in STYLES:
            raise BadValue(f"unknown style {style!r}; valid: {', '.join(STYLES)}")
        if width not in WIDTHS:
            raise BadValue(f"unknown width {width!r}; valid: {', '.join(WIDTHS)}")
        it = STYLES[style]
        wide = 72 * (it.single if width == "single" else it.double)
        return cls(
            style, wide, it.scale * (0.7 if it.wide and width == "single" else 1.0), it.dpi, unit,
            titled=caption or it.wide, caption=caption,
            least=wide * 9 / 16 if it.wide else 0.0,
        )  # fmt: skip

    @property
    def small(self) -> float:
        """Size of the smallest type: caption, keys, values."""
        return 6.5 * self.scale

    @property
    def base(self) -> float:
        """Size of axis labels and ticks."""
        return 7.0 * self.scale

    @property
    def title(self) -> float:
        """Size of the title."""
        return 8.5 * self.scale

    def pt(self, points: float) -> float:
        """``points`` of the paper style, in this one."""
        return points * self.scale

    def value(self, n_bytes: float, digits: int = 2) -> str:
        """A number of the display unit, without the unit; small ones with a digit more, nothing is never said."""
        shown = in_unit(n_bytes, self.unit)
        if self.unit in ("MiB", "MB", "KiB"):
            digits = 0 if shown >= 9.95 else 1
        elif 0 < shown < 0.0095:
            digits = max(digits, 3)
        least = 10.0**-digits
        return f"<{least:.{digits}f}" if 0 < shown < least / 2 else f"{shown:.{digits}f}"

    def labelled(self, n_bytes: float, digits: int = 2) -> str:
        """A number with its unit."""
        return f"{self.value(n_bytes, digits)} {self.unit}"

    def left(self, high_bytes: float) -> float:
        """Room to the left of a drawing, in points of the print style: a scale's label, its numbers and its ticks."""
        digits = 2 if (shown := in_unit(high_bytes, self.unit)) < 5 else 0 if shown > 50 else 1
        return text_width(f"{shown:.{digits}f}", self.base) / self.scale + 21

    def scaled(self, values: Sequence[float | None]) -> list[float]:
        """Bytes in the display unit; None becomes a gap."""
        return [float("nan") if v is None else in_unit(v, self.unit) for v in values]

    @contextmanager
    def settings(self) -> Iterator[None]:
        """Matplotlib's settings for this look, from its own defaults (whatever a user's file says), while it draws."""
        with matplotlib.rc_context():
            defaults = matplotlib.rcParamsDefault
            matplotlib.rcParams.update(
                {key: defaults[key] for key in defaults if not key.startswith("backend")}  # asking for one loads pyplot
                | {
                    "font.family": "DejaVu Sans",
                    "font.size": self.base,
                    "text.color": INK,
                    "text.parse_math": False,  # a name with two dollar signs is a name
                    "axes.labelcolor": INK,
                    "axes.edgecolor": INK,
                    "axes.linewidth": self.pt(0.5),
                    "axes.labelsize": self.base,
                    "axes.labelpad": self.pt(3),
                    "axes.spines.top": False,
                    "axes.spines.right": False,
                    "axes.unicode_minus": True,
                    "xtick.labelsize": self.base,
                    "ytick.labelsize": self.base,
                    "xtick.color": INK,
                    "ytick.color": INK,
                    "xtick.major.width": self.pt(0.5),
                    "ytick.major.width": self.pt(0.5),
                    "xtick.major.size": self.pt(2.5),
                    "ytick.major.size": self.pt(2.5),
                    "xtick.major.pad": self.pt(2),
                    "ytick.major.pad": self.pt(2),
                    "hatch.linewidth": self.pt(0.4),
                    "lines.solid_joinstyle": "miter",
                    "pdf.fonttype": 42,
                    "ps.fonttype": 42,
                    "svg.fonttype": "path",
                    "svg.hashsalt": "memprof",
                    "path.simplify": False,
                }
            )
            yield


def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Width of a line of text in points, from the font alone."""
    font = FontProperties(family="DejaVu Sans", size=size, weight=weight)
    width, _, _ = text_to_path.get_text_width_height_descent(text, font, ismath=False)
    return 1.015 * float(width)  # hinting may set a line a little wider than the font says


def fill_lines(phrases: Sequence[str], size: float, width: float, glue: str = " · ") -> list[str]:
    """``phrases`` set in as few lines as fit ``width``, broken between phrases, or between words of a long one."""
    lines: list[str] = []
    for phrase in phrases:
        if lines and text_width(lines[-1] + glue + phrase, size) <= width:
            lines[-1] += glue + phrase
            continue
        words = phrase.split(" ")
        lines.append(words[0])
        for word in words[1:]:
            if text_width(f"{lines[-1]} {word}", size) <= width:
                lines[-1] += f" {word}"
            else:
                lines.append(word)
    return lines


def phrases(data: dict[str, Any]) -> list[str]:
    """Where a figure's numbers come from, and what else is to be said of them."""
    return [*provenance_lines(data["provenance"]), *data.get("said", [])]


def caption(data: dict[str, Any]) -> str:
    """A figure's title and all that belongs under it, as text."""
    return f"{data['title']}. {' · '.join(phrases(data))}." if "provenance" in data else str(data.get("title", ""))


@dataclass(frozen=True)
class KeyItem:
    """An entry of the key: a swatch and its text.

    The swatch is an ``area``, a ``line``, a ``hatch``, a ``hollow`` circle, or a marker such as ``x``.
    """

    text: str
    colour: str
    mark: str = "area"


class Sheet:
    """A figure with its title, key and caption set, and room for the drawing between them.

    Args:
        look: The look to set it in.
        data: The figure's data; its provenance and what is ``said`` of it become the caption.
        title: The line on top.
        body: Height of the drawing, in points of the print style.
        left: Room to the left of the drawing, for ticks and label (None: what numbers need).
        right: Room to the right of the drawing.
        below: Room below the drawing.
        key: Entries of the key, set in a line or more under the title.
    """

    def __init__(
        self,
        look: Look,
        data: dict[str, Any],
        title: str,
        *,
        body: float,
        left: float | None = None,
        right: float = 8,
        below: float = 26,
        key: Sequence[KeyItem] = (),
    ) -> None:
        self.look = look
        pt, self.pad = look.pt, look.pt(4)
        inner = look.width - 2 * self.pad
        caption = fill_lines(phrases(data), look.small, inner) if look.caption else []
        rows = self._rows(key, inner)
        line = pt(8.6)
        top = pt(10) if look.titled else 0.0
        head = self.pad + top + len(rows) * pt(10) + pt(5)
        foot = self.pad + len(caption) * line + (pt(4) if caption else 0.0)
        room = max(pt(body), look.least - head - pt(below) - foot)
        self.height = head + room + pt(below) + foot
        self.figure = Figure(figsize=(look.width / 72, self.height / 72), dpi=look.dpi, facecolor="white")
        FigureCanvasAgg(self.figure)
        if look.titled:
            self._text(self.pad, self.height - self.pad - pt(8), title, look.title, weight="bold")
        for number, row in enumerate(rows):
            self._set_row(row, self.height - self.pad - top - (number + 1) * pt(10) + pt(2.5))
        if caption:
            self.rule(foot - pt(1.5))
        for number, text in enumerate(caption):
            self._text(self.pad, self.pad + (len(caption) - 1 - number) * line + pt(1.5), text, look.small, color=MUTED)
        if left is None:
            left = 38 if look.unit in ("MiB", "MB", "KiB") else 33
        self.x0, self.x1 = pt(left), look.width - pt(right)
        self.y0, self.y1 = foot + pt(below), foot + pt(below) + room

    def axes(self, box: tuple[float, float, float, float] | None = None) -> Axes:
        """Axes over the drawing's room, or over a ``box`` in it: left, foot, width, height (points)."""
        x, y, wide, tall = box or (0.0, 0.0, self.x1 - self.x0, self.y1 - self.y0)
        width, height = self.look.width, self.height
        return self.figure.add_axes(((self.x0 + x) / width, (self.y0 + y) / height, wide / width, tall / height))

    def rule(self, y: float) -> None:
        """A hairline across the figure."""
        ends = [self.pad / self.look.width, 1 - self.pad / self.look.width]
        height = y / self.height
        self.figure.add_artist(Line2D(ends, [height, height], color=RULE, linewidth=self.look.pt(0.4)))

    def _text(self, x: float, y: float, text: str, size: float, **how: Any) -> None:
        at = x / self.look.width, y / self.height
        self.figure.text(*at, text, fontsize=size, va="baseline", parse_math=False, **how)

    def _entry_width(self, item: KeyItem) -> float:
        return self.look.pt(10) + text_width(item.text, self.look.small) + self.look.pt(8)

    def _rows(self, key: Sequence[KeyItem], width: float) -> list[list[KeyItem]]:
        rows: list[list[KeyItem]] = []
        room = 0.0
        for item in key:
            need = self._entry_width(item)
            if not rows or need - self.look.pt(8) > room:
                rows.append([])
                room = width
            rows[-1].append(item)
            room -= need
        return rows

    def _set_row(self, row: Sequence[KeyItem], y: float) -> None:
        pt, x = self.look.pt, self.pad
        for item in row:
            left, middle = x / self.look.width, (y + pt(2.4)) / self.height
            if item.mark in ("area", "hatch"):
                swatch = Rectangle(
                    (left, (y - pt(0.4)) / self.height), pt(7) / self.look.width, pt(5.6) / self.height,
                    facecolor=item.colour, edgecolor=MUTED, linewidth=pt(0.3),
                    hatch=HATCH if item.mark == "hatch" else None,
                )  # fmt: skip
                self.figure.add_artist(swatch)
            elif item.mark == "line":
                ends = [left, (x + pt(7)) / self.look.width]
                self.figure.add_artist(Line2D(ends, [middle, middle], color=item.colour, linewidth=pt(1.2)))
            else:
                centre = (x + pt(3.5)) / self.look.width
                hollow = item.mark == "hollow"
                dot = Line2D(
                    [centre], [middle], marker="o" if hollow else item.mark, color=item.colour, markersize=pt(4),
                    markeredgewidth=pt(0.9), markerfacecolor="white" if hollow else item.colour, linestyle="none",
                )  # fmt: skip
                self.figure.add_artist(dot)
            self._text(x + pt(10), y, item.text, self.look.small)
            x += self._entry_width(item)


def save(figure: Figure, path: Path, look: Look, said: str = "") -> None:
    """Write ``figure`` so that drawing it again gives the same bytes: no date, no version, fixed ids.

    What is ``said`` of it goes into the file's metadata, where it can be read without being seen.
    """
    words = {"pdf": {"Subject": said}, "png": {"Description": said}, "svg": {"Description": said}} if said else {}
    empty: dict[str, dict[str, Any]] = {
        "pdf": {"CreationDate": None, "Producer": None, "Creator": "memprof"},
        "png": {"Software": None},
        "svg": {"Date": None, "Creator": "memprof"},
    }
    kind = path.suffix[1:]
    figure.savefig(path, format=kind, dpi=look.dpi, metadata={**empty[kind], **words.get(kind, {})})
