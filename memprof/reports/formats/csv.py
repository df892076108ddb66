"""CSV for a spreadsheet or a data frame: one row a token, every column in bytes and seconds."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence

from memprof.lines import visible
from memprof.records import Run, TokenColumns

COLUMNS = tuple(f.name for f in dataclasses.fields(TokenColumns))
HEAD = (
    "run", "model", "method", "task", "data", "device", "status", "stack", "static_bytes", "sample", "sample_status",
    "error", "token", *COLUMNS, "run_complete",
)  # fmt: skip


def render(runs: Sequence[Run], unit: str = "GiB") -> str:
    """All tokens of all ``runs``; a failed sample is one row without a token. Bytes, whatever ``unit`` is."""
    del unit
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(HEAD)
    for number, run in enumerate(runs):
        spec = run.record.spec
        about = (
            run.path or f"run{number}", spec.model, spec.method, spec.task, run.record.data_label, spec.device,
            run.record.status, spec.stack, run.record.static_bytes,
        )  # fmt: skip
        for sample in run.samples:
            named = (*about, sample.id, sample.status, sample.error or "")
            whole = "no" if run.unfinished else "yes"
            columns = [getattr(sample.tokens, name) for name in COLUMNS]
            for token, values in enumerate(zip(*columns, strict=True)):
                writer.writerow(map(_safe, (*named, token, *values, whole)))
            if not len(sample.tokens):
                writer.writerow(map(_safe, (*named, *[""] * (1 + len(COLUMNS)), whole)))
    return file.getvalue()


def _safe(value: object) -> object:
    """A cell that no spreadsheet takes for a formula, and no terminal for an order."""
    if not isinstance(value, str):
        return value
    text = visible(value, but="\t\u2028\u2029")
    return f"'{text}" if value.lstrip().startswith(("=", "+", "-", "@")) or value.startswith(("\t", "\r")) else text
