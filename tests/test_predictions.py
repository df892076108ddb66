"""What is predicted is what was predicted before the code moved, number by number and byte by byte.

``scripts/record_predictions.py`` made ``reference/predictions.json`` with the code of commit 5e45844.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
WRITTEN = json.loads((HERE / "reference" / "predictions.json").read_text())
predict = runpy.run_path(str(HERE.parent / "scripts" / "record_predictions.py"))["predict"]


@pytest.mark.slow
@pytest.mark.parametrize("what", WRITTEN)
def test_predictions_are_those_made_before_the_move(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMPROF_CACHE", "")
    model, task, stack = what.split("/")
    now = json.loads(json.dumps(predict(model, task, stack, tmp_path / "runs")))
    for then, found in zip(WRITTEN[what]["said"], now["said"], strict=True):
        assert {key: found[key] for key in then} == then
    for method, samples in WRITTEN[what]["samples"].items():
        for then, found in zip(samples, now["samples"][method], strict=True):
            _assert_same(then, found, f"{method}, {then['id']}")


def _assert_same(then: dict[str, Any], now: dict[str, Any], where: str) -> None:
    for key, value in then.items():
        assert now[key] == value, f"{where}: {key}"
