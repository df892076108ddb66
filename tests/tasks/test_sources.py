"""Every form in which samples come, whole and broken."""

import base64
import csv
import io
import json
import sys
import types

import pytest
from PIL import Image

from memprof.errors import BadValue, DataError
from memprof.tasks import TASKS, _sources
from memprof.tasks.ocrbench import INSTRUCTION


def png(width=6, height=4, colour="red", mode="RGB"):
    stream = io.BytesIO()
    Image.new(mode, (width, height), 1 if mode == "L" else colour).save(stream, "PNG")
    return stream.getvalue()


def noise(side):
    """A PNG whose base64 passes csv's limit of 128 KiB a field."""
    stream = io.BytesIO()
    Image.effect_noise((side, side), 90).save(stream, "PNG")
    return stream.getvalue()


# ----------------------------------------------------------------------------------------------------- shapes


def shapes(tmp_path, text, **options):
    path = tmp_path / "shapes.csv"
    path.write_bytes(text.encode(options.get("encoding", "utf-8")))
    return TASKS.build("ai2d").samples(str(path), options.get("limit"))


def test_csv_of_shapes(tmp_path):
    first, second = shapes(tmp_path, "width,height,text_tokens\n640,480,20\n30,40,7\n")
    assert (first.width, first.height, first.text_tokens, first.question, first.answers) == (640, 480, 20, "", ())
    assert (first.id, second.id) == ("00000", "00001")
    assert second.image().size == (30, 40)


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffwidth,height,text_tokens\r\n640,480,20\r\n",
        "Width, Height ,TEXT_TOKENS\n\n 640 , 480 , 20 \n\n",
        "note,text_tokens,height,width\nhello,20,480,640",
    ],
)
def test_csv_forms_that_are_accepted(tmp_path, text):
    (only,) = shapes(tmp_path, text)
    assert (only.width, only.height, only.text_tokens) == (640, 480, 20)


def test_csv_ids_and_limit(tmp_path):
    text = "id,width,height,text_tokens\na,1,1,0\n,2,2,0\nbroken,x,1,1\n"
    assert [s.id for s in shapes(tmp_path, text, limit=2)] == ["a", "00001"]


HEADER = "width,height,text_tokens\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER + "1,1,1\n0,1,1\n", r"^shapes\.csv, line 3: width is not a positive integer$"),
        (HEADER + "1,-4,1\n", r"line 2: height is not a positive integer"),
        (HEADER + "1,1.5,1\n", r"line 2: height is not a positive integer"),
        (HEADER + "1,1,\n", r"line 2: text_tokens is not a whole number of at least 0"),
        (HEADER + "1,1,-1\n", r"line 2: text_tokens is not"),
        (HEADER + "1,1\n", r"line 2: 2 fields, but the header has 3"),
        (HEADER, r"shapes\.csv holds no samples"),
        ("", r"shapes\.csv is empty; its first line must name the columns width, height, text_tokens"),
        ("width,tokens\n1,1\n", r"line 1: no column height, text_tokens; it has width, tokens"),
        ("width,height,width,text_tokens\n1,1,2,1\n", r"line 1: column width stands twice"),
        ("id,images,Images," + HEADER + "a,1,2,1,1,1\n", r"line 1: column images stands twice"),
        ("id," + HEADER + "a,1,1,1\na,1,1,1\n", r"line 3: id 'a' stands twice"),
    ],
)
def test_broken_csv(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        shapes(tmp_path, text)


def test_csv_of_rows_that_leave_their_text_open(tmp_path):
    """A count asked for stands in for one that a row, or the whole file, does not say."""
    (tmp_path / "none.csv").write_text("width,height\n640,480\n")
    (tmp_path / "some.csv").write_text(HEADER + "1,1,\n1,1,7\n")
    (other := tmp_path / "other.csv").write_text("tokens\n1\n")
    task = TASKS.build("ai2d")
    assert [s.text_tokens for s in task.samples(str(tmp_path / "none.csv"), text_tokens=30)] == [30]
    assert [s.text_tokens for s in task.samples(str(tmp_path / "some.csv"), text_tokens=30)] == [30, 7]
    with pytest.raises(DataError, match="no column text_tokens"):
        task.samples(str(tmp_path / "none.csv"))
    with pytest.raises(DataError, match="no column width, height"):
        task.samples(str(other), text_tokens=1)


def test_csv_that_is_not_utf8(tmp_path):
    with pytest.raises(DataError, match="not UTF-8"):
        shapes(tmp_path, HEADER + "1,1,é\n", encoding="latin-1")


def test_shape_too_large_to_draw_can_still_be_predicted(tmp_path):
    (only,) = shapes(tmp_path, HEADER + "100000,100000,5\n")
    assert only.width == 100_000
    with pytest.raises(DataError, match="too large to draw"):
        only.image()


# -------------------------------------------------------------------------------------------------------- TSV


def tsv(tmp_path, header, *rows):
    path = tmp_path / "my.tsv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([header, *rows])
    return str(path)


def b64(data):
    return base64.b64encode(data).decode()


def test_tsv_of_vlmevalkit(tmp_path):
    big = noise(400)
    assert len(b64(big)) > csv.field_size_limit()
    path = tsv(
        tmp_path,
        ["index", "image", "question", "answer", "category"],
        ["7", b64(big), 'one "quoted"\nof two lines', "['a', 'b']", "Doc-oriented VQA"],
        ["8", "7", "the same picture", "c", "Doc-oriented VQA"],
        ["9", b64(png(5, 9)), "ünïcode", "d", "Doc-oriented VQA"],
        ["10", "no base64, but long enough not to be taken for an index of another row!", "broken", "e", ""],
        ["11", "99", "refers to nothing", "f", ""],
    )
    limit = csv.field_size_limit()
    samples = TASKS.build("ocrbench").samples(path)
    assert csv.field_size_limit() == limit
    assert [s.id for s in samples] == ["7", "8", "9", "10", "11"]
    assert samples[0].question == f'one "quoted"\nof two lines\n{INSTRUCTION}'
    assert samples[0].answers == ("a", "b")
    assert [(s.width, s.height) for s in samples] == [(400, 400), (400, 400), (5, 9), (0, 0), (0, 0)]
    assert samples[2].image().getpixel((0, 0)) == (255, 0, 0)
    assert samples[0].image().mode == "RGB"  # the file is grey
    assert samples[3].category is None
    with pytest.raises(DataError, match=r"my\.tsv, index 10: the image cannot be read"):
        samples[3].image()
    with pytest.raises(DataError, match="'99', neither base64 nor the index of a row read"):
        samples[4].image()
    assert len(TASKS.build("ocrbench").samples(path, 2)) == 2


def test_tsv_of_ai2d_has_a_column_an_option(tmp_path):
    header = ["index", "image", "question", "A", "B", "C", "D", "answer"]
    path = tsv(tmp_path, header, ["0", b64(png()), "Which?", "leaf", "root", "stem", "", "C"])
    (only,) = TASKS.build("ai2d").samples(path)
    assert only.question.splitlines()[1:4] == ["A. leaf", "B. root", "C. stem"]
    assert only.answers == ("C",)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([["index", "question"]], "no column image; it has index, question"),
        ([["index", "image", "question"]], "holds no samples"),
        ([["index", "image", "question"], ["1", "x"]], "line 2: 2 fields, but the header has 3"),
        ([["index", "image", "question"], ["1", "x", "q"], ["1", "x", "q"]], "id '1' stands twice"),
        ([["index", "image", "answer"], ["1", "x", "a"]], "index 1: no column 'question'; it has index, answer"),
    ],
)
def test_broken_tsv(tmp_path, lines, message):
    with pytest.raises(DataError, match=message):
        TASKS.build("ocrbench").samples(tsv(tmp_path, *lines))


def test_tsv_that_is_not_utf8(tmp_path):
    (tmp_path / "my.tsv").write_bytes(b"index\timage\tquestion\n1\tx\t\xff\n")
    with pytest.raises(DataError, match="not UTF-8"):
        TASKS.build("ocrbench").samples(str(tmp_path / "my.tsv"))


# ------------------------------------------------------------------------------------------------------ JSONL


def listed(folder, *rows):
    (folder / "list.jsonl").write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return str(folder)


def test_folder_with_a_jsonl(tmp_path):
    (tmp_path / "red.png").write_bytes(png(6, 4))
    (tmp_path / "cut.png").write_bytes(noise(40)[:300])
    (tmp_path / "text.png").write_text("no picture")
    data = listed(
        tmp_path,
        {"image": "red.png", "question": "Colour?", "answer": "red", "id": 12},
        "",
        {"image": "cut.png", "question": "?", "answers": ["a"], "category": "odd"},
        {"image": "text.png", "question": "?"},
        {"image": "none.png", "question": "?"},
    )
    samples = TASKS.build("folder").samples(data)
    assert [s.id for s in samples] == ["12", "00001", "00002", "00003"]
    assert [(s.width, s.height) for s in samples] == [(6, 4), (40, 40), (0, 0), (0, 0)]
    assert samples[0].image().size == (6, 4)
    assert samples[1].category == "odd"
    assert samples[0].text_tokens is None
    for broken, why in ((1, "cut.png"), (2, "not a picture Pillow knows"), (3, "none.png")):
        with pytest.raises(DataError, match=why):
            samples[broken].image()
    assert len(TASKS.build("folder").samples(data + "/list.jsonl", 2)) == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{"], r"list\.jsonl, line 1: not JSON"),
        (["[1]"], "line 1: not an object with an 'image'"),
        ([{"question": "?"}], "line 1: not an object with an 'image'"),
        ([{"image": "a.png"}], "line 1: no column 'question'; it has image"),
        ([""], "holds no samples"),
        ([{"id": 1, "image": "a", "question": "?"}] * 2, "line 2: id '1' stands twice"),
    ],
)
def test_broken_jsonl(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        TASKS.build("folder").samples(listed(tmp_path, *rows))


# ----------------------------------------------------------------------------------------- parquet and the hub


def test_parquet_of_the_hub(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {
            "question": f"q{i}",
            "options": ["x", "y"],
            "answer": str(i % 2),
            "image": {"bytes": png(i + 1, 3), "path": "p"},
        }
        for i in range(5)
    ]
    rows[3]["image"] = {"bytes": b"broken", "path": "p"}
    rows[4]["image"] = None
    for number, part in enumerate((rows[:3], rows[3:])):
        table = pyarrow.Table.from_pylist(part)
        parquet.write_table(table, tmp_path / f"test-{number}.parquet", row_group_size=2)
    samples = TASKS.build("ai2d").samples(str(tmp_path))
    assert [s.id for s in samples] == ["00000", "00001", "00002", "00003", "00004"]
    assert [s.width for s in samples] == [1, 2, 3, 0, 0]
    assert [s.answers[0] for s in samples] == ["A", "B", "A", "B", "A"]
    assert samples[2].image().size == (3, 3)
    assert samples[-3] == samples[2]
    assert [s.id for s in samples[1:3]] == ["00001", "00002"]
    for broken in (3, 4):
        with pytest.raises(DataError, match=f"row {broken}: the image cannot be read"):
            samples[broken].image()
    one = TASKS.build("ai2d").samples(str(tmp_path / "test-0.parquet"), 2)
    assert len(one) == 2
    parquet.write_table(pyarrow.table({"question": ["?"]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="no column image"):
        TASKS.build("ai2d").samples(str(tmp_path / "other.parquet"))


def test_parquet_that_is_none(tmp_path):
    pytest.importorskip("pyarrow.parquet")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(DataError, match=r"cannot read a\.parquet"):
        TASKS.build("ai2d").samples(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(("module", "data"), [("pyarrow", "a.parquet"), ("datasets", "hub")])
def test_missing_library_is_one_line(tmp_path, monkeypatch, module, data):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, f"{module}.parquet", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"needs {module}: pip install memprof-vlm\[hub\]$"):
        TASKS.build("ai2d").samples(data)


class Hub(list):
    """What memprof uses of a ``datasets.Dataset``."""

    def cast_column(self, name, feature):
        assert (name, feature) == ("image", "raw bytes")
        return self


def hub(monkeypatch, load):
    module = types.ModuleType("datasets")
    module.load_dataset = load
    module.Image = lambda decode: "decoded" if decode else "raw bytes"
    module.disable_progress_bars = lambda: None
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_hub(monkeypatch):
    asked = []
    rows = Hub(
        {
            "dataset": "IIIT5K",
            "question": "what is written?",
            "question_type": "Regular Text Recognition",
            "answer": ["CENTRE"],
            "image": {"bytes": data, "path": None},
        }
        for data in (png(), b"broken", None)
    )
    hub(monkeypatch, lambda repo, split: asked.append((repo, split)) or rows)
    samples = TASKS.build("ocrbench").samples("hub")
    assert asked == [("echo840/OCRBench", "test")]
    assert len(samples) == 3
    assert samples[0].image().size == (6, 4)
    assert (samples[0].category, samples[0].answers) == ("Regular Text Recognition", ("CENTRE",))
    for broken in (1, 2):
        assert samples[broken].width == 0
        with pytest.raises(DataError, match=f"echo840/OCRBench test, row {broken}"):
            samples[broken].image()
    assert len(TASKS.build("ocrbench").samples("hub", 2)) == 2
    assert len(TASKS.build("ocrbench").samples("hub", 20)) == 3


@pytest.mark.parametrize(("offline", "why"), [("1", "HF_HUB_OFFLINE is set"), ("", "ConnectionError: no route")])
def test_hub_out_of_reach_is_one_line(monkeypatch, offline, why):
    def load(repo, split):
        raise ConnectionError("no route\nand a long trace")

    hub(monkeypatch, load)
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    with pytest.raises(DataError, match=f"cannot load lmms-lab/ai2d.*{why}.*--data bundled") as caught:
        TASKS.build("ai2d").samples("hub")
    assert "\n" not in str(caught.value)


def test_a_task_without_a_hub():
    with pytest.raises(BadValue, match="folder has no data set on the hub"):
        TASKS.build("folder").samples("hub")


# ------------------------------------------------------------------------------------------------------ paths


def test_what_is_no_source(tmp_path):
    task = TASKS.build("ai2d")
    (tmp_path / "x.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    for name in "ab":
        (tmp_path / "two" / f"{name}.jsonl").write_text("")
    for data, message in {
        "bundeld": "no file or folder 'bundeld'; --data takes bundled, hub, or a path",
        "x.json": "cannot read x.json: --data takes .tsv, .jsonl, .parquet, .csv",
        "empty": "holds no .jsonl and no .parquet",
        "two": "holds 2 .jsonl files; name the one to read",
        "missing.csv": "no file or folder",
    }.items():
        with pytest.raises(DataError, match=message):
            task.samples(str(tmp_path / data) if data != "bundeld" else data)


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_below_one(limit):
    with pytest.raises(BadValue, match="below 1"):
        TASKS.build("ai2d").samples("bundled", limit)


def test_a_lazy_sequence_makes_only_what_is_asked_for():
    made = []
    lazy = _sources.Lazy(4, lambda i: made.append(i) or i * 10)
    assert (lazy[-1], lazy[1:3], len(lazy), made) == (30, [10, 20], 4, [3, 1, 2])
    with pytest.raises(IndexError):
        lazy[4]
