"""Figures: the numbers are the records', the bytes are the same whenever drawn, and the type is legible."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from synthetic import METHODS, NASTY, STATIC, make_run, make_runs

from memprof import figures
from memprof.errors import BadValue, DataError
from memprof.figures.style import Look, fill_lines, text_width
from memprof.pruning import METHODS as PRUNERS
from memprof.records import PARTS, Run, RunRecord, RunSpec, SampleRecord
from memprof.telling import facts, palette

HERE = Path(__file__).parent


@pytest.fixture
def planned(runs):
    return {data["name"]: data for data in figures.plan(runs)}


def test_every_figure_is_planned_with_its_provenance(planned):
    assert set(planned) == {
        f"internvl2-2b_{task}_paper_{rest}"
        for task in ("ai2d", "ocrbench")
        for rest in ("baseline_curve", "fastv_curve", "topv_curve", "overlay", "breakdown", "tokens")
    }
    for data in planned.values():
        origin = data["provenance"]
        assert origin["status"] == "predicted"
        assert (origin["torch"], origin["transformers"], origin["memprof"]) == ("2.13.0", "5.23.0", "0.1.0")
        phrases = " ".join(facts.provenance_lines(origin))
        for word in ("InternVL2-2B", "bundled sample", "stack paper", "bfloat16", "predicted for", "1 failed"):
            assert word in phrases
        assert json.loads(json.dumps(data)) == data


def test_curve_data_are_the_records(runs, planned):
    run, data = runs[2], planned["internvl2-2b_ai2d_paper_topv_curve"]
    assert data["static_bytes"] == STATIC
    assert data["dynamic_peak_bytes"] == run.highest.dynamic_peak_bytes
    assert data["peak_allocated_bytes"] == [b for s in run.finished for b in s.tokens.peak_allocated_bytes]
    assert data["kv_bytes"] == [b for s in run.finished for b in s.tokens.kv_bytes]
    assert data["maximum"]["bytes"] == max(data["peak_allocated_bytes"]) == STATIC + data["dynamic_peak_bytes"]
    assert data["peak_allocated_bytes"][data["maximum"]["index"]] == data["maximum"]["bytes"]
    assert [s["status"] for s in data["samples"]].count("failed") == 1
    assert data["samples"][1]["id"] == NASTY


def test_curves_that_are_compared_share_one_scale(planned):
    axes = {n: tuple(d["axis_bytes"]) for n, d in planned.items() if n.endswith("_curve")}
    assert len({v for n, v in axes.items() if "ai2d" in n}) == 1
    assert all(planned[n]["maximum"]["bytes"] < v[1] for n, v in axes.items())


def test_breakdown_sums_to_the_peak_and_hides_nothing(planned):
    for bar in planned["internvl2-2b_ai2d_paper_breakdown"]["bars"]:
        assert sum(bar["parts"].values()) == bar["dynamic_peak_bytes"]
        assert tuple(bar["parts"]) == PARTS
        assert bar["parts"]["unexplained"] > 0


def test_overlay_saves_against_baseline(runs, planned):
    series = planned["internvl2-2b_ai2d_paper_overlay"]["series"]
    peaks = [run.highest.dynamic_peak_bytes for run in runs[:3]]
    assert [s["dynamic_peak_bytes"] for s in series] == peaks
    assert series[0]["saving"] is None
    assert series[2]["saving"] == pytest.approx(1 - peaks[2] / peaks[0])


@pytest.mark.parametrize("kind", ["overlay", "breakdown"])
def test_a_change_over_fewer_samples_says_so_in_the_caption(runs, kind):
    base, topv = runs[0], runs[2]
    assert "said" not in next(data for data in figures.plan(runs) if data["name"].endswith(kind))
    base.highest.status = "oom"
    (data,) = [data for data in figures.plan([base, topv]) if data["name"].endswith(kind)]
    there = {s.id: s.dynamic_peak_bytes for s in base.finished}
    own = max(s.dynamic_peak_bytes for s in topv.finished if s.id in there)
    drawn = (data["series"] if kind == "overlay" else data["bars"])[1]
    assert drawn["saving"] == 1 - own / max(there.values())
    look = Look.of()
    with look.settings():
        drawing = figures.KINDS.load(kind)().paint(data, look)
    caption = " ".join(text.get_text() for text in drawing.texts)
    assert "over the 4 of 5 samples that both finished (TopV)" in caption


def test_overlay_leaves_gaps_where_a_method_has_no_sample():
    full, short = make_runs(("ai2d",), METHODS[:2], samples=5, tokens=3)
    short.samples.pop(2)
    (data,) = [d for d in figures.plan([full, short]) if d["kind"] == "overlay"]
    assert data["series"][1]["sample_peak_bytes"][2] is None
    assert data["series"][1]["token_peak_bytes"][6:9] == [None] * 3
    assert len(data["series"][1]["token_peak_bytes"]) == len(data["series"][0]["token_peak_bytes"]) == 12


def test_equal_methods_are_both_seen():
    from memprof.figures.kinds.overlay import _coincide

    data = figures.plan(make_runs(("ai2d",), (METHODS[0], "random:keep=0.5", "uniform:keep=0.5"), samples=5, tokens=3))
    baseline, random, uniform = next(d["series"] for d in data if d["kind"] == "overlay")
    for drawn in ("token_peak_bytes", "sample_peak_bytes"):
        assert _coincide(random, uniform, drawn)
        assert not _coincide(baseline, random, drawn)
    lower = uniform | {"token_peak_bytes": [*uniform["token_peak_bytes"][:-1], 0]}
    assert not _coincide(random, lower, "token_peak_bytes")  # equal peaks of samples, and a token that is not
    absent = uniform | {"token_peak_bytes": [*uniform["token_peak_bytes"][:-1], None]}
    assert not _coincide(random, absent, "token_peak_bytes")


def test_what_ran_on_no_gpu_has_no_axis_of_gpu_memory():
    run = make_run(samples=1, tokens=2)
    assert facts.memory_text(facts.header("curve", "x", [run])) == "GPU memory"
    run.record.spec.device = "cpu"
    assert facts.memory_text(facts.header("curve", "x", [run])) == "memory"


def test_runs_of_other_stacks_status_or_data_are_not_compared():
    here = make_run(METHODS[0])
    assert len(facts.groups([here, make_run(METHODS[2])])) == 1
    assert len(facts.groups([here, make_run(METHODS[2], stack="current"), make_run(METHODS[2], measured=True)])) == 3


def test_names_stay_unique_and_labels_tell_apart():
    runs = [*make_runs(("ai2d",), (*METHODS, "topv:keep=0.25,layer=2")), *make_runs(("ai2d",), measured=True)]
    names = [d["name"] for d in figures.plan(runs)]
    assert len(names) == len(set(names))
    assert facts.labels(facts.groups(runs)[0]) == ["Baseline", "FastV", "TopV keep 0.5", "TopV keep 0.25"]


def test_one_run_of_one_token_is_drawn(tmp_path):
    assert figures.draw([make_run(samples=1, tokens=1)], tmp_path, formats=("png",))


def test_a_run_that_never_finished_a_sample_cannot_be_drawn(tmp_path):
    spec = RunSpec("internvl2-2b", "baseline", "ai2d", "sim")
    empty = Run(RunRecord(spec, "predicted"), [SampleRecord("a", "failed", "no")])
    with pytest.raises(DataError, match="nothing to draw"):
        figures.draw([empty], tmp_path)


@pytest.mark.parametrize(
    "wrong", [{"style": "poster"}, {"width": "wide"}, {"unit": "G"}, {"formats": ("gif",)}], ids=lambda w: next(iter(w))
)
def test_unknown_choices_name_the_valid_ones(runs, tmp_path, wrong):
    with pytest.raises(BadValue, match="valid:"):
        figures.draw(runs[:1], tmp_path, **wrong)


DRAW = "import sys; sys.path.insert(0, sys.argv[1]); from synthetic import make_runs; from memprof import figures;" + (
    "figures.draw(make_runs(('ai2d',), samples=5, tokens=3), sys.argv[2], formats=('pdf', 'png', 'svg'));"
    "assert not {'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)"
)


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_two_processes_and_a_redraw_from_data_give_the_same_bytes(tmp_path):
    drawing = []
    for number in "12":
        env = {**os.environ, "PYTHONHASHSEED": number, "SOURCE_DATE_EPOCH": number, "TZ": f"UTC{number}"}
        command = [sys.executable, "-W", "error", "-c", DRAW, str(HERE), str(tmp_path / number)]
        drawing.append(subprocess.Popen(command, env=env))
    assert [process.wait() for process in drawing] == [0, 0]
    first = digests(tmp_path / "1")
    assert len(first) == 4 * 6
    assert digests(tmp_path / "2") == first
    data = [figures.read_data(p) for p in sorted((tmp_path / "1").glob("*.json"))]
    list(figures.draw_data(data, tmp_path / "3", formats=("pdf", "png", "svg")))
    assert digests(tmp_path / "3") == first
    for pdf in (tmp_path / "1").glob("*.pdf"):
        content = pdf.read_bytes()
        assert b"/FontFile2" in content  # TrueType, embedded
        assert b"/Type3" not in content
        assert b"CreationDate" not in content


@pytest.mark.parametrize("style", ["paper", "slides"])
@pytest.mark.parametrize("width", ["single", "double"])
def test_type_is_legible_inside_the_figure_and_does_not_overlap(style, width):
    look = Look.of(style, width)
    methods = (*METHODS, "topv:keep=0.25,layer=2", "random:keep=0.5", "uniform:keep=0.5")
    for data in figures.plan(make_runs(("ai2d",), methods, samples=9, tokens=5)):
        with look.settings():
            figure = figures.KINDS.load(data["kind"])().paint(data, look)
            figure.canvas.draw()
            boxes = []
            for text in figure.findobj(lambda a: hasattr(a, "get_fontsize") and hasattr(a, "get_text")):
                if not text.get_text().strip() or not text.get_visible():
                    continue
                assert text.get_fontsize() >= 6.5
                box = text.get_window_extent()
                if box.width == 0 or (boxes and any(t is text for t, _ in boxes)):
                    continue
                boxes.append((text, box))
            drawn = [(t.get_text(), b) for t, b in boxes if not _is_hidden_tick(t, figure)]
            for text, box in drawn:
                assert box.x0 >= -1, (data["name"], text)
                assert box.x1 <= figure.bbox.width + 1, (data["name"], text)
                assert box.y0 >= -1, (data["name"], text)
                assert box.y1 <= figure.bbox.height + 1, (data["name"], text)
            for i, (one, a) in enumerate(drawn):
                for other, b in drawn[i + 1 :]:
                    wide = min(a.x1, b.x1) - max(a.x0, b.x0)
                    tall = min(a.y1, b.y1) - max(a.y0, b.y0)
                    assert wide < 1 or tall < 0.35 * min(a.height, b.height), (data["name"], one, other)


def _is_hidden_tick(text, figure) -> bool:
    """Matplotlib keeps labels of ticks outside the limits, and does not draw them."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            for tick in axis.get_major_ticks():
                if text in (tick.label1, tick.label2):
                    low, high = sorted(axis.get_view_interval())
                    return not low - 1e-9 <= tick.get_loc() <= high + 1e-9
    return False


def test_widths_are_the_columns_of_a_paper():
    assert Look.of("paper", "single").width == pytest.approx(3.35 * 72)
    assert Look.of("paper", "double").width == pytest.approx(6.9 * 72)


def test_lines_break_between_phrases_and_lose_none():
    phrases = ["one", "two words", "a very much longer phrase than fits"]
    lines = fill_lines(phrases, 7, 60)
    assert all(text_width(line, 7) <= 60 for line in lines)
    assert re.sub(r"[ ·]+", " ", " ".join(lines)) == " ".join(phrases)


def test_every_part_and_method_has_one_colour_of_its_own():
    assert tuple(palette.PART_COLOURS) == tuple(palette.PART_LABELS) == PARTS
    methods = PRUNERS.names()
    assert {name: palette.method_label(name) for name in methods} == {name: cls.title for name, cls in PRUNERS}
    colours = [*palette.PART_COLOURS.values(), *map(palette.method_colour, methods)]
    assert len(set(colours)) == len(colours)
    assert palette.method_colour("new") == palette.method_colour("new")


def test_data_files_are_checked(tmp_path):
    (tmp_path / "a.json").write_text('{"kind": "nonsense", "name": "x"}')
    with pytest.raises(DataError, match="no figure's data"):
        figures.read_data(tmp_path / "a.json")
    with pytest.raises(DataError, match="cannot read"):
        figures.read_data(tmp_path / "none.json")


def test_for_print_title_and_origin_go_to_the_caption_file(runs, tmp_path):
    (data,) = [d for d in figures.plan(runs) if d["kind"] == "breakdown" and "ai2d" in d["name"]]
    files = list(figures.draw_data([data], tmp_path, formats=("pdf", "png"), caption=False))
    assert {f.suffix for f in files} == {".pdf", ".png", ".txt", ".json"}
    said = next(f for f in files if f.suffix == ".txt").read_text()
    assert said.startswith(data["title"])
    assert "predicted" in said
    look = Look.of(caption=False)
    with look.settings():
        drawn = figures.KINDS.load("breakdown")().paint(data, look)
    assert not any(data["title"] in text.get_text() for text in drawn.texts)
    assert b"InternVL2-2B" in next(f for f in files if f.suffix == ".png").read_bytes()


def test_a_style_keeps_its_former_name(tmp_path):
    assert Look.of("paper") == Look.of("print")


@pytest.mark.parametrize("width", ["single", "double"])
def test_slides_are_as_wide_as_a_screen(runs, width):
    look = Look.of("slides", width, caption=False)
    for data in figures.plan(runs[:3]):
        with look.settings():
            size = figures.KINDS.load(data["kind"])().paint(data, look).get_size_inches()
        assert size[0] / size[1] == pytest.approx(16 / 9, rel=0.01), data["name"]


def test_many_samples_are_a_band_that_holds_every_peak():
    from memprof.figures.bands import MANY, band

    values = [float((7 * i) % 101) for i in range(MANY + 37)]
    found = band(values)
    assert max(found.high) == max(values)
    assert min(found.low) == min(values)
    rows = zip(found.low, found.first, found.median, found.third, found.high, strict=True)
    assert all(list(row) == sorted(row) for row in rows)
    assert band([1.0, None, 3.0]).median[0] == 1.0


def painted(kind, data, *look):
    wanted = Look.of(*look)
    with wanted.settings():
        drawn = figures.KINDS.load(kind)().paint(next(d for d in data if d["kind"] == kind), wanted)
        drawn.canvas.draw()
    return drawn


def test_a_band_of_many_samples_names_each_of_its_tints():
    from matplotlib.colors import to_hex
    from matplotlib.patches import Rectangle, StepPatch

    drawn = painted("memory-curve", figures.plan([make_run(samples=401, tokens=1)]))
    said = [text.get_text() for text in drawn.texts]
    assert {"half of them", "all"} <= set(said)
    keys = {to_hex(patch.get_facecolor()) for patch in drawn.findobj(Rectangle)}
    assert {to_hex(patch.get_facecolor()) for patch in drawn.findobj(StepPatch) if patch.get_fill()} <= keys


def test_many_samples_lie_in_the_order_of_baselines_peaks():
    from matplotlib.patches import StepPatch

    drawn = painted("overlay", figures.plan(make_runs(("ai2d",), samples=401, tokens=1)))
    lines = [patch.get_data().values for patch in drawn.findobj(StepPatch) if not patch.get_fill()]
    assert any((values[1:] >= values[:-1]).all() for values in map(np.asarray, lines))
    assert any(axes.get_xlabel() == "samples by rising peak under Baseline (400)" for axes in drawn.axes)


def test_no_value_stands_below_a_broken_axis():
    (data,) = (d for d in figures.plan([make_run(samples=4, tokens=3)]) if d["kind"] == "memory-curve")
    low, high = data["axis_bytes"]
    assert low > 0
    for foot in (4.0, 4.0005, 3.999):  # where a round number falls on the foot, or beside it
        data["axis_bytes"] = [int(foot * 2**30), high]
        (axes,) = painted("memory-curve", [data]).axes
        assert all(tick > foot + 0.05 for tick in axes.get_yticks())


def test_four_panels_are_two_and_two():
    methods = (*METHODS, "random:keep=0.5")
    drawn = painted("over-tokens", figures.plan(make_runs(("ai2d",), methods, samples=2, tokens=2)))
    rows = {round(axes.get_position().y0, 3) for axes in drawn.axes}
    columns = {round(axes.get_position().x0, 3) for axes in drawn.axes}
    assert (len(rows), len(columns)) in ((1, 4), (2, 2))


def test_equal_methods_share_one_line_with_both_names():
    data = figures.plan(make_runs(("ai2d",), (METHODS[0], "random:keep=0.5", "uniform:keep=0.5"), samples=5, tokens=3))
    overlay = next(d for d in data if d["kind"] == "overlay")
    look = Look.of()
    with look.settings():
        drawn = figures.KINDS.load("overlay")().paint(overlay, look)
    names = [text.get_text() for axes in drawn.axes for text in axes.texts]
    assert "Random,\nUniform" in names


def test_in_every_sample_the_lower_methods_line_lies_in_front() -> None:
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_hex

    data = figures.plan(make_runs(("ai2d",), METHODS[:2], samples=8, tokens=3))
    overlay = next(d for d in data if d["kind"] == "overlay")
    low, high = overlay["series"]  # FastV above Baseline, but for one sample
    for column in (low["token_peak_bytes"], high["token_peak_bytes"]):
        assert None not in column
    high["sample_peak_bytes"][2] = low["sample_peak_bytes"][2] // 2
    look = Look.of()
    with look.settings():
        drawn = figures.KINDS.load("overlay")().paint(overlay, look)
    (lines,) = (c for axes in drawn.axes for c in axes.collections if isinstance(c, LineCollection))
    started = overlay["samples"][2]["start"], overlay["samples"][4]["start"]
    pieces = [*zip(lines.get_segments(), map(to_hex, lines.get_colors()), strict=True)]
    front = {start: [colour for path, colour in pieces if path[0][0] == start] for start in started}
    baseline, fastv = palette.method_colour("baseline").lower(), palette.method_colour("fastv").lower()
    assert front == {started[0]: [baseline, fastv], started[1]: [fastv, baseline]}


def test_a_value_stands_right_below_its_name_however_tall_the_panel() -> None:
    data = next(d for d in figures.plan(make_runs(("ai2d",), samples=3, tokens=3)) if d["kind"] == "over-tokens")
    for style in ("print", "slides"):
        look = Look.of(style, "double")
        with look.settings():
            drawn = figures.KINDS.load("over-tokens")().paint(data, look)
            drawn.canvas.draw()
            name, value = (text.get_window_extent() for text in drawn.axes[0].texts)
        assert 0 < name.y0 - value.y0 < 2 * name.height


def test_the_unit_follows_the_figures_own_peak(tmp_path):
    run = make_run(samples=2, tokens=2)
    for sample in run.samples:
        sample.dynamic_peak_bytes //= 2000
    (data,) = [d for d in figures.plan([run]) if d["kind"] == "breakdown"]
    assert figures._highest(data) == max(s.dynamic_peak_bytes for s in run.finished)
