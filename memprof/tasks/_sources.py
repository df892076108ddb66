"""Readers of the forms in which samples come. Each gives rows, and a row's picture only when it is asked for.

=================  =============================================================================================
form               columns
=================  =============================================================================================
bundled            ``<task>.json`` beside this file, written by ``scripts/make_bundled.py``
hub, ``.parquet``  those of the hub's data set; ``image`` is a struct with ``bytes``, or bytes
``.tsv``           VLMEvalKit's: ``index, image`` (base64, or the index of the row that has it) and the task's own
``.jsonl``         ``image`` (a path, relative to the file, or a list of them) and the task's own; ``id`` optional
a folder           of pictures and nothing else: sizes only
``.csv``           shapes only: ``width, height, text_tokens``; ``id``, ``images`` (how many of that size) and
                   ``batch`` (prompts side by side) optional
=================  =============================================================================================

``datasets`` and ``pyarrow`` are imported inside the functions that need them.
"""

from __future__ import annotations

import base64
import bisect
import contextlib
import csv
import functools
import importlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

from memprof.errors import DataError
from memprof.files import kind_of, read_bytes
from memprof.limits import LIMITS
from memprof.tasks._pictures import Drawn, Encoded, Picture

T = TypeVar("T")

#: Suffixes of pictures in a folder that has no list of them.
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SHAPE_COLUMNS = ("width", "height", "text_tokens")
#: All that a row of shapes is read for.
_READ_COLUMNS = (*SHAPE_COLUMNS, "id", "images", "batch")
#: VLMEvalKit: an image field of at most this many characters is the index of the row that holds the image.
_REFERENCE_CHARS = 64
_IMAGE = "image"
#: No encoded picture has more bytes.
MOST_BYTES = 2**29


@dataclass(frozen=True)
class Row:
    """One row: its columns (the image apart), its picture, how messages name it, and the pictures behind the first."""

    id: str
    values: Mapping[str, Any]
    picture: Picture
    where: str
    others: tuple[Picture, ...] = ()


class Lazy(Sequence[T]):
    """A sequence of ``count`` items, each made when it is indexed and never kept."""

    def __init__(self, count: int, make: Callable[[int], T]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        at = range(self._count)[index]
        return [self._make(i) for i in at] if isinstance(at, range) else self._make(at)


def read_path(path: Path, limit: int | None, text_tokens: int | None = None) -> Sequence[Row]:
    """The rows of a file or folder, told by its suffix; ``text_tokens`` as in :func:`read_shapes`.

    Raises:
        DataError: Nothing is there, the form is unknown, or the file is broken.
    """
    if not path.exists():
        raise DataError(f"no file or folder {str(path)!r}; --data takes bundled, hub, or a path")
    if path.is_dir():
        lists = [found for found in sorted(path.glob("*.jsonl")) if found.is_file()]
        if len(lists) == 1:
            return read_jsonl(lists[0], limit)
        if lists:
            raise DataError(f"{path} holds {len(lists)} .jsonl files; name the one to read")
        shards = sorted(path.glob("*.parquet"))
        if shards:
            return read_parquet(shards, limit)
        if pictures_in(path):
            return read_pictures(path, limit)
        raise DataError(f"{path} holds no .jsonl and no .parquet file, and no picture")
    readers: dict[str, Callable[[Path, int | None], Sequence[Row]]] = {
        ".tsv": read_tsv,
        ".jsonl": read_jsonl,
        ".parquet": lambda file, limit: read_parquet([file], limit),
        ".csv": functools.partial(read_shapes, text_tokens=text_tokens),
    }
    if not path.is_file():
        raise DataError(f"cannot read {path}: it is {kind_of(path)}")
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"cannot read {path.name}: --data takes {', '.join(readers)}, or a folder with a .jsonl")
    return reader(path, limit)


# --------------------------------------------------------------------------------------------- plain pictures


def pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder that says nothing more of them, by name; none where it holds a list or shards."""
    if not folder.is_dir() or any(folder.glob("*.jsonl")) or any(folder.glob("*.parquet")):
        return []
    return [path for path in sorted(folder.iterdir()) if path.suffix.lower() in PICTURES and path.is_file()]


def read_pictures(folder: Path, limit: int | None) -> Sequence[Row]:
    """Pictures without questions: their sizes are read from their headers, and nothing is asked about them."""
    return [
        Row(path.name, {"text_tokens": None}, Encoded(path.read_bytes, f"{folder.name}/{path.name}"), path.name)
        for path in pictures_in(folder)[:limit]
    ]


# ---------------------------------------------------------------------------------------------------- bundled


@functools.cache
def bundled(name: str) -> Mapping[str, Any]:
    """The bundled file of task ``name``: ``title``, ``facts``, ``samples``."""
    data: Mapping[str, Any] = json.loads((Path(__file__).parent / f"{name}.json").read_text(encoding="utf-8"))
    return data


def read_bundled(name: str, limit: int | None) -> Sequence[Row]:
    """Questions of memprof's own about pictures it draws, at real shapes."""
    samples = bundled(name)["samples"][:limit]
    return [
        Row(s["id"], s, Drawn(s["width"], s["height"], s["id"], s["scene"]), f"bundled {name}, {s['id']}")
        for s in samples
    ]


# ----------------------------------------------------------------------------------------------------- shapes


def read_shapes(path: Path, limit: int | None, text_tokens: int | None = None) -> Sequence[Row]:
    """Shapes from a CSV; the picture of each is drawn at its size.

    Args:
        path: The file.
        limit: Rows at most.
        text_tokens: Of a row that says none, and then no column need.

    Raises:
        DataError: The file or a line is broken; the message names the line.
    """
    rows: list[Row] = []
    with _text(path) as file:
        reader = csv.reader(file)
        header = [name.strip().lower() for name in next(_lines(reader, path), [])]
        _need_columns(path, header, SHAPE_COLUMNS if text_tokens is None else SHAPE_COLUMNS[:2])
        if twice := [name for name in _READ_COLUMNS if header.count(name) > 1]:
            raise DataError(f"{path.name}, line 1: column {twice[0]} stands twice")
        for fields in itertools.islice(_lines(reader, path), limit):
            where = f"{path.name}, line {reader.line_num}"
            if len(fields) != len(header):
                raise DataError(f"{where}: {len(fields)} fields, but the header has {len(header)}")
            values = dict(zip(header, (f.strip() for f in fields), strict=True))
            if text_tokens is not None:
                values["text_tokens"] = values.get("text_tokens") or str(text_tokens)
            width, height, tokens = (_whole(values, name, where) for name in SHAPE_COLUMNS)
            sample_id = values.get("id") or f"{len(rows):05d}"
            images, batch = (_whole(values, name, where) if values.get(name) else 1 for name in ("images", "batch"))
            picture, sizes = Drawn(width, height, sample_id), {"text_tokens": tokens, "batch": batch}
            rows.append(Row(sample_id, sizes, picture, where, (picture,) * (images - 1)))
    return _checked(path, rows)


def _whole(values: Mapping[str, str], name: str, where: str) -> int:
    least, most = LIMITS[name]
    try:
        number = int(values[name])
    except ValueError:
        number = least - 1
    if number < least:
        raise DataError(f"{where}: {name} is not a {'positive integer' if least else 'whole number of at least 0'}")
    if number > most:
        raise DataError(f"{where}: {name} is above {most}")
    return number


# --------------------------------------------------------------------------------------------------------- TSV


def read_tsv(path: Path, limit: int | None) -> Sequence[Row]:
    """A VLMEvalKit TSV. Only the places of the images are kept; an image is read from the file when asked for.

    Raises:
        DataError: The file has no usable header, or a line is broken.
    """
    starts: dict[str, int] = {}  # index -> where in the file its record starts, in bytes
    found: list[tuple[str, dict[str, str], str]] = []
    with path.open("rb") as file, _huge_fields():
        counted = _Counted(file, path)
        reader = csv.reader(counted, delimiter="\t")
        header = next(_lines(reader, path), [])
        _need_columns(path, header, ("index", _IMAGE))
        start = counted.bytes
        for fields in itertools.islice(_lines(reader, path), limit):
            where = f"{path.name}, line {reader.line_num}"
            if len(fields) != len(header):
                raise DataError(f"{where}: {len(fields)} fields, but the header has {len(header)}")
            values = dict(zip(header, fields, strict=True))
            image = values.pop(_IMAGE)
            sample_id = values["index"]
            holder = image if len(image) <= _REFERENCE_CHARS else sample_id
            found.append((sample_id, {k: v for k, v in values.items() if v}, holder))
            starts[sample_id] = start
            start = counted.bytes

    column = header.index(_IMAGE)

    def encoded(holder: str) -> bytes:
        if holder not in starts:
            raise ValueError(f"the field is {holder!r}, neither base64 nor the index of a row read")
        with path.open("rb") as file, _huge_fields():
            file.seek(starts[holder])
            text = next(csv.reader(_Counted(file, path), delimiter="\t"))[column]
        return base64.b64decode(text, validate=True)

    def row(sample_id: str, values: dict[str, str], holder: str) -> Row:
        where = f"{path.name}, index {sample_id}"
        return Row(sample_id, values, Encoded(functools.partial(encoded, holder), where), where)

    return _checked(path, [row(*fields) for fields in found])


class _Counted:
    """Lines of a binary file as text, counting the bytes handed out (``csv`` never reads ahead of its record)."""

    def __init__(self, file: Any, path: Path) -> None:
        self._file, self._path, self.bytes = file, path, 0

    def __iter__(self) -> Iterator[str]:
        for line in self._file:
            encoding = "utf-8-sig" if self.bytes == 0 else "utf-8"
            self.bytes += len(line)
            try:
                yield line.decode(encoding)
            except UnicodeDecodeError:
                raise DataError(f"{self._path.name} is not UTF-8 text") from None


@contextlib.contextmanager
def _huge_fields() -> Iterator[None]:
    """Lift ``csv``'s limit of 128 KiB a field, which a base64 image passes, and put it back."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


# ------------------------------------------------------------------------------------------------------- JSONL


def read_jsonl(path: Path, limit: int | None) -> Sequence[Row]:
    """A folder of images listed in a JSONL, one object a line.

    Raises:
        DataError: A line is no JSON object, or names no image.
    """
    rows: list[Row] = []
    with _text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            if len(rows) == limit:
                break
            where = f"{path.name}, line {number}"
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                why = f"{error.msg}, character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else error
                raise DataError(f"{where}: not JSON: {why}") from None
            if not isinstance(values, dict) or not (named := _paths(values.get(_IMAGE))):
                raise DataError(f"{where}: not an object with an 'image' that is a path, or a list of paths")
            sample_id = str(values.get("id", f"{len(rows):05d}"))
            first, *others = (
                Encoded(functools.partial(read_bytes, path.parent / name, MOST_BYTES), f"{where} ({name})")
                for name in named
            )
            rows.append(Row(sample_id, values, first, where, tuple(others)))
    return _checked(path, rows)


def _paths(given: Any) -> list[str]:
    """The paths in an ``image`` field: one, or a list of them; none where it is anything else."""
    found = given if isinstance(given, list) else [given]
    return found if len(found) <= LIMITS["images"][1] and all(isinstance(name, str) for name in found) else []


# ------------------------------------------------------------------------------------------- parquet and the hub


def read_parquet(paths: Sequence[Path], limit: int | None) -> Sequence[Row]:
    """Shards in the hub's layout, in the order given; a row group's images are read when one of them is asked for.

    Raises:
        DataError: ``pyarrow`` is not installed, or a file is no parquet with an ``image`` column.
    """
    parquet = _optional("pyarrow.parquet", f"reading {paths[0].name}")
    files: list[Any] = []
    table: list[dict[str, Any]] = []
    groups: list[tuple[int, int]] = []  # (file, row group)
    begins: list[int] = []  # first row of each
    for number, path in enumerate(paths):
        try:
            file = parquet.ParquetFile(path)
            columns = [c for c in file.schema_arrow.names if c != _IMAGE]
            _need_columns(path, file.schema_arrow.names, (_IMAGE,))
            count = sum(file.metadata.row_group(g).num_rows for g in range(file.num_row_groups))
            for group in range(file.num_row_groups):
                groups.append((number, group))
                begins.append(len(table) + sum(file.metadata.row_group(g).num_rows for g in range(group)))
            # a file of images alone has no other column to count rows by
            table += file.read(columns=columns).to_pylist() if columns else [{}] * count
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"cannot read {path.name}: {error}".splitlines()[0]) from None
        files.append(file)

    @functools.lru_cache(maxsize=1)
    def images(at: int) -> list[Any]:
        number, group = groups[at]
        read: list[Any] = files[number].read_row_group(group, columns=[_IMAGE]).column(0).to_pylist()
        return read

    def encoded(index: int) -> bytes:
        at = bisect.bisect_right(begins, index) - 1
        return _image_bytes(images(at)[index - begins[at]])

    name = paths[0].name if len(paths) == 1 else paths[0].parent.name

    def row(index: int) -> Row:
        where = f"{name}, row {index}"
        return Row(f"{index:05d}", table[index], Encoded(functools.partial(encoded, index), where), where)

    if not table:
        raise DataError(f"{name} holds no samples")
    return Lazy(len(table[:limit]), row)


def read_hub(repo: str, split: str, limit: int | None) -> Sequence[Row]:
    """A data set of the hub through ``datasets``: its cache (``HF_HOME``) is used, ``HF_HUB_OFFLINE`` is honoured.

    Raises:
        DataError: ``datasets`` is not installed, or the data set is neither in the cache nor reachable.
    """
    datasets = _optional("datasets", f"--data hub ({repo})")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        data = datasets.load_dataset(repo, split=split)
        data = data.cast_column(_IMAGE, datasets.Image(decode=False))
    except Exception as error:  # many types, by version and by what is missing
        why = "HF_HUB_OFFLINE is set and the cache gave no copy" if _offline() else f"{type(error).__name__}: {error}"
        why = why.splitlines()[0][:200]
        remedy = "run once with a network, or use --data bundled or a path"
        raise DataError(f"cannot load {repo} ({why}); {remedy}") from None

    def row(index: int) -> Row:
        values = dict(data[index])
        image = values.pop(_IMAGE)
        where = f"{repo} {split}, row {index}"
        return Row(f"{index:05d}", values, Encoded(lambda: _image_bytes(image), where), where)

    return Lazy(len(data) if limit is None else min(limit, len(data)), row)


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _image_bytes(value: Any) -> bytes:
    """The encoded bytes in a cell of the hub's layout: ``{"bytes", "path"}`` or bytes."""
    if isinstance(value, Mapping):
        if value.get("bytes") is None and value.get("path"):
            return read_bytes(Path(value["path"]), MOST_BYTES)
        value = value.get("bytes")
    if not isinstance(value, bytes):
        raise ValueError("the row has no image bytes")
    return value


def _optional(module: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        name = module.partition(".")[0]
        raise DataError(f"{what} needs {name}: pip install memprof-vlm[hub]") from None


# ------------------------------------------------------------------------------------------------------ shared


@contextlib.contextmanager
def _text(path: Path) -> Iterator[Iterator[str]]:
    """The lines of a UTF-8 file, with or without a byte order mark."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError:
        raise DataError(f"{path.name} is not UTF-8 text") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def _lines(reader: Any, path: Path) -> Iterator[list[str]]:
    """The records of a ``csv`` reader, empty lines left out."""
    try:
        for fields in reader:
            if any(f.strip() for f in fields):
                yield fields
    except csv.Error as error:
        raise DataError(f"{path.name}, line {reader.line_num}: {error}") from None


def _need_columns(path: Path, header: Sequence[str], needed: Sequence[str]) -> None:
    if not header:
        raise DataError(f"{path.name} is empty; its first line must name the columns {', '.join(needed)}")
    missing = [name for name in needed if name not in header]
    if missing:
        raise DataError(f"{path.name}, line 1: no column {', '.join(missing)}; it has {', '.join(header)}")


def _checked(path: Path, rows: list[Row]) -> list[Row]:
    """``rows``, if there are any and no id stands twice."""
    if not rows:
        raise DataError(f"{path.name} holds no samples")
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            raise DataError(f"{row.where}: id {row.id!r} stands twice")
        seen.add(row.id)
    return rows
