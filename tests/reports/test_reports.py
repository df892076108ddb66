"""Reports: the numbers are the records', text of data sets does no harm, and every format stands on its own."""

import copy
import csv
import io
import json
import os
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic import METHODS, NASTY, STATIC, make_run, make_runs

from memprof import reports
from memprof.errors import BadValue, UnknownName
from memprof.records import PARTS, Run, RunRecord, RunSpec, SampleRecord, summarize
from memprof.reports.pages import embed
from memprof.reports.rows import plain, sheets
from memprof.telling.palette import PART_LABELS

ROOT = Path(__file__).parents[2]


def nothing_finished() -> Run:
    return Run(
        RunRecord(RunSpec("internvl2-2b", "baseline", "ai2d", "sim"), "predicted"), [SampleRecord("a", "failed")]
    )


def page_data(page: str) -> str:
    return re.search(r'id="data">(.*?)</script>', page, re.S).group(1)


def test_formats_are_found_by_file():
    assert reports.names() == ["chrome", "csv", "html", "json", "latex", "markdown", "table"]


@pytest.mark.parametrize("name", reports.names())
@pytest.mark.parametrize("case", ["three", "empty", "none"])
def test_every_format_renders_the_same_text_twice(name, case, runs):
    chosen = {"three": runs[:3], "empty": [nothing_finished()], "none": []}[case]
    assert reports.render(name, chosen) == reports.render(name, chosen)


@pytest.mark.parametrize("name", reports.names())
def test_every_format_says_measured_or_predicted_and_on_what(name, runs):
    predicted, measured = (
        reports.render(name, runs),
        reports.render(name, make_runs(("ai2d",), samples=3, measured=True)),
    )
    if name == "html":  # its style and script know both words; its data know one
        predicted, measured = page_data(predicted), page_data(measured)
    assert "predicted" in predicted
    assert "measured" not in predicted
    assert "measured" in measured
    assert "predicted" not in measured
    assert "cuda" in measured


def test_unknown_names(runs):
    with pytest.raises(UnknownName, match="did you mean 'markdown'"):
        reports.render("markdwn", runs)
    with pytest.raises(BadValue, match="GiB"):
        reports.render("table", runs, "G")


@pytest.mark.parametrize("width", [80, 120, 200])
def test_table_fits_and_is_complete(runs, width):
    text = reports.render("table", runs, width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "\x1b" not in text
    for run in runs:
        total = summarize(run)
        for key in ("static_bytes", "dynamic_peak_bytes", "kv_cache_bytes", "peak_reserved_bytes"):
            assert f"{total[key] / 2**30:.3f}" in text
    assert re.search(r"TopV +0\.50 ?/ ?0\.50 ", text)
    joined = " ".join(text.split())
    assert "torch 2.13.0" in joined
    assert "sample ai2d/0003 failed: image cannot be read" in joined
    assert "(Baseline, FastV, TopV)" in joined


def test_table_has_colours_only_when_asked(runs):
    coloured = reports.render("table", runs, width=100, colour=True)
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured).split() == reports.render("table", runs, width=100).split()


@pytest.mark.parametrize("format", ["table", "markdown"])
def test_scores_and_fidelity_are_shown_with_their_intervals(runs, format):
    assert "score" not in reports.render(format, runs[:1])
    done = runs[0].finished
    for number, sample in enumerate(done):
        sample.score = float(number % 2)
        sample.fidelity = {"agreement": 0.5, "kl": 0.25, "exact": 0.0, "first_divergence": 2.0}
    text = reports.render(format, runs[:1]).replace("\\", "")
    right = sum(s.score for s in done)
    assert f"{right:g}/{len(done)}" in text
    assert re.search(rf"{100 * right / len(done):.1f} +\[\d+\.\d, \d+\.\d\]", text)
    assert "50.0 [50.0, 50.0]" in text
    assert "0.250 [0.250, 0.250]" in text


def test_a_mean_over_some_samples_says_over_how_many(runs):
    done = runs[0].finished
    for sample in done:
        sample.score, sample.fidelity = 1.0, {"agreement": 0.5, "kl": 0.25, "exact": 0.0, "first_divergence": 2.0}
    (sheet,) = sheets(runs[:1], "GiB")
    assert "n=" not in "".join(sheet.quality[0])
    done[0].fidelity = None
    (sheet,) = sheets(runs[:1], "GiB")
    _, right, score, *compared = sheet.quality[0]
    assert (right, score) == (f"{len(done)}/{len(done)}", "100.0 [100.0, 100.0]")
    assert all(cell.endswith(f" (n={len(done) - 1})") for cell in compared)


def test_intervals_stand_below_their_means_at_80_columns(runs):
    for sample in runs[0].finished:
        sample.score = 1.0
    text = reports.render("table", runs[:1], width=80)
    assert "[100.0, 100.0]" in text
    assert max(map(len, text.splitlines())) <= 80


def test_saving_is_against_baseline_of_the_same_experiment(runs):
    (sheet,) = sheets([*runs[:3]], "GiB")
    base, topv = runs[0].highest.dynamic_peak_bytes, runs[2].highest.dynamic_peak_bytes
    assert sheet.rows[0][4] == "-"
    assert sheet.rows[2][4] == f"{100 * (1 - topv / base):.1f} %"
    assert [s.rows[0][4] for s in sheets([runs[0], make_run(METHODS[2], stack="current")], "GiB")] == ["-", "-"]


@pytest.mark.parametrize("refused", [0, 1], ids=["Baseline", "FastV"])
def test_saving_is_over_the_samples_that_both_finished(runs, refused):
    base, fastv = runs[:2]
    lost = runs[refused].highest
    lost.status, lost.error = "oom", "out of memory"
    (sheet,) = sheets([base, fastv], "GiB")
    both = [[s.dynamic_peak_bytes for s in run.finished if s.id != lost.id] for run in (base, fastv)]
    assert sheet.rows[1][4] == f"{100 * (1 - max(both[1]) / max(both[0])):.1f} %".replace("-", "−")
    (said,) = [line for line in sheet.remarks if line.startswith("saved")]
    assert said == (
        "saved against Baseline: over the 4 of 5 samples that both finished (FastV);"
        " other columns: over all that each finished"
    )
    assert "saved against Baseline: over the 4 of 5" in reports.render("html", [base, fastv])


def test_nothing_is_saved_where_no_sample_is_common(runs):
    base, topv = runs[0], runs[2]
    for sample in base.finished[1:]:
        sample.status = "oom"
    topv.samples[0].status = "oom"
    (sheet,) = sheets([base, topv], "GiB")
    assert sheet.rows[1][4] == "-"
    assert not [line for line in sheet.remarks if line.startswith("saved")]


def test_markdown_is_a_table_that_nothing_breaks(runs):
    runs[0].samples[3].id = "a|b\n# <b>*x*"
    text = reports.render("markdown", runs[:3])
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len(tables) == 2 * 5
    assert len({re.sub(r"\\\|", "", line).count("|") for line in tables[:5]}) == 1
    assert "a\\|b\N{REPLACEMENT CHARACTER}\\# &lt;b&gt;\\*x\\*" in text


def test_markdown_parts_sum_to_the_peak(runs):
    (sheet,) = sheets(runs[:3], "GiB")
    for row in sheet.parts:
        assert sum(map(float, row[1:-1])) == pytest.approx(float(row[-1]), abs=0.005)


def test_csv_has_a_row_a_token_and_a_row_a_failure(runs):
    rows = list(csv.DictReader(io.StringIO(reports.render("csv", runs))))
    assert len(rows) == sum(sum(len(s.tokens) for s in r.finished) + 1 for r in runs)
    first, sample = rows[0], runs[0].samples[0]
    for column in ("peak_allocated_bytes", "allocated_bytes", "reserved_bytes", "kv_bytes"):
        assert int(first[column]) == getattr(sample.tokens, column)[0]
    assert first["seconds"] == first["device_used_bytes"] == ""
    assert int(first["static_bytes"]) == STATIC
    assert rows[4]["sample"] == NASTY
    assert [r["error"] for r in rows if r["sample_status"] == "failed"] == ["image cannot be read: truncated <PNG>"] * 6


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@x", "\t=1"])
def test_csv_holds_no_formula(runs, name):
    runs[0].samples[0].id = name
    assert next(csv.DictReader(io.StringIO(reports.render("csv", runs[:1]))))["sample"] == f"'{name}"


def test_json_is_the_document_of_the_design(runs):
    assert json.loads(reports.render("json", runs)) == {"schema": 1, "runs": [summarize(run) for run in runs]}


def chrome_counters(events) -> dict[str, list[tuple[float, dict[str, int]]]]:
    """Each counter's values, as the Trace Event format has them: numbers under ``args``, in order of time."""
    counters: dict[str, list[tuple[float, dict[str, int]]]] = {}
    for event in events:
        assert {"ph", "name", "pid", "tid"} <= set(event)
        assert event["ph"] in "MXCi"
        if event["ph"] != "M":
            assert event["ts"] >= 0
        if event["ph"] == "C":
            assert event["args"]
            assert all(type(n) is int for n in event["args"].values())
            counters.setdefault(event["name"], []).append((event["ts"], event["args"]))
    for track in counters.values():
        assert [at for at, _ in track] == sorted(at for at, _ in track)
        assert len({tuple(series) for _, series in track}) == 1, "a series must not come and go"
    return counters


@pytest.mark.parametrize("measured", [False, True])
def test_chrome_trace_is_in_order_and_carries_every_byte(measured):
    run = make_run(METHODS[2], samples=5, tokens=3, measured=measured)
    trace = json.loads(reports.render("chrome", [run]))
    events = trace["traceEvents"]
    counters = chrome_counters(events)
    peaks = [b for s in run.finished for b in s.tokens.peak_allocated_bytes]
    assert [series["bytes"] for _, series in counters["peak allocated"]] == [*peaks, 0]
    assert ("device used" in counters) is measured
    # A value a part at every token, in drawing order; together they are the token's peak.
    stacked = [series for _, series in counters["dynamic by part"]]
    assert [sum(series.values()) for series in stacked] == [*(b - STATIC for b in peaks), 0]
    labels = [PART_LABELS[p] for p in PARTS if any(p in s.token_parts for s in run.finished)]
    assert list(stacked[0]) == labels
    cache = [n for s in run.finished for n in s.token_parts["kv_cache"]]
    assert [series["KV cache"] for series in stacked] == [*cache, 0]
    assert not [name for name in counters if name.startswith("at the peak")]
    prefill = next(e for e in events if e["name"] == "prefill")
    assert prefill["dur"] == pytest.approx(210_000 if measured else 1000)
    name = next(e["args"]["name"] for e in events if e["name"] == "process_name")
    assert ("1 ms a token" in name) is not measured
    assert bool(trace["otherData"]["untimed"]) is not measured
    assert [e["args"]["error"] for e in events if e["ph"] == "i"] == ["image cannot be read: truncated <PNG>"]


def test_chrome_trace_of_records_without_parts_a_token_shows_those_of_the_peak():
    run = make_run(METHODS[2], samples=5, tokens=3)
    for sample in run.samples:
        sample.token_parts = {}
    counters = chrome_counters(json.loads(reports.render("chrome", [run]))["traceEvents"])
    assert "dynamic by part" not in counters
    for part in PARTS:
        shown = {series["bytes"] for _, series in counters[f"at the peak: {PART_LABELS[part]}"]}
        assert {s.peak_parts[part] for s in run.finished} <= shown


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script":
            self.scripts[-1] += data


def test_page_is_one_file_that_no_text_can_break(runs):
    runs[0].samples[0].answer = NASTY
    runs[0].samples[3].error = "<script>alert(2)</script>"
    runs[0].record.data_label = runs[1].record.data_label = runs[2].record.data_label = "<b>'\"</title>"
    page = reports.render("html", runs)
    reader = _Reader()
    reader.feed(page)
    tags = [tag for tag, _ in reader.tags]
    assert tags.count("script") == 2
    assert "img" not in tags
    assert "b" not in tags
    for tag, attributes in reader.tags:
        assert not {k for k in attributes if k.startswith("on")}
        assert "src" not in attributes
        if "href" in attributes:
            assert (tag, attributes["href"]) == ("link", "data:,")
    data = json.loads(reader.scripts[0])
    assert data["groups"][0]["samples"][1]["id"] == NASTY
    assert data["groups"][0]["runs"][0]["samples"][0]["answer"] == NASTY
    # The only address in the page is the name of a namespace, which nobody fetches.
    assert set(re.findall(r"https?://[\w./-]+", page)) <= {"http://www.w3.org/2000/svg"}


def test_page_holds_the_records(runs):
    text = reports.render("html", runs)
    data = json.loads(page_data(text))
    assert [g["status"] for g in data["groups"]] == ["predicted", "predicted"]
    run, shown = runs[2], data["groups"][0]["runs"][2]
    assert shown["dynamic"] == run.highest.dynamic_peak_bytes
    assert [b for b in shown["peak"] if b is not None] == [
        b - STATIC for s in run.finished for b in s.tokens.peak_allocated_bytes
    ]
    for sample, there in zip(run.samples, shown["samples"], strict=True):
        assert (there["parts"] is None) is not sample.ok
        if sample.ok:
            assert sum(there["parts"].values()) == sample.dynamic_peak_bytes
            every = list(there["every"].values())
            assert [sum(column[t] for column in every) for t in range(len(sample.tokens))] == there["peak"]


def test_embedded_json_means_the_same():
    value = {"a": NASTY, "b": ["<!--", "&amp;", "\u2029"]}
    text = embed(value)
    assert json.loads(text) == value
    assert not set("<>&\u2028\u2029") & set(text)


def test_page_assets_are_packaged():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["memprof"]
    for asset in (ROOT / "memprof" / "reports" / "page").iterdir():
        name = asset.relative_to(ROOT / "memprof").as_posix()
        assert any(fnmatch(name, pattern.replace("**/", "*")) for pattern in patterns), (
            f"add {asset.suffix} to package-data"
        )


def test_plain_text_has_no_escapes():
    assert (
        plain("a\x1b[31m\nb\u202ec")
        == "a\N{REPLACEMENT CHARACTER}[31m\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}c"
    )
    assert len(plain("x" * 500)) == 200


def test_reports_load_no_torch():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from synthetic import make_runs; from memprof import reports\n"
        "for name in reports.names(): reports.render(name, make_runs(samples=2, tokens=2))\n"
        "assert not {'torch', 'transformers', 'matplotlib', 'plotly'} & set(sys.modules)"
    )
    here = str(ROOT / "tests" / "figures")
    subprocess.run([sys.executable, "-W", "error", "-c", code, here], check=True, env={**os.environ}, cwd=ROOT)


def test_latex_is_a_booktabs_table_whose_text_is_escaped(runs):
    text = reports.render("latex", runs)
    assert text.count(r"\toprule") == text.count(r"\end{tabular}") >= 1
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert all(line.count("&") == rows[0].count("&") for line in rows)
    assert not [line for line in rows if "%" in line.replace(r"\%", "") or "_" in line.replace(r"\_", "")]
    for run in runs:
        assert f"{summarize(run)['dynamic_peak_bytes'] / 2**30:.3f}" in text


def test_a_table_whose_samples_failed_says_that_no_peak_of_all_is_known(runs):
    text = reports.render("table", runs[:1], width=120)
    assert f"≥ {summarize(runs[0])['dynamic_peak_bytes'] / 2**30:.3f}" in text
    assert "failed: Baseline 1 of" in text


def test_what_a_sign_means_is_told_however_many_failed(runs):
    many = copy.deepcopy(runs[0])
    for number, sample in enumerate(many.samples[:-1]):
        sample.status, sample.error = "failed", f"reason {number}"
    text = reports.render("table", [many], width=200)
    assert "≥: of the samples that finished" in text
    failed = len(many.samples) - 1
    told = text.count("reason ")
    assert (f"and {failed - told} more" in text) == (told < failed)


@pytest.mark.parametrize("unit", ["GiB", "GB", "MiB", "MB", "KiB"])
def test_no_other_kind_of_unit_stands_in_a_table(runs, unit):
    high = copy.deepcopy(runs[:2])
    for sample in high[1].samples:
        sample.peak_parts["attention"] = sample.peak_parts.get("attention", 0) + 2**31
        sample.dynamic_peak_bytes += 2**31
    text = reports.render("table", high, unit, width=200)
    assert "above Baseline: at its peak" in text
    other = {"GiB", "MiB", "KiB"} if unit in ("GB", "MB") else {"GB", "MB"}
    assert not other & set(re.findall(r"[GMK]i?B", text.replace("CUDA context of 500 MiB", "")))


def test_without_a_baseline_the_table_says_what_to_add(runs):
    assert "add --method baseline" in reports.render("table", runs[1:3], width=200)
    assert "add --method baseline" not in reports.render("table", runs[:3], width=200)


def test_the_total_is_what_nvidia_smi_would_show():
    from synthetic import make_run

    run = make_run(samples=2, tokens=2)
    assert summarize(run)["device_bytes"] is None
    run.record.environment["gpu_context_bytes"] = 500 * 2**20
    assert summarize(run)["device_bytes"] == summarize(run)["peak_reserved_bytes"] + 500 * 2**20
    measured = make_run(samples=2, tokens=2, measured=True)
    used = [u for s in measured.finished for u in s.tokens.device_used_bytes]
    assert summarize(measured)["device_bytes"] == max(used)


def test_tiny_runs_are_read_in_a_unit_that_shows_every_cell():
    """Every dynamic peak and cache: a model of a test's size held "<0.1 MiB" of either."""
    run = make_run(samples=1, tokens=2)
    run.record.static_bytes = 3_000_000
    tokens = run.samples[0].tokens
    run.samples[0].dynamic_peak_bytes, run.samples[0].peak_parts = 70_000, {"kv_cache": 5_000, "mlp": 65_000}
    tokens.peak_allocated_bytes, tokens.kv_bytes = [3_070_000, 3_010_000], [5_000, 6_000]
    text = reports.render("table", [run], width=120)
    assert "in KiB" in text
    assert f"{70_000 / 1024:.1f}" in text
    assert f"{6_000 / 1024:.1f}" in text
    assert "<0.1" not in text
    assert "in MiB" in reports.render("table", [run], "MiB", width=120)


def test_the_terminal_says_what_its_kv_cache_is(runs):
    """``explain`` says what the cache holds at the peak, which is another number."""
    assert "KV cache: the most that a token left" in " ".join(reports.render("table", runs, width=80).split())
