"""A program says what a direct trace says, to the byte, at shapes it was never recorded at."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_card

from memprof import predict, runner
from memprof.errors import DoesNotFit
from memprof.families import FAMILIES, PromptShape
from memprof.records import RunSpec
from memprof.runner import Bench, complete_spec
from memprof.simulator.cards import CONTEXT_BYTES
from memprof.units import MIB

#: Every kind of program there is: nothing cut, a row or a map read, a selection by itself, a mask, several cuts.
CASES = (
    ("baseline", "paper"), ("fastv", "current"), ("fastv", "paper"), ("topv", "current"),
    ("topv:keep=0.3,layer=1", "paper"), ("fastv:drop=mask", "current"), ("pyramiddrop:keep=0.7", "current"),
)  # fmt: skip


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMPROF_CACHE", "")


def bench_of(monkeypatch: pytest.MonkeyPatch, method: str, stack: str, **changes: Any) -> tuple[Bench, RunSpec, Any]:
    """A bench over a tiny InternVL of eight decoder layers, deep enough for its layers to be folded."""
    family = FAMILIES.load("internvl")()
    card = tiny_card(family)
    card = dataclasses.replace(card, text={**card.text, "num_hidden_layers": 8})
    monkeypatch.setattr(runner, "find_model", lambda _: (family, card))
    spec = RunSpec(model=card.name, method=method, task="ai2d", device="sim", stack=stack, dtype="bfloat16",
                   max_new_tokens=7, **changes)  # fmt: skip
    spec, pruner, _ = complete_spec(spec)
    return Bench(spec), spec, pruner


def random_shapes(bench: Bench, count: int, seed: int) -> list[PromptShape]:
    draw = random.Random(seed)
    return [
        bench.family.shape(bench.card, draw.randint(100, 1500), draw.randint(100, 1500), draw.randint(1, 90), 12)
        for _ in range(count)
    ]


def compare(bench: Bench, spec: RunSpec, pruner: Any, asked: int, compared: int) -> predict.Predictor:
    """Foresee ``asked`` shapes; hold ``compared`` of them against direct traces."""
    shapes = random_shapes(bench, asked, 1)
    model, meter = bench.ready(spec)
    bench.foresee(spec, pruner, shapes)
    predictor = bench._predictor(spec, pruner)
    assert predictor is not None
    checked = 0
    for shape in random.Random(2).sample(shapes, compared):
        found = predictor.trace(shape, spec.max_new_tokens)
        if found is None:
            continue
        checked += 1
        direct = bench._profile(model, meter, pruner, spec.stack, shape, spec.max_new_tokens, 0)
        real, ours = meter.trace, found[0]
        count, slots = real.marks[-1], len(ours.nbytes)
        assert ours.events == real.events[:count]
        assert ours.marks == real.marks
        assert ours.phases == real.phases
        for name in ("nbytes", "parts", "sites", "shapes", "dtypes"):
            assert list(getattr(ours, name)) == getattr(real, name)[:slots], name
        assert bench._predict(spec, pruner, shape) == direct
    assert checked >= compared * 0.9
    return predictor


@pytest.mark.parametrize(("method", "stack"), CASES)
def test_random_shapes(monkeypatch: pytest.MonkeyPatch, method: str, stack: str) -> None:
    """``benchmarks/exactness.py`` does the same for every method, with more shapes and at full scale."""
    predictor = compare(*bench_of(monkeypatch, method, stack), asked=20, compared=2)
    assert predictor.recorded <= 10


@pytest.mark.slow
def test_internvl2_2b_of_sixteen_tokens() -> None:
    spec, pruner, _ = complete_spec(
        RunSpec(model="internvl2-2b", method="topv", task="ai2d", device="sim", stack="paper", gpu="h100")
    )
    compare(Bench(spec), spec, pruner, asked=20, compared=1)


def test_prompts_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, spec, pruner = bench_of(monkeypatch, "baseline", "current")
    spec = dataclasses.replace(spec, max_new_tokens=2)
    shape = bench.family.shape(bench.card, 300, 300, 20, 2)
    shapes = [dataclasses.replace(shape, batch=n) for n in range(2, 9)]
    model, meter = bench.ready(spec)
    bench.foresee(spec, pruner, shapes)
    for one in (shape, shapes[2], shapes[5]):
        direct = bench._profile(model, meter, pruner, spec.stack, one, spec.max_new_tokens, 0)
        assert bench.outcome(spec, pruner, one, 0) == direct
        assert direct.memory["kv_bytes_per_layer"][0] == one.batch * 2 * 2 * _kv_numbers(bench) * shape.length
    assert bench._predict(spec, pruner, shapes[2]) is not None
    assert bench._predict(spec, pruner, shape) is None, "a program of several says nothing of one"


def _kv_numbers(bench: Bench) -> int:
    text = bench.card.text
    return int(text["num_key_value_heads"] * text.get("head_dim", text["hidden_size"] // text["num_attention_heads"]))


@pytest.mark.parametrize(
    ("method", "tokens", "asked", "recorded"),
    [
        ("topv", 7, 1, 2),  # of two numbers of tokens
        ("topv", 7, 2, 4),
        ("topv", 7, 4, 5),  # one program for all four
        ("fastv:drop=mask", 2, 1, 1),
        ("visionzip", 2, 3, 3),  # other events at each number of tiles: no recording is made twice
    ],
)
def test_few_shapes(monkeypatch: pytest.MonkeyPatch, method: str, tokens: int, asked: int, recorded: int) -> None:
    bench, spec, pruner = bench_of(monkeypatch, method, "current")
    spec = dataclasses.replace(spec, max_new_tokens=tokens)
    shapes = [bench.family.shape(bench.card, 300 * n, 300, 20 + n * n, 12) for n in range(1, asked + 1)]
    assert len({shape.tiles for shape in shapes}) == asked
    model, meter = bench.ready(spec)
    bench.foresee(spec, pruner, shapes)
    predictor = bench._predictor(spec, pruner)
    assert predictor is not None
    assert predictor.recorded == recorded
    for shape in shapes:
        direct = bench._profile(model, meter, pruner, spec.stack, shape, spec.max_new_tokens, 0)
        assert bench._predict(spec, pruner, shape) == direct
    if asked < 3:
        other = dataclasses.replace(shapes[0], after=shapes[0].after + 1)
        assert predictor.forecast(other, tokens) is None, "so few shapes say nothing of another"


def test_a_method_whose_events_depend_on_tiles_is_told_apart_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """VisionZip scores the tiles one by one: a program for each number of them."""
    bench, spec, pruner = bench_of(monkeypatch, "visionzip", "current")
    spec = dataclasses.replace(spec, max_new_tokens=2)
    shapes = [bench.family.shape(bench.card, 300 * n, 300, text, 12) for n in (2, 3) for text in range(10, 70, 10)]
    bench.foresee(spec, pruner, shapes)
    predictor = bench._predictor(spec, pruner)
    assert predictor is not None
    model, meter = bench.ready(spec)
    shape = shapes[2]
    found = predictor.trace(shape, 2)
    assert found is not None
    bench._profile(model, meter, pruner, spec.stack, shape, 2, 0)
    assert found[0].nbytes == meter.trace.nbytes[: len(found[0].nbytes)]  # type: ignore[attr-defined]


class Cached:
    """A folder of programs, and how often a run had to record."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.monkeypatch, self.folder = monkeypatch, folder
        monkeypatch.setenv("MEMPROF_CACHE", str(folder))

    def recordings(self, stack: str = "current") -> int:
        bench, spec, pruner = bench_of(self.monkeypatch, "topv", stack)
        spec = dataclasses.replace(spec, max_new_tokens=2)
        shapes = random_shapes(bench, 20, 5)
        bench.foresee(spec, pruner, shapes)
        predictor = bench._predictor(spec, pruner)
        assert predictor is not None
        assert predictor.forecast(shapes[0], 2) is not None
        return predictor.recorded

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.rglob("*.json"))


def test_programs_are_kept_and_spoiled_files_are_made_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cached = Cached(monkeypatch, tmp_path)
    assert cached.recordings() > 0
    (file,) = cached.files
    assert cached.recordings() == 0
    good = file.read_text()
    data = json.loads(good)
    del data["programs"][0][1]["dims"]
    for text in (good[: len(good) // 2], json.dumps(data)):
        file.write_text(text)
        assert cached.recordings() > 0
        assert json.loads(file.read_text())["programs"]
    monkeypatch.setattr(predict, "source_hash", lambda: "changed")
    monkeypatch.setattr(runner, "source_hash", lambda: "changed")
    assert cached.recordings() > 0
    assert len(cached.files) == 2


def test_where_programs_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert predict.cache_folder() is None
    monkeypatch.setenv("MEMPROF_CACHE", str(tmp_path))
    assert predict.cache_folder() == tmp_path
    monkeypatch.delenv("MEMPROF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert predict.cache_folder() == tmp_path / "x" / "memprof"


def test_a_card_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 MiB beside the context hold the tiny model and short prompts; a block above 1 MiB needs a segment of 20 MiB."""
    bench, spec, pruner = bench_of(monkeypatch, "baseline", "paper")
    spec = dataclasses.replace(spec, max_new_tokens=2, gpu=str(8 * MIB + CONTEXT_BYTES))
    shapes = [bench.family.shape(bench.card, 100, 100, text, 1) for text in (20, 60, 90, 110, 130, 150, 4000)]
    bench.foresee(spec, pruner, shapes)
    fits, refused = (bench.outcome(spec, pruner, shape, 0) for shape in (shapes[1], shapes[-1]))
    assert fits.refused is None
    assert len(fits.memory["tokens"]) == 2
    assert refused.refused is not None
    assert "out of memory" in refused.refused
    assert "of 0.496 GiB, 0.488 GiB are the CUDA context" in refused.refused
    model, meter = bench.ready(spec)
    assert refused == bench._profile(model, meter, pruner, "paper", shapes[-1], 2, 0)
    assert {len(column) for column in vars(refused.memory["tokens"]).values()} == {0}
    with pytest.raises(DoesNotFit, match=r"do not fit on 8MiB: .* are the CUDA context"):
        bench.ready(dataclasses.replace(spec, gpu="8MiB"))
