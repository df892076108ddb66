"""Write down what memprof predicts: ``python scripts/record_predictions.py tests/reference/predictions.json``.

``tests/test_predictions.py`` holds later versions to the file. It was made before the house was rebuilt, so that a move
of code that changes a byte is seen. Make it again only where bytes are meant to change, and say so in CHANGELOG.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from memprof.cli import main as memprof

MODELS, TASKS, STACKS = ("internvl2-2b", "llava-1.5-7b"), ("ai2d", "ocrbench"), ("current", "paper")
METHODS = ("baseline", "fastv", "topv")
#: Sizes of what is run, and the card that is predicted for: in particular, so that no default decides a byte.
LIMIT, TOKENS, GPU = 2, 4, "h100"
#: Keys of a sample's line that hold numbers of this memprof.
KEYS = (
    "id", "tiles", "visual_tokens", "text_tokens", "kept_visual_tokens", "kv_tokens_planned", "kv_tokens_found",
    "kv_bytes_per_layer", "tokens", "peak_token", "peak_phase", "vision_peak_bytes", "peak_parts", "token_parts",
    "peak_holders", "dynamic_peak_bytes",
)  # fmt: skip


def predict(model: str, task: str, stack: str, folder: Path) -> dict[str, Any]:
    """What ``--json`` says of three methods, and every sample's line, by method."""
    words = ["run", "--model", model, "--task", task, "--stack", stack, "--device", "sim", "--gpu", GPU, "--json"]
    words += ["--limit", str(LIMIT), "--max-new-tokens", str(TOKENS), "-o", str(folder)]
    for method in METHODS:
        words += ["--method", method]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        memprof(words)
    said = json.loads(out.getvalue())
    return {
        "said": [{k: v for k, v in run.items() if k != "path"} for run in said["runs"]],
        "samples": {method: _samples(folder / method / "samples.jsonl") for method in METHODS},
    }


def _samples(file: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [{key: row[key] for key in KEYS} | {"tokens": _numbers(row["tokens"])} for row in rows]


def _numbers(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {name: column for name, column in columns.items() if any(value is not None for value in column)}


def predictions(models: tuple[str, ...] = MODELS) -> dict[str, Any]:
    """What is predicted of each of ``models``, by ``model/task/stack``."""
    found = {}
    with tempfile.TemporaryDirectory() as there:
        for model, task, stack in product(models, TASKS, STACKS):
            found[f"{model}/{task}/{stack}"] = predict(model, task, stack, Path(there) / model / task / stack)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    given = parser.parse_args()
    lines = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in predictions().items())
    given.file.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
