"""The HTML page in headless Chromium: it draws, hovers, zooms, switches sample, asks for nothing and logs no error."""

from pathlib import Path

import pytest
from browser import CHROMIUM, Page
from synthetic import NASTY, make_runs

from memprof import reports

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on PATH")


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(reports.render("html", make_runs(samples=8, tokens=6)), encoding="utf-8")
    return path


def text(page: Page, selector: str) -> str:
    return page.run(f"(document.querySelector({selector!r}) || {{}}).innerText || ''")


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True)])
def test_page(file, width, dark):
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
