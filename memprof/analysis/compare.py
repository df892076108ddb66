"""All methods at several budgets: what is kept, what it costs in bytes and time, what is lost.

Runs are ordinary run folders, one a method and budget, and taken up again where they are; the study is read off them.
A method that the model cannot run is left out, and its reason is kept.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memprof import files
from memprof.analysis.published import BUDGET, definitions
from memprof.bench import Bench
from memprof.errors import MemprofError, UsageError
from memprof.families import Model
from memprof.intervals import bootstrap, intervals
from memprof.pruning import METHODS, build_pruner
from memprof.records import Run, RunSpec, SampleRecord, device_bytes
from memprof.runner import Judge, Progress, check_distinct, complete_spec
from memprof.runner import run as make_run
from memprof.telling import facts
from memprof.telling.palette import method_label

#: What every method has to beat.
CONTROL = "random"


@dataclass
class Study:
    """Runs of one model and task.

    Attributes:
        model: The model.
        runs: Baseline's, then each method's at each budget.
        left_out: Methods that could not run, and why.
    """

    model: Model
    runs: list[Run] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def method_specs(methods: Sequence[str], keeps: Sequence[float]) -> list[str]:
    """Baseline, then each of ``methods`` at each of ``keeps``; ``all`` stands for every method that has a budget.

    Raises:
        UsageError: None that prunes.
        UnknownName: No such method.
        BadValue: A method has no budget, or a budget is outside 0 to 1.
    """
    with_budget = [name for name, cls in METHODS if "keep" in {f.name for f in dataclasses.fields(cls)}]
    wanted = list(dict.fromkeys(one for name in methods for one in (with_budget if name == "all" else [name])))
    pruning = [name for name in wanted if name != facts.BASELINE]
    if not pruning:
        raise UsageError("Baseline is always compared; name a method that prunes beside it, as --methods topv")
    specs = [f"{name}{',' if ':' in name else ':'}keep={keep:g}" for name in pruning for keep in keeps]
    for spec in specs:
        build_pruner(spec)
    return [facts.BASELINE, *specs]


def make(
    asked: RunSpec,
    specs: Sequence[str],
    folder: Path,
    *,
    judge: Judge | None = None,
    begin: Callable[[str], None] = lambda method: None,
    progress: Progress | None = None,
) -> Study:
    """Make, or take up again, a run in ``folder`` for each of ``specs``.

    Args:
        asked: What all have in common; its method says nothing.
        specs: Method specs.
        folder: Each run's folder lies in it, named after its method.
        judge: Compares answers with the unpruned ones.
        begin: Told of each method before it runs.
        progress: Told of each sample.

    Raises:
        UsageError: A method cannot be asked for, or two are equal in full.
    """
    bench: Bench | None = None
    study: Study | None = None
    every = [complete_spec(dataclasses.replace(asked, method=method)) for method in specs]
    check_distinct([done.spec for done in every])
    for method, done in zip(specs, every, strict=True):
        begin(method)
        bench, study = bench or Bench(done.setup), study or Study(done.setup.model)
        path = folder / facts.slug(done.spec.method.replace(":", "_").replace(",", "_"))
        try:
            run = make_run(
                done.spec, path, bench=bench, resume=(path / "run.json").exists(), progress=progress, judge=judge
            )
        except MemprofError as error:
            study.left_out[method] = str(error).partition("\n")[0]
            continue
        if run.finished:
            study.runs.append(run)
        else:
            study.left_out[method] = run.samples[0].error or "no sample finished" if run.samples else "no samples"
    assert study is not None
    return study


def rows(study: Study) -> list[dict[str, Any]]:
    """A line a run: bytes of the highest sample, means with 95 % bootstrap intervals, differences paired by sample."""
    base = next((run for run in study.runs if facts.method_of(run) == facts.BASELINE), None)
    controls = {facts.keep_of(run): run for run in study.runs if facts.method_of(run) == CONTROL}
    return [_row(study.model, run, base, controls.get(facts.keep_of(run))) for run in study.runs]


def _row(model: Model, run: Run, base: Run | None, control: Run | None) -> dict[str, Any]:
    done, spec = run.finished, run.record.spec
    fullest = max(done, key=lambda s: s.kv_cache_bytes)
    prefills = [s.tokens.seconds[0] for s in done if s.tokens.seconds and s.tokens.seconds[0] is not None]
    scores = [s.score for s in done if s.score is not None]
    return {
        "method": facts.method_of(run),
        "spec": spec.method,
        "keep": facts.keep_of(run),
        "positions": build_pruner(spec.method, spec.stack).positions,
        "samples": len(done),
        "failed": len(run.samples) - len(done),
        "status": run.record.status,
        "visual_flops_cut": run.record.visual_flops_cut,
        "static_bytes": run.record.static_bytes,
        "dynamic_peak_bytes": max(s.dynamic_peak_bytes for s in done),
        "peak_allocated_bytes": max(s.peak_allocated_bytes for s in done),
        "peak_reserved_bytes": max(s.peak_reserved_bytes for s in done),
        "device_bytes": device_bytes(run),
        "saved": None if base is None else facts.saving(run, [base, run]),
        "kv_cache_bytes": fullest.kv_cache_bytes,
        "kv_after_prefill_bytes": sum(fullest.kv_bytes_per_layer),
        "kv_published_bytes": _published(model, run, fullest),
        "prefill_seconds": min(prefills) if prefills else None,  # a busy machine only adds
        "accuracy": bootstrap(scores).to_json() if scores else None,
        "accuracy_minus_baseline": _difference(run, base),
        "accuracy_minus_random": _difference(run, control),
        "fidelity": {name: it.to_json() for name, it in intervals([s.fidelity for s in done if s.fidelity]).items()},
    }


def _published(model: Model, run: Run, sample: SampleRecord) -> dict[str, int]:
    """What each definition in use gives for the sample with the largest cache."""
    spec = run.record.spec
    shape = sample.shape
    if shape is None:
        return {}
    ways = definitions(model, build_pruner(spec.method, spec.stack), shape, spec.dtype)
    return {way.name: way.bytes for way in ways}


def _difference(run: Run, other: Run | None) -> dict[str, float] | None:
    """Mean difference of scores over the samples that both have one of, or None."""
    if other is None or other is run:
        return None
    theirs = {s.id: s.score for s in other.finished if s.score is not None}
    pairs = [s.score - theirs[s.id] for s in run.finished if s.score is not None and s.id in theirs]
    return bootstrap(pairs).to_json() if pairs else None


def budget_bytes(row: dict[str, Any]) -> int | None:
    """KV as most published tables have it: the budget of visual tokens in all layers, without text."""
    held: dict[str, int] = row["kv_published_bytes"]
    return held.get(BUDGET)


def table(lines: Sequence[dict[str, Any]], unit: str) -> str:
    """Markdown, a line a method and budget, by falling budget; columns that nothing was measured for are left out."""
    from memprof.units import in_unit

    def size(n_bytes: int | None) -> str:
        return "" if n_bytes is None else f"{in_unit(n_bytes, unit):.3f}"

    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "keep / pruned": lambda r: "-" if r["keep"] is None else f"{r['keep']:.3g} / {1 - r['keep']:.3g}",
        "method": lambda r: _named(r),
        "FLOPs cut": lambda r: "" if r["visual_flops_cut"] is None else f"{100 * r['visual_flops_cut']:.0f} %",
        f"static {unit}": lambda r: size(r["static_bytes"]),
        f"dynamic peak {unit}": lambda r: size(r["dynamic_peak_bytes"]),
        "against Baseline": lambda r: facts.change_text(r["saved"]),
        f"reserved {unit}": lambda r: "" if r["device_bytes"] is None else size(r["peak_reserved_bytes"]),
        f"total {unit}": lambda r: size(r["device_bytes"]),
        f"KV held {unit}": lambda r: size(r["kv_after_prefill_bytes"]),
        f"KV as published {unit}": lambda r: size(budget_bytes(r)),
        "prefill ms": lambda r: "" if r["prefill_seconds"] is None else f"{1e3 * r['prefill_seconds']:.0f}",
        "accuracy %": lambda r: _spread(r["accuracy"]),
        "minus Random": lambda r: _spread(r["accuracy_minus_random"]),
        "same tokens %": lambda r: _spread(r["fidelity"].get("agreement")),
        "KL, nats": lambda r: _spread(r["fidelity"].get("kl"), 1, 3),
    }
    ordered = sorted(lines, key=lambda r: (-(r["keep"] or 0), r["method"] != facts.BASELINE))
    cells = {head: [cell(row) for row in ordered] for head, cell in columns.items()}
    shown = [head for head, column in cells.items() if any(column)]
    body = [[cells[head][i] for head in shown] for i in range(len(ordered))]
    text = [shown, ["---"] * len(shown), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in text)


def _named(row: dict[str, Any]) -> str:
    """The method's title, or its whole spec where it is not the default reading."""
    name, settings = row["spec"].partition(":")[0], row["spec"].partition(":")[2]
    default = build_pruner(f"{name}:keep={row['keep']:g}" if row["keep"] is not None and settings else name)
    asked = build_pruner(row["spec"])
    return method_label(name) if name == facts.BASELINE or asked.like == default.like else f"`{row['spec']}`"


def _spread(value: dict[str, float] | None, scale: float = 100, digits: int = 0) -> str:
    """A mean and its interval."""
    if value is None:
        return ""
    mean, low, high = (f"{scale * value[key]:.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def document(study: Study) -> dict[str, Any]:
    """The study as one JSON-ready document."""
    first = study.runs[0].record.spec
    return {
        "schema": 1,
        "model": study.model.name,
        "task": first.task,
        "title": f"Token pruning: {study.model.title} on {facts.data_title(study.runs[0].record)}",
        "provenance": facts.provenance(study.runs),
        "rows": rows(study),
        "left_out": study.left_out,
    }


def told(study: dict[str, Any], unit: str) -> str:
    """:func:`document` as Markdown: the table, and what was left out."""
    origin = study["provenance"]
    total = "Reserved: static, dynamic and cached; total: with the CUDA context, as nvidia-smi shows it. "
    shown = any(row["device_bytes"] for row in study["rows"])
    count = f"{origin['samples']} sample{'s' * (str(origin['samples']) != '1')}"
    lines = [
        f"## {study['title']}\n",
        f"{origin.get('where') or origin['status']}, {origin['data']}, {count}, "
        f"stack {origin['stack']}, {origin['dtype']}. "
        f"{total if shown else ''}KV held: of the fullest sample, after prefill. KV as published: the budget of visual "
        "tokens in all layers, without text.\n",
        table(study["rows"], unit),
    ]
    lines += [f"- left out: `{method}`: {reason}" for method, reason in study["left_out"].items()]
    return "\n".join(lines) + "\n"


def write(study: dict[str, Any], text: str, folder: Path) -> list[Path]:
    """``compare.json`` and ``compare.md`` in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    data, page = folder / "compare.json", folder / "compare.md"
    files.replace(data, json.dumps(study, indent=1, ensure_ascii=False) + "\n")
    files.replace(page, text)
    return [data, page]


def figure(study: dict[str, Any]) -> dict[str, Any]:
    """The data of the figure of a study (:mod:`memprof.figures.kinds.comparison`)."""
    lines = [row for row in study["rows"] if row["keep"] is not None]
    base = next((row for row in lines if row["method"] == facts.BASELINE), None)
    pruned = [row for row in lines if row["method"] != facts.BASELINE]
    names = list(dict.fromkeys(row["method"] for row in pruned))
    panels = [
        _panel("dynamic peak", "bytes", pruned, base, lambda r: r["dynamic_peak_bytes"]),
        _panel("KV after prefill", "bytes", pruned, base, lambda r: r["kv_after_prefill_bytes"], budget_bytes),
        _panel("prefill", "s", pruned, base, lambda r: r["prefill_seconds"]),
        _panel("right answers", "%", pruned, base, lambda r: r["accuracy"]),
        _panel("same tokens", "%", pruned, base, lambda r: r["fidelity"].get("agreement")),
    ]
    return {
        "schema": 1,
        "kind": "comparison",
        "name": "comparison",
        "title": study["title"],
        "provenance": study["provenance"] | {"methods": _said_of_marks(pruned)},
        "methods": names,
        "shares": sorted({row["keep"] for row in pruned}),
        "panels": [panel for panel in panels if panel["series"]],
    }


def _said_of_marks(lines: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader of the figure has to know of its marks."""
    said = ["KV of the fullest sample"]
    if any(row["prefill_seconds"] is not None for row in lines):
        said.append("prefill: the fastest sample's")
    return [*said, "bars: 95 % bootstrap intervals"] if any(row["accuracy"] for row in lines) else said


def _panel(
    title: str,
    unit: str,
    lines: Sequence[dict[str, Any]],
    base: dict[str, Any] | None,
    value: Callable[[dict[str, Any]], Any],
    published: Callable[[dict[str, Any]], int | None] = lambda row: None,
) -> dict[str, Any]:
    """One measure of each line, and the same as ``published``; of a method's readings at one budget the first."""
    series = dict[str, list[dict[str, Any]]]()
    for row in lines:
        found, points = value(row), series.setdefault(row["method"], [])
        if found is not None and all(point["keep"] != row["keep"] for point in points):
            theirs = published(row)
            points.append({"keep": row["keep"], **_ends(found), **({} if theirs is None else {"published": theirs})})
    level = value(base) if base is not None else None
    return {
        "title": title,
        "unit": unit,
        "spread": unit == "%",
        "baseline": None if level is None else _ends(level)["value"],
        "series": {name: points for name, points in series.items() if points},
    }


def _ends(value: Any) -> dict[str, float]:
    """A mean and the ends of its interval; a number is its own."""
    if isinstance(value, dict):
        return {"value": value["mean"], "low": value["low"], "high": value["high"]}
    return {"value": value, "low": value, "high": value}
