"""A run, as what predicts it."""

from __future__ import annotations

import dataclasses
from typing import Any

from memprof.records import GIVEN, RunSpec


def predicting(spec: RunSpec, **changes: Any) -> RunSpec:
    """``spec`` on the simulated device, with ``changes``.

    The hub's weights, and a program's own, become random ones: a prediction needs none. A path stays, as the
    configuration that lies there decides the sizes.
    """
    weights = "random" if spec.weights in ("hub", GIVEN) else spec.weights
    return dataclasses.replace(spec, **{"device": "sim", "weights": weights, **changes})
