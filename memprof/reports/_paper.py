"""What terminal reports are written on: a console of a known width that keeps its text."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from memprof.lines import visible


class Screen(Console):
    """A console that shows what others wrote: their control characters are text, whatever they stand in."""

    def render_str(self, text: str, **how: Any) -> Text:
        """Written out before it is laid out: what it then takes of a line is known, and nothing is cut off."""
        return super().render_str(visible(text, but="\n\t"), **how)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """As rich renders it, and then made safe."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text, but="\n\t"))


class Paper(Screen):
    """A console that prints to :attr:`text`: ``width`` columns (None: the terminal's), 40 at least, ANSI if asked."""

    def __init__(self, width: int | None, *, colour: bool) -> None:
        self._sheet = io.StringIO()
        super().__init__(
            file=self._sheet, width=max(40, width or shutil.get_terminal_size((120, 24)).columns),
            force_terminal=colour, no_color=not colour, highlight=False, legacy_windows=False,
            color_system="truecolor" if colour else None,
        )  # fmt: skip

    @property
    def text(self) -> str:
        """What was printed, without spaces at the ends of lines."""
        return "\n".join(line.rstrip() for line in self._sheet.getvalue().splitlines()) + "\n"
