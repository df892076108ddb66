"""How long the first answer takes, command by command: nothing recorded, in the user's cache, and as memprof ships.

Each answer is a process of its own, imports included, for InternVL2-2B on the bundled sample of AI2D. Of three
processes the quickest counts (one, where it records); seconds of CPU are given beside, as they hardly depend on what
else the machine does. Written to ``benchmarks/results/first_answers.json``::

    python benchmarks/first_answers.py             # all three
    python benchmarks/first_answers.py --recorded  # without the first, which takes a minute or two
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "first_answers.json"
MODEL = "internvl2-2b"
COMMANDS = {
    "run": ["run", "--model", MODEL, "--method", "topv", "--device", "auto", "-o", "{here}/run", "--force"],
    "fit": ["fit", "--model", MODEL, "--gpu", "8GiB"],
    "fit topv": ["fit", "--model", MODEL, "--method", "topv", "--gpu", "24GiB"],
    "explain": ["explain", "{here}/run"],
    "tune": ["tune", "--model", MODEL, "--method", "topv", "--budget", "4.6GiB", "-o", "{here}/tune"],
}
#: Goals in seconds, of an answer that records and of one that does not.
GOALS = {"nothing recorded": 8.0, "in the cache": 1.5, "shipped": 1.5}
CODE = """
import sys
from pathlib import Path
from memprof.forecasts import book
if sys.argv[1] != "shipped": book.SHIPPED = Path("nowhere")
from memprof.cli import main
try: main(sys.argv[2:])
except SystemExit as end: code = end.code
print(int("torch" in sys.modules), file=sys.stderr)
sys.exit(code)
"""


def answer(name: str, way: str, here: Path, cache: Path) -> dict[str, Any]:
    """One process."""
    words = [word.replace("{here}", str(here)) for word in COMMANDS[name]]
    if name == "tune":
        words[-1] += f"-{time.monotonic_ns()}"
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", CODE, way, *words, "--json"], capture_output=True, text=True, check=False,
        env={**os.environ, "MEMPROF_CACHE": str(cache)},
    )  # fmt: skip
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(done.stderr)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_seconds": seconds, "cpu_seconds": cpu, "torch_loaded": done.stderr.strip().endswith("1")}


def main() -> None:
    """Time every command in every way, and write down what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recorded", action="store_true", help="only answers that record nothing")
    args = parser.parse_args()
    results: dict[str, Any] = {
        "machine": f"{len(os.sched_getaffinity(0))} cores of {platform.machine()}", "load_before": os.getloadavg()[0],
        "model": MODEL, "goals_seconds": GOALS, "answers": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        here, cache = Path(folder), Path(folder) / "cache"
        for way in GOALS:
            for name in COMMANDS:
                if way == "nothing recorded":
                    if args.recorded:
                        continue
                    # Each begins with an empty cache; the run that is explained is there.
                    own = cache if name == "run" else Path(folder) / f"cache-{name}"
                    times = [answer(name, way, here, own)]
                else:
                    used = cache if way == "in the cache" else Path(folder) / "empty"
                    first = answer(name, way, here, used)  # in the cache: puts there what is missing
                    times = [first, answer(name, way, here, used), answer(name, way, here, used)]
                    times = times[1:] if way == "in the cache" else times
                best = min(times, key=lambda one: one["wall_seconds"])
                results["answers"].setdefault(way, {})[name] = best
                print(f"{way:>16} {name:>8}: {best['wall_seconds']:6.2f} s wall, {best['cpu_seconds']:6.2f} s of CPU"
                      f"{', torch loaded' if best['torch_loaded'] else ''}", flush=True)  # fmt: skip
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
