"""Predicted over measured: every pair a mark, shares of equal points counted by point, type inside and apart."""

from __future__ import annotations

from typing import Any

import pytest
from synthetic import make_run

from memprof import figures
from memprof.figures.style import Look
from memprof.telling import facts

MIB = 2**20


def data(*labels: str) -> dict[str, Any]:
    pairs = [[100 * MIB, 100 * MIB, 3], [13_000 * MIB, 12_944 * MIB, 1]]
    measures = {name: {"pairs": pairs} for name in ("peak of a sample", "peak of a token", "reserved at a token")}
    return facts.header("agreement", "x", [make_run(samples=1, tokens=1)]) | {
        "title": "Predicted against measured",
        "references": [{"label": label, "measures": measures} for label in labels],
    }


@pytest.mark.parametrize("style", ["print", "slides"])
@pytest.mark.parametrize("width", ["single", "double"])
def test_it_is_painted_inside_its_frame(style: str, width: str) -> None:
    look = Look.of(style, width)
    with look.settings():
        drawn = figures.KINDS.load("agreement")().paint(data("H200, transformers 5.17", "H100"), look)
        drawn.canvas.draw()
        frame = drawn.bbox
        said = [text for text in drawn.texts if text.get_text()]
        said += [text for axes in drawn.axes for text in (axes.xaxis.label, axes.yaxis.label, *axes.texts)]
        boxes = {text.get_text(): text.get_window_extent() for text in said if text.get_text()}
    assert len(drawn.axes) == 6
    for words, box in boxes.items():
        assert 0 <= box.x0 < box.x1 <= frame.width, words
        assert 0 <= box.y0 < box.y1 <= frame.height, words
    assert "75 % of 4 equal" in boxes
    assert "off by (MiB)" in boxes


def test_differences_are_signed() -> None:
    look = Look.of("print", "double")
    with look.settings():
        drawn = figures.KINDS.load("agreement")().paint(data("H200"), look)
    marks = [line.get_ydata().tolist() for line in drawn.axes[1].lines if line.get_marker() == "o"]
    assert marks == [[0.0, -56.0]]
