"""A question's answers in every format, on a screen, in a file or as a folder. Nothing here loads torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from memprof.asked import Asked
from memprof.errors import BadValue, MemprofError, UnknownName
from memprof.files import replace
from memprof.reports.answers import html, markdown, terminal
from memprof.reports.answers.sheet import as_json, legend, sheet
from memprof.telling.facts import slug
from memprof.units import check_unit

if TYPE_CHECKING:
    from PIL.Image import Image

#: Each format with the suffixes its files may have; the first is the one memprof gives.
_SUFFIXES = {"terminal": (".txt",), "markdown": (".md",), "html": (".html", ".htm"), "json": (".json",)}
FORMATS = tuple(_SUFFIXES)
#: What a folder holds unless told otherwise.
_PAGES = ("html", "markdown", "json")


def check(name: str) -> None:
    """Raise :class:`UnknownName`, with the valid ones, unless ``name`` is a format."""
    if name not in FORMATS:
        raise UnknownName("format", name, FORMATS)


def is_folder(path: Path) -> bool:
    """Whether ``path`` is a folder, or has a folder's name: one without a suffix."""
    return path.is_dir() or not path.suffix


def check_target(path: Path, name: str | None) -> None:
    """Raise :class:`BadValue` where neither ``name`` nor a suffix says what the file ``path`` is to be."""
    if name is None and not is_folder(path) and _format_of(path) is None:
        valid = ", ".join(suffix for suffixes in _SUFFIXES.values() for suffix in suffixes)
        raise BadValue(f"{path}: the suffix is none of {valid}; take one, give --format, or name a folder")


def render(name: str, asked: Asked, unit: str = "GiB", *, colour: bool = False) -> str:
    """``asked`` in the format ``name``, all in one text: only a page of HTML can hold the pictures."""
    check(name)
    check_unit(unit)
    if name == "terminal":
        return terminal.render(asked, unit, colour=colour)
    if name == "markdown":
        return markdown.render(asked, unit)
    if name == "html":
        return html.render(asked, unit, pictures=_pictures(asked, legends=False))
    return json.dumps(as_json(asked), indent=1, ensure_ascii=False) + "\n"


def save(asked: Asked, path: Path, name: str | None, unit: str = "GiB") -> list[Path]:
    """Write ``asked`` to ``path``: to a file, in the format ``name`` or the one its suffix names; or into a folder.

    Returns:
        The files written. Markdown's pictures lie beside it.

    Raises:
        BadValue: Nothing says which format is meant.
        MemprofError: A file cannot be written.
    """
    check_target(path, name)
    try:
        if is_folder(path):
            path.mkdir(parents=True, exist_ok=True)
            pages = [(path / f"ask{_SUFFIXES[one][0]}", one) for one in ([name] if name else _PAGES)]
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            pages = [(path, name or _format_of(path) or "terminal")]
        return [file for page, one in pages for file in _write(asked, page, one, unit)]
    except OSError as error:
        raise MemprofError(f"cannot write {error.filename or path}: {error.strerror or error}") from None


def _format_of(path: Path) -> str | None:
    return next((name for name, suffixes in _SUFFIXES.items() if path.suffix.lower() in suffixes), None)


def _write(asked: Asked, path: Path, name: str, unit: str) -> list[Path]:
    """One page, and what lies beside it: the first is the page."""
    if name != "markdown":
        replace(path, render(name, asked, unit))
        return [path]
    drawn = _pictures(asked, legends=True)
    files = {label: path.with_name(f"{slug(path.stem)}-{slug(label)}.png") for label in drawn}
    names = {label: file.name for label, file in files.items()}
    replace(path, markdown.render(asked, unit, pictures=names))
    for label, picture in drawn.items():
        picture.save(files[label], optimize=True)
    return [path, *files.values()]


def _pictures(asked: Asked, *, legends: bool) -> dict[str, Image]:
    """What each method kept, drawn, by its label."""
    from memprof.figures import kept

    if asked.tiles is None or asked.grid is None:
        return {}
    return {
        one.label: kept.draw(asked.tiles, asked.grid, one.tokens, legend(one, asked) if legends else ())
        for one in sheet(asked, "GiB").columns
        if one.tokens is not None
    }
