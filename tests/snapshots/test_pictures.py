"""The page, the trace for Perfetto, the flame table, and the ways to add blocks up."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import pytest
from made import MIB, NoMemory, Recorder, save

from memprof.cli import main
from memprof.errors import DataError, UnknownName
from memprof.snapshots import chrome, html
from memprof.snapshots.curve import GROUPS, REST, curve
from memprof.snapshots.flames import flames
from memprof.snapshots.holding import Instant
from memprof.snapshots.recording import Frame
from memprof.snapshots.report import analyse, study
from memprof.snapshots.sites import call_site, module, operator, way

sys.path.append(str(Path(__file__).resolve().parents[1] / "reports"))
from browser import CHROMIUM, Page

NASTY = "</script><b>bold</b>\x1b[31m"


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """Many sites, one with a nasty name, ending out of memory."""
    recorder = Recorder(capacity=800 * MIB)
    recorder.recording = True
    kept = []
    with contextlib.suppress(NoMemory):
        for i in range(400):
            kept.append(recorder.malloc((3 + i % 7) * MIB, NASTY if i % 13 == 0 else f"site{i % 13}"))
            if i % 3 == 0:
                recorder.free(kept.pop(0))
    assert recorder.events[-1]["action"] == "oom"
    return save(tmp_path_factory.mktemp("made") / "made.pickle", recorder.dump())


def test_the_curve_keeps_the_peak_and_its_groups_add_up(file):
    studied = study(file)
    drawn = curve(studied.replay, studied.allocated, call_site, points=20)
    assert drawn.allocated.max() == studied.report.peak_allocated_bytes
    assert (drawn.levels.sum(axis=0) == drawn.allocated).all()
    assert len(drawn.groups) == GROUPS + 1
    assert drawn.groups[-1] == REST
    assert len(drawn.events) <= 20 + 3
    assert drawn.ooms.tolist() == [studied.report.out_of_memory.event]
    assert drawn.ooms[0] in drawn.events
    for i, event in enumerate(drawn.events.tolist()):
        held = sorted(Instant.of(studied.replay, event).sizes.tolist(), reverse=True)
        assert [n for n, _ in drawn.largest[i]] == held[: len(drawn.largest[i])]


def test_holders_by_line_module_and_operator_add_up_to_the_same(file):
    totals = {
        by: sum(holder.bytes for holder in analyse(file, top=99, by=by).holders) for by in ("line", "module", "op")
    }
    assert len(set(totals.values())) == 1
    with pytest.raises(UnknownName, match="line"):
        way("colour")


def test_modules_are_the_files_of_the_forward_calls_around():
    frames = [
        Frame("??", 0, "at::_ops::mm::call(at::Tensor)"), Frame("/x/torch/nn/modules/linear.py", 9, "forward"),
        Frame("/x/torch/nn/modules/module.py", 1, "_call_impl"), Frame("/home/me/block.py", 3, "forward"),
        Frame("/home/me/model.py", 7, "Model.forward"), Frame("/home/me/train.py", 5, "main"),
    ]  # fmt: skip
    assert module(frames) == "model › block › linear"
    assert operator(frames) == "mm"
    assert module(frames[-1:]) == "(outside forward) train.py:5 main"
    predicted = [
        Frame("aten.mm.default", 0, "x"),
        Frame("<mlp>", 0, "layers.3.mlp"),
        Frame("<predicted by memprof>", 0, "y"),
    ]
    assert module(predicted) == "layers.3.mlp"
    assert operator(predicted) == "mm"
    assert operator([]) == module([]) == "(no stack recorded)"


def test_flames_hold_what_their_branches_hold(file):
    studied = study(file)
    rows = flames(Instant.of(studied.replay, studied.report.peak_event))
    assert rows[0].depth == 0
    top = [row for row in rows if row.depth == 0]
    assert sum(row.bytes for row in top) <= studied.report.peak_allocated_bytes
    assert sum(row.share for row in top) > 0.9
    assert top == sorted(top, key=lambda row: -row.bytes)


def test_the_trace_opens_and_ends_at_the_peak(file, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["snapshot", str(file), "--format", "chrome"])
    assert not ended.value.code
    trace = json.loads(capsys.readouterr().out)
    events = trace["traceEvents"]
    highest = max(e["args"]["bytes"] for e in events if e["name"] == "allocated")
    assert highest == analyse(file).peak_allocated_bytes
    assert [e["ph"] for e in events if e["name"] == "out of memory"] == ["i"]
    stacked = [e for e in events if e["name"] == "allocated by line"]
    assert max(sum(e["args"].values()) for e in stacked) == highest
    assert [e["ts"] for e in stacked] == sorted(e["ts"] for e in stacked)


def test_a_picture_of_one_moment_has_no_trace_but_a_page(tmp_path):
    recorder = Recorder()
    recorder.malloc(5 * MIB)
    studied = study(save(tmp_path / "now.pickle", recorder.dump()))
    with pytest.raises(DataError, match="no events"):
        chrome.render(studied)
    assert "No history was recorded" in html.render(studied, "MiB")


def test_the_page_stands_alone_and_no_text_is_markup(file, tmp_path, capsys):
    page = tmp_path / "page.html"
    with pytest.raises(SystemExit) as ended:
        main(["snapshot", str(file), "--html", "-o", str(page)])
    assert not ended.value.code
    assert capsys.readouterr() == ("", f"{page}\n")
    text = page.read_text(encoding="utf-8")
    assert "Content-Security-Policy" in text
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "<b>bold</b>" not in text
    assert "\x1b" not in text


def test_what_cannot_be_written_is_one_line(file, tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    with pytest.raises(SystemExit) as ended:
        main(["snapshot", str(file), "--html", "-o", str(tmp_path / "taken" / "page.html")])
    assert ended.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit) as ended:
        main(["snapshot", str(file), "--format", "poem"])
    assert ended.value.code == 2


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on PATH")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_the_page_in_chromium(file, tmp_path, width, dark):
    path = tmp_path / "page.html"
    path.write_text(html.render(study(file, ["expandable_segments=True"]), "MiB"), encoding="utf-8")
    with Page(path, width=width, dark=dark) as page:
        text = page.run("document.body.innerText")
        for words in (
            "Out of memory",
            "What would have let it through",
            "Who held the memory when it ran out",
            "What if",
        ):
            assert words in text
        assert page.run("document.querySelectorAll('.figure svg path').length") == GROUPS + 2
        assert page.run("document.querySelectorAll('.figure .oom').length") == 1
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
        left, top, wide, high = page.box(".figure svg")
        page.mouse("mouseMoved", left + wide * 0.6, top + high * 0.5)
        page.settle()
        assert page.run("getComputedStyle(document.querySelector('.tip')).display") == "block"
        tip = page.run("document.querySelector('.tip').innerText")
        assert "largest blocks" in tip
        assert "model.py:7 site" in tip
        assert page.run("document.querySelector('.tip').getBoundingClientRect().right <= innerWidth + 1")
        page.run("document.querySelectorAll('#ways button')[1].click()")
        assert page.run("document.querySelectorAll('#ways button')[1].getAttribute('aria-pressed')") == "true"
        assert page.run("document.querySelectorAll('b').length") == 0  # but for the tip's own
        assert page.requests == [path.resolve().as_uri()]
        assert page.errors == []
