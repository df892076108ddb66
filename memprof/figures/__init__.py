"""Figures from run records: drawn to be printed, the same bytes whenever they are drawn again.

A kind of figure is one file in ``memprof/figures/kinds``. It first turns runs into *data*, a JSON-ready dict that is
written beside the picture and holds every number in it, and then paints the data; so a figure can be drawn again, in
another style, from its data alone. Nothing here imports torch; only :mod:`memprof.figures.style` and the kinds import
matplotlib.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memprof import files
from memprof.errors import BadValue, DataError, UnknownName
from memprof.figures.kind import Kind
from memprof.plugins import Registry
from memprof.records import Run
from memprof.units import GIB, check_unit, unit_for

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from memprof.figures.style import Look

__all__ = ["FORMATS", "KINDS", "draw", "draw_data", "figure", "plan", "read_data"]

#: The kinds of figure, by file.
KINDS: Registry[Kind] = Registry("memprof.figures.kinds", Kind, "figure")  # type: ignore[type-abstract]
#: A figure's name is a file's name, and leads out of no folder.
_NAME = re.compile(r"\w[\w.=+,-]{0,199}")
#: What a figure can be written as.
FORMATS: tuple[str, ...] = ("pdf", "png", "svg")


def draw(
    runs: Sequence[Run],
    out_dir: Path | str,
    style: str = "print",
    width: str = "single",
    unit: str | None = "GiB",
    formats: Sequence[str] = ("pdf", "png"),
    *,
    caption: bool = True,
) -> list[Path]:
    """Draw every figure that ``runs`` give rise to.

    Args:
        runs: Runs as :func:`memprof.store.find_runs` reads them. Those of one model, task and stack stand side by side.
        out_dir: The folder to write to; made if missing.
        style: ``print`` (formerly ``paper``) or ``slides``.
        width: ``single`` or ``double`` column.
        unit: ``GiB``, ``GB``, ``MiB`` or ``MB``, or None for what shows each figure's peak well; the data files hold
            bytes whatever it is.
        formats: Any of ``pdf``, ``png``, ``svg``.
        caption: Whether title and origin are drawn; else they go to a ``.txt`` beside each figure.

    Returns:
        The files written, figure by figure: the pictures, then the data they were drawn from.

    Raises:
        DataError: No run has a finished sample, so there is nothing to draw.
        BadValue: An unknown style, width, unit or format.
    """
    figures = plan(runs)
    if not figures:
        raise DataError("nothing to draw: no run has a finished sample")
    return list(draw_data(figures, out_dir, style, width, unit, formats, caption=caption))


def plan(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The data of every figure that ``runs`` give rise to, in drawing order."""
    usable = [run for run in runs if run.finished]
    return [data for _, kind in KINDS for data in kind().plan(usable)] if usable else []


def figure(
    runs: Sequence[Run], kind: str, style: str = "print", width: str = "single", unit: str | None = None
) -> Figure:
    """The first figure of a kind that ``runs`` give rise to, with title and origin, on no file.

    Args:
        runs: As in :func:`draw`.
        kind: One of ``KINDS.names()``.
        style: As in :func:`draw`.
        width: As in :func:`draw`.
        unit: As in :func:`draw`.

    Raises:
        UnknownName: No such kind.
        DataError: The runs give rise to none.
        BadValue: An unknown style, width or unit.
    """
    from memprof.figures.style import Look

    if kind not in KINDS.names():
        raise UnknownName("figure", kind, KINDS.names())
    data = next((one for one in plan(runs) if one["kind"] == kind), None)
    if data is None:
        none = "no sample finished" if not any(run.finished for run in runs) else f"these runs give no {kind}"
        raise DataError(f"nothing to draw: {none}")
    look = Look.of(style, width, unit_for(_highest(data), unit))
    with look.settings():
        return _painted(data, look)[0]


def draw_data(
    figures: Iterable[dict[str, Any]],
    out_dir: Path | str,
    style: str = "print",
    width: str = "single",
    unit: str | None = "GiB",
    formats: Sequence[str] = ("pdf", "png"),
    *,
    caption: bool = True,
) -> Iterator[Path]:
    """Draw figures from their data alone, yielding each file once it is written."""
    from memprof.figures.style import Look, save

    for wanted in formats:
        if wanted not in FORMATS:
            raise BadValue(f"unknown figure format {wanted!r}; valid: {', '.join(FORMATS)}")
    if unit is not None:
        check_unit(unit)
    Look.of(style, width)  # a wrong name shows before a folder is made
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    for data in figures:
        look = Look.of(style, width, unit_for(_highest(data), unit), caption=caption)
        with look.settings():
            figure, said = _painted(data, look)
            for wanted in formats:
                path = out / f"{data['name']}.{wanted}"
                save(figure, path, look, said)
                yield path
        if not caption:
            path = out / f"{data['name']}.txt"
            files.replace(path, f"{said}\n")
            yield path
        path = out / f"{data['name']}.json"
        files.replace(path, json.dumps(data, ensure_ascii=False, separators=(",", ":")) + "\n")
        yield path


def _highest(data: Any) -> int:
    """The highest peak that a figure shows, which decides its unit; a gibibyte where it shows none."""
    peaks: list[int] = []

    def look_into(node: Any) -> None:
        if isinstance(node, dict):
            peaks.extend(node[key] for key in ("dynamic_peak_bytes", "peak_bytes") if isinstance(node.get(key), int))
            for value in node.values():
                look_into(value)
        elif isinstance(node, list) and node and isinstance(node[0], (dict, list)):
            for value in node:
                look_into(value)

    look_into(data)
    return max(peaks, default=GIB)


def _painted(data: dict[str, Any], look: Look) -> tuple[Figure, str]:
    """The figure and its caption; damaged data are a DataError."""
    from memprof.figures.style import caption

    try:
        return KINDS.load(data["kind"])().paint(data, look), caption(data)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {files.first_line(error)}"
        raise DataError(f"figure {data['name']} cannot be drawn from its data ({why})") from error


def read_data(path: Path | str) -> dict[str, Any]:
    """The data of a figure, as :func:`draw` wrote it beside the picture.

    Raises:
        DataError: The file cannot be read, or holds no figure's data.
    """
    try:
        data = files.read_json(Path(path))
    except FileNotFoundError:
        raise DataError(f"cannot read {path}: it is not there") from None
    if data.get("kind") not in KINDS.names() or "name" not in data:
        raise DataError(f"{path} holds no figure's data")
    if not isinstance(data["name"], str) or not _NAME.fullmatch(data["name"]):
        raise DataError(f"{path} names its figure {str(data['name'])[:60]!r}, which is no plain file name")
    return data
