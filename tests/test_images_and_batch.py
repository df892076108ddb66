"""Several pictures in a prompt, and prompts side by side: from a file or an option to the record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typed import call

import memprof
from memprof.api import spec
from memprof.bench import Bench, shape_of
from memprof.errors import DataError
from memprof.models.find import find
from memprof.runner import complete_spec, run, samples_of
from memprof.store import read_run
from memprof.tasks import TASKS, Sample

HEADER = "width,height,text_tokens,images,batch\n"


def samples(file: Path) -> list[Sample]:
    found = TASKS.build("folder").samples(str(file))
    return [found[number] for number in range(len(found))]


def test_a_csv_says_how_many(tmp_path: Path) -> None:
    file = tmp_path / "some.csv"
    file.write_text(HEADER + "640,480,20,3,4\n320,200,10,,\n")
    first, second = samples(file)
    assert (first.sizes(), first.batch) == ([(640, 480)] * 3, 4)
    assert (second.sizes(), second.batch) == ([(320, 200)], 1)
    shape = shape_of(find("llava-1.5-7b"), first, 20)
    assert (len(shape.images), shape.batch, shape.visual_tokens) == (3, 4, 3 * 576)


@pytest.mark.parametrize(
    ("row", "said"),
    [("1,1,1,0,1", "images is not a positive"), ("1,1,1,1,x", "batch is not a positive"),
     ("1,1,1,9999,1", "images is above 1000")],
)  # fmt: skip
def test_a_number_that_is_none_is_refused_by_its_line(tmp_path: Path, row: str, said: str) -> None:
    file = tmp_path / "some.csv"
    file.write_text(f"{HEADER}{row}\n")
    with pytest.raises(DataError, match=f"line 2: {said}"):
        samples(file)


def test_a_line_lists_its_pictures(tmp_path: Path) -> None:
    for name, size in (("a.png", (64, 32)), ("b.png", (30, 90))):
        Image.new("RGB", size, {"a": "red", "b": "blue"}[name[0]]).save(tmp_path / name)
    file = tmp_path / "some.jsonl"
    file.write_text(json.dumps({"image": ["a.png", "b.png"], "question": "Which is red?", "text_tokens": 5}) + "\n")
    (one,) = samples(file)
    assert one.sizes() == [(64, 32), (30, 90)]
    assert [picture.image().getpixel((0, 0)) for picture in one.pictures] == [(255, 0, 0), (0, 0, 255)]
    card = find("qwen2-vl-2b")
    family = card.family
    assert shape_of(card, one, 5) == family.shape_of(card, [family.image(card, *size) for size in one.sizes()], 5)
    (tmp_path / "b.png").write_bytes(b"no picture")
    asked = spec("proving", task="folder", device="sim", data=str(file))
    done = run(asked, tmp_path / "run")
    assert "some.jsonl, line 1 (b.png): the image cannot be read" in str(done.samples[0].error)


@pytest.mark.parametrize("image", [[], [1], ["a.png", None], 3])
def test_a_list_of_anything_else_is_refused(tmp_path: Path, image: object) -> None:
    (tmp_path / "some.jsonl").write_text(json.dumps({"image": image, "question": "?"}) + "\n")
    with pytest.raises(DataError, match="line 1: not an object with an 'image' that is a path, or a list of paths"):
        samples(tmp_path / "some.jsonl")


def test_pictures_are_shown_in_turn(tmp_path: Path) -> None:
    for name in "ab":
        Image.new("RGB", (64, ord(name)), "red").save(tmp_path / f"{name}.png")
    (tmp_path / "some.jsonl").write_text(json.dumps({"image": ["a.png", "b.png"], "question": "?"}) + "\n")
    asked = complete_spec(spec("llava-1.5-7b", task="folder", device="sim", data=str(tmp_path), images=3, batch=2))
    found, _ = samples_of(asked.setup.model, asked.task, asked.spec)
    assert found[0].sizes() == [(64, 97), (64, 98), (64, 97)]
    assert found[0].batch == 2


def test_options_reach_the_record_and_are_what_is_predicted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "one.csv"
    file.write_text("width,height,text_tokens\n448,448,20\n")
    words = ("--model", "proving", "--device", "sim", "--data", str(file), "--max-new-tokens", "3")
    code, _, err = call(capsys, "run", "-q", *words, "--images", "2", "--batch", "3", "-o", str(tmp_path / "r"))
    assert code == 0, err
    (sample,) = read_run(tmp_path / "r").samples
    assert sample.shape is not None
    assert (len(sample.shape.images), sample.shape.batch) == (2, 3)
    said = memprof.predict("proving", images=[(448, 448)] * 2, text_tokens=20, new_tokens=3, batch=3).memory.fullest
    assert sample.dynamic_peak_bytes == said.dynamic_peak_bytes
    code, out, err = call(capsys, "audit", str(tmp_path / "r"))
    assert code == 0, out + err


def test_prompts_side_by_side_are_measured(tmp_path: Path) -> None:
    file = tmp_path / "one.csv"
    file.write_text(HEADER + "100,100,20,2,1\n100,100,20,2,3\n")
    asked = spec("proving", device="cpu", data=str(file), max_new_tokens=2)
    one, three = run(asked, tmp_path / "r", bench=Bench(complete_spec(asked).setup)).samples
    assert (one.error, three.error) == (None, None)
    assert [3 * n for n in one.tokens.kv_bytes] == three.tokens.kv_bytes
    assert one.shape is not None
    assert len(one.shape.images) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--batch", "2", "--method", "topv"), "TopV cuts one prompt at a time: --batch 2 goes with --method baseline"),
        (("--model", "gpt2", "--method", "fastv"), "GPT-2 is a language model: FastV has no visual tokens to prune"),
    ],
)
def test_what_no_method_cuts_is_said(words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "run", "--device", "sim", *words)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
