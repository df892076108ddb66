from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from memprof import forks, runner
from memprof.bench import Bench, generate
from memprof.errors import BadValue, DataError, DoesNotFit, UnknownName, UsageError
from memprof.forecasts import Ask
from memprof.limits import LIMITS, MOST_IN_ALL
from memprof.meters.cpu import CpuMeter
from memprof.models.find import find
from memprof.prompts import Shape
from memprof.pruning import visual_flops_cut, visual_tokens_per_layer
from memprof.pruning.methods.topv import TopV
from memprof.records import PARTS, Run, RunSpec, SampleRecord, summarize
from memprof.runner import complete_spec, run, shard_of
from memprof.store import read_run
from memprof.units import GIB


def spec(**changes: Any) -> RunSpec:
    base = RunSpec(model="internvl2-2b", method="baseline", task="ai2d", device="sim", max_new_tokens=2)
    return dataclasses.replace(base, **changes)


@pytest.fixture
def shapes(tmp_path: Path) -> str:
    path = tmp_path / "shapes.csv"
    path.write_text("width,height,text_tokens\n1600,1200,53\n448,448,20\n")
    return str(path)


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A 13-tile sample under three methods in the paper's stack, on the true InternVL2-2B."""
    folder = tmp_path_factory.mktemp("paper")
    data = folder / "one.csv"
    data.write_text("width,height,text_tokens\n1600,1200,53\n")
    bench = Bench(complete_spec(spec()).setup)
    return {
        method: run(spec(method=method, stack="paper", data=str(data)), folder / method, bench=bench)
        for method in ("baseline", "fastv", "topv")
    }


def test_static_is_the_true_size_of_internvl2_2b(paper: dict[str, Run]) -> None:
    record = paper["baseline"].record
    assert record.static_parts["workspaces"] == 33 * 2**20  # cuBLAS' and cuBLASLt's, on the card that is predicted for
    assert record.static_bytes == pytest.approx(4.109 * GIB + 33 * 2**20, rel=1e-3)
    assert sum(record.static_parts.values()) == record.static_bytes
    weights = sum(n for part, n in record.static_parts.items() if part not in ("rounding", "workspaces"))
    assert weights == 2 * 2_205_754_368 + 2 * 64 * 4  # bf16, and two fp32 rotary buffers


def test_parts_sum_to_the_dynamic_peak(paper: dict[str, Run]) -> None:
    for one in paper.values():
        sample = one.samples[0]
        assert sample.tiles == 13
        assert set(sample.peak_parts) == set(PARTS)
        assert sum(sample.peak_parts.values()) == sample.dynamic_peak_bytes
        assert sample.peak_parts["unexplained"] == 0
        static = one.record.static_bytes
        rows = [sum(row) for row in zip(*sample.token_parts.values(), strict=True)]
        assert rows == [peak - static for peak in sample.tokens.peak_allocated_bytes]
        at_peak = {part: column[sample.peak_token] for part, column in sample.token_parts.items()}
        assert at_peak == {part: n for part, n in sample.peak_parts.items() if part in at_peak}


def test_the_papers_order_of_methods(paper: dict[str, Run]) -> None:
    peak = {method: one.samples[0].dynamic_peak_bytes for method, one in paper.items()}
    assert peak["topv"] <= 0.6 * peak["baseline"]
    assert peak["fastv"] > peak["baseline"]
    kv = {method: one.samples[0].kv_cache_bytes for method, one in paper.items()}
    assert kv["topv"] < 0.62 * kv["baseline"]
    # 24 layers x keys and values x 8 heads x 128 numbers x 2 bytes a token, prompt and one new token.
    assert kv["baseline"] == 96 * 1024 * (13 * 256 + 48 + 53 + 1)
    holders = {
        method: max(one.samples[0].peak_parts, key=one.samples[0].peak_parts.__getitem__)
        for method, one in paper.items()
    }
    assert holders == {"baseline": "logits", "fastv": "attention", "topv": "logits"}


def test_visual_flops_cut_agrees_with_the_published_shares() -> None:
    def cut(model: str, tokens: int) -> float:
        known = find(model)
        layers = visual_tokens_per_layer(TopV().stages(tokens, known.layers), tokens, known.layers)
        return visual_flops_cut(layers, tokens, known.hidden, known.ffn)

    assert cut("llava-1.5-7b", 576) == pytest.approx(0.476, abs=0.0005)
    for tiles in range(1, 14):
        assert 0.46 <= cut("internvl2-2b", 256 * tiles) <= 0.51


def test_an_interrupted_run_resumes_to_the_same_bytes(
    shapes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(complete_spec(spec()).setup)
    whole = run(spec(data=shapes), tmp_path / "first", bench=bench)
    real = runner._profile_sample

    def killed(*args: Any) -> Any:
        if args[2].id == whole.samples[1].id:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(runner, "_profile_sample", killed)
    with pytest.raises(KeyboardInterrupt):
        run(spec(data=shapes), tmp_path / "again", bench=bench)
    assert [s.id for s in read_run(tmp_path / "again").samples] == [whole.samples[0].id]
    monkeypatch.setattr(runner, "_profile_sample", real)
    resumed = run(spec(data=shapes), tmp_path / "again", bench=bench, resume=True)
    for name in ("samples.jsonl", "run.json"):
        ours, theirs = ((tmp_path / f / name).read_text().replace(f, "") for f in ("again", "first"))
        assert ours == theirs
    assert resumed.record.complete


def test_equal_shapes_are_predicted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "same.csv"
    data.write_text("width,height,text_tokens\n" + "448,448,20\n" * 5)
    calls = []
    real = generate.profile_prompt
    monkeypatch.setattr(generate, "profile_prompt", lambda *a, **k: calls.append(1) or real(*a, **k))
    done = run(spec(data=str(data)), tmp_path / "r")
    assert len(done.finished) == 5
    assert len(calls) <= 4  # a program may take a few traces; five samples never take five
    assert len({json.dumps({**s.to_json(), "id": ""}) for s in done.samples}) == 1


def test_measured_on_the_cpu(tmp_path: Path, shapes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny import tiny_card

    card = tiny_card(find("internvl2-2b").family)
    monkeypatch.setattr("memprof.models.find.find", lambda *_: card)
    done = run(spec(device="cpu", dtype="float32", data=shapes, method="topv", max_tiles=4), tmp_path / "r")
    assert done.record.status == "measured"
    assert all(s.ok and s.tokens.seconds[0] > 0 for s in done.samples)
    assert done.samples[0].kv_tokens_found == done.samples[0].kv_tokens_planned
    assert summarize(done)["status"] == "measured"


def test_one_bad_sample_does_not_end_a_run(tmp_path: Path, shapes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Bench.outcome

    def outcome(self: Bench, ask: Ask) -> Any:
        if ask.shape.tiles > 1:
            raise DataError("row 0: the picture is broken\nand more")
        return real(self, ask)

    monkeypatch.setattr(Bench, "outcome", outcome)
    done = run(spec(data=shapes), tmp_path / "r")
    assert [(s.status, s.error) for s in done.samples] == [("failed", "row 0: the picture is broken"), ("ok", None)]
    assert summarize(done)["failed"] == 1


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"model": "internvl9"}, UnknownName, "internvl2-2b"),
        ({"method": "topvv"}, UnknownName, "topv"),
        ({"method": "topv:kept=1"}, UnknownName, "keep"),
        ({"method": "topv:keep=0"}, BadValue, "keep"),
        ({"method": "topv:layer=24"}, BadValue, "24 decoder layers"),
        ({"task": "ai3d"}, UnknownName, "ai2d"),
        ({"max_new_tokens": 0}, BadValue, "max_new_tokens"),
        ({"max_tiles": 0}, BadValue, "max_tiles"),
        *(
            ({name: most + 1}, BadValue, f"{name}={most + 1} is above the limit of {most}")
            for name in ("max_new_tokens", "max_tiles", "images", "batch", "text_tokens", "limit")
            for most in [LIMITS[name][1]]
        ),
        ({"images": 1.5}, BadValue, "images=1.5 is not a whole number"),
        ({"attention": "bogus"}, UnknownName, "eager, sdpa"),
        ({"attention": "flash_attention_2"}, UnknownName, "eager, sdpa"),
    ],
)
def test_mistakes_show_before_a_model_is_built(changes: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        complete_spec(spec(**changes))


def test_prompts_side_by_side_have_a_limit_in_all(shapes: str, tmp_path: Path) -> None:
    asked = spec(model="proving", data=shapes, batch=LIMITS["batch"][1], text_tokens=MOST_IN_ALL // 1000)
    done = run(asked, tmp_path / "r")
    assert {sample.status for sample in done.samples} == {"failed"}
    assert f"above the limit of {MOST_IN_ALL}" in (done.samples[0].error or "")


def test_a_model_that_cannot_be_built_costs_no_run(shapes: str, tmp_path: Path) -> None:
    def small(gpu: str | None = None) -> RunSpec:
        return spec(model="proving", data=shapes, gpu=gpu)

    with pytest.raises(DoesNotFit):
        run(small("1MiB"), tmp_path / "r")
    assert not (tmp_path / "r").exists()
    whole = run(small(), tmp_path / "r")
    with pytest.raises(DoesNotFit):
        run(small("1MiB"), tmp_path / "r", force=True)
    assert read_run(tmp_path / "r") == whole


def test_failed_samples_are_run_again_when_asked(shapes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(complete_spec(spec(model="proving")).setup)
    run(spec(model="proving", data=shapes), tmp_path / "first", bench=bench)
    real = Bench.outcome

    def outcome(self: Bench, ask: Ask) -> Any:
        if ask.shape.text_tokens == 53 + sum(self.model.template):
            raise torch.cuda.OutOfMemoryError("another process holds the card")
        return real(self, ask)

    with monkeypatch.context() as patch:
        patch.setattr(Bench, "outcome", outcome)
        done = run(spec(model="proving", data=shapes), tmp_path / "again", bench=bench)
        assert [s.status for s in done.samples] == ["oom", "ok"]
    done = run(spec(model="proving", data=shapes), tmp_path / "again", bench=bench, resume=True)
    assert [s.status for s in done.samples] == ["oom", "ok"]
    run(spec(model="proving", data=shapes), tmp_path / "again", bench=bench, resume=True, retry_failed=True)
    for name in ("samples.jsonl", "run.json"):
        ours, theirs = ((tmp_path / f / name).read_text().replace(f, "") for f in ("again", "first"))
        assert ours == theirs


def proving(**changes: Any) -> RunSpec:
    """Three samples that are answered, in a second."""
    return spec(model="proving", device="cpu", dtype="float32", limit=3, **changes)


class Judged:
    """A judge that finds nothing lost, and on the second sample no room for the unpruned model."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, model: Any, prompt: Any, pruner: Any, stack: str, *, sample: str, **_: Any) -> dict[str, float]:
        self.seen.append(sample)
        if len(self.seen) == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nand more")
        return {"agreement": 1.0}


def test_what_was_measured_stands_where_the_unpruned_model_does_not_fit(tmp_path: Path) -> None:
    done = run(proving(method="topv"), tmp_path / "r", judge=Judged())
    assert [(s.status, s.fidelity, s.error) for s in done.samples] == [
        ("ok", {"agreement": 1.0}, None), ("ok", None, "CUDA out of memory."), ("ok", {"agreement": 1.0}, None)
    ]  # fmt: skip
    second = done.samples[1]
    assert second.dynamic_peak_bytes > 0
    assert second.score is not None
    (note,) = read_run(tmp_path / "r").record.notes
    assert note.endswith(f"the first is {second.id}: CUDA out of memory.")


def test_a_run_with_fidelity_is_another_than_one_without(tmp_path: Path) -> None:
    done = run(proving(), tmp_path / "r")
    assert not done.record.spec.fidelity
    with pytest.raises(UsageError, match="fidelity: False there, True asked"):
        run(proving(), tmp_path / "r", resume=True, judge=Judged())
    assert run(proving(), tmp_path / "compared", judge=Judged()).record.spec.fidelity


@pytest.mark.parametrize(("broken", "calls"), [(1, [0, 1, 0, 1, 2]), (3, [0, 1, 2, 0, 1, 2])])
def test_the_first_sample_that_finishes_warms_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: int, calls: list[int]
) -> None:
    ids = [s.id for s in run(proving(warmup=0), tmp_path / "cold").samples]
    seen, real = list[int](), runner._profile_sample

    def profile(*args: Any) -> Any:
        seen.append(ids.index(args[2].id))
        return SampleRecord(args[2].id, "failed", "no picture") if seen[-1] < broken else real(*args)

    monkeypatch.setattr(runner, "_profile_sample", profile)
    done = run(proving(), tmp_path / "r")
    assert seen == calls
    assert done.record.notes == ([runner.COLD] if broken == 3 else [])


def test_what_a_meter_notes_later_is_in_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(CpuMeter, "notes", lambda _: calls.append(1) or ["NVML is gone"] * (len(calls) > 1))
    run(proving(), tmp_path / "r")
    assert read_run(tmp_path / "r").record.notes == ["NVML is gone"]


def test_shards_cover_every_sample_once() -> None:
    assert sorted(x for i in range(1, 4) for x in shard_of(11, f"{i}/3")) == list(range(11))
    for bad in ("0/3", "4/3", "1", "a/b"):
        with pytest.raises(BadValue, match="i/n"):
            shard_of(11, bad)


@pytest.fixture
def many_shapes(tmp_path: Path) -> str:
    path = tmp_path / "many.csv"
    path.write_text("width,height,text_tokens\n" + "".join(f"{300 + n},300,{20 + n}\n" for n in range(20)))
    return str(path)


def test_many_shapes_are_predicted_on_copies_of_the_process(
    many_shapes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, here = spec(model="proving", data=many_shapes, method="topv"), list[Shape]()
    real = Bench._predict

    def predict(self: Bench, ask: Ask) -> Any:
        here.append(ask.shape)
        return real(self, ask)

    monkeypatch.setattr(Bench, "_predict", predict)
    found = {}
    for cores in (1, 3):
        here.clear()
        monkeypatch.setattr(forks, "_cores", lambda cores=cores: cores)
        found[cores] = run(asked, tmp_path / f"on-{cores}").samples
        assert len(here) == (20 if cores == 1 or not sys.platform.startswith("linux") else 0)
    assert found[1] == found[3]


def test_an_error_on_a_copy_is_that_samples_own(
    many_shapes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, real = Bench(complete_spec(spec(model="proving")).setup), Bench._predict
    broken = 27 + sum(bench.model.template)

    def predict(self: Bench, ask: Ask) -> Any:
        if ask.shape.text_tokens == broken:
            raise DataError("no such text")
        return real(self, ask)

    monkeypatch.setattr(Bench, "_predict", predict)
    monkeypatch.setattr(forks, "_cores", lambda: 3)
    done = run(spec(model="proving", data=many_shapes), tmp_path / "r", bench=bench)
    assert [s.status for s in done.samples] == ["ok"] * 7 + ["failed"] + ["ok"] * 12
    assert done.samples[7].error == "no such text"
    assert not bench._coming


def test_a_local_rank_measures_on_its_own_card(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = list[int]()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.delenv("SLURM_LOCALID", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    Bench(complete_spec(spec(device="cuda")).setup)
    assert taken == []
    monkeypatch.setenv("LOCAL_RANK", "2")
    Bench(complete_spec(spec(device="cuda")).setup)
    Bench(complete_spec(spec(device="sim")).setup)
    assert taken == [2]
