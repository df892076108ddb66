"""How long a run without storage takes, with the table of what operators give and with torch's own cache alone::

python benchmarks/recording.py       # half a minute, no card; writes benchmarks/results/recording.json
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from memprof.bench import Bench
from memprof.environment import environment
from memprof.records import RunSpec
from memprof.runner import complete_spec
from memprof.tracing import ledger

MODEL, TIMES = "internvl2-2b", 3
METHODS = ("baseline", "topv")


def by_torch(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operator gives, without the table."""
    return func(*args, **kwargs)


def seconds(method: str) -> dict[str, float]:
    """The least time of a run in both ways, in turns, after one of each."""
    done = complete_spec(RunSpec(MODEL, method, "ai2d", "sim", "current", max_new_tokens=4))
    bench = Bench(done.setup)
    ask = done.ask(bench.model.family.shape(bench.model, 900, 448, 40), seed=0)
    found: dict[str, list[float]] = {"table": [], "torch": []}
    said = []
    for _ in range(1 + TIMES):
        for name, way in (("table", ledger.answer), ("torch", by_torch)):
            kept, ledger.answer = ledger.answer, way
            start = time.perf_counter()
            try:
                said.append(bench.profile(ask))
            finally:
                ledger.answer = kept
            found[name].append(time.perf_counter() - start)
    assert all(one == said[0] for one in said), "the same bytes, either way"
    least = {name: min(times[1:]) for name, times in found.items()}
    return {**least, "ratio": least["torch"] / least["table"]}


def main() -> None:
    """Print the ratios, write them."""
    found = {method: seconds(method) for method in METHODS}
    for method, row in found.items():
        print(f"{method}: {row['table']:.2f} s with the table, {row['torch']:.2f} s by torch: {row['ratio']:.2f} times")
    file = Path(__file__).parent / "results" / "recording.json"
    about = {"schema": 1, "status": "timed", "model": MODEL, "new_tokens": 4, "environment": environment()}
    file.write_text(json.dumps({**about, "methods": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
