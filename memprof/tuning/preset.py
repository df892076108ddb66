"""A preset: options of ``memprof run`` in a file, as a tuning session leaves them."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memprof.errors import DataError
from memprof.records import SCHEMA, RunSpec
from memprof.store import write_json

#: What a preset may hold: the options of ``memprof run`` that decide a run's bytes, by their names in Python.
KEYS: tuple[str, ...] = (
    "model", "method", "task", "device", "stack", "dtype", "attention", "weights", "data", "max_new_tokens",
    "max_tiles", "limit", "seed",
)  # fmt: skip


def preset_of(spec: RunSpec, method: str) -> dict[str, Any]:
    """The preset that runs ``method`` as ``spec`` was tuned, on all samples and on whichever device there is."""
    there = spec.to_json() | {"method": [method]}
    return {key: there[key] for key in KEYS if key not in ("device", "limit") and there[key] is not None}


def write_preset(path: Path, preset: Mapping[str, Any], because: Mapping[str, Any]) -> None:
    """Write ``preset`` as JSON, and beside it ``because``: what it was found to need, and under which question."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"schema": SCHEMA, "preset": dict(preset), "because": dict(because)})


def read_preset(path: Path) -> dict[str, Any]:
    """The options in a preset file, JSON or TOML: under ``preset``, or at its top level.

    Raises:
        DataError: The file cannot be read, or holds something that is no option of a preset.
    """
    try:
        text = path.read_text(encoding="utf-8")
        data: Any = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read preset {path}: {error}") from None
    if isinstance(data, dict):
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
        if not all(isinstance(one, str | int | float) for one in (value if isinstance(value, list) else [value])):
            raise DataError(f"{path}: {key} must be a number or a text")
    return options
