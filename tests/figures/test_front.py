from __future__ import annotations

import pytest
from synthetic import GIB

from memprof import figures
from memprof.figures.kinds.front import PRUNED, Front, front_data
from memprof.figures.style import Look
from memprof.records import Run, RunRecord, RunSpec, SampleRecord, TokenColumns


def run(method: str, peak: float, agreement: float | None = None) -> Run:
    columns = TokenColumns([int(peak * GIB)], [1], [1], [1], [None], [None])
    compared = None if agreement is None else {"agreement": agreement}
    sample = SampleRecord("a", tokens=columns, dynamic_peak_bytes=1, fidelity=compared)
    return Run(RunRecord(RunSpec("internvl2-2b", method, "ai2d", "sim"), "predicted", data_label="AI2D"), [sample])


def test_a_method_at_several_shares_makes_a_front() -> None:
    assert Front().plan([run("topv:keep=0.5,layer=2", 5), run("fastv:keep=0.5,layer=2", 6)]) == []
    runs = [run("topv:keep=0.5,layer=2", 5), run("topv:keep=0.25,layer=2", 4.5), run("uniform:keep=0.5,layer=2", 4.9)]
    (data,) = Front().plan(runs)
    assert data["x_label"] == PRUNED
    topv, uniform = data["series"]
    assert [(p["x"], p["front"]) for p in topv["points"]] == [(0.5, True), (0.75, True)]
    assert uniform["method"] == "uniform"


def test_what_was_measured_is_what_it_is_drawn_against() -> None:
    (data,) = Front().plan([run("topv:keep=0.5,layer=2", 5, 0.99), run("topv:keep=0.25,layer=2", 5.5, 0.9)])
    assert data["x_label"].startswith("1 − agreement")
    assert [p["x"] for p in data["series"][0]["points"]] == [pytest.approx(0.01), pytest.approx(0.1)]
    assert [p["front"] for p in data["series"][0]["points"]] == [True, False]  # loses more and needs more


def test_it_is_painted() -> None:
    points = [{"method": "topv:keep=0.5", "peak_bytes": 5 * GIB, "x": 0.1, "fits": False, "params": {}}]
    data = front_data(points, [run("topv", 5)], "x", x_label="loss", budget_bytes=4 * GIB)
    assert data["kind"] in figures.KINDS.names()
    look = Look.of()
    with look.settings():
        figure = Front().paint(data, look)
    assert any("budget" in text.get_text() for axes in figure.axes for text in axes.texts)
