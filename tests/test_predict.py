"""A program says what a direct trace says, to the byte, at shapes it was never recorded at."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_card

from memprof import files
from memprof.bench import Bench
from memprof.bench import recorder as recorder_module
from memprof.bench.recorder import Recorder
from memprof.errors import DoesNotFit
from memprof.families import FAMILIES
from memprof.forecasts import Ask, book
from memprof.gpus import CONTEXT_BYTES
from memprof.models import find
from memprof.prompts import Shape
from memprof.records import RunSpec
from memprof.runner import Complete, complete_spec
from memprof.simulator import folding, unfolding
from memprof.simulator.trace import Trace
from memprof.units import MIB

#: Every kind of program there is: nothing cut, a row or a map read, a selection by itself, a mask, several cuts.
CASES = (
    ("baseline", "paper"), ("fastv", "current"), ("fastv", "paper"), ("topv", "current"),
    ("topv:keep=0.3,layer=1", "paper"), ("fastv:drop=mask", "current"), ("pyramiddrop:keep=0.7", "current"),
    ("sparsevlm:keep=0.6", "current"), ("sparsevlm-plus:keep=0.6", "current"), ("visionzip", "paper"),
    ("dart", "current"), ("cdpruner:keep=0.2", "current"),
)  # fmt: skip


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMPROF_CACHE", "")


def bench_of(
    monkeypatch: pytest.MonkeyPatch, method: str, stack: str, family: str = "internvl", **changes: Any
) -> tuple[Bench, Complete]:
    """A bench over a tiny model of eight decoder layers, deep enough for its layers to be folded."""
    model = tiny_card(FAMILIES.load(family)()).of_depth(8)
    monkeypatch.setattr(find, "find", lambda *_: model)
    spec = RunSpec(model=model.name, method=method, task="ai2d", device="sim", stack=stack, dtype="bfloat16",
                   **{"max_new_tokens": 7, **changes})  # fmt: skip
    done = complete_spec(spec)
    return Bench(done.setup), done


def random_shapes(bench: Bench, count: int, seed: int) -> list[Shape]:
    draw, model = random.Random(seed), bench.model
    return [
        model.family.shape(model, draw.randint(100, 1500), draw.randint(100, 1500), draw.randint(1, 90), 12)
        for _ in range(count)
    ]


def recorder_of(bench: Bench, done: Complete) -> Recorder:
    return bench._recorder(done.ask(bench.model.family.shape(bench.model, 100, 100, 1)))


def trace_of(recorder: Recorder, shape: Shape, new_tokens: int) -> Trace | None:
    """The trace that a program gives of a shape, or None where none answers for it."""
    if recorder.forecast(shape, new_tokens) is None:
        return None
    found = recorder.programs.unfolded(shape, new_tokens)
    assert found is not None
    unfolded, passages = found
    return unfolded.trace(recorder.programs.lengths(shape, new_tokens), passages)


def compare(bench: Bench, done: Complete, asked: int, compared: int) -> Recorder:
    """Foresee ``asked`` shapes; hold ``compared`` of them against direct traces."""
    asks = [done.ask(shape, seed=0) for shape in random_shapes(bench, asked, 1)]
    bench.foresee(asks)
    recorder, meter = recorder_of(bench, done), bench.ready()[1]
    checked = 0
    for ask in random.Random(2).sample(asks, compared):
        ours = trace_of(recorder, ask.shape, ask.new_tokens)
        if ours is None:
            continue
        checked += 1
        direct = bench.profile(ask)
        real = meter.trace  # type: ignore[attr-defined]
        count, slots = real.marks[-1], len(ours.nbytes)
        assert ours.events == real.events[:count]
        assert ours.marks == real.marks
        assert ours.phases == real.phases
        for name in ("nbytes", "parts", "sites", "shapes", "dtypes"):
            assert list(getattr(ours, name)) == getattr(real, name)[:slots], name
        assert bench._predict(ask) == direct
    assert checked >= compared * 0.9
    return recorder


@pytest.mark.parametrize(("method", "stack"), CASES)
def test_random_shapes(monkeypatch: pytest.MonkeyPatch, method: str, stack: str) -> None:
    """``benchmarks/exactness.py`` does the same for every method, with more shapes and at full scale."""
    recorder = compare(*bench_of(monkeypatch, method, stack), asked=20, compared=2)
    # What looks at the vision tower goes through it tile by tile, and is recorded for each number of them.
    assert recorder.recorded <= (30 if "vision" in recorder.programs.pruner.needs else 10)


@pytest.mark.parametrize("method", ["baseline", "topv:keep=0.3"])
def test_layers_that_a_tower_adds_to_are_a_head_of_their_own(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """DeepStack: the first layers are unlike the others, whatever the method; those behind them still fold."""
    bench, done = bench_of(monkeypatch, method, "current", "qwen3-vl")
    recorder = compare(bench, done, asked=12, compared=2)
    assert all(bench.knows(done.ask(shape)) for shape in random_shapes(bench, 12, 1))
    programs = [one.structure for one in recorder.programs.shared.values() if one is not None]
    assert programs
    assert all(one is not None and one.folded_layers for one in programs)


@pytest.mark.parametrize("family", ["smolvlm", "llava-next", "llava-onevision"])
def test_what_is_known_is_answered(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Pictures whose tokens do not grow evenly with their tiles: what combinations say in fractions is not known."""
    bench, done = bench_of(monkeypatch, "baseline", "current", family)
    own, model = bench.model.family, bench.model

    def asks(*texts: int) -> list[Ask]:
        tiles = range(1, own.most_tiles(model) + 1)
        return [done.ask(own.shape_of(model, own.of_tiles(model, n), text), seed=0) for n in tiles for text in texts]

    bench.foresee(asks(1, 90))
    known = [ask for ask in asks(*range(2, 90, 8)) if bench.knows(ask)]
    assert all(bench._predict(ask) is not None for ask in known)
    bench.foresee(asks(53))
    assert all(bench.knows(ask) for ask in asks(53))
    for ask in random.Random(3).sample(asks(53), 2):
        assert bench._predict(ask) == bench.profile(ask)


def test_a_model_whose_layers_never_repeat_is_traced_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, done = bench_of(monkeypatch, "baseline", "current")
    tried = list[int]()

    def unlike(recording: folding.Recording, **_: object) -> None:
        tried.append(recording.head_layers)
        raise folding.Unlike(recording.head_layers, "made up")

    monkeypatch.setattr(recorder_module, "fold", unlike)
    shape = random_shapes(bench, 1, 3)[0]
    assert bench.outcome(done.ask(shape, seed=0)) == bench.profile(done.ask(shape, seed=0))
    assert {2, 3, 4, 8} <= set(tried) <= {*range(2, 9)}


def test_it_is_the_same_however_many_tokens_are_written_out_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, done = bench_of(monkeypatch, "topv", "current", max_new_tokens=12)
    ask = done.ask(random_shapes(bench, 1, 3)[0], seed=0)
    direct = bench.profile(ask)
    bench.foresee([ask])
    for at_once in (3, 5, 11, 12):
        monkeypatch.setattr(unfolding, "AT_ONCE", at_once)
        recorder_of(bench, done).programs._unfolded.clear()
        assert bench._predict(ask) == direct, at_once


@pytest.mark.slow
def test_internvl2_2b_of_sixteen_tokens() -> None:
    done = complete_spec(
        RunSpec(model="internvl2-2b", method="topv", task="ai2d", device="sim", stack="paper", gpu="h100")
    )
    compare(Bench(done.setup), done, asked=20, compared=1)


def test_prompts_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, done = bench_of(monkeypatch, "baseline", "current", max_new_tokens=2)
    shape = bench.model.family.shape(bench.model, 300, 300, 20, 2)
    asks = [done.ask(dataclasses.replace(shape, batch=n), seed=0) for n in range(2, 9)]
    bench.foresee(asks)
    assert bench._predict(done.ask(shape)) is None, "a program of several says nothing of one"
    for one in (done.ask(shape, seed=0), asks[2], asks[5]):
        direct = bench.profile(one)
        assert bench.outcome(one) == direct
        each = 2 * 2 * bench.model.kv_numbers
        assert direct.memory.kv_bytes_per_layer[0] == one.shape.batch * each * shape.length
    assert bench._predict(asks[2]) is not None


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
    bench, done = bench_of(monkeypatch, method, "current", max_new_tokens=tokens)
    model = bench.model
    shapes = [model.family.shape(model, 300 * n, 300, 20 + n * n, 12) for n in range(1, asked + 1)]
    assert len({shape.tiles for shape in shapes}) == asked
    asks = [done.ask(shape, seed=0) for shape in shapes]
    bench.foresee(asks)
    recorder = recorder_of(bench, done)
    assert recorder.recorded == recorded
    for ask in asks:
        assert bench._predict(ask) == bench.profile(ask)
    if asked < 3:
        assert recorder.forecast(shapes[0].longer(1), tokens) is None, "so few shapes say nothing of another"


def test_a_method_whose_events_depend_on_tiles_is_told_apart_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """VisionZip scores the tiles one by one: a program for each number of them."""
    bench, done = bench_of(monkeypatch, "visionzip", "current", max_new_tokens=2)
    model = bench.model
    shapes = [model.family.shape(model, 300 * n, 300, text, 12) for n in (2, 3) for text in range(10, 70, 10)]
    bench.foresee(map(done.ask, shapes))
    ours = trace_of(recorder_of(bench, done), shapes[2], 2)
    assert ours is not None
    bench.profile(done.ask(shapes[2], seed=0))
    meter: Any = bench.ready()[1]
    assert ours.nbytes == meter.trace.nbytes[: len(ours.nbytes)]


@pytest.mark.parametrize("method", ["topv", "fastv"])
def test_a_share_that_was_never_recorded(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Between shares that were recorded the others follow, selections and all."""
    bench, done = bench_of(monkeypatch, method, "paper", max_new_tokens=2)
    shapes = random_shapes(bench, 10, 3)

    def asks(keep: float) -> list[Any]:
        kept = dataclasses.replace(done.pruner, keep=keep)  # type: ignore[call-arg]
        return [dataclasses.replace(done.ask(shape, seed=0), pruner=kept) for shape in shapes]

    for keep in (0.5, 0.05, 0.95):
        bench.foresee(asks(keep))
    recorder = recorder_of(bench, done)
    known = recorder._known
    others = [ask for keep in (0.37, 0.81) for ask in asks(keep)]
    assert sum(map(bench.knows, others)) >= 0.8 * len(others)
    for ask in random.Random(4).sample([ask for ask in others if bench.knows(ask)], 3):
        assert bench._predict(ask) == bench.profile(ask)
    assert recorder._known == known


class Cached:
    """A folder of programs, and how often a run had to record."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.monkeypatch, self.folder = monkeypatch, folder
        monkeypatch.setenv("MEMPROF_CACHE", str(folder))

    def recordings(self, stack: str = "current") -> int:
        bench, done = bench_of(self.monkeypatch, "topv", stack, max_new_tokens=2)
        shapes = random_shapes(bench, 20, 5)
        bench.foresee(map(done.ask, shapes))
        recorder = recorder_of(bench, done)
        assert recorder.forecast(shapes[0], 2) is not None
        return recorder.recorded

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
    del data["programs"][0][1]["sizes"]
    for text in (good[: len(good) // 2], json.dumps(data)):
        file.write_text(text)
        assert cached.recordings() > 0
        assert json.loads(file.read_text())["programs"]
    monkeypatch.setattr(book, "RECORDER", "changed")
    assert cached.recordings() > 0
    assert len(cached.files) == 2


def test_where_programs_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert files.cache_folder() is None
    monkeypatch.setenv("MEMPROF_CACHE", str(tmp_path))
    assert files.cache_folder() == tmp_path
    monkeypatch.delenv("MEMPROF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert files.cache_folder() == tmp_path / "x" / "memprof"


def test_a_card_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 MiB beside context and workspaces hold short prompts; a block above 1 MiB needs a segment of 20 MiB."""
    bench, done = bench_of(
        monkeypatch, "baseline", "paper", max_new_tokens=2, gpu=f"{41 * MIB + CONTEXT_BYTES}B"
    )  # fmt: skip
    model = bench.model
    shapes = [model.family.shape(model, 100, 100, text, 1) for text in (20, 60, 90, 110, 130, 150, 4000)]
    asks = [done.ask(shape, seed=0) for shape in shapes]
    bench.foresee(asks)
    fits, refused = (bench.outcome(ask) for ask in (asks[1], asks[-1]))
    assert fits.refused is None
    assert len(fits.memory.fullest.tokens) == 2
    assert refused.refused is not None
    assert "out of memory" in refused.refused
    assert "of 0.528 GiB, 0.488 GiB are the CUDA context" in refused.refused
    assert refused == bench.profile(asks[-1])
    assert {len(column) for column in vars(refused.memory.fullest.tokens).values()} == {0}
    with pytest.raises(DoesNotFit, match=r"do not fit on 8MiB: .* the CUDA context alone takes 0.488 GiB"):
        bench.set_up(dataclasses.replace(bench.setup, gpu="8MiB")).ready()
