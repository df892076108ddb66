"""The bundled samples, the pictures memprof draws, and what every task must do."""

import hashlib
import importlib.util
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from PIL import Image

from memprof.tasks import TASKS, Sample, Task
from memprof.tasks._draw import _SCENES, draw

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
NAMES = TASKS.names()


def script():
    spec = importlib.util.spec_from_file_location("make_bundled", ROOT / "scripts/make_bundled.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --------------------------------------------------------------------------------- what every task must do


@pytest.mark.parametrize("name", NAMES)
def test_every_task(name, tmp_path):
    task = TASKS.build(name)
    assert isinstance(task, Task)
    assert task.name == name
    assert task.title
    assert task.paper
    assert task.metric
    assert task.max_new_tokens > 0
    samples = task.samples()
    assert len({s.id for s in samples}) == len(samples) > 4
    assert [s.id for s in task.samples("bundled", 4)] == [s.id for s in samples[:4]]
    for sample in samples:
        assert isinstance(sample, Sample)
        assert sample.width > 0 < sample.height
        assert sample.question
        assert sample.text_tokens > 0
        assert task.score(sample.answers[0], sample) == 1.0
        assert task.score("something else altogether", sample) == 0.0
    smallest = min(samples, key=lambda s: s.width * s.height)
    assert smallest.image().size == (smallest.width, smallest.height)
    assert task.aggregate((s.category, 1.0) for s in samples)["score"] == 1.0
    shapes = tmp_path / "my.csv"
    shapes.write_text("width,height,text_tokens\n30,20,5\n")
    (only,) = task.samples(str(shapes))
    assert only.image().size == (30, 20)
    assert task.label(str(shapes)) == "shapes from my.csv"


def test_labels():
    ai2d, ocrbench, folder = (TASKS.build(n) for n in ("ai2d", "ocrbench", "folder"))
    assert ai2d.label() == "AI2D bundled sample (43 real shapes, drawn pictures)"
    assert ai2d.label("hub") == "AI2D (lmms-lab/ai2d, test)"
    assert ai2d.label("/data/AI2D_TEST.tsv") == "AI2D (AI2D_TEST.tsv)"
    assert ocrbench.label("bundled") == "OCRBench bundled sample (48 real shapes, drawn pictures)"
    assert ocrbench.label("hub") == "OCRBench (echo840/OCRBench, test)"
    assert ocrbench.label("Shapes.CSV") == "shapes from Shapes.CSV"
    assert folder.label("my/pictures/") == "image folder (pictures)"


def test_no_heavy_import():
    code = (
        "import sys; from memprof.tasks import TASKS\n"
        "for name, cls in TASKS: print(cls.title, cls().label(), cls().samples('bundled', 2)[0].id)\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'PIL', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def test_bundled_takes_milliseconds():
    task = TASKS.build("ocrbench")
    task.samples()
    start = time.perf_counter()
    task.samples("bundled", 4)
    assert time.perf_counter() - start < 0.05


# ------------------------------------------------------------------------------------------------ the samples


def test_ai2d_lengths_and_shapes_are_like_the_real_ones():
    samples = TASKS.build("ai2d").samples()
    tokens = [s.text_tokens for s in samples]
    assert abs(sum(tokens) / len(tokens) - 53) < 1
    assert max(tokens) <= 88
    sizes = [(s.width, s.height) for s in samples]
    assert (min(w for w, _ in sizes), max(w for w, _ in sizes)) == (240, 1500)
    assert (min(h for _, h in sizes), max(h for _, h in sizes)) == (156, 1080)
    tiles = [script().tiles(size) for size in sizes]
    assert tiles[0] == 13
    assert min(tiles[:2]) == 1
    assert len(set(tiles[:9])) >= 6
    answers = [s.answers[0] for s in samples]
    assert all(10 <= answers.count(letter) <= 11 for letter in "ABCD")


def test_ocrbench_spans_the_real_shapes():
    samples = TASKS.build("ocrbench").samples()
    sizes = {(s.width, s.height) for s in samples}
    assert {(4961, 7016), (439, 907), (754, 1000)} <= sizes
    tiles = [script().tiles((s.width, s.height)) for s in samples]
    assert tiles[0] == 13
    assert {3, 7, 9, 11, 13} <= set(tiles)
    assert {s.category for s in samples} == {"Key Information Extraction"}
    short = TASKS.build("ocrbench:suffix=false").samples()
    assert {a.text_tokens - b.text_tokens for a, b in zip(samples, short, strict=True)} == {10}


@pytest.mark.parametrize("name", NAMES)
def test_the_answer_stands_in_the_scene(name):
    for row in json.loads((ROOT / f"memprof/tasks/{name}.json").read_text(encoding="utf-8"))["samples"]:
        answer = row["options"][int(row["answer"])] if "options" in row else row["answer"]
        answer = answer[0] if isinstance(answer, list) else answer
        words = json.dumps(row["scene"], ensure_ascii=False)
        assert answer in words or any(answer.endswith(part) for part in words.split('"') if len(part) > 2)


def test_questions_about_order_are_answered_by_the_scene():
    for row in json.loads((ROOT / "memprof/tasks/ai2d.json").read_text(encoding="utf-8"))["samples"]:
        scene, options, right = row["scene"], row["options"], int(row["answer"])
        labels = scene.get("labels") or [*scene.get("parts", {}), *scene.get("groups", {})]
        ends = [max((x for x in labels if o.endswith(x)), key=len, default=o) for o in options]
        assert len(set(ends)) == 4
        if scene["kind"] == "parts":
            assert scene["parts"][ends[right]] in row["question"]
        elif scene["kind"] == "tree":
            assert any(m in row["question"] for m in scene["groups"][ends[right]])
        else:
            step = {"chain": -1, "cycle": 1}.get(scene["kind"], -1 if "above" in row["question"] else 1)
            before = labels[(labels.index(ends[right]) - step) % len(labels)]
            assert before in row["question"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared beside the checkout")
def test_the_script_writes_the_same_bytes():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sentencepiece's own, at import
        pytest.importorskip("sentencepiece")
    for name, text in script().build(SHARED).items():
        assert (ROOT / "memprof/tasks" / name).read_text(encoding="utf-8") == text


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared beside the checkout")
def test_all_formulas_of_ocrbench_are_of_hme100k():
    """Why the category alone decides which rule scores a row."""
    from memprof.tasks.ocrbench import FORMULA, QUESTIONS

    rows = json.loads((SHARED / "data/ocrbench/OCRBench.json").read_text(encoding="utf-8"))
    assert {r["type"] for r in rows if r["dataset_name"] == "HME100k"} == {FORMULA}
    assert {r["dataset_name"] for r in rows if r["type"] == FORMULA} == {"HME100k"}
    assert {t: sum(r["type"] == t for r in rows) for t in QUESTIONS} == QUESTIONS


# --------------------------------------------------------------------------------------------------- drawing


def scenes():
    found = {"card": {"kind": "card"}}
    for name in NAMES:
        for row in json.loads((ROOT / f"memprof/tasks/{name}.json").read_text(encoding="utf-8"))["samples"]:
            found.setdefault(row["scene"]["kind"], row["scene"])
    return found


def test_every_kind_of_scene_is_in_use():
    assert set(scenes()) == set(_SCENES)


@pytest.mark.parametrize("size", [(1, 1), (400, 1), (1, 400), (5000, 20), (20, 3000), (3, 7), (61, 47), (301, 299)])
@pytest.mark.parametrize("kind", sorted(_SCENES))
def test_drawing_at_awkward_sizes(kind, size):
    picture = draw(*size, scenes()[kind], seed="0")
    assert (picture.size, picture.mode) == (size, "RGB")


@pytest.mark.parametrize("kind", sorted(_SCENES))
def test_drawing_is_deterministic_and_not_empty(kind):
    scene = scenes()[kind]
    digests = {hashlib.sha256(draw(320, 240, scene, seed="7").tobytes()).hexdigest() for _ in range(2)}
    assert len(digests) == 1
    assert len(draw(320, 240, scene, seed="7").getcolors(320 * 240)) > 20


def test_the_seed_changes_a_drawn_shape():
    assert draw(50, 50, seed="a").tobytes() != draw(50, 50, seed="b").tobytes()


def test_two_calls_give_two_pictures():
    sample = TASKS.build("ai2d").samples()[1]
    first, second = sample.image(), sample.image()
    assert first is not second
    assert isinstance(first, Image.Image)
    assert first.tobytes() == second.tobytes()


def test_the_largest_picture_is_drawn_in_seconds():
    sample = max(TASKS.build("ocrbench").samples(), key=lambda s: s.width * s.height)
    start = time.perf_counter()
    assert sample.image().size == (4961, 7016)
    assert time.perf_counter() - start < 5
