"""Asking a tiny model: its real answers, what stayed, and what is honestly not shown."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from asking import checkpoint, picture
from PIL import Image
from tiny import families, tiny_model

from memprof.analysis.ask import ask, open_picture
from memprof.asked import Asked, Grid
from memprof.bench import Bench
from memprof.bench.generate import Outcome, place
from memprof.errors import DataError, UsageError
from memprof.forecasts import Ask
from memprof.models import find
from memprof.models.tokenizer import read_tokenizer
from memprof.pruning import method_name
from memprof.records import RunSpec
from memprof.runner import Complete, complete_spec
from memprof.tasks import Sample

METHODS = ("topv:keep=0.5,layer=1", "uniform:keep=0.25,layer=1", "pyramiddrop:parts=3", "visionzip", "baseline")


def specs(weights: str, methods: tuple[str, ...] = METHODS, **fields: object) -> list[Complete]:
    base = RunSpec(
        "internvl3-1b", "baseline", "folder", "cpu", dtype="float32", weights=weights, max_new_tokens=6, max_tiles=4
    )
    return [complete_spec(dataclasses.replace(base, method=method, **fields)) for method in methods]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def asked(weights: Path) -> Asked:
    return ask(specs(str(weights)), picture(), "what is this?", "cat.png")


def test_the_answer_is_what_the_model_generates(asked: Asked, weights: Path) -> None:
    (one,) = specs(str(weights), ("baseline",))
    bench = Bench(one.setup)

    class Same:
        def image(self) -> Image.Image:
            return picture()

    prompt = bench.prompt(Sample("x", 200, 100, "what is this?", None, (), None, Same()), one.spec.max_tiles)
    model, _ = bench.ready()
    with torch.no_grad():
        out = model.generate(**place(prompt, model), max_new_tokens=6, do_sample=False)
    said = read_tokenizer(weights).decode(out[0, len(prompt.ids) :].tolist())
    assert asked.reference is not None
    assert asked.reference.text == said.strip()
    assert asked.reference.run.record.spec.method == "baseline"


def test_baseline_comes_first_and_every_method_answers(asked: Asked) -> None:
    assert [one.run.record.spec.method.partition(":")[0] for one in asked.answers] == [
        "baseline", "topv", "uniform", "pyramiddrop", "visionzip",
    ]  # fmt: skip
    assert all(one.text is not None for one in asked.answers)
    assert asked.notes == []


def test_the_grid_and_the_tiles_are_what_the_model_was_given(asked: Asked) -> None:
    assert asked.grid == Grid(columns=2, rows=1, thumbnail=True, across=2, down=2)
    assert asked.tiles is not None
    assert asked.tiles.shape == (3, 56, 56, 3)
    whole = np.asarray(picture().resize((112, 56), Image.Resampling.BICUBIC))
    assert np.abs(np.concatenate(list(asked.tiles[:2]), axis=1).astype(int) - whole).max() <= 1


def test_what_stayed_is_counted_cut_by_cut(asked: Asked) -> None:
    baseline, topv, uniform, pyramid, zipped = asked.answers
    assert baseline.tokens == list(range(12))
    assert topv.tokens is not None
    assert len(topv.tokens) == topv.kept == 6
    assert topv.tokens == sorted(set(topv.tokens))
    assert uniform.tokens is not None
    assert len(uniform.tokens) == 3
    assert [cut.kept for cut in pyramid.cuts] == [6, 3]
    first, last = (set(cut.tokens or ()) for cut in pyramid.cuts)
    assert last < first
    assert pyramid.tokens == sorted(last)
    assert zipped.cuts[0].layer == 0
    for one in asked.answers:
        assert one.sample.kept_visual_tokens[-1] == one.kept
        assert (one.run.record.visual_flops_cut or 0) > 0 or one is baseline


def test_random_weights_say_nothing_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    _, card, _ = tiny_model("internvl")
    monkeypatch.setattr(find, "find", lambda *_: card)
    found = ask(specs("random", ("topv:layer=1", "uniform:layer=1")), picture(), "what is this?", "cat.png")
    assert [one.text for one in found.answers] == [None, None]
    assert found.reference is None
    assert [len(one.tokens or ()) for one in found.answers] == [24, 24]
    assert "random weights: their answers would be noise and are not shown" in found.notes
    assert "random weights: what topv kept follows from noise" in found.notes
    assert any("taken to be 4 tokens" in note for note in found.notes)
    assert found.tiles is not None


def test_a_prediction_has_numbers_only(weights: Path) -> None:
    found = ask(
        specs(str(weights), ("uniform:layer=1",), device="sim", max_new_tokens=2), picture(), "what is this?", "cat.png"
    )
    (one,) = found.answers
    assert one.run.record.status == "predicted"
    assert one.sample.dynamic_peak_bytes > 0
    assert (one.text, one.tokens, one.kept) == (None, None, 6)
    assert found.tiles is None
    assert found.notes[0].startswith("predicted, nothing ran: no answers")


def test_a_failing_method_leaves_its_reason_and_the_others_go_on(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Bench.outcome

    def broken(self: Bench, asked: Ask) -> object:
        if method_name(asked.pruner) == "topv":
            raise torch.cuda.OutOfMemoryError("no room\nand more")
        return whole(self, asked)

    monkeypatch.setattr(Bench, "outcome", broken)
    found = ask(specs(str(weights), ("topv:layer=1", "baseline")), picture(), "what is this?", "cat.png")
    assert found.answers[0].text is not None
    assert (found.answers[1].sample.status, found.answers[1].sample.error) == ("oom", "no room")
    assert found.answers[1].tokens is None


def test_a_card_that_ran_out_is_no_answer(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Bench.outcome

    def short(self: Bench, asked: Ask) -> Outcome:
        found = whole(self, asked)
        if method_name(asked.pruner) != "topv":
            return found
        return Outcome(dataclasses.replace(found.memory, refused="no room; it ended in prefill"), None)

    monkeypatch.setattr(Bench, "outcome", short)
    found = ask(specs(str(weights), ("topv:layer=1", "baseline")), picture(), "what is this?", "cat.png")
    assert found.answers[0].text is not None
    assert (found.answers[1].sample.status, found.answers[1].sample.error) == ("oom", "no room; it ended in prefill")
    assert found.answers[1].text is None


def test_an_empty_question_is_refused(weights: Path) -> None:
    with pytest.raises(UsageError, match="empty"):
        ask(specs(str(weights)), picture(), " \n", "cat.png")


def test_pictures_are_read_upright_or_said_to_be_broken(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # held on its side
    picture(60, 20).save(tmp_path / "held.jpg", exif=exif)
    assert open_picture(tmp_path / "held.jpg").size == (20, 60)
    picture(60, 20).convert("P").save(tmp_path / "small.gif")
    assert open_picture(tmp_path / "small.gif").mode == "RGB"
    (tmp_path / "text.png").write_text("no picture")
    whole = tmp_path / "whole.png"
    picture(60, 20).save(whole)
    (tmp_path / "half.png").write_bytes(whole.read_bytes()[:60])
    for name, says in (
        ("none.png", "not there"), ("text.png", "not a picture"), ("half.png", "cannot be read"), (".", "a folder"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=says):
            open_picture(tmp_path / name)


@pytest.mark.parametrize("name", families())
def test_every_family_can_show_what_the_model_is_given(name: str) -> None:
    family, card, _ = tiny_model(name)
    shape = family.shape(card, 90, 90, 3, 1)
    plain = Image.new("RGB", (90, 90), (250, 120, 3))
    pixels = family.inputs(card, shape.images, [plain])["pixel_values"].values
    assert pixels is not None
    shown = family.seen(card, shape.images[0], pixels)
    assert shown.dtype == np.uint8
    assert len(shown) == shape.images[0].tiles
    assert (shown == (250, 120, 3)).all()
