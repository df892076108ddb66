"""memprof's own pictures: diagrams, receipts, forms and a test card, drawn at any size with Pillow's own font.

A picture follows from its scene, its seed and its size alone. Every length is a share of the picture, so the same scene
reads alike at 240 x 225 and at 4961 x 7016 pixels; what would be too small to read is left out.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from memprof.errors import DataError

Box = tuple[float, float, float, float]
Point = tuple[float, float]

MAX_PIXELS = 2**28  # 768 MiB of RGB: beyond it a shape can be predicted but not drawn
MIN_TEXT = 5.0  # pixels
INK, PAPER, FAINT = "#22262c", "#fbfaf6", "#8b929c"
TINTS = ("#cfe3f5", "#f8dcc4", "#d5ecd0", "#f6e7a9", "#e6d5ef", "#f5cfd3", "#cdebe8", "#e3e0d6")
COLOURS = {
    "red": "#d1423f",
    "blue": "#3b6fc4",
    "green": "#3f9650",
    "orange": "#e58a2b",
    "purple": "#8553ad",
    "brown": "#8a5a3b",
    "pink": "#ea8fb4",
    "grey": "#8f969e",
}


def draw(width: int, height: int, scene: Mapping[str, Any] | None = None, *, seed: str = "") -> Image.Image:
    """The picture of ``scene`` in RGB at ``width`` x ``height`` pixels; without a scene, a test card.

    Raises:
        DataError: The picture would have more than 2^28 pixels.
    """
    if width * height > MAX_PIXELS:
        raise DataError(f"a picture of {width} x {height} pixels is too large to draw (at most {MAX_PIXELS} pixels)")
    scene = scene or {"kind": "card"}
    sheet = _Sheet(width, height, seed)
    _SCENES[scene["kind"]](sheet, scene)
    return sheet.image


@functools.lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


class _Sheet:
    """A picture under the pen. Boxes are (left, top, right, bottom) in pixels."""

    def __init__(self, width: int, height: int, seed: str) -> None:
        self.width, self.height, self._seed = width, height, seed
        self.image = Image.new("RGB", (width, height), PAPER)
        self.pen = ImageDraw.Draw(self.image)
        self.line = max(1, round(min(width, height) / 220))

    def number(self, *key: object) -> int:
        """A whole number that follows from the seed and ``key``, the same on every machine."""
        text = "/".join(map(str, (self._seed, *key)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6])

    def box(self, left: float, top: float, right: float, bottom: float) -> Box:
        """A box given as shares of the sheet."""
        return (left * self.width, top * self.height, right * self.width, bottom * self.height)

    def text(
        self, box: Box, text: str, *, size: float | None = None, align: str = "m", fill: str = INK, bold: bool = False
    ) -> None:
        """Write ``text`` inside ``box``, shrunk until it fits; ``align`` is l, m or r. Unreadably small is left out."""
        left, top, right, bottom = box
        size = min(size or math.inf, 0.82 * (bottom - top))
        if size < MIN_TEXT or right <= left or not text:
            return
        long = _font(round(size)).getlength(text)
        if long > right - left:
            size *= (right - left) / long
            if size < MIN_TEXT:
                return
        x = {"l": left, "m": (left + right) / 2, "r": right}[align]
        stroke = round(size / 48) if bold else 0
        self.pen.text(
            (x, (top + bottom) / 2), text, fill=fill, font=_font(int(size)), anchor=f"{align}m", stroke_width=stroke
        )

    def panel(self, box: Box, fill: str | None = None, outline: str | None = INK, round_share: float = 0.2) -> None:
        """A box with round corners, or a plain one where it is too small for them."""
        left, top, right, bottom = (round(v) for v in box)
        if right < left or bottom < top:
            return
        radius = round_share * min(right - left, bottom - top)
        if radius < 3:
            self.pen.rectangle((left, top, right, bottom), fill=fill, outline=outline, width=self.line)
        else:
            self.pen.rounded_rectangle(
                (left, top, right, bottom), radius=radius, fill=fill, outline=outline, width=self.line
            )

    def stroke(self, points: Sequence[Point], fill: str = INK, width: int | None = None) -> None:
        """A line through ``points``."""
        self.pen.line([(round(x), round(y)) for x, y in points], fill=fill, width=width or self.line, joint="curve")

    def arrow(self, start: Box, end: Box, fill: str = INK) -> None:
        """An arrow from the edge of one box to the edge of another."""
        (x0, y0), (x1, y1) = _edge(start, end), _edge(end, start)
        length = math.hypot(x1 - x0, y1 - y0)
        head = min(5.5 * self.line, 0.6 * length)
        if length < 2 or head < 1:
            return
        ux, uy = (x1 - x0) / length, (y1 - y0) / length
        neck = (x1 - head * ux, y1 - head * uy)
        self.stroke([(x0, y0), neck], fill, max(1, round(1.4 * self.line)))
        side = 0.55 * head
        left = (neck[0] - side * uy, neck[1] + side * ux)
        right = (neck[0] + side * uy, neck[1] - side * ux)
        self.pen.polygon([(x1, y1), left, right], fill=fill)

    def title(self, text: str) -> Box:
        """Write the heading; the box below it, inside the margins."""
        self.text(self.box(0.04, 0.015, 0.96, 0.115), text, size=0.055 * min(self.width, 1.6 * self.height), bold=True)
        return self.box(0.04, 0.13, 0.96, 0.97)


def _edge(box: Box, towards: Box) -> Point:
    """Where the line between the centres of two boxes leaves the first, with a little air."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    dx, dy = (towards[0] + towards[2]) / 2 - x, (towards[1] + towards[3]) / 2 - y
    shares = [half / abs(d) for half, d in (((box[2] - box[0]) / 2, dx), ((box[3] - box[1]) / 2, dy)) if d]
    share = min([1.06 * s for s in shares] + [0.5])
    return (x + share * dx, y + share * dy)


def _around(x: float, y: float, width: float, height: float) -> Box:
    return (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def _inside(box: Box, left: float, top: float, right: float, bottom: float) -> Box:
    """A box given as shares of another."""
    width, height = box[2] - box[0], box[3] - box[1]
    return (box[0] + left * width, box[1] + top * height, box[0] + right * width, box[1] + bottom * height)


# ---------------------------------------------------------------------------------------------------- diagrams


def _node(sheet: _Sheet, box: Box, label: str, tint: str) -> None:
    sheet.panel(box, fill=tint)
    sheet.text(_inside(box, 0.06, 0.1, 0.94, 0.9), label, size=0.05 * min(sheet.width, 1.8 * sheet.height))


def _chain(sheet: _Sheet, scene: Mapping[str, Any]) -> None:
    """Boxes in a snake, an arrow from each to the next."""
    area, labels = sheet.title(scene["title"]), scene["labels"]
    width, height = area[2] - area[0], area[3] - area[1]
    columns = max(1, min(len(labels), round(math.sqrt(0.6 * len(labels) * width / max(height, 1)))))
    rows = math.ceil(len(labels) / columns)
    boxes = []
    for i in range(len(labels)):
        row, column = divmod(i, columns)
        column = columns - 1 - column if row % 2 else column
        cell = (width / columns, height / rows)
        centre = (area[0] + (column + 0.5) * cell[0], area[1] + (row + 0.5) * cell[1])
        boxes.append(_around(*centre, 0.72 * cell[0], min(0.56 * cell[1], 0.5 * cell[0])))
    for start, end in itertools.pairwise(boxes):
        sheet.arrow(start, end)
    for i, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        _node(sheet, box, label, TINTS[(i + sheet.number("tint")) % len(TINTS)])


def _cycle(sheet: _Sheet, scene: Mapping[str, Any]) -> None:
    """Boxes on a ring, an arrow from each to the next and from the last to the first."""
    area, labels = sheet.title(scene["title"]), scene["labels"]
    width, height = area[2] - area[0], area[3] - area[1]
    boxes = []
    for i in range(len(labels)):
        angle = 2 * math.pi * i / len(labels) - math.pi / 2
        centre = (
            area[0] + width * (0.5 + 0.355 * math.cos(angle)),
            area[1] + height * (0.5 + 0.4 * math.sin(angle)),
        )
        boxes.append(_around(*centre, 0.27 * width, 0.15 * height))
    ring = _around((area[0] + area[2]) / 2, (area[1] + area[3]) / 2, 0.26 * width, 0.3 * height)
    sheet.pen.ellipse(ring, fill=TINTS[sheet.number("ring") % len(TINTS)])
    for start, end in zip(boxes, [*boxes[1:], boxes[0]], strict=True):
        sheet.arrow(start, end)
    for i, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        _node(sheet, box, label, TINTS[(i + sheet.number("tint")) % len(TINTS)])


def _layers(sheet: _Sheet, scene: Mapping[str, Any]) -> None:
    """Wavy bands, top to bottom, each named at the side."""
    area, labels = sheet.title(scene["title"]), scene["labels"]
    height = (area[3] - area[1]) / len(labels)
    right = area[0] + 0.6 * (area[2] - area[0])
    steps = 24
    for i, label in enumerate(labels):
        top = area[1] + i * height
        phase = sheet.number("wave", i) % 628 / 100
        wave = [
            (area[0] + (right - area[0]) * k / steps, top + (i > 0) * 0.1 * height * math.sin(phase + k / 2.6))
            for k in range(steps + 1)
        ]
        tint = TINTS[(i + sheet.number("tint")) % len(TINTS)]
        sheet.pen.polygon([*wave, (right, area[3]), (area[0], area[3])], fill=tint)
        sheet.stroke(wave)
        middle = top + height / 2
        sheet.stroke([(right - 0.04 * sheet.width, middle), (right + 0.05 * sheet.width, middle)])
        sheet.text((right + 0.06 * sheet.width, top, area[2], top + height), label, size=0.05 * sheet.width, align="l")
    sheet.panel((area[0], area[1], right, area[3]), round_share=0.0)


def _tree(sheet: _Sheet, scene: Mapping[str, Any]) -> None:
    """A root, its groups, and the members of each group under it."""
    area, groups = sheet.title(scene["title"]), scene["groups"]
    width, height = area[2] - area[0], area[3] - area[1]
    root = _around(area[0] + width / 2, area[1] + 0.1 * height, 0.3 * width, 0.14 * height)
    for i, (name, members) in enumerate(groups.items()):
        x = area[0] + width * (i + 0.5) / len(groups)
        head = _around(x, area[1] + 0.38 * height, 0.8 * width / len(groups), 0.14 * height)
        sheet.stroke([_edge(root, head), _edge(head, root)])
        tint = TINTS[(i + sheet.number("tint")) % len(TINTS)]
        above = head
        for k, member in enumerate(members):
            y = area[1] + height * (0.6 + 0.36 * (k + 0.5) / len(members))
            leaf = _around(x, y, 0.68 * width / len(groups), 0.28 * height / len(members))
            sheet.stroke([_edge(above, leaf), _edge(leaf, above)], FAINT)
            sheet.panel(leaf, fill="#ffffff", outline=FAINT)
            sheet.text(_inside(leaf, 0.05, 0.05, 0.95, 0.95), member, size=0.045 * sheet.width)
            above = leaf
        _node(sheet, head, name, tint)
    _node(sheet, root, scene["root"], "#ffffff")


def _parts(sheet: _Sheet, scene: Mapping[str, Any]) -> None:
    """A body with coloured parts, each named at the side with a line to it."""
    area, parts = sheet.title(scene["title"]), scene["parts"]
    width, height = area[2] - area[0], area[3] - area[1]
    x, y = (area[0] + area[2]) / 2, (area[1] + area[3]) / 2
    sheet.pen.ellipse(_around(x, y, 0.46 * width, 0.92 * height), fill="#f1ede2", outline=INK, width=sheet.line)
    half = math.ceil(len(parts) / 2)
    for i, (name, colour) in enumerate(parts.items()):
        left, rank = i < half, i if i < half else i - half
        count = half if left else len(parts) - half
        at_y = area[1] + height * (rank + 0.5) / count
        sway = 0.03 * (sheet.number("sway", i) % 3 - 1)
        at_x = x + width * ((-0.09 if left else 0.09) + sway)
        part_y = y + 0.72 * (at_y - y)
        blob = _around(at_x, part_y, 0.13 * width, 0.5 * height / half)
        sheet.pen.ellipse(blob, fill=COLOURS[colour], outline=INK, width=sheet.line)
        anchor = area[0] + width * (0.24 if left else 0.76)
        sheet.stroke([(at_x, part_y), (anchor, at_y)])
        label = (area[0], at_y - height / 12, anchor - 0.01 * width, at_y + height / 12)
        if not left:
            label = (anchor + 0.01 * width, label[1], area[2], label[3])
        sheet.text(label, name, size=0.045 * sheet.width, align="r" if left else "l")


# --------------------------------------------------------------------------------------------------- documents


def _receipt(sheet: _Sheet, scene: Mapping[str, Any]) -> None:
    """A till receipt: shop, address, date, items, total, bars."""
    lines: list[tuple[str, str, float]] = [(scene["company"], "", 1.35), *((a, "", 0.8) for a in scene["address"])]
    lines += [("", "", 0.4), (f"Date: {scene['date']}", f"Bill {scene['number']}", 0.85), ("-", "", 0.5)]
    lines += [(name, price, 1.0) for name, price in scene["items"]]
    lines += [("-", "", 0.5), ("Subtotal", scene["subtotal"], 0.9), ("Tax", scene["tax"], 0.9)]
    lines += [("TOTAL", scene["total"], 1.4), ("-", "", 0.5), (scene["thanks"], "", 0.9)]
    unit = 0.86 * sheet.height / sum(1.35 * weight for *_, weight in lines)
    size = min(unit, 0.05 * sheet.width)
    y = 0.03 * sheet.height
    left, right = 0.07 * sheet.width, 0.93 * sheet.width
    for text, price, weight in lines:
        bottom = y + 1.35 * unit * weight
        if text == "-":
            dash = max(2.0, sheet.width / 60)
            x = left
            while x < right:
                sheet.stroke([(x, (y + bottom) / 2), (x + 0.6 * dash, (y + bottom) / 2)], FAINT)
                x += dash
        elif price:
            middle = left + 0.66 * (right - left)
            sheet.text((left, y, middle, bottom), text, size=size * weight, align="l", bold=weight > 1.2)
            sheet.text((middle, y, right, bottom), price, size=size * weight, align="r", bold=weight > 1.2)
        else:
            sheet.text((left, y, right, bottom), text, size=size * weight, bold=weight > 1.2)
        y = bottom
    _bars(sheet, (0.2 * sheet.width, y + 0.01 * sheet.height, 0.8 * sheet.width, 0.97 * sheet.height))


def _bars(sheet: _Sheet, box: Box) -> None:
    """Upright bars, as under a receipt; they say nothing."""
    step = max(1.0, (box[2] - box[0]) / 95)
    x, i = box[0], 0
    while x < box[2] and box[3] > box[1]:
        width = step * (1 + sheet.number("bar", i) % 3)
        if i % 2 == 0:
            sheet.pen.rectangle((round(x), round(box[1]), round(x + width) - 1 or 0, round(box[3])), fill=INK)
        x, i = x + width, i + 1


def _form(sheet: _Sheet, scene: Mapping[str, Any]) -> None:
    """A filled-in office form: fields in two columns, each with its name and its value."""
    area, fields = sheet.title(scene["title"]), list(scene["fields"].items())
    sheet.panel(area, fill="#ffffff", round_share=0.0)
    rows = math.ceil(len(fields) / 2)
    body = _inside(area, 0.0, 0.0, 1.0, 0.74)
    for i, (name, value) in enumerate(fields):
        row, column = divmod(i, 2)
        wide = i == len(fields) - 1 and column == 0
        cell = _inside(body, 0.5 * column, row / rows, 1.0 if wide else 0.5 * (column + 1), (row + 1) / rows)
        sheet.panel(cell, outline=FAINT, round_share=0.0)
        sheet.text(_inside(cell, 0.04, 0.04, 0.96, 0.4), name, size=0.024 * sheet.width, align="l", fill="#555c66")
        sheet.text(_inside(cell, 0.04, 0.38, 0.96, 0.96), value, size=0.034 * sheet.width, align="l", fill="#1d3f8a")
    for i, line in enumerate(scene["notes"]):
        top = 0.76 + 0.05 * i
        sheet.text(_inside(area, 0.03, top, 0.97, top + 0.05), line, size=0.022 * sheet.width, align="l")
    sheet.stroke([_inside(area, 0.6, 0.94, 0.6, 0.94)[:2], _inside(area, 0.95, 0.94, 0.95, 0.94)[:2]])
    sheet.text(_inside(area, 0.6, 0.945, 0.95, 0.99), "Signature", size=0.02 * sheet.width, fill=FAINT)


# ------------------------------------------------------------------------------------------------------- others


def _card(sheet: _Sheet, scene: Mapping[str, Any]) -> None:
    """A test card: a soft gradient, shapes and the size in words, for a shape that came without a picture."""
    ramp = Image.linear_gradient("L").resize((sheet.width, sheet.height))
    flat = [Image.new("L", ramp.size, 120 + sheet.number("base", i) % 100) for i in range(2)]
    order = sheet.number("order") % 3
    sheet.image.paste(Image.merge("RGB", [*flat[:order], ramp, *flat[order:]]))
    small = min(sheet.width, sheet.height)
    for i, (name, colour) in enumerate(list(COLOURS.items())[: scene.get("shapes", 5)]):
        radius = small * (0.08 + 0.01 * (sheet.number("size", i) % 8))
        x = sheet.width * (0.1 + 0.8 * (sheet.number("x", i) % 1000) / 1000)
        y = sheet.height * (0.15 + 0.7 * (sheet.number("y", i) % 1000) / 1000)
        shape = _around(x, y, 2 * radius, 2 * radius)
        if sheet.number("shape", name) % 2:
            sheet.pen.ellipse(shape, fill=colour)
        else:
            sheet.panel(shape, fill=colour, outline=None)
    words = scene.get("words", f"{sheet.width} x {sheet.height}")
    sheet.text(sheet.box(0.1, 0.4, 0.9, 0.6), words, size=0.12 * sheet.width, fill="#ffffff", bold=True)


_SCENES: dict[str, Callable[[_Sheet, Mapping[str, Any]], None]] = {
    "chain": _chain,
    "cycle": _cycle,
    "layers": _layers,
    "tree": _tree,
    "parts": _parts,
    "receipt": _receipt,
    "form": _form,
    "card": _card,
}
