"""What terminal reports are written on: a console of a known width that keeps its text."""

from __future__ import annotations

import io
import shutil

from rich.console import Console


class Paper(Console):
    """A console that prints to :attr:`text`: ``width`` columns (None: the terminal's), 80 at least, ANSI if asked."""

    def __init__(self, width: int | None, *, colour: bool) -> None:
        self._sheet = io.StringIO()
        super().__init__(
            file=self._sheet, width=max(80, width or shutil.get_terminal_size((120, 24)).columns),
            force_terminal=colour, no_color=not colour, highlight=False, legacy_windows=False,
            color_system="truecolor" if colour else None,
        )  # fmt: skip

    @property
    def text(self) -> str:
        """What was printed, without spaces at the ends of lines."""
        return "\n".join(line.rstrip() for line in self._sheet.getvalue().splitlines()) + "\n"
