"""Input that means harm, or is damaged: an answer or one line, an exit code, nothing written where none is asked."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from memprof.cli import main
from memprof.errors import DataError, MemprofError
from memprof.lines import masked, visible
from memprof.records import RunRecord, RunSpec, SampleRecord, TokenColumns
from memprof.reports import names, render
from memprof.reports._paper import Screen
from memprof.store import RunFolder, find_runs, read_run
from memprof.tasks import TASKS
from memprof.tasks._pictures import Encoded
from memprof.tuning.preset import read_preset

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
SPEC = RunSpec(model="proving", method="baseline", task="folder", device="sim")


def said(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    out, err = capfd.readouterr()
    return int(left.value.code or 0), out, err


def one_line(err: str) -> bool:
    return err.startswith("memprof: ") and err.count("\n") == 1 and not CONTROL.search(err[:-1])


def sample(name: str, **changes: Any) -> SampleRecord:
    columns = TokenColumns([150, 140], [120, 121], [200, 200], [10, 11], [None, None], [None, None])
    return SampleRecord(**{
        "id": name, "tokens": columns, "peak_parts": {"mlp": 50}, "dynamic_peak_bytes": 50, "visual_tokens": 4,
        "kept_visual_tokens": [4], **changes,
    })  # fmt: skip


def write_run(path: Path, *samples: SampleRecord, asked: int | None = None, complete: bool = True) -> Path:
    record = RunRecord(spec=SPEC, status="predicted", static_bytes=100, data_label="folder", samples_asked=asked)
    with RunFolder.open(path, record) as folder:
        for one in samples:
            folder.append(one)
        folder.record.complete = complete
        folder.save()
    return path


@pytest.fixture
def hostile(shared: Path) -> Path:
    folder = shared / "cases" / "hostile"
    if not folder.is_dir():
        pytest.skip("../shared/cases/hostile is not here")
    return folder


@pytest.fixture
def copied(hostile: Path, tmp_path: Path) -> Path:
    """The folder, to be written beside."""
    for file in hostile.iterdir():
        (shutil.copytree if file.is_dir() else shutil.copy)(file, tmp_path / file.name)
    for folder in (tmp_path, *(path for path in tmp_path.rglob("*") if path.is_dir())):
        folder.chmod(0o755)
    for file in tmp_path.rglob("*.*"):
        file.chmod(0o644)
    (tmp_path / "img").mkdir()
    for name in ("ok.png", "img/ok.png"):
        Image.new("RGB", (64, 48), "red").save(tmp_path / name)
    Image.new("RGB", (8, 8)).save(tmp_path / "img" / "eps.eps")
    return tmp_path


# -- names and figures -------------------------------------------------------------------------------------------------


def everything(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_a_figure_leads_out_of_no_folder(copied: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = everything(copied)
    code, _, err = said(capfd, "plot", copied / "figure_name_escapes.json", "-o", copied / "out")
    assert (code, one_line(err)) == (1, True)
    assert everything(copied) == before


NAMES = ["../x", "/tmp/x", "a/b", "..", ".", "", "a\x00b", "x\x1b[31m", 3, None, ["x"], "x" * 300]


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_s_name_is_a_plain_file_name(name: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "f.json").write_text(json.dumps({"schema": 1, "kind": "breakdown", "name": name}))
    code, _, err = said(capfd, "plot", tmp_path / "f.json", "-o", tmp_path / "out")
    assert (code, one_line(err)) == (1, True)
    assert everything(tmp_path) == {tmp_path / "f.json"}


@pytest.mark.parametrize("body", [{}, {"bars": 3}, {"bars": [{}]}, {"provenance": None, "title": 1, "bars": []}])
def test_a_figure_whose_data_are_damaged_is_one_line(
    body: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "f.json").write_text(json.dumps({"schema": 1, "kind": "breakdown", "name": "f", **body}))
    code, _, err = said(capfd, "plot", tmp_path / "f.json", "-o", tmp_path / "out")
    assert (code, one_line(err)) == (1, True)


# -- run folders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["report", "plot", "diff", "explain", "audit"])
@pytest.mark.parametrize("folder", ["run_list", "run_spec_not_object"])
def test_damaged_runs_are_one_line(
    hostile: Path, folder: str, command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    more = {"diff": [hostile / folder], "plot": ["-o", tmp_path / "o"]}.get(command, [])
    code, _, err = said(capfd, command, hostile / folder, *more)
    assert (code, one_line(err)) == (1, True)


def test_a_line_torn_inside_a_character_is_dropped(hostile: Path) -> None:
    run = read_run(hostile / "torn_utf8")
    whole = (hostile / "torn_utf8" / "samples.jsonl").read_bytes().count(b"\n")
    assert len(run.samples) == whole
    assert run.unfinished == f"{whole} of {whole + 1} samples"


def test_every_way_to_tear_a_line_leaves_the_others(tmp_path: Path) -> None:
    file = write_run(tmp_path / "r", sample("a"), sample("Ä日本")) / "samples.jsonl"
    whole = file.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole)):
        file.write_bytes(whole[:end])
        assert [one.id for one in read_run(tmp_path / "r").samples] == ["a"]
    with RunFolder.open(tmp_path / "r", read_run(tmp_path / "r").record, resume=True) as folder:
        folder.append(sample("Ä日本"))
    assert file.read_bytes() == whole


def test_duplicates_are_told_and_counted_once(copied: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = copied / "two_resume_duplicates" / "samples.jsonl"
    lines = [json.loads(line)["id"] for line in file.read_text().splitlines()]
    run = read_run(copied / "two_resume_duplicates")
    assert [one.id for one in run.samples] == list(dict.fromkeys(lines))
    assert f"{len(lines) - len(set(lines))} lines stood twice" in run.healed[0]
    for form in ("table", "markdown", "html"):
        assert "stood twice" in render(form, [run])
    with RunFolder.open(copied / "two_resume_duplicates", run.record, resume=True):
        pass
    assert (copied / "two_resume_duplicates" / "samples.jsonl").read_bytes().count(b"\n") == len(set(lines))


def test_a_finished_line_is_taken_before_a_failed_one(tmp_path: Path) -> None:
    path = write_run(tmp_path / "r", SampleRecord(id="a", status="failed", error="no"), sample("a"), sample("a"))
    assert read_run(path).samples == [sample("a")]


def test_partly_done_is_shown_in_every_format(tmp_path: Path) -> None:
    part = find_runs([write_run(tmp_path / "r", sample("a"), asked=48, complete=False)])
    whole = find_runs([write_run(tmp_path / "s", sample("a"), asked=1)])
    telling = {"csv": ",no\n", "json": '"complete": false', "chrome": "predicted, unfinished"}
    for form in names():
        words = telling.get(form, "1 of 48 samples")
        assert words in render(form, part), form
        assert words not in render(form, whole), form


def test_a_shard_that_is_missing_is_told(tmp_path: Path) -> None:
    for number in (1, 3):
        spec = RunSpec(**{**SPEC.to_json(), "shard": f"{number}/3"})
        record = RunRecord(spec=spec, status="predicted", samples_asked=1)
        with RunFolder.open(tmp_path / f"r.{number}of3", record) as folder:
            folder.append(sample(str(number)))
            folder.record.complete = True
            folder.save()
    (run,) = find_runs([tmp_path])
    assert run.unfinished
    assert "2 of 3 shards are here: 1, 3" in run.healed


def test_an_empty_shard_says_so(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "r", asked=0))
    assert run.unfinished
    assert "unfinished" in render("table", [run])


@pytest.mark.parametrize("name", [".run.json.abc.tmp", "run.json.tmp"])
def test_what_a_kill_leaves_before_the_first_sample_is_no_obstacle(tmp_path: Path, name: str) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / name).write_text("{")
    write_run(tmp_path / "r", sample("a"))
    assert sorted(os.listdir(tmp_path / "r")) == ["run.json", "samples.jsonl"]


BROKEN = {
    "NaN seconds": {"tokens": {"peak_allocated_bytes": [1], "seconds": [float("nan")]}},
    "endless seconds": {"tokens": {"peak_allocated_bytes": [1], "seconds": [float("inf")]}},
    "bytes below 0": {"tokens": {"peak_allocated_bytes": [-1]}},
    "a height below 0": {"height": -1},
    "a layer's bytes below 0": {"kv_bytes_per_layer": [4, -4]},
    "bytes beyond 64 bits": {"dynamic_peak_bytes": 10**30},
    "ragged columns": {"tokens": {"peak_allocated_bytes": [1, 2], "kv_bytes": [1]}},
    "ragged parts": {"token_parts": {"mlp": [1, 2, 3]}},
    "NaN score": {"score": float("nan")},
    "score above 1": {"score": 1.5},
    "NaN fidelity": {"fidelity": {"kl": float("nan")}},
    "a part that is text": {"peak_parts": {"mlp": "many"}},
    "no id": {"id": None},
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_a_number_that_cannot_be_is_refused_with_its_line(
    tmp_path: Path, change: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path / "r", sample("a"))
    with (path / "samples.jsonl").open("a") as file:
        file.write(json.dumps({"id": "b", **change}) + "\n")
    code, _, err = said(capfd, "report", path)
    assert (code, one_line(err)) == (1, True)
    assert "samples.jsonl, line 2" in err


# -- data --------------------------------------------------------------------------------------------------------------


def run_over(capfd: pytest.CaptureFixture[str], folder: Path, data: str, task: str = "folder") -> tuple[int, str, str]:
    return said(
        capfd, "run", "--model", "proving", "--device", "sim", "--max-new-tokens", "2", "--task", task, "--data",
        folder / data, "-o", folder / "o", "--force", "-v",
    )  # fmt: skip


@pytest.mark.parametrize(("data", "task", "failed"), [("sur.jsonl", "folder", set()), ("null.jsonl", "ai2d", {"b"})])
def test_one_bad_row_is_one_failed_sample(
    copied: Path, data: str, task: str, failed: set[str], capfd: pytest.CaptureFixture[str]
) -> None:
    code, _, _ = run_over(capfd, copied, data, task)
    run = read_run(copied / "o")
    assert code == 0
    # Half a character in a question: the sample fails where a tokenizer is asked, and is predicted where none is.
    assert {one.id for one in run.samples if not one.ok} - {"c"} == failed
    assert len(run.samples) == len((copied / data).read_text().splitlines())
    code, _, _ = said(
        capfd, "run", "--model", "proving", "--device", "sim", "--max-new-tokens", "2", "--task", task, "--data",
        copied / data, "-o", copied / "o", "--resume",
    )  # fmt: skip
    assert code == 0
    assert read_run(copied / "o").samples == run.samples


@pytest.mark.parametrize("data", ["dz.jsonl", "eps.jsonl"])
def test_what_is_no_picture_of_ours_is_refused(copied: Path, data: str, capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err = run_over(capfd, copied, data)
    assert (code, "Traceback" in err) == (1, False)
    assert [one.status for one in read_run(copied / "o").samples] == ["failed"]


def test_a_row_of_a_million_million_tokens_is_refused(copied: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err = run_over(capfd, copied, "t1e12.csv")
    assert (code, one_line(err)) == (1, True)
    assert "t1e12.csv, line 2" in err


def test_a_bomb_is_refused(hostile: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err = said(capfd, "ask", hostile / "bomb_13000.png", "what?", "--model", "proving")
    assert (code, one_line(err)) == (1, True)


def test_control_characters_and_markup_are_text(copied: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = run_over(capfd, copied, "q.jsonl")
    assert code == 0
    assert not CONTROL.search(out + err)
    assert "[/][red]m" in err
    run = read_run(copied / "o")
    for form in ("table", "markdown", "csv"):
        assert not CONTROL.search(render(form, [run])), form
    assert not re.search(r'(?m)(^|,)"?[=+@-]', render("csv", [run]))


def test_what_is_written_out_takes_its_place_on_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Laid out as it is shown: nothing of a line is cut off, and nothing silently taken out."""
    Screen(width=60).print("\x1b[31mred\x07 " * 5 + "[Errno 2] there is none", markup=False, highlight=False)
    said = capsys.readouterr().out.replace("\n", " ")
    assert said.split() == [r"\x1b[31mred\x07"] * 5 + ["[Errno", "2]", "there", "is", "none"]


@pytest.mark.parametrize("task", ["ai2d", "ocrbench", "folder"])
@pytest.mark.parametrize("question", [None, 1, ["q"]])
def test_a_question_that_is_no_text_is_refused(task: str, question: Any, tmp_path: Path) -> None:
    row = {"image": "a.png", "options": ["x", "y"], "answer": "A"}
    rows = [{**row, "question": "q"}, {**row, "question": question}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples = TASKS.build(task).samples(str(tmp_path / "d.jsonl"))
    with pytest.raises(DataError, match=r"line 2: the question is .* and no text"):
        samples[1]


@pytest.mark.parametrize("cell", ["=1+1", "+1", "-1", "@x", " =1", "\n=1"])
def test_no_cell_is_a_formula(cell: str, tmp_path: Path) -> None:
    text = render("csv", [read_run(write_run(tmp_path / "r", sample(cell)))])
    assert not re.search(r'(?m)(^|,)"?\s*[=+@-]', text)


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "p.jsonl")
    return tmp_path / "p.jsonl"


def test_oom_waits_for_no_named_pipe(pipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A device that never ends neither; what the shell has opened, as ``<(dmesg)``, is read."""
    for log in (pipe, Path("/dev/zero")):
        code, _, err = said(capfd, "oom", log)
        assert (code, one_line(err), "it is a " in err) == (1, True, True)
    out, into = os.pipe()
    os.write(into, b"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.")
    os.close(into)
    try:
        code, shown, _ = said(capfd, "oom", f"/dev/fd/{out}")
        assert (code, "Out of memory" in shown) == (0, True)
    finally:
        os.close(out)


def test_a_pipe_is_not_waited_for(pipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err = said(capfd, "run", "--device", "sim", "--task", "folder", "--data", pipe, "-o", pipe.parent / "o")
    assert (code, one_line(err), "a pipe" in err) == (1, True, True)
    with pytest.raises(DataError, match="a pipe"):
        read_preset(pipe)


@pytest.mark.parametrize("value", ["many", -1, 1.5, 10**12, True, [1]])
def test_a_row_s_own_count_of_tokens_is_checked(tmp_path: Path, value: Any) -> None:
    rows = [{"image": "a.png", "question": "q"}, {"image": "a.png", "question": "q", "text_tokens": value}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples = TASKS.build("folder").samples(str(tmp_path / "d.jsonl"))
    assert samples[0].text_tokens is None
    with pytest.raises(DataError, match="line 2: text_tokens"):
        samples[1]


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    for name in ("a.png", "a.tif"):
        Image.fromarray(ramp).save(tmp_path / name)
        got = np.asarray(Encoded((tmp_path / name).read_bytes, name).image())[0, :, 0].astype(int)
        assert np.abs(got - np.arange(256)).max() <= 1, name


def test_small_numbers_of_a_wide_format_stay(tmp_path: Path) -> None:
    grey = np.arange(200, dtype=np.int32)[None]
    Image.fromarray(grey).save(tmp_path / "a.tif")
    assert (np.asarray(Encoded((tmp_path / "a.tif").read_bytes, "a").image())[0, :, 0] == grey[0]).all()


# -- presets, words ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ['{"method": []}', '{"method": [1]}', '{"model": ["a"]}', '{"seed": "x"}', '{"limit": 1.5}', '{"seed": true}', "[",
     "[]", '{"preset": 3}', "[" * 100_000],
)  # fmt: skip
def test_presets_are_checked(text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.json").write_text(text)
    code, _, err = said(capfd, "run", "--preset", tmp_path / "p.json", "--device", "sim")
    assert (code, one_line(err)) == (1, True)


def test_the_preset_without_methods(hostile: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err = said(capfd, "run", "--preset", hostile / "preset_empty_methods.json", "--device", "sim")
    assert (code, one_line(err)) == (1, True)


@pytest.mark.parametrize(
    "text",
    ["postgresql://me:s3cret@host/db", "mysql://me:s3:cr@et@h:1/x?a=b", "x password=s3cret host=h",
     "x?password=s3cret&b=1", "PGPASSWORD='s3cret'", "cannot reach postgresql+psycopg2://:s3cret@[::1]/db: refused"],
)  # fmt: skip
def test_passwords_are_masked(text: str) -> None:
    assert "s3" not in masked(text)
    assert "***" in masked(text)


def test_words_that_are_no_passwords_stay() -> None:
    for text in ("max_new_tokens=0 is below 1", "journal:///a/b.journal", "https://host/a:b", "topv:keep=0.5,layer=2"):
        assert masked(text) == text
    assert visible("Ä日本 ok") == "Ä日本 ok"
    assert visible("\x1b[31m\ud800\u202e") == r"\x1b[31m\ud800\u202e"


def test_errors_show_no_control_characters(capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err = said(capfd, "run", "--model", "\x1b[31mred\nmemprof: all is well", "--device", "sim")
    assert (code, one_line(err)) == (2, True)


def test_an_unwritable_place_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_run(tmp_path / "r", sample("a"))
    (tmp_path / "file").write_text("")
    for where in (tmp_path / "file" / "x", tmp_path / ("n" * 300), tmp_path):
        code, _, err = said(capfd, "report", path, "-o", where)
        assert (code, one_line(err)) == (1, True), err
    for words in (("run", "--model", "proving", "--device", "sim", "--limit", "1", "-o", tmp_path / "file" / "x"),
                  ("run", "--model", "proving", "--device", "sim", "--limit", "1", "-o", tmp_path / ("n" * 300)),
                  ("plot", path, "-o", tmp_path / "file")):  # fmt: skip
        code, _, err = said(capfd, *words)
        assert (code in (1, 2), one_line(err)) == (True, True), err


def test_a_library_says_what_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(MemprofError):
        read_run(tmp_path / "none")


@pytest.mark.parametrize("words", [("--max-new-tokens", "1000000000000"), ("--seed", str(10**30))])
def test_what_no_memory_or_generator_has_room_for_is_refused(
    words: tuple[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    code, _, err = said(capfd, "run", "--device", "sim", *words)
    assert (code, one_line(err)) == (2, True)


def test_a_program_with_one_digit_changed_is_never_believed(
    hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memprof.forecasts import book
    from memprof.forecasts.book import Book, Missing
    from memprof.runner import complete_spec

    monkeypatch.setattr(book, "SHIPPED", tmp_path / "nothing-shipped")
    asked = complete_spec(RunSpec("internvl2-2b", "topv:keep=0.5,layer=2", "ai2d", "sim"))
    ask = asked.ask(asked.setup.model.family.shape(asked.setup.model, 448, 448, 20))
    file = Book(tmp_path).file(asked.setup, asked.pruner, "current")
    assert file is not None
    shutil.copy(hostile / "cache_wrong_prediction.json", file)
    assert isinstance(Book(tmp_path).forecast(asked.setup, ask), Missing)
