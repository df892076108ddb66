"""Figures from run records: drawn to be printed, the same bytes whenever they are drawn again.

A kind of figure is one file in ``memprof/figures/kinds``. It first turns runs into *data*, a JSON-ready dict that is
written beside the picture and holds every number in it, and then paints the data; so a figure can be drawn again, in
another style, from its data alone. Nothing here imports torch; only :mod:`memprof.figures.style` and the kinds import
matplotlib.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from memprof.errors import BadValue, DataError
from memprof.figures.kind import Kind
from memprof.plugins import Registry
from memprof.records import Run
from memprof.units import check_unit

__all__ = ["FORMATS", "KINDS", "draw", "draw_data", "plan", "read_data"]

#: The kinds of figure, by file.
KINDS: Registry[Kind] = Registry("memprof.figures.kinds", Kind, "figure")  # type: ignore[type-abstract]
#: What a figure can be written as.
FORMATS: tuple[str, ...] = ("pdf", "png", "svg")


def draw(
    runs: Sequence[Run],
    out_dir: Path | str,
    style: str = "paper",
    width: str = "single",
    unit: str = "GiB",
    formats: Sequence[str] = ("pdf", "png"),
) -> list[Path]:
    """Draw every figure that ``runs`` give rise to.

    Args:
        runs: Runs as :func:`memprof.store.find_runs` reads them. Those of one model, task and stack stand side by side.
        out_dir: The folder to write to; made if missing.
        style: ``paper`` or ``slides``.
        width: ``single`` or ``double`` column.
        unit: ``GiB``, ``GB``, ``MiB`` or ``MB``; the data files hold bytes whatever it is.
        formats: Any of ``pdf``, ``png``, ``svg``.

    Returns:
        The files written, figure by figure: the pictures, then the data they were drawn from.

    Raises:
        DataError: No run has a finished sample, so there is nothing to draw.
        BadValue: An unknown style, width, unit or format.
    """
    figures = plan(runs)
    if not figures:
        raise DataError("nothing to draw: no run has a finished sample")
    return list(draw_data(figures, out_dir, style, width, unit, formats))


def plan(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The data of every figure that ``runs`` give rise to, in drawing order."""
    usable = [run for run in runs if run.finished]
    return [data for _, kind in KINDS for data in kind().plan(usable)] if usable else []


def draw_data(
    figures: Iterable[dict[str, Any]],
    out_dir: Path | str,
    style: str = "paper",
    width: str = "single",
    unit: str = "GiB",
    formats: Sequence[str] = ("pdf", "png"),
) -> Iterator[Path]:
    """Draw figures from their data alone, yielding each file once it is written."""
    from memprof.figures.style import Look, save

    for wanted in formats:
        if wanted not in FORMATS:
            raise BadValue(f"unknown figure format {wanted!r}; valid: {', '.join(FORMATS)}")
    look = Look.of(style, width, check_unit(unit))
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    for data in figures:
        with look.settings():
            figure = KINDS.load(data["kind"])().paint(data, look)
            for wanted in formats:
                path = out / f"{data['name']}.{wanted}"
                save(figure, path, look)
                yield path
        path = out / f"{data['name']}.json"
        path.write_text(json.dumps(data, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
        yield path


def read_data(path: Path | str) -> dict[str, Any]:
    """The data of a figure, as :func:`draw` wrote it beside the picture.

    Raises:
        DataError: The file cannot be read, or holds no figure's data.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    if not isinstance(data, dict) or data.get("kind") not in KINDS.names() or "name" not in data:
        raise DataError(f"{path} holds no figure's data")
    return data
