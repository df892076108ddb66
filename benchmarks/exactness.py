"""Whether a program says what a direct trace says, to the byte: random shapes, every method, both stacks.

A prediction of many shapes comes from an allocation program (``memprof/simulator/program.py``), recorded at a few
prompts and evaluated at the rest. Here shapes it was not recorded at are traced directly as well, and everything the
two say is held equal: allocated, reserved and KV bytes of every token, the parts, and the largest tensors at the peak.
What was checked before stays in ``benchmarks/results/exactness.json`` beside what is checked now::

    python benchmarks/exactness.py --layers 8          # every method, both towers cut to 8 layers
    python benchmarks/exactness.py --method baseline --method fastv --method topv   # at full depth
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import time
from pathlib import Path
from typing import Any

from memprof.bench import Bench
from memprof.forecasts import Setup
from memprof.prompts import Shape
from memprof.pruning import METHODS
from memprof.records import STACKS, RunSpec
from memprof.runner import Complete, complete_spec

RESULTS = Path(__file__).parent / "results"
#: Forms of a method that run other operators than its default.
FORMS = ("fastv:drop=mask", "topv:layer=1,keep=0.3", "topv:recover=4", "topv:score=cost")
#: Shapes a program is made for; those that are checked are drawn from them.
ASKED, TOKENS = 40, 7


def shapes_of(bench: Bench, count: int, seed: int) -> list[Shape]:
    """Sizes of prompts in AI2D's range of image sizes and question lengths."""
    draw, model = random.Random(seed), bench.model
    return [
        model.family.shape(model, draw.randint(240, 1500), draw.randint(156, 1080), draw.randint(20, 100))
        for _ in range(count)
    ]


def bench_of(spec: RunSpec, layers: int | None) -> Bench:
    """A bench for ``spec``, its towers cut to ``layers`` each: an order of events that holds for 8 holds for 24."""
    return Bench(setup_of(complete_spec(spec), layers))


def setup_of(done: Complete, layers: int | None) -> Setup:
    """Its set-up, with the towers cut."""
    if layers is None:
        return done.setup
    cut = {"num_hidden_layers": layers}
    return dataclasses.replace(done.setup, model=done.setup.model.but(text=cut, vision=cut))


def check(bench: Bench, asked: RunSpec, shapes: int) -> dict[str, Any]:
    """Hold ``shapes`` shapes of one method and stack against direct traces."""
    done = complete_spec(asked)
    bench.set_up(setup_of(done, bench.model.layers if bench.model.layers != done.setup.model.layers else None)).ready()
    wanted = [done.ask(shape, seed=0) for shape in shapes_of(bench, ASKED, 0)]
    began = time.perf_counter()
    bench.foresee(wanted)
    recorded = time.perf_counter() - began
    counts = {"equal": 0, "unequal": 0, "traced directly": 0}
    for ask in random.Random(1).sample(wanted, shapes):
        said = bench._predict(ask)
        if said is None:
            counts["traced directly"] += 1
            continue
        counts["equal" if said == bench.profile(ask) else "unequal"] += 1
    about = {
        "model": done.spec.model, "layers": bench.model.layers, "method": asked.method, "stack": done.spec.stack,
        "tokens": TOKENS,
    }  # fmt: skip
    return {**about, "record_seconds": round(recorded, 1), **counts}


def keep(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Put ``row`` in the place of an older one of the same question, and write all of them."""
    file = RESULTS / "exactness.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    same = ("model", "layers", "method", "stack")
    rows = [old for old in rows if any(old[k] != row[k] for k in same)] + [row]
    rows.sort(key=lambda r: (-r["layers"], r["method"], r["stack"]))
    file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    lines = ["| model | decoder layers | method | stack | equal to the byte | unequal | traced directly |"]
    lines.append("|---|---:|---|---|---:|---:|---:|")
    for r in rows:
        counts = f"{r['equal']} | {r['unequal']} | {r['traced directly']}"
        lines.append(f"| {r['model']} | {r['layers']} | `{r['method']}` | {r['stack']} | {counts} |")
    (RESULTS / "exactness.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return rows


def main() -> int:
    """Check what was asked for; 1 if anything differed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="internvl2-2b")
    parser.add_argument("--method", action="append", help="repeat; default: all, and other forms of some")
    parser.add_argument("--shapes", type=int, default=20)
    parser.add_argument("--layers", type=int, help="layers of both towers; default: the model's own")
    given = parser.parse_args()
    os.environ["MEMPROF_CACHE"] = ""
    RESULTS.mkdir(exist_ok=True)
    bench, wrong = None, 0
    for method in given.method or [*METHODS.names(), *FORMS]:
        for stack in STACKS:
            spec = RunSpec(
                model=given.model, method=method, task="ai2d", device="sim", stack=stack, max_new_tokens=TOKENS
            )
            bench = bench or bench_of(spec, given.layers)
            row = check(bench, spec, given.shapes)
            wrong += row["unequal"]
            keep(row)
            print(row, flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
