"""``memprof ask`` as a user types it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from asking import checkpoint, picture
from safetensors.torch import save_file
from typed import call

from memprof.families import proving
from memprof.models.build import build_model
from memprof.models.find import find


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a picture, ``cat.png``, and a checkpoint, ``tiny``."""
    folder = tmp_path_factory.mktemp("ask")
    checkpoint(folder / "tiny")
    picture().save(folder / "cat.png")
    return folder


def words(there: Path, *more: str) -> list[str]:
    return [
        "ask", str(there / "cat.png"), "what is this?", "--model", "internvl3-1b", "--weights", str(there / "tiny"),
        "--device", "cpu", "--dtype", "float32", "--max-tiles", "4", "--max-new-tokens", "4", *more,
    ]  # fmt: skip


def test_the_three_methods_of_the_supplement_by_default(capsys: pytest.CaptureFixture[str], there: Path) -> None:
    code, out, err = call(capsys, *words(there))
    assert (code, err) == (0, "")
    assert out.startswith("InternVL3-1B as in tiny on cat.png (200 × 100), stack current, measured (MiB)\n")
    assert "User: what is this?" in out
    assert "keeps all 12 visual tokens" in out
    for name in ("Baseline", "FastV", "TopV"):
        assert name in out


def test_json_is_one_document(capsys: pytest.CaptureFixture[str], there: Path) -> None:
    code, out, err = call(capsys, *words(there, "--method", "baseline", "--method", "uniform:layer=1", "--json"))
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert [one["method"] for one in document["answers"]] == ["baseline", "uniform:keep=0.5,layer=1"]
    assert len(document["answers"][1]["cuts"][0]["tokens"]) == 6


def test_a_file_by_its_suffix_and_only_its_name_on_stdout(
    capsys: pytest.CaptureFixture[str], there: Path, tmp_path: Path
) -> None:
    page = tmp_path / "deep" / "page.html"
    code, out, err = call(capsys, *words(there, "--method", "baseline", "-o", str(page)))
    assert (code, out, err) == (0, f"{page}\n", "")
    assert page.read_text().count("data:image/png") == 2


def test_a_folder_gets_everything_and_stdout_the_answers(
    capsys: pytest.CaptureFixture[str], there: Path, tmp_path: Path
) -> None:
    code, out, _ = call(capsys, *words(there, "--method", "baseline", "-o", str(tmp_path / "all")))
    assert code == 0
    assert "User: what is this?" in out
    listed = [line for line in out.splitlines() if line.startswith(str(tmp_path))]
    assert {Path(line).name for line in listed} == {"ask.html", "ask.md", "ask.json", "ask-baseline.png"}


def test_a_model_that_comes_with_its_weights_runs_where_others_are_predicted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    card = find("proving")
    model = build_model(card, device="cpu", dtype="float32", seed=1)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    shutil.copy(Path(proving.__file__).parent / "_proving" / "tokenizer.json", tmp_path)
    picture(80, 80).save(tmp_path / "scene.png")
    code, out, err = call(
        capsys, "ask", str(tmp_path / "scene.png"), "read red", "--model", "proving", "--weights", str(tmp_path),
        "--max-new-tokens", "2", "--method", "baseline",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "measured" in out
    assert "100/100" in out


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (["--model", "gpt"], 2, "internvl2-2b"),
        (["--method", "nope"], 2, "baseline"),
        (["--method", "topv:layer=30"], 2, "decoder layers"),
        (["--stack", "old"], 2, "paper"),
        (["--unit", "G"], 2, "GiB"),
        (["--format", "pdf"], 2, "markdown"),
        (["-o", "answers.pdf"], 2, ".html"),
        (["--max-new-tokens", "0"], 2, "below 1"),
        (["--weights", "/nowhere"], 1, "/nowhere"),
    ],
)
def test_mistakes_are_one_line_and_a_code(
    capsys: pytest.CaptureFixture[str], there: Path, more: list[str], code: int, says: str
) -> None:
    found, out, err = call(capsys, "ask", str(there / "cat.png"), "what?", "--device", "sim", *more)
    assert (found, out) == (code, "")
    assert says in err
    assert err.count("\n") == 1


def test_a_missing_or_broken_picture_and_an_empty_prompt(capsys: pytest.CaptureFixture[str], there: Path) -> None:
    for image, prompt, code, says in (
        (there / "no.png", "x", 1, "not there"), (there / "tiny" / "config.json", "x", 1, "not a picture"),
        (there / "cat.png", "", 2, "empty"),
    ):  # fmt: skip
        found, out, err = call(capsys, "ask", str(image), prompt, "--device", "sim")
        assert (found, out, err.count("\n")) == (code, "", 1)
        assert says in err
