"""The second proving model: its pictures, its questions, how it was trained, and what it must show."""

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
from memprof.families._proving_llava.scenes import COLOURS, HELD_OUT, KINDS, NUMBERS, SAME, SIZE, THINGS, draw_scene
from memprof.families.proving_llava import VOCABULARY, ProvingLlava
from memprof.models.checkpoint import load_checkpoint
from memprof.models.find import find
from memprof.models.tokenizer import read_tokenizer
from memprof.pruning.vision import uses_class_token, vision_attention
from memprof.records import RunSpec, summarize
from memprof.runner import run

FAMILY = ProvingLlava()
CARD = find("proving-llava")
SHIPPED = FAMILY.shipped(CARD)
SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def training() -> Any:
    """``scripts/train_proving_llava.py`` as a module; it takes its optimiser from the first one's script beside it."""
    for name in ("train_proving", "train_proving_llava"):
        spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
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


def test_things_stand_apart_inside_the_picture() -> None:
    for seed in range(100):
        things = draw_scene(seed).things
        assert THINGS[0] <= len(things) <= THINGS[1]
        assert sum(thing.alpha for thing in things).max() <= 1.0, "no thing hides another"
        for thing in things:
            assert thing.colour in COLOURS
            assert thing.kind in KINDS
            assert min(thing.at) > 0
            assert max(thing.at) < SIZE
            assert thing.alpha.sum() > 25


def test_noise_falls_with_frequency_as_in_photographs() -> None:
    """Of rings about zero frequency, power falls with about the square, as natural images' does."""
    power = np.zeros((SIZE, SIZE))
    for seed in range(40):
        grey = draw_scene(seed).pixels.mean(2)
        power += np.abs(np.fft.fft2(grey - grey.mean())) ** 2
    at = np.abs(np.fft.fftfreq(SIZE, 1 / SIZE))
    radius = np.hypot(at[:, None], at)
    bands = [power[(radius >= low) & (radius < 2 * low)].mean() for low in (1, 2, 4, 8)]
    slope = np.polyfit(np.log2([1, 2, 4, 8]), np.log2(bands), 1)[0]
    assert -3.2 < slope < -1.5


def test_questions_have_one_right_answer() -> None:
    for number in range(100):
        scene = draw_scene(HELD_OUT + number)
        count, compare = (FAMILY.own_questions(task, number + 1)[number].question() for task in ("ocrbench", "ai2d"))
        (word,) = count.words
        assert count.text == f"how many {word}"
        assert count.answer == NUMBERS[sum(word in (thing.kind, thing.colour) for thing in scene.things)]
        first, second = (scene.count(word) for word in compare.words)
        more = SAME if first == second else compare.words[first < second]
        assert (compare.text, compare.answer) == (f"more {compare.words[0]} or {compare.words[1]}", more)
        assert first + second > 0


# -- the family --------------------------------------------------------------------------------------------------------


def test_tokens() -> None:
    tokenizer = read_tokenizer(SHIPPED)
    for own in FAMILY.own_questions("ai2d", 20):
        text = own.question().text
        assert tokenizer.encode(text) == [VOCABULARY.index(word) for word in text.split()]
    assert tokenizer.decode([*tokenizer.encode("3"), tokenizer.special("<eos>")]) == "3"
    assert tokenizer.decode(tokenizer.encode("balls")) == "balls"
    assert tokenizer.encode("<eos>") != [tokenizer.special("<eos>")]


def test_one_view_whatever_the_picture() -> None:
    for width, height in ((64, 64), (1600, 200)):
        shape = FAMILY.shape(CARD, width, height, 3, 12)
        assert (shape.tiles, shape.visual_tokens, shape.length) == (1, 64, 70)
    pixels = FAMILY.pixels(CARD, shape.images[0], draw_scene(3).image())
    assert isinstance(pixels, np.ndarray)
    assert pixels.shape == (1, 3, SIZE, SIZE)


def test_its_tower_has_a_class_token_in_use(model: Any) -> None:
    attention = vision_attention([("tower", model.model.vision_tower)], -2)
    assert uses_class_token(attention)
    assert len(model.model.vision_tower.encoder.layers) == 3
    assert attention is model.model.vision_tower.encoder.layers[1].self_attn


def test_a_run_asks_what_training_taught(training: Any) -> None:
    tokenizer = read_tokenizer(SHIPPED)
    batch = training.make_batch([HELD_OUT])
    for task, (start, _) in zip(("ocrbench", "ai2d"), training.segments(), strict=False):
        own = FAMILY.own_questions(task, 1)[0]
        shape = FAMILY.shape(CARD, *own.size(), len(tokenizer.encode(own.question().text)), None)
        ids = FAMILY.written(CARD, own.question().text, shape.images, tokenizer).ids
        assert len(ids) == shape.length
        asked = len(ids) - training.PREFIX
        assert batch.ids[0, : training.PREFIX].tolist() == ids[: training.PREFIX]
        assert batch.ids[0, start : start + asked].tolist() == ids[training.PREFIX :]
        assert VOCABULARY[batch.labels[0, start + asked - 1]] == own.question().answer
    pixels = FAMILY.pixels(CARD, shape.images[0], own.image())
    assert (batch.pixels[0].numpy() == pixels[0]).all()


def test_own_questions() -> None:
    assert FAMILY.shipped(CARD) == SHIPPED
    assert len(FAMILY.own_questions("ai2d")) == 64
    assert len({own.id for own in FAMILY.own_questions("ocrbench", 20)}) == 20
    with pytest.raises(BadValue, match="limit"):
        FAMILY.own_questions("ai2d", 0)
    assert "things to compare" in FAMILY.own_label("ai2d")
    assert "things to count" in FAMILY.own_label("ocrbench")


# -- training ----------------------------------------------------------------------------------------------------------


def test_packed_questions_do_not_see_each_other(training: Any, model: Any) -> None:
    batch = training.make_batch([HELD_OUT + 1, HELD_OUT + 2])
    with torch.no_grad():
        packed = training.forward(model, batch, training.masks_for(2)).logits
        for start, count in training.segments():
            ids = torch.cat((batch.ids[:, : training.PREFIX], batch.ids[:, start : start + count]), 1)
            alone = model(input_ids=ids, pixel_values=batch.pixels).logits[:, training.PREFIX :]
            assert torch.allclose(packed[:, start : start + count], alone, atol=2e-3)


def test_the_guide_points_at_what_is_asked_after(training: Any) -> None:
    batch = training.make_batch(range(30))
    for seed in range(30):
        scene = draw_scene(seed)
        for (start, count), question in zip(training.segments(), training.questions(scene, seed), strict=True):
            rows = batch.guide[seed, start : start + count]
            (at,) = rows.sum(1).nonzero().T
            assert batch.labels[seed, start + at[0]] >= 0, "the position that writes the answer"
            asked = [thing for thing in scene.things if any(map(thing.has, question.words))]
            cells = {training.cell_of(*thing.at) for thing in asked}
            assert set(rows[at[0]].nonzero()[:, 0].tolist()) == {0} | {2 + cell for cell in cells}
            assert float(rows[at[0]].sum()) == pytest.approx(1.0)


def test_the_same_seed_gives_the_same_first_steps(training: Any) -> None:
    def losses(seed: int) -> list[float]:
        return training.train(training.Plan(seed=seed, steps=3, images=2, warmup=2), say=lambda _: None)[1]

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
    assert sum(t.numel() for t in tensors) <= 4e6


def test_shipped_weights_score_what_the_report_says(training: Any, model: Any, report: dict[str, Any]) -> None:
    found = training.gates(model, 72, cuts=(), attention=False)
    for name in ("count", "compare"):
        said = report["gates"][name]
        margin = 3 * (max(said * (1 - said), 0.02) / 72) ** 0.5
        assert found[name] == pytest.approx(said, abs=margin)


def test_the_gates_of_a_fair_test_bed(report: dict[str, Any]) -> None:
    gates = report["gates"]
    for name in ("count", "compare"):
        assert gates[name] >= gates[f"{name}_guess"] + 0.3, "it sees"
        assert gates[f"{name}_drop2"] <= gates[f"{name}_guess"] + 0.08, "and looks behind layer 2"
    assert gates["attention_2"] > 0.3, "the layer in front of its readers; layers 0 and 1 were kept blind"
    assert gates["count_drop4"] >= gates["count"] - 0.05, "what is asked is known behind layer 3"


def test_greedy_answers_are_right(model: Any, report: dict[str, Any]) -> None:
    tokenizer = read_tokenizer(SHIPPED)
    for task, name in (("ocrbench", "count"), ("ai2d", "compare")):
        right = 0
        for own in FAMILY.own_questions(task, 30):
            asked = own.question()
            shape = FAMILY.shape(CARD, *own.size(), len(tokenizer.encode(asked.text)), None)
            prompt = FAMILY.written(CARD, asked.text, shape.images, tokenizer, [own.image()])
            out = model.generate(**place(prompt, model), max_new_tokens=4, do_sample=False)
            right += tokenizer.decode(out[0, shape.length :].tolist()) == asked.answer
        assert right / 30 >= report["gates"][name] - 0.25


def test_class_token_methods_run_and_keep_their_plan(tmp_path: Path) -> None:
    for method in ("vispruner:keep=0.25", "visionzip:keep=0.25,class_token=true"):
        spec = RunSpec(
            model="proving-llava", method=method, task="ocrbench", device="cpu", dtype="float32", limit=2, warmup=0,
            max_new_tokens=2,
        )  # fmt: skip
        done = run(spec, tmp_path / method.partition(":")[0], judge=Judge())
        found = summarize(done)
        assert (found["status"], found["samples"], found["failed"]) == ("measured", 2, 0)
        assert done.samples[0].kept_visual_tokens == [16] * CARD.layers
        assert done.samples[0].kv_tokens_found == done.samples[0].kv_tokens_planned
        assert "own drawn questions" in found["data"]
