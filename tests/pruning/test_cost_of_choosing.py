"""What choosing tokens costs: operators, bytes, and a peak that does not rise, all told without a card."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from memprof.bench import Bench
from memprof.bench.generate import profile_prompt
from memprof.models.find import find
from memprof.pruning import METHODS, build_pruner
from memprof.records import RunSpec
from memprof.runner import complete_spec

ROOT = Path(__file__).parents[2]
PRUNING = [name for name in METHODS.names() if name != "baseline"]


@cache
def loaded(path: str) -> ModuleType:
    """A file of ``benchmarks`` or ``scripts``."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@cache
def stand(tiles: int) -> Any:
    """InternVL2-2B in its true width and a prompt of so many tiles."""
    return loaded("benchmarks/selection.py").Stand(tiles)


@pytest.mark.parametrize("method", PRUNING)
def test_a_choice_at_thirteen_tiles_is_a_few_operators_or_said_to_be_sequential(method: str) -> None:
    row = stand(13).tally(method)
    assert row["choice"] > 0
    if build_pruner(method).sequential:
        assert row["choice"] > row["cuts"] * 300, "then it need not be called sequential"
    else:
        assert row["choice"] <= (60 if method == "topv" else 300 * row["cuts"])


@pytest.mark.parametrize("spec", ["topv", "topv:features=l2,relax=source,score=sum,recover=4", "topv:beta=0"])
@pytest.mark.parametrize("tiles", [1, 13, 40])
def test_topv_stays_below_what_its_layer_took(tiles: int, spec: str) -> None:
    """At 10,240 tokens too, where the matrix of all pairs is more than the layer had."""
    here = stand(tiles)
    profile_prompt(here.model, here.meter, build_pruner(spec), "current", here.prompt, new_tokens=1)
    trace, live, products, most = here.meter.trace, 0, 0, {"layer": 0, "pruner": 0}
    for event in trace.events:
        slot = max(event, ~event)
        live += trace.nbytes[slot] if event >= 0 else -trace.nbytes[slot]
        if event < 0:
            continue
        part, (module, operator) = trace.parts[slot], trace.sites[slot]
        if part == "pruner" or ".layers.1." in module:
            part = "pruner" if part == "pruner" else "layer"
            most[part] = max(most[part], live)
            products += part == "pruner" and operator.startswith("aten.mm")
    assert most["pruner"] < most["layer"]
    assert (products > 1) == (tiles == 40), "whole where it fits, in blocks beyond"


@pytest.mark.parametrize("stack", ["current", "paper"])
@pytest.mark.parametrize("model", ["internvl2-2b", "llava-1.5-7b"])
def test_topv_peaks_are_those_of_random_at_the_same_cut(model: str, stack: str) -> None:
    """Every token of every shape that is recorded on cards, to the byte; what is reserved, too."""
    bench, found = None, {}
    for method in ("topv", "random"):
        done = complete_spec(
            RunSpec(model, method, "ai2d", "sim", stack, find(model).dtype, max_new_tokens=3, gpu="h100")
        )
        bench = bench or Bench(done.setup)
        shapes = [
            bench.model.family.shape(bench.model, *sizes, done.spec.max_tiles)
            for sizes in loaded("scripts/record_reference.py").shapes(model)
        ]
        asks = [done.ask(shape, seed=0) for shape in shapes]
        bench.foresee(asks)
        memory = [bench.outcome(ask).memory.cards[0].tokens for ask in asks]
        found[method] = [(row.peak_allocated_bytes, row.reserved_bytes) for row in memory]
    assert len(found["topv"]) >= 8
    assert found["topv"] == found["random"]
