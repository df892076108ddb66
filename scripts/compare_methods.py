"""All methods at several budgets on the proving model: what is kept, what is lost, what it costs.

    python scripts/compare_methods.py --samples 200 -o plots

Every method that has a ``keep`` is run, found and not listed, beside Baseline and the controls Random and Uniform. The
numbers are the proving model's own: they show how methods rank learnt attention, not how any other model fares. Runs go
to ``runs/compare`` and are resumed; ``compare_methods.json``, ``.md``, ``.pdf`` and ``.png`` are made from them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from memprof.analysis.fidelity import Judge
from memprof.figures import facts, palette
from memprof.figures.style import KeyItem, Look, Sheet, save
from memprof.intervals import bootstrap, intervals
from memprof.pruning import METHODS
from memprof.records import Run, RunSpec
from memprof.runner import Bench, run

KEEPS = (0.75, 0.5, 0.25, 0.125)
#: Task and what the proving model is asked under it.
TASKS = {"ocrbench": "strings read", "ai2d": "last characters read"}
CONTROL = "random"
#: TopV read otherwise than by default, one choice at a time: what its paper leaves open.
VARIANTS = (
    "topv:sigma=0.417", "topv:sigma=0.1", "topv:eps=0.05", "topv:beta=0.0", "topv:beta=0.0,score=sum",
    "topv:beta=0.0,score=sum,iterations=20", "topv:score=sum", "topv:score=cost", "topv:relax=source",
    "topv:features=l2", "topv:features=l2,score=sum,marginals=norm", "topv:recover=4", "topv:layer=3",
)  # fmt: skip
VARIED_KEEPS = (0.5, 0.25)


def methods() -> list[str]:
    """Names of all methods with a budget, Baseline's having none."""
    return [name for name, cls in METHODS if "keep" in {f.name for f in dataclasses.fields(cls)}]


def make_runs(
    folder: Path, task: str, specs: Sequence[str], samples: int, seed: int, weights: str = "random"
) -> list[Run]:
    """A run for every method spec; what is there is taken up again."""
    found: list[Run] = []
    bench: Bench | None = None
    judge = Judge()
    for method in specs:
        spec = RunSpec(
            model="proving", method=method, task=task, device="cpu", dtype="float32", limit=samples, max_new_tokens=8,
            seed=seed, weights=weights,
        )  # fmt: skip
        bench = bench or Bench(spec)
        path = folder / task / method.replace(":", "_")
        found.append(run(spec, path, bench=bench, resume=path.exists(), judge=judge))
        print(task, method, bootstrap(s.score or 0.0 for s in found[-1].finished).mean, flush=True)
    return found


def with_budget(specs: Sequence[str], keeps: Sequence[float]) -> list[str]:
    """Each of ``specs`` at each of ``keeps``."""
    return [f"{spec}{',' if ':' in spec else ':'}keep={keep}" for spec in specs for keep in keeps]


def row(run: Run, baseline: Run, control: Run | None) -> dict[str, Any]:
    """One line of the table: means with 95 % bootstrap intervals over samples; differences are paired."""
    done = run.finished
    scores = [s.score or 0.0 for s in done]

    def against(other: Run) -> dict[str, float]:
        pairs = zip(scores, (s.score or 0.0 for s in other.finished), strict=True)
        return bootstrap(a - b for a, b in pairs).to_json()

    return {
        "method": facts.method_of(run),
        "spec": run.record.spec.method,
        "keep": facts.keep_of(run),
        "task": run.record.spec.task,
        "samples": len(done),
        "visual_flops_cut": run.record.visual_flops_cut,
        "accuracy": bootstrap(scores).to_json(),
        "accuracy_minus_baseline": against(baseline),
        "accuracy_minus_random": against(control) if control else None,
        "fidelity": {name: it.to_json() for name, it in intervals([s.fidelity for s in done if s.fidelity]).items()},
        "dynamic_peak_bytes": max(s.dynamic_peak_bytes for s in done),
        "kv_cache_bytes": max(s.kv_cache_bytes for s in done),
        "prefill_seconds": min(s.tokens.seconds[0] or 0.0 for s in done),  # a busy machine only adds
    }


def study(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The lines of one task."""
    controls = {facts.keep_of(r): r for r in runs if facts.method_of(r) == CONTROL}
    return [row(r, runs[0], controls.get(facts.keep_of(r))) for r in runs]


def table(rows: Sequence[dict[str, Any]], *, settings: bool = False) -> str:
    """Markdown, one line a method and budget; with ``settings`` methods are named by their whole spec."""

    def spread(value: dict[str, float], scale: float = 100, digits: int = 0) -> str:
        mean, low, high = (f"{scale * value[k]:.{digits}f}" for k in ("mean", "low", "high"))
        return f"{mean} [{low}, {high}]"

    head = (
        "keep / pruned", "method", "FLOPs cut", "accuracy %", "minus Random", "same tokens %", "KL, nats",
        "dynamic peak MiB", "KV KiB", "fastest prefill ms",
    )  # fmt: skip
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for it in sorted(rows, key=lambda it: (-it["keep"], it["method"] != "baseline")):
        over = it["accuracy_minus_random"]
        cells = (
            f"{it['keep']:g} / {1 - it['keep']:g}",
            f"`{it['spec']}`" if settings else METHODS.load(it["method"]).title,
            f"{100 * it['visual_flops_cut']:.0f} %",
            spread(it["accuracy"]),
            spread(over) if over and it["method"] != CONTROL else "",
            spread(it["fidelity"]["agreement"]),
            spread(it["fidelity"]["kl"], 1, 3),
            f"{it['dynamic_peak_bytes'] / 2**20:.2f}",
            f"{it['kv_cache_bytes'] / 2**10:.0f}",
            f"{1e3 * it['prefill_seconds']:.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def paint(data: dict[str, Any], look: Look) -> Any:
    """A panel a task, and one for fidelity: the share right (or the same) over the share kept."""
    rows, pt = data["rows"], look.pt
    names = sorted({r["method"] for r in rows} - {"baseline"}, key=lambda n: (n != "topv", n))
    marks = dict(zip(names, "osD^vPX*<>", strict=False))
    key = [KeyItem(METHODS.load(n).title, palette.method_colour(n), marks[n]) for n in names]
    key.append(KeyItem("Baseline", palette.method_colour("baseline"), "line"))
    sheet = Sheet(look, data, data["title"], body=120, left=30, right=6, key=key)
    first = next(iter(TASKS))
    panels = [(task, title, "accuracy", None) for task, title in TASKS.items()]
    panels.append((first, "same tokens as unpruned", "fidelity", "agreement"))
    gap = pt(20)
    wide = (sheet.x1 - sheet.x0 - gap * (len(panels) - 1)) / len(panels)
    for number, (task, title, group, measure) in enumerate(panels):
        axes = sheet.axes((number * (wide + gap), 0, wide, pt(108)))
        for place, name in enumerate(names):
            mine = sorted((r for r in rows if r["task"] == task and r["method"] == name), key=lambda r: r["keep"])
            values = [r[group] if measure is None else r[group][measure] for r in mine]
            at = [KEEPS[::-1].index(r["keep"]) + 0.09 * (place - (len(names) - 1) / 2) for r in mine]
            mean = [100 * v["mean"] for v in values]
            ends = [[100 * abs(v["mean"] - v[end]) for v in values] for end in ("low", "high")]
            axes.errorbar(
                at, mean, yerr=ends, color=palette.method_colour(name), marker=marks[name], markersize=pt(3),
                linewidth=pt(0.8), elinewidth=pt(0.6),
            )  # fmt: skip
        base = next(r for r in rows if r["task"] == task and r["method"] == "baseline")
        level = base[group] if measure is None else base[group][measure]
        axes.axhline(100 * level["mean"], color=palette.method_colour("baseline"), linewidth=pt(1.0), zorder=0)
        axes.set_xticks(range(len(KEEPS)), [f"{keep:g}" for keep in KEEPS[::-1]])
        axes.set_ylim(0, 104)
        axes.set_title(title, fontsize=look.base, loc="left")
        axes.set_xlabel("share of visual tokens kept")
        if not number:
            axes.set_ylabel("%")
    return sheet.figure


def main() -> None:
    """Run, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path("plots"))
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"))
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", default="random", help="another checkpoint of the proving model; default: its own")
    parser.add_argument("--only", choices=tuple(TASKS), help="make the runs of one task, in a process of its own")
    given = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [t for t in TASKS if given.only in (None, t)]
    specs = ["baseline", *with_budget(methods(), KEEPS)]
    runs = {task: make_runs(given.runs, task, specs, given.samples, given.seed, given.weights) for task in chosen}
    first = next(iter(TASKS))
    varied = ["baseline", *with_budget(("random", "topv", *VARIANTS), VARIED_KEEPS)]
    # A process for one task alone leaves the other readings to the process for the other, which has as much to do.
    readings = given.only != first
    folder = given.runs / "readings"  # of its own: no two processes may write to one run
    variants = make_runs(folder, first, varied, given.samples, given.seed, given.weights) if readings else []
    if given.only:
        return
    rows = [line for found in runs.values() for line in study(found)]
    every = [one for found in runs.values() for one in found]
    data = {
        "schema": 1,
        "name": "compare_methods",
        "title": "Token pruning on the proving model's own questions",
        "provenance": facts.provenance(every) | {"methods": ["bars: 95 % bootstrap intervals"]},
        "rows": rows,
        "topv_variants": study(variants),
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "compare_methods.json").write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    text = "\n".join(f"## {title}\n\n{table([r for r in rows if r['task'] == task])}" for task, title in TASKS.items())
    text += f"\n## TopV read otherwise ({TASKS[first]})\n\n{table(data['topv_variants'], settings=True)}"
    (given.out / "compare_methods.md").write_text(text)
    look = Look.of(width="double", unit="MiB")
    with look.settings():
        figure = paint(data, look)
        for kind in ("pdf", "png"):
            save(figure, given.out / f"compare_methods.{kind}", look)
    print(text)


if __name__ == "__main__":
    main()
