"""A configuration that transformers reads and cannot run is one line, whoever meets it, and leaves no run behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_card
from typed import call

import memprof
from memprof.errors import MemprofError
from memprof.families import FAMILIES, Model
from memprof.models.faults import runs

#: What is said of it at the top, of its text and of its tower: each stands for a place where transformers fails.
BROKEN: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "a layer that the tower has not": ("llava", {"vision_feature_layer": -9}, {}, {}),
    "a shuffle that does not divide": ("smolvlm", {"scale_factor": 5}, {}, {}),
    "sections that are no head": (
        "qwen2-5-vl", {}, {"rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24]}}, {}
    ),
    "a tower of another width": ("qwen2-5-vl", {}, {}, {"out_hidden_size": 16}),
}  # fmt: skip


def broken(how: str) -> Model:
    family, top, text, vision = BROKEN[how]
    return tiny_card(FAMILIES.load(family)()).but(text=text, vision=vision, **top)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMPROF_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("how", BROKEN)
def test_from_python_it_is_one_line_with_its_cause(how: str) -> None:
    model = broken(how)
    config = model.family.config(model)
    with pytest.raises(MemprofError, match=r"configuration cannot be run by transformers: .*; correct its") as caught:
        memprof.predict(config, images=[(100, 60)], text_tokens=5, new_tokens=1)
    assert isinstance(caught.value.__cause__, Exception)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("words", [("run", "--limit", "1"), ("fit", "--gpu", "h100"), ("tune", "--budget", "1GiB")])
def test_on_the_command_line_it_is_one_line(
    words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, file, folder = broken(next(iter(BROKEN))), tmp_path / "mine.json", tmp_path / "r"
    file.write_text(json.dumps(model.config))
    more = ("-o", str(folder)) if words[0] == "run" else ()
    method = () if words[0] == "fit" else ("--method", "fastv")
    sim = () if words[0] == "fit" else ("--device", "sim", "-q")
    ended, _, err = call(capsys, *words, "--model", str(file), *method, *sim, *more)
    assert (ended, err.count("\n")) == (1, 1), err
    assert "memprof: mine's configuration cannot be run by transformers: IndexError" in err
    assert not folder.exists()


def test_without_weights_it_is_one_line() -> None:
    model = tiny_card(FAMILIES.load("llava")())
    with memprof.weightless(model.family.config(model)) as module:
        with pytest.raises(MemprofError, match=r"this generate.. of a Llava.* cannot be run by transformers: .*match"):
            module.generate(
                input_ids=torch.full((1, 3), model.family.image_token(model)),
                pixel_values=torch.zeros(1, 3, *[model.vision["image_size"]] * 2), max_new_tokens=1,
            )  # fmt: skip

        def stop(*_: object) -> None:
            raise KeyError("somebody's own")

        hook = module.register_forward_pre_hook(stop)
        with pytest.raises(KeyError, match="somebody's own"):
            module.generate(input_ids=torch.ones(1, 3, dtype=torch.int64), max_new_tokens=1)
        hook.remove()


def test_what_is_not_transformers_passes_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError), runs("this", "that"):
        1 / 0  # noqa: B018
    with pytest.raises(MemprofError, match=r"^mine$"), runs("this", "that"):
        raise MemprofError("mine")
