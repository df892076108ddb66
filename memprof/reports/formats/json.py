"""JSON for a program: the document that ``--json`` prints, its schema numbered."""

from __future__ import annotations

import json
from collections.abc import Sequence

from memprof.records import SCHEMA, Run, summarize


def render(runs: Sequence[Run], unit: str = "GiB") -> str:
    """``{"schema": 1, "runs": [...]}``, one object a run. Bytes, whatever ``unit`` is."""
    del unit
    return json.dumps({"schema": SCHEMA, "runs": [summarize(run) for run in runs]}, indent=1, ensure_ascii=False) + "\n"
