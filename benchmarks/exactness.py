"""Whether a program says what a direct trace says, to the byte: random shapes, every method, both stacks.

A prediction of many shapes comes from an allocation program (``memprof/simulator/program.py``), recorded at a few
prompts and evaluated at the rest. Here shapes it was not recorded at are traced directly as well, and everything the
two say is held equal: allocated, reserved and KV bytes of every token, the parts, and the largest tensors at the peak.
Written to ``benchmarks/results``::

    python benchmarks/exactness.py                          # InternVL2-2B, 20 shapes a method and stack
    python benchmarks/exactness.py --method topv --shapes 5
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

from memprof.families import PromptShape
from memprof.pruning import METHODS
from memprof.records import STACKS, RunSpec
from memprof.runner import Bench, complete_spec

RESULTS = Path(__file__).parent / "results"
#: Forms of a method that run other operators than its default.
FORMS = ("fastv:drop=mask", "topv:layer=1,keep=0.3", "topv:recover=4", "topv:score=cost")
#: Shapes a program is made for; those that are checked are drawn from them.
ASKED, TOKENS = 60, 8


def shapes_of(bench: Bench, count: int, seed: int) -> list[PromptShape]:
    """Sizes of prompts in AI2D's range of image sizes and question lengths."""
    draw = random.Random(seed)
    return [
        bench.family.shape(bench.card, draw.randint(240, 1500), draw.randint(156, 1080), draw.randint(20, 100), None)
        for _ in range(count)
    ]


def check(bench: Bench, asked: RunSpec, shapes: int) -> dict[str, Any]:
    """Hold ``shapes`` shapes of one method and stack against direct traces."""
    spec, pruner, _ = complete_spec(asked)
    model, meter = bench.ready(spec)
    wanted = shapes_of(bench, ASKED, 0)
    began = time.perf_counter()
    bench.foresee(spec, pruner, wanted)
    recorded = time.perf_counter() - began
    counts = {"equal": 0, "unequal": 0, "traced directly": 0}
    for shape in random.Random(1).sample(wanted, shapes):
        said = bench._predict(spec, pruner, shape)
        if said is None:
            counts["traced directly"] += 1
            continue
        direct = bench._profile(model, meter, pruner, spec.stack, shape, spec.max_new_tokens, 0)
        counts["equal" if said == direct else "unequal"] += 1
    return {"method": asked.method, "stack": spec.stack, "record_seconds": round(recorded, 1), **counts}


def main() -> int:
    """Check what was asked for; 1 if anything differed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="internvl2-2b")
    parser.add_argument("--method", action="append", help="repeat; default: all, and other forms of some")
    parser.add_argument("--shapes", type=int, default=20)
    given = parser.parse_args()
    os.environ["MEMPROF_CACHE"] = ""
    methods = given.method or [*(name for name, _ in METHODS), *FORMS]
    bench, rows = None, []
    for method in methods:
        for stack in STACKS:
            spec = RunSpec(
                model=given.model, method=method, task="ai2d", device="sim", stack=stack, max_new_tokens=TOKENS
            )
            bench = bench or Bench(complete_spec(spec)[0])
            rows.append(check(bench, spec, given.shapes))
            print(rows[-1], file=sys.stderr, flush=True)
    if not given.method:
        RESULTS.mkdir(exist_ok=True)
        found = {"model": given.model, "tokens": TOKENS, "asked": ASKED, "shapes": given.shapes, "rows": rows}
        (RESULTS / "exactness.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("| method | stack | equal to the byte | unequal | traced directly |\n|---|---|---:|---:|---:|")
    for row in rows:
        print(f"| `{row['method']}` | {row['stack']} | {row['equal']} | {row['unequal']} | {row['traced directly']} |")
    return int(any(row["unequal"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
