"""Settings evaluated by arithmetic: what a search does, without a model."""

from __future__ import annotations

import time
from typing import Any

from memprof.plugins import split_spec
from memprof.records import RunSpec
from memprof.tuning import Question, Result

GIB = 2**30


def question(*methods: str, **changes: Any) -> Question:
    spec = RunSpec(model="internvl2-2b", method="baseline", task="ai2d", device="sim", seed=changes.pop("seed", 0))
    return Question(spec, methods or ("topv",), **({"budget_bytes": 5 * GIB} | changes))


class Stub:
    """Memory rises with keep and layer; weights are 4 GiB."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.calls: list[str] = []
        self.seconds = seconds

    def __call__(self, method: str, name: str) -> Result:
        self.calls.append(method)
        time.sleep(self.seconds)
        spec, values = split_spec(method)
        keep, layer = float(values.get("keep", 1)), int(values.get("layer", 2))
        share = (layer + keep * (24 - layer)) / 24
        peak = int(4 * GIB + (0.2 + 2.2 * share**1.1 + 0.05 * (spec == "fastv")) * GIB)
        return Result("predicted", peak, peak + 2**27, 1 - share, share, held_by="the fp32 logits of all positions")
