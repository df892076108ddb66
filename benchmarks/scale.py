"""How long a prediction takes: it grows with the number of distinct shapes, not with samples or the size of the model.

Each point is a process of its own that runs ``memprof.runner.run`` with an empty cache of programs: imports, building
the model and recording (where its programs do not ship), evaluating, and one flushed line a sample are all in the time;
seconds of CPU and bytes are those of the process and of its copies together (pages they share count once). Written
to ``benchmarks/results``::

    python benchmarks/scale.py            # all points, then the figure
    python benchmarks/scale.py --headline # 3,088 samples x three methods x 16 tokens alone
    python benchmarks/scale.py --draw     # the figure from what was measured before
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
METHODS = ("baseline", "fastv", "topv")
#: Samples of AI2D's test split, and the tokens its task makes.
SAMPLES, TOKENS = 3088, 16
#: Distinct shapes of the headline. AI2D itself is not at hand; its images have 9 tile counts in memprof's sample of 43
#: sizes and its prompts spread over some 60 lengths, of which not all pairs occur.
SHAPES = 400
MODELS = ("internvl2-2b", "internvl2-8b", "llava-1.5-13b", "internvl2-26b", "internvl2-76b")


def shapes_file(path: Path, samples: int, distinct: int) -> None:
    """``samples`` rows of exactly ``distinct`` shapes: image sizes in AI2D's range, 20 to 100 tokens of question."""
    draw, seen = random.Random(0), dict[tuple[int, int], tuple[int, int, int]]()
    from memprof.models.find import find

    card = find("internvl2-2b")

    family = card.family
    while len(seen) < distinct:
        row = draw.randint(240, 1500), draw.randint(156, 1080), draw.randint(20, 100)
        shape = family.shape(card, *row, None)
        seen.setdefault((shape.tiles, shape.text[-1]), row)
    rows = list(seen.values())
    lines = [",".join(map(str, rows[i % len(rows)])) for i in range(samples)]
    path.write_text("width,height,text_tokens\n" + "\n".join(lines) + "\n", encoding="utf-8")


def child(model: str, data: str, output: str) -> None:
    """Run the three methods and print what it took."""
    start = time.perf_counter()
    from memprof.bench import Bench
    from memprof.models.find import find
    from memprof.records import RunSpec
    from memprof.runner import complete_spec, run

    imported = time.perf_counter()
    took, bench, done = {}, None, 0
    for method in METHODS:
        began = time.perf_counter()
        spec = RunSpec(model=model, method=method, task="ai2d", device="sim", data=data, max_new_tokens=TOKENS,
                       dtype=find(model).dtype)  # fmt: skip
        bench = bench or Bench(complete_spec(spec).setup)
        done += len(run(spec, Path(output) / method, bench=bench).finished)
        took[method] = time.perf_counter() - began
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps({
        "import_seconds": imported - start, "method_seconds": took, "samples_done": done,
        "cpu_seconds": sum(one.ru_utime + one.ru_stime for one in usage),
    }))  # fmt: skip


def held(pid: int) -> int:
    """Bytes held by a process and its copies, shared pages once; 0 where it is gone, or nothing is said of it."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
    except OSError:
        return 0
    own = next(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:"))
    return own + sum(held(int(child)) for child in children)


def point(model: str, samples: int, distinct: int) -> dict[str, Any]:
    """One process."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "shapes.csv"
        shapes_file(data, samples, distinct)
        load, start = os.getloadavg()[0], time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, __file__, "--child", model, str(data), f"{folder}/runs"],
            env={**os.environ, "MEMPROF_CACHE": f"{folder}/cache"}, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        most = 0
        while process.poll() is None:
            most = max(most, held(process.pid))
            time.sleep(0.5)
        seconds = time.perf_counter() - start
        said = process.communicate()[0]
        if process.returncode:
            raise SystemExit(process.returncode)
    out = {
        "model": model, "samples": samples, "distinct_shapes": distinct, "tokens": TOKENS, "methods": len(METHODS),
        "cores": len(os.sched_getaffinity(0)), "wall_seconds": seconds, "load_before": load, "peak_bytes": most,
        **json.loads(said.splitlines()[-1]),
    }  # fmt: skip
    print(f"{model} {samples} samples, {distinct} shapes: {seconds:.1f} s wall, {out['cpu_seconds']:.1f} s CPU, "
          f"{out['peak_bytes'] / 2**30:.2f} GiB", file=sys.stderr)  # fmt: skip
    return out


def draw(results: dict[str, Any]) -> None:
    """Three panels: seconds of CPU against samples, distinct shapes, and parameters."""
    from matplotlib.figure import Figure

    from memprof.figures.style import Look
    from memprof.telling.palette import method_colour

    look = Look.of("paper", "double")
    with look.settings():
        figure = Figure(figsize=(6.9, 2.3), layout="constrained")
        axes = figure.subplots(1, 3, sharey=True)
        panels = (("samples", "samples"), ("distinct_shapes", "distinct shapes"), ("model", "parameters, billions"))
        for axis, (key, label) in zip(axes, panels, strict=True):
            points = results["by_" + key]
            x = [float(p["model"].rpartition("-")[2][:-1]) if key == "model" else p[key] for p in points]
            y = [p["cpu_seconds"] for p in points]
            axis.plot(x, y, "o" if key == "model" else "o-", markersize=3, color=method_colour("topv"))
            axis.set_xlabel(label)
            if key == "model":
                axis.set_xscale("log")
                axis.set_xlim(1.3, 150)
                axis.set_xticks([2, 10, 50], ["2", "10", "50"])
                axis.minorticks_off()
                for point, left, up in zip(points, x, y, strict=True):
                    name = point["model"].rpartition("-")[0] if "llava" in point["model"] else point["model"]
                    axis.annotate(name.replace("internvl2-", ""), (left, up), (0, 5), textcoords="offset points",
                                  ha="center", fontsize=5)  # fmt: skip
        axes[0].set_ylabel("seconds of CPU, 3 methods")
        axes[0].set_ylim(0, 1.1 * max(p["cpu_seconds"] for key, _ in panels for p in results["by_" + key]))
        figure.suptitle(
            f"{TOKENS} tokens under three methods, an empty cache; 26b and 76b do not ship and are recorded first",
            fontsize=8,
        )
        for suffix in ("png", "pdf"):
            figure.savefig(RESULTS / f"scale.{suffix}", dpi=look.dpi, metadata={"CreationDate": None} if suffix == "pdf"
                           else {"Software": None})  # fmt: skip


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--headline", action="store_true")
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child)
        return
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / "scale.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if not args.draw:
        results["headline"] = point("internvl2-2b", SAMPLES, SHAPES)
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        if not args.headline:
            results["by_samples"] = [point("internvl2-2b", n, 25) for n in (25, 800, SAMPLES)]
            results["by_distinct_shapes"] = [point("internvl2-2b", 400, n) for n in (25, 100, 200, 400)]
            results["by_model"] = [point(model, 400, 25) for model in MODELS]
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if "by_model" in results:
        draw(results)


if __name__ == "__main__":
    main()
