"""The HTML page in headless Chromium: it draws, hovers, zooms, switches sample, asks for nothing and logs no error."""

from pathlib import Path

import pytest
from browser import CHROMIUM, Page
from synthetic import NASTY, make_runs

from memprof import reports
from memprof.telling.palette import PART_COLOURS, PART_LABELS

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on PATH")


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(reports.render("html", make_runs(samples=8, tokens=6)), encoding="utf-8")
    return path


def text(page: Page, selector: str) -> str:
    return page.run(f"(document.querySelector({selector!r}) || {{}}).innerText || ''")


@pytest.mark.slow
def test_what_pruning_costs(tmp_path):
    runs = make_runs(samples=8, tokens=6)[:2]
    for run in runs:
        for number, sample in enumerate(run.finished):
            sample.score = float(number % 2)
            sample.fidelity = {"agreement": 0.5, "kl": 0.25, "exact": 0.0, "first_divergence": 2.0}
    path = tmp_path / "report.html"
    path.write_text(reports.render("html", runs), encoding="utf-8")
    with Page(path, width=390) as page:  # nothing beyond the edge of a phone
        cut = "[...document.querySelectorAll('.scroll')].filter((one) => one.scrollWidth > one.clientWidth).length"
        assert page.run(cut) == 0
    with Page(path) as page:
        assert "What it costs" in text(page, "main")
        assert "0.250 [0.250, 0.250]" in text(page, "main table:not(.words)")
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
        assert page.errors == []


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True)])
def test_page(file, width, dark):
    clicked = make_runs(samples=8, tokens=6)[0].samples[1]  # under Baseline
    with Page(file, width=width, dark=dark) as page:
        # It draws: a line a method, bars a sample, and says what it is.
        assert page.run("document.querySelectorAll('#curve path[data-method]').length") == 3
        assert page.run("document.querySelectorAll('#stack rect').length") > 7
        assert text(page, "#status").lower() == "predicted"
        assert "torch 2.13.0" in text(page, "main")
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
        background = page.run("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(21, 23, 27)" if dark else "rgb(255, 255, 255)")

        # It hovers.
        left, top, wide, high = page.box("#curve svg")
        page.mouse("mouseMoved", left + wide * 0.6, top + high * 0.5)
        page.settle()
        assert page.run("getComputedStyle(document.querySelector('#curve .tip')).display") == "block"
        assert {"Baseline", "FastV", "TopV"} <= set(text(page, "#curve .tip").split())

        # It zooms, and back.
        whole = page.run("document.querySelector('#curve path[data-method]').getAttribute('d')")
        for kind, share in (("mousePressed", 0.4), ("mouseMoved", 0.6), ("mouseReleased", 0.6)):
            page.mouse(kind, left + wide * share, top + high * 0.5, button="left", clickCount=1)
        page.settle()
        assert page.run("document.querySelector('#curve path[data-method]').getAttribute('d')") != whole
        page.run("document.getElementById('whole').click()")
        assert page.run("document.querySelector('#curve path[data-method]').getAttribute('d')") == whole

        # It switches sample, by the list and by a click; a failed one shows its error.
        page.run("(s => { s.value = 3; s.dispatchEvent(new Event('change')); })(document.getElementById('sample'))")
        assert "truncated <PNG>" in text(page, "#cards")
        left, top, wide, high = page.box("#stack svg")
        page.click(left + 52 + (wide - 62) * 1.5 / 8, top + high * 0.6)
        page.settle()
        assert page.run("document.getElementById('sample').value") == "1"
        assert page.run("document.querySelector('#sample option:checked').textContent") == NASTY
        assert page.run("document.querySelectorAll('#cards svg[role=img]').length") == 3

        # Its parts are stacked over its tokens, in the colours of parts, and the numbers are the record's.
        assert page.run("document.querySelectorAll('.card:first-child path[data-part]').length") == len(
            clicked.token_parts
        )
        drawn = page.run("document.querySelector('.card path[data-part=kv_cache]').getAttribute('fill')")
        assert drawn == PART_COLOURS["kv_cache"]
        steps = page.run(
            "document.querySelector('.card path[data-part=kv_cache]').getAttribute('d').split('M').length - 1"
        )
        assert steps == len(clicked.tokens)
        left, top, wide, high = page.box(".card svg")
        page.mouse("mouseMoved", left + 52 + (wide - 62) * 3.5 / 6, top + high * 0.5)
        page.settle()
        bubble = text(page, ".card .tip").split("\n")
        assert bubble[0] == "token 3, decode"
        for part, column in clicked.token_parts.items():
            assert (PART_LABELS[part] in bubble) is bool(column[3])
        assert f"{clicked.token_parts['kv_cache'][3] / 2**30:.3f} GiB" in bubble

        # Without prefill, decode steps fill the height; another sample is shown in the same way.
        page.run("document.getElementById('decode').click()")
        page.settle()
        without = "document.querySelector('.card path[data-part=kv_cache]').getAttribute('d').split('M').length - 1"
        assert page.run(without) == len(clicked.tokens) - 1
        assert page.run("document.querySelectorAll('.card:first-child path[data-part]').length") == 2
        before = page.run("document.querySelector('.card path[data-part=kv_cache]').getAttribute('d')")
        page.run("document.querySelector('.picker button[aria-label=\"Previous sample\"]').click()")
        page.settle()
        assert page.run("document.querySelector('.card path[data-part=kv_cache]').getAttribute('d')") != before
        assert page.run("document.documentElement.scrollWidth <= innerWidth")

        # Methods switch off, static is added, groups and themes change.
        page.run("document.querySelector('.method').click()")
        assert page.run("document.querySelectorAll('#curve path[data-method]').length") == 2
        page.run("document.getElementById('total').click()")
        assert "static 4.109 GiB" in page.run("document.getElementById('curve').textContent")
        page.run("document.querySelectorAll('#groups button')[1].click()")
        assert "OCRBench" in text(page, "h2")
        page.run("document.getElementById('theme').click()")
        assert page.run("getComputedStyle(document.body).backgroundColor") != background

        # No text became markup, nothing was asked for, nothing went wrong.
        assert page.run("document.querySelectorAll('img').length") == 0
        assert page.requests == [file.resolve().as_uri()]
        assert page.errors == []


@pytest.mark.slow
def test_records_without_parts_a_token_are_drawn_as_they_were(tmp_path):
    runs = make_runs(("ai2d",), samples=3, tokens=6)
    for run in runs:
        for sample in run.samples:
            sample.token_parts = {}
    path = tmp_path / "report.html"
    path.write_text(reports.render("html", runs), encoding="utf-8")
    with Page(path) as page:
        assert page.run("document.querySelectorAll('.card path[data-part]').length") == 0
        rects = page.run("document.querySelectorAll('.card svg[role=img] svg rect').length")
        assert rects > 3 * 6
        page.run("document.getElementById('decode').click()")
        page.settle()
        assert 0 < page.run("document.querySelectorAll('.card svg[role=img] svg rect').length") < rects
        assert page.errors == []


@pytest.mark.slow
def test_on_a_phone_no_column_is_hidden_and_words_are_told(file):
    with Page(file, width=390) as page:
        wide = "document.querySelector('.scroll')"
        assert page.run(f"{wide}.scrollWidth <= {wide}.clientWidth")
        assert "dynamic peak" in page.run("[...document.querySelectorAll('td')].map((td) => td.dataset.name).join()")
        assert "peaks in" in text(page, "main")
        assert page.run("document.querySelectorAll('dl dt').length") > 5
        assert page.run("document.querySelector('#csv').onclick === null")
        assert page.errors == []
