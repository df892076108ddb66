"""README, docs and notebooks: every block runs and prints what stands below it; links lead somewhere; the site builds.

A ``console`` or ``sh`` block is typed into a shell, a ``python`` block is run, and a ``pycon`` block is a session whose
answers are compared: the shell lines of a page in its order in one folder, its Python in its order in another.
Blocks of ``text`` are read, not run: what they show needs a card, a hub or another program.
"""

from __future__ import annotations

import doctest
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from shell import Shell

import memprof

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: Kinds of blocks that are run, and those that are not: to be read, or data.
RUN, SHOWN = {"console", "sh", "python", "pycon"}, {"text", "json", "ini"}
#: Lines of set-up: what they do, the environment that runs this test has done.
SETUP = ("make ", "source ", "python ")


def blocks(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Each shell line of a page, and the lines that are shown below it."""
    for kind, body in re.findall(r"^```(console|sh)\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S):
        shown: list[str] | None = None
        for line in body.splitlines():
            command = line.removeprefix("$ ") if kind == "console" and line.startswith("$ ") else ""
            command = line.partition("  #")[0] if kind == "sh" else command
            if command and not command.startswith(SETUP):
                shown = []
                yield command, shown
            elif shown is not None and line.strip() not in ("", "..."):
                shown.append(line.rstrip())


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_says_what_it_is(page: Path) -> None:
    fences = re.findall(r"^```(.*)$", page.read_text(encoding="utf-8"), flags=re.M)
    kinds = set(fences[::2])
    assert kinds <= RUN | SHOWN, sorted(kinds - RUN - SHOWN)


def clone(tmp_path: Path, book: Path) -> tuple[Path, dict[str, str]]:
    """A folder with what a reader's clone has beside the package, and an environment where ``memprof`` is installed."""
    here = tmp_path / "clone"
    here.mkdir()
    for name in ("reference", "plots"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, here / name)
    tool = tmp_path / "bin" / "memprof"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m memprof "$@"\n')
    tool.chmod(0o755)
    # What pages record serves all of them; the list of saved runs is each page's own.
    cache = tmp_path / "cache"
    cache.mkdir()
    (book / "programs").mkdir(parents=True, exist_ok=True)
    (cache / "programs").symlink_to(book / "programs", target_is_directory=True)
    env = {
        **os.environ, "PATH": f"{tool.parent}:{os.environ['PATH']}", "COLUMNS": "80", "PYTHONPATH": str(ROOT),
        "MEMPROF_CACHE": str(cache), "MPLBACKEND": "agg",
    }  # fmt: skip
    return here, env


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_shell_line_works_and_prints_what_is_shown(page: Path, tmp_path: Path, shared_book: Path) -> None:
    typed = [*blocks(page)]  # all of it, before what is shown is read
    if not typed:
        pytest.skip("no shell line")
    here, env = clone(tmp_path, shared_book)
    for command, shown in typed:
        done = subprocess.run(["bash", "-c", command], cwd=here, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stderr[-2000:])
        said = [line.rstrip() for line in done.stdout.splitlines()]
        for line in shown:
            assert line in said, (command, line, done.stdout[-4000:])


def examples(page: Path) -> list[tuple[str, str]]:
    """A page's Python, block by block: ``python`` or ``pycon``, and what stands in it."""
    return re.findall(r"^```(python|pycon)\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)


@pytest.fixture
def in_a_folder(tmp_path: Path, shared_book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples write where they are, and find what others have recorded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEMPROF_CACHE", str(shared_book))


@pytest.mark.slow
@pytest.mark.usefixtures("in_a_folder")
@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)], ids=name_of)
def test_every_python_example_works_after_those_above_it(page: Path) -> None:
    names: dict[str, Any] = {}
    for number, (kind, block) in enumerate(examples(page)):
        title = f"{page.name}, example {number + 1}"
        if kind == "python":
            exec(compile(block, title, "exec"), names)
            continue
        session = doctest.DocTestParser().get_doctest(block, names, title, str(page), 0)
        said: list[str] = []
        assert session.examples, title
        doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(session, out=said.append, clear_globs=False)
        assert not said, "".join(said)
        names = session.globs


def test_every_public_name_has_an_example() -> None:
    text = "\n".join(block for _, block in examples(ROOT / "docs" / "python.md"))
    for name in set(memprof.__all__) - {"__version__"}:
        assert re.search(rf"memprof\.{name}\b", text), name


NOTEBOOKS = sorted((ROOT / "docs").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.usefixtures("in_a_folder")
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs_and_prints_what_it_shows(notebook: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shell = Shell()
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            shell.run("".join(cell["source"]))
            shown = [out["text"] for out in cell["outputs"] if out["output_type"] == "stream"]
            assert capsys.readouterr().out == "".join(text for texts in shown for text in texts), cell["source"]


def test_notebooks_are_executed_and_show_profiles() -> None:
    assert len(NOTEBOOKS) == 2
    for notebook in NOTEBOOKS:
        assert notebook.stat().st_size < 64 * 1024
        cells = [one for one in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if one["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
        shown = [out["data"] for cell in cells for out in cell["outputs"] if out["output_type"] == "execute_result"]
        assert shown
        assert all("<svg" in "".join(data["text/html"]) for data in shown)


@pytest.mark.slow
def test_the_site_builds_and_every_link_of_it_leads_somewhere(tmp_path: Path) -> None:
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    api = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    assert all(f'id="memprof.{name}"' in api for name in memprof.__all__ if not name.startswith("_"))
    assert (tmp_path / "site" / "plots" / "ask" / "ask-topv.png").exists()


def test_every_page_is_on_the_site() -> None:
    there = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    missing = [page for page in PAGES[1:] if f" {page.relative_to(ROOT / 'docs')}\n" not in there]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_to_a_file(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_readme_is_short_and_begins_with_what_was_measured() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 1200
    assert text.index("measured on") < text.index("make run")


def test_the_table_of_agreement_is_what_is_drawn() -> None:
    text = (ROOT / "docs" / "exactness.md").read_text(encoding="utf-8")
    drawn = json.loads((ROOT / "plots" / "predicted_against_measured.json").read_text(encoding="utf-8"))
    labels = [one["label"] for one in drawn["references"]]
    assert f"| equal to the byte, and the furthest off | {' | '.join(labels)} |" in text
    for measure in drawn["references"][0]["measures"]:
        cells = []
        for one in drawn["references"]:
            pairs = one["measures"][measure]["pairs"]
            share = sum(n for a, p, n in pairs if a == p) / sum(n for _, _, n in pairs)
            furthest = max((p - a for a, p, _ in pairs), key=abs) / 2**20
            cells.append(f"{100 * share:.0f} %, {furthest:+.1f} MiB".replace("-", "−"))
        assert f"| {measure} | {' | '.join(cells)} |" in text


def test_the_supplements_table_is_what_was_made() -> None:
    text = (ROOT / "docs" / "supplement.md").read_text(encoding="utf-8")
    made = json.loads((ROOT / "plots" / "supplement.json").read_text(encoding="utf-8"))
    for method, label in (("topv", "TopV"), ("baseline", "Baseline"), ("fastv", "FastV")):
        for task, called in (("ai2d", "AI2D"), ("ocrbench", "OCRBench")):
            sizes = made["measured"]["dynamic_gb"][method][task], made["dynamic_gb"][method][task]
            published = f"{made['published'][method][task]:.2f}"
            assert f"| {label} on {called} | {published} | {sizes[0]:.3f} | {sizes[1]:.3f} |" in text
    both = made, made["measured"]
    worst = max(abs(error) for one in both for row in one["error_percent"].values() for error in row.values())
    points = max(
        abs(saved - made["published_savings"][task][other])
        for one in both
        for task, row in one["savings"].items()
        for other, saved in row.items()
    )
    assert f"Every figure is within {worst:.1f} % and every saving within {points:.1f} points" in text
