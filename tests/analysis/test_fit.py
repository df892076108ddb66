"""What fits is what a run on such a card says; the arithmetic of it is held in ``cli/test_tune.py``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_card
from typed import call

from memprof import api
from memprof.analysis import fit as module
from memprof.analysis.fit import fit
from memprof.bench import Bench
from memprof.errors import BadValue, DoesNotFit
from memprof.families import FAMILIES
from memprof.gpus import CARDS, CONTEXT_BYTES, find_card
from memprof.models import find
from memprof.records import RunSpec
from memprof.runner import complete_spec
from memprof.units import MIB

#: Most images looked at in a test: all are looked at one by one as well.
MOST = 5


@pytest.fixture
def spec(monkeypatch: pytest.MonkeyPatch) -> RunSpec:
    """Baseline of a tiny InternVL, which fits into 32 MiB beside the context."""
    monkeypatch.setenv("MEMPROF_CACHE", "")
    family = FAMILIES.load("internvl")()
    card = tiny_card(family)
    monkeypatch.setattr(module, "MOST_TILES", 3)
    monkeypatch.setattr(type(family), "searched_prompts", 3)
    monkeypatch.setattr(find, "find", lambda *_: card)
    return RunSpec(model=card.name, method="baseline", task="ai2d", device="sim", dtype="bfloat16", max_new_tokens=2)


def refused(spec: RunSpec, gpu: int, tiles: int) -> str | None:
    """What a run of the same prompt says on a card of ``gpu`` bytes."""
    done = complete_spec(dataclasses.replace(spec, gpu=f"{gpu}B"))
    bench, model = Bench(done.setup), done.setup.model
    shape = model.family.shape(model, 100 * tiles, 100, 53)
    assert shape.tiles == tiles
    try:
        return bench.outcome(done.ask(shape, seed=0)).refused
    except DoesNotFit as error:
        return str(error)


def test_what_fits_runs_and_what_does_not_is_refused(spec: RunSpec) -> None:
    found = fit(spec, find_card(f"{CONTEXT_BYTES + 512 * MIB}B"), tiles=1)
    assert found.fits
    assert found.need.device_bytes == found.need.reserved_bytes + CONTEXT_BYTES
    assert refused(spec, found.need.device_bytes, 1) is None
    says = refused(spec, found.need.allocated_bytes + CONTEXT_BYTES - 1, 1)
    assert says is not None
    assert "are the CUDA context" in says


def test_a_card_brings_its_kernels_and_workspaces_and_not_its_limit(spec: RunSpec) -> None:
    card = dataclasses.replace(CARDS["t4"], memory_bytes=CONTEXT_BYTES + 96 * MIB)
    named, plain = fit(spec, card, tiles=2), fit(spec, find_card(f"{card.memory_bytes}B"), tiles=2)
    assert named.static_bytes - plain.static_bytes == 8_519_680 - 32 * MIB  # cuBLAS' workspaces: the size has an H100's
    batch = {limit.name: limit for limit in named.limits}["batch"]
    assert batch.largest is not None
    assert batch.device_bytes is not None
    assert batch.device_bytes <= CONTEXT_BYTES + 96 * MIB
    assert (named.gpu, named.gpu_bytes) == ("t4", card.memory_bytes)


def test_a_measured_context_comes_before_the_assumed_one(spec: RunSpec) -> None:
    card = dataclasses.replace(find_card("1GiB"), measured={"context_bytes": 7 * MIB})
    bench = Bench(complete_spec(spec).setup)
    assert fit(spec, card, tiles=1, bench=bench).context_bytes == 7 * MIB
    assert fit(spec, card, tiles=1, bench=bench, context_bytes=MIB).context_bytes == MIB


@pytest.mark.parametrize("family", [name for name in FAMILIES.names() if FAMILIES.load(name).sees])
def test_as_many_images_as_fit_and_no_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family: str) -> None:
    """Found by a search, and the same as looking at every number there is; whatever a family makes of an image."""
    monkeypatch.setenv("MEMPROF_CACHE", str(tmp_path))
    model = tiny_card(FAMILIES.load(family)())
    for name, most in (("searched_images", MOST), ("searched_prompts", 1)):
        monkeypatch.setattr(type(model.family), name, most)
    monkeypatch.setattr(find, "find", lambda *_: model)
    spec = RunSpec(model=model.name, method="baseline", task="ai2d", device="sim", dtype="bfloat16", max_new_tokens=2)
    bench = Bench(complete_spec(spec).setup)
    desk = module._Desk(spec, bench, CONTEXT_BYTES, module.QUESTION_TOKENS)
    most = max(n for n in range(1, MOST + 1) if desk.shape(module.Shown(1, n)).length + 2 <= model.positions)
    needs = {n: desk.need("baseline", module.Shown(1, n)).device_bytes for n in range(1, most + 1)}
    assert most >= 2
    assert desk.shape(module.Shown(1, most)).visual_tokens == most * desk.shape(module.Shown(1)).visual_tokens
    for asked, budget in ((2, needs[most]), (most, needs[2]), (1, max(needs[1], needs[most] - 1))):
        found = fit(spec, find_card(f"{budget}B"), tiles=1, images=asked, bench=bench)
        (images,) = (limit for limit in found.limits if limit.name == "images")
        largest = max(n for n in needs if needs[n] <= budget)
        assert (images.asked, images.largest, images.device_bytes) == (asked, largest, needs[largest])
        assert found.fits is (needs[asked] <= budget)
        assert (images.note == f"no more than {MOST} are looked at") is (largest == MOST)


def test_what_is_far_too_large_is_not_looked_at(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search for the most prompts side by side does not begin with the most there could be."""
    monkeypatch.setattr(type(find.find("").family), "searched_prompts", 100_000)
    looked = list[int]()
    need = module._Desk.need

    def noted(desk: Any, method: str, shown: module.Shown, stack: str | None = None) -> module.Need:
        looked.append(shown.batch)
        return need(desk, method, shown, stack)

    monkeypatch.setattr(module._Desk, "need", noted)
    found = fit(spec, find_card(f"{CONTEXT_BYTES + 96 * MIB}B"), tiles=1)
    (batch,) = (limit for limit in found.limits if limit.name == "batch")
    assert batch.largest is not None
    assert batch.largest > 4
    assert max(looked) <= 32 * batch.largest
    assert len(set(looked)) <= 12


def test_what_is_asked_for_is_looked_at_however_much_it_is(spec: RunSpec) -> None:
    found = fit(spec, find_card("1GiB"), tiles=1, images=5)
    limits = {limit.name: limit for limit in found.limits}
    assert found.fits
    assert (limits["images"].asked, limits["images"].largest) == (5, 5)


def test_what_the_model_has_no_positions_for_does_not_fit(spec: RunSpec) -> None:
    found = fit(spec, find_card("1GiB"), tiles=1, question_tokens=find.find("").positions)
    assert {limit.name: limit.largest for limit in found.limits}["images"] is None


def test_a_prompt_beyond_the_positions_leaves_no_room_for_an_answer(spec: RunSpec) -> None:
    found = fit(spec, find_card("1GiB"), tiles=1, question_tokens=find.find("").positions)
    (answer,) = (limit for limit in found.limits if limit.name == "new tokens")
    assert answer.largest is None
    assert "positions" in answer.note


@pytest.mark.parametrize("asked", ["tiles", "images", "question_tokens"])
def test_what_no_prompt_can_be_is_refused_at_once(spec: RunSpec, asked: str) -> None:
    with pytest.raises(BadValue, match="above the limit"):
        fit(spec, find_card("1GiB"), **{asked: 10**12})


def test_more_than_can_be_looked_at_is_refused_at_once(spec: RunSpec) -> None:
    with pytest.raises(BadValue, match=f"more than the {8 * module.MOST_TILES} that fit looks at"):
        fit(spec, find_card("1GiB"), tiles=8 * module.MOST_TILES, images=2)


@pytest.mark.parametrize("room", [MIB, 20 * MIB])
def test_where_nothing_fits_the_answer_says_so(spec: RunSpec, room: int) -> None:
    card = find_card(f"{CONTEXT_BYTES + room}B")
    found = module.answer(spec, card, tiles=1)
    assert not found.fits
    assert found.refusal
    assert found.need.device_bytes > card.memory_bytes
    with pytest.raises(DoesNotFit) as told:
        fit(spec, card, tiles=1)
    assert str(told.value) == found.refusal
    assert not module.answer(spec, find_card("1GiB"), tiles=1).refusal


def test_python_is_answered_and_the_command_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    found = api.fits("1GiB", "internvl2-2b")
    assert (found.fits, found.limits) == (False, ())
    assert call(capsys, "fit", "--gpu", "1GiB") == (4, "", f"memprof: {found.refusal}\n")
