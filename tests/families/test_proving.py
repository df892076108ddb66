from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from memprof.analysis.fidelity import Judge
from memprof.bench.generate import place
from memprof.errors import BadValue
from memprof.families._proving.drawing import (
    CHARACTERS,
    HELD_OUT,
    INKS,
    LENGTHS,
    SIZE,
    draw_scene,
    last_question,
    read_question,
)
from memprof.families.proving import VOCABULARY, Proving
from memprof.models.checkpoint import load_checkpoint
from memprof.models.find import find
from memprof.models.tokenizer import read_tokenizer
from memprof.pruning import build_pruner
from memprof.records import RunSpec, summarize
from memprof.runner import run

FAMILY = Proving()
CARD = find("proving")
SHIPPED = FAMILY.shipped(CARD)


@pytest.fixture(scope="module")
def training() -> Any:
    """``scripts/train_proving.py`` as a module."""
    path = Path(__file__).parents[2] / "scripts" / "train_proving.py"
    spec = importlib.util.spec_from_file_location("train_proving", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_proving"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model() -> Any:
    return load_checkpoint(CARD, str(SHIPPED), device="cpu", dtype="float32", attention="sdpa")


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return json.loads((SHIPPED / "report.json").read_text())


# -- pictures and questions --------------------------------------------------------------------------------------------


def test_a_picture_follows_from_its_seed() -> None:
    one, again, other = draw_scene(7), draw_scene(7), draw_scene(8)
    assert (one.pixels == again.pixels).all()
    assert (one.pixels != other.pixels).any()
    assert one.pixels.shape == (SIZE, SIZE, 3)
    assert one.image().size == (SIZE, SIZE)


def test_two_strings_in_two_inks_inside_the_picture() -> None:
    for seed in range(200):
        first, second = draw_scene(seed).lines
        assert first.ink != second.ink
        assert first.boxes[:, 3].max() <= second.boxes[:, 1].min()
        for line in (first, second):
            assert line.ink in INKS
            assert LENGTHS[0] <= len(line.text) <= LENGTHS[1]
            assert set(line.text) <= set(CHARACTERS)
            assert line.boxes.min() >= 0
            assert line.boxes.max() <= SIZE


def test_questions_have_one_right_answer() -> None:
    for seed in range(200):
        scene = draw_scene(seed)
        for k in (0, 1):
            line = scene.lines[k]
            assert (read_question(scene, k).text, read_question(scene, k).answer) == (f"read {line.ink}", line.text)
            last = last_question(scene, k)
            assert last.text.split() == ["read", line.ink, *line.text[:-1]]
            assert last.answer == line.text[-1]


# -- the family --------------------------------------------------------------------------------------------------------


def test_tokens() -> None:
    tokenizer = read_tokenizer(SHIPPED)
    for seed in range(20):
        question = last_question(draw_scene(seed), 0)
        assert tokenizer.encode(question.text) == [VOCABULARY.index(word) for word in question.text.split()]
    assert tokenizer.decode([*tokenizer.encode("K7X"), tokenizer.special("<eos>")]) == "K7X"
    assert tokenizer.encode("<eos>") != [tokenizer.special("<eos>")]
    assert tokenizer.encode("what is this?") == [tokenizer.special("<unk>")] * 4


def test_one_tile_whatever_the_picture() -> None:
    for width, height in ((80, 80), (1600, 200)):
        shape = FAMILY.shape(CARD, width, height, 2, 12)
        assert (shape.tiles, shape.visual_tokens, shape.length) == (1, 100, 105)
    picture = draw_scene(3).image()
    pixels = FAMILY.pixels(CARD, shape.images[0], picture)
    assert isinstance(pixels, np.ndarray)
    assert pixels.shape == (1, 3, SIZE, SIZE)
    assert FAMILY.pixels(CARD, shape.images[0], None) == pixels.shape
    assert FAMILY.positions(shape.images[0])[12].tolist() == pytest.approx([0.25, 0.15])


def test_a_run_asks_what_training_taught(training: Any) -> None:
    tokenizer = read_tokenizer(SHIPPED)
    batch = training.make_batch([HELD_OUT])
    own = FAMILY.own_questions("ocrbench", 1)[0]
    shape = FAMILY.shape(CARD, *own.size(), len(tokenizer.encode(own.question().text)), None)
    ids = FAMILY.written(CARD, own.question().text, shape.images, tokenizer).ids
    assert len(ids) == shape.length
    assert batch.ids[0, : len(ids)].tolist() == ids
    pixels = FAMILY.pixels(CARD, shape.images[0], own.image())
    assert (batch.pixels[0].numpy() == pixels[0]).all()


def test_own_questions() -> None:
    assert FAMILY.shipped(CARD) == SHIPPED
    assert len(FAMILY.own_questions("ai2d")) == 64
    reads, lasts = FAMILY.own_questions("ocrbench", 20), FAMILY.own_questions("ai2d", 20)
    assert len({own.id for own in reads}) == 20
    assert {len(own.question().answer) for own in lasts} == {1}
    with pytest.raises(BadValue, match="limit"):
        FAMILY.own_questions("ai2d", 0)
    assert {own.question().line for own in reads} == {0, 1}
    assert "own drawn questions" in FAMILY.own_label("ai2d")


# -- training ----------------------------------------------------------------------------------------------------------


def test_packed_questions_do_not_see_each_other(training: Any, model: Any) -> None:
    batch = training.make_batch([HELD_OUT + 1, HELD_OUT + 2])
    with torch.no_grad():
        packed = training.forward(model, batch, training.masks_for(2)).logits
        for start, count in training.segments():
            ids = torch.cat((batch.ids[:, : training.PREFIX], batch.ids[:, start : start + count]), 1)
            alone = model(input_ids=ids, pixel_values=batch.pixels).logits[:, training.PREFIX :]
            assert torch.allclose(packed[:, start : start + count], alone, atol=2e-3)


def test_dense_labels_lie_under_their_characters(training: Any) -> None:
    for seed in range(50):
        scene = draw_scene(seed)
        labels, homes = training.under(scene)
        assert labels.shape == (3, 100)
        assert ((labels[0] == 0) == (labels[2] == 0)).all()
        for line, home in zip(scene.lines, homes, strict=True):
            assert (labels[0, home] == list(INKS).index(line.ink) + 1).all()
            middle = line.boxes.reshape(-1, 2, 2).mean(1) / 8 - 0.5
            assert np.abs(np.stack([home % 10, home // 10], 1) - middle).max() < 1.01


def test_muon_steps_are_orthogonal(training: Any) -> None:
    stack = torch.randn(3, 16, 48, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(training.orthogonal(stack))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_the_same_seed_gives_the_same_first_steps(training: Any) -> None:
    def losses(seed: int) -> list[float]:
        plan = training.Plan(seed=seed, steps=3, images=2, world=1, warmup=2)
        return training.train(plan, say=lambda _: None)[1]

    threads = torch.get_num_threads()
    try:
        first, again, other = losses(0), losses(0), losses(1)
    finally:
        torch.set_num_threads(threads)
    assert first == again
    assert first != other
    assert first[-1] < first[0]


# -- what is shipped ---------------------------------------------------------------------------------------------------


def test_shipped_weights_are_small_and_half() -> None:
    file = SHIPPED / "model.safetensors"
    assert file.stat().st_size <= 8e6
    with safe_open(file, framework="pt") as stored:
        tensors = [stored.get_tensor(name) for name in stored.keys()]  # noqa: SIM118 - it is no dict
    assert {t.dtype for t in tensors} == {torch.float16}
    assert 1e6 <= sum(t.numel() for t in tensors) <= 4e6


def test_shipped_weights_score_what_the_report_says(training: Any, model: Any, report: dict[str, Any]) -> None:
    found = training.gates(model, 72, cuts=(), attention=False)
    for name in ("read", "last"):
        said = report["gates"][name]
        margin = 3 * (max(said * (1 - said), 0.02) / 144) ** 0.5
        assert found[name] == pytest.approx(said, abs=margin)


def test_the_gates_of_a_fair_test_bed(report: dict[str, Any]) -> None:
    gates = report["gates"]
    assert gates["read"] >= 0.90
    assert gates["read_drop2"] <= 0.02
    assert gates["last_drop2"] <= 0.06  # twenty characters
    assert gates["read_drop3"] <= gates["read"] - 0.2
    assert gates["last"] >= 0.90
    assert gates["attention_1"] > 0.10


def test_greedy_answers_are_right(model: Any, report: dict[str, Any]) -> None:
    tokenizer = read_tokenizer(SHIPPED)
    right = 0
    for own in FAMILY.own_questions("ocrbench", 20):
        asked = own.question()
        shape = FAMILY.shape(CARD, *own.size(), len(tokenizer.encode(asked.text)), None)
        prompt = FAMILY.written(CARD, asked.text, shape.images, tokenizer, [own.image()])
        out = model.generate(**place(prompt, model), max_new_tokens=16, do_sample=False)
        right += tokenizer.decode(out[0, shape.length :].tolist()) == asked.answer
    assert right / 20 >= report["gates"]["read"] - 0.2


def test_a_run_reports_accuracy_fidelity_and_memory(tmp_path: Path) -> None:
    spec = RunSpec(
        model="proving", method="topv:keep=0.5", task="ai2d", device="cpu", dtype="float32", limit=3, warmup=0
    )
    done = run(spec, tmp_path / "r", judge=Judge())
    found = summarize(done)
    assert (found["status"], found["samples"], found["failed"]) == ("measured", 3, 0)
    assert found["accuracy"] is not None
    assert set(found["fidelity"]) >= {"agreement", "kl"}
    assert "own drawn questions" in found["data"]
    assert done.samples[0].kept_visual_tokens == [100, 100, 50, 50, 50, 50]
    assert done.samples[0].kv_tokens_found == done.samples[0].kv_tokens_planned
    assert done.record.spec.weights == "shipped"


def test_pruning_what_is_read_loses_the_answer(model: Any) -> None:
    """One token kept at layer 2 leaves nothing to read; a fair test bed must show that in fidelity."""
    tokenizer = read_tokenizer(SHIPPED)
    judge, kl = Judge(), []
    for own in FAMILY.own_questions("ocrbench", 4):
        asked = own.question()
        shape = FAMILY.shape(CARD, *own.size(), len(tokenizer.encode(asked.text)), None)
        prompt = FAMILY.written(CARD, asked.text, shape.images, tokenizer, [own.image()])
        few, many = (
            judge(model, prompt, build_pruner(f"topv:keep={keep}"), "current", sample=own.id, new_tokens=8, seed=0)
            for keep in (0.01, 0.75)
        )
        kl.append((few["kl"], many["kl"]))
    assert np.mean([few for few, _ in kl]) > 2 * np.mean([many for _, many in kl])
