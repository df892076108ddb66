"""A preset: options of ``memprof run`` in a file, as a tuning session leaves them."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memprof.errors import DataError
from memprof.files import parse_json, read_text, write_json
from memprof.records import SCHEMA, RunSpec

#: What a preset may hold: the options of ``memprof run`` that decide a run's bytes, by their names in Python.
KEYS: tuple[str, ...] = (
    "model", "method", "task", "device", "stack", "dtype", "attention", "weights", "data", "max_new_tokens",
    "max_tiles", "limit", "seed",
)  # fmt: skip

_NUMBERS = ("max_new_tokens", "max_tiles", "limit", "seed")


def preset_of(spec: RunSpec, method: str) -> dict[str, Any]:
    """The preset that runs ``method`` as ``spec`` was tuned, on all samples and on whichever device there is."""
    there = spec.to_json() | {"method": [method]}
    return {key: there[key] for key in KEYS if key not in ("device", "limit") and there[key] is not None}


def write_preset(path: Path, preset: Mapping[str, Any], because: Mapping[str, Any]) -> None:
    """Write ``preset`` as JSON, and beside it ``because``: what it was found to need, and under which question."""
    write_json(path, {"schema": SCHEMA, "preset": dict(preset), "because": dict(because)})


def read_preset(path: Path) -> dict[str, Any]:
    """The options in a preset file, JSON or TOML: under ``preset``, or at its top level.

    Raises:
        DataError: The file cannot be read, or holds something that is no option of a preset.
    """
    try:
        text = read_text(path)
        data: Any = tomllib.loads(text) if path.suffix == ".toml" else parse_json(text, f"{path} holds no preset: it")
    except FileNotFoundError:
        raise DataError(f"cannot read preset {path}: it is not there") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise DataError(f"cannot read preset {path}: {error}") from None
    if type(schema := data.get("schema", SCHEMA)) is not int or schema > SCHEMA:
        raise DataError(f"preset {path} was written by a later memprof (schema {str(schema)[:40]}; this one: {SCHEMA})")
    data = data.get("preset", data)
    if not isinstance(data, dict):
        raise DataError(f'{path} holds no preset; write for example {{"method": "topv:keep=0.4"}}')
    unknown = sorted(set(data) - {*KEYS, "schema"})
    if unknown:
        raise DataError(f"{path} sets {', '.join(unknown)}; a preset may set {', '.join(KEYS)}")
    options = {key: value for key, value in data.items() if key != "schema"}
    methods = options.get("method")
    if isinstance(methods, str):
        options["method"] = [methods]
    for key, value in options.items():
        _check(path, key, value)
    return options


def _check(path: Path, key: str, value: Any) -> None:
    """Raise DataError where an option is not what ``memprof run`` takes."""
    if not all(isinstance(one, str | int | float) for one in (value if isinstance(value, list) else [value])):
        raise DataError(f"{path}: {key} must be a number or a text")
    if key == "method":
        if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
            raise DataError(f"{path}: method must be a text, or a list with at least one")
    elif key in _NUMBERS:
        if type(value) is not int:
            raise DataError(f"{path}: {key} must be a whole number")
    elif not isinstance(value, str):
        raise DataError(f"{path}: {key} must be a text")
