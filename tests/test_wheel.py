"""The wheel: what it holds and asks for; built, installed, and used from another folder without the checkout."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from memprof.version import VERSION

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
#: Distributions whose module has another name, and modules that come with a distribution that is asked for.
NAMED = {"pillow": "PIL", "nvidia-ml-py": "pynvml"}
BROUGHT = {"huggingface_hub": "transformers", "tokenizers": "transformers"}
#: What loads memprof, or is there for whoever has it: a harness that is in no registry, pytest's plug-in, data frames.
AROUND = {"vlmeval", "pytest", "pandas"}


def modules(requirements: list[str]) -> set[str]:
    """The modules that requirements install."""
    names = [re.match(r"[\w.-]+", line)[0] for line in requirements]  # type: ignore[index]
    return {NAMED.get(name, name.replace("-", "_")) for name in names}


def imported() -> dict[str, list[str]]:
    """Every module of others that memprof imports, wherever in a file, and the files that do."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "memprof").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names = [node.module]
            for top in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"memprof", "__future__"}:
                found.setdefault(top, []).append(str(path.relative_to(ROOT)))
    return found


def test_an_install_asks_for_what_is_imported_and_for_nothing_else() -> None:
    wanted, extras = modules(PROJECT["dependencies"]), PROJECT["optional-dependencies"]
    known = wanted.union(*(modules(lines) for name, lines in extras.items() if name not in ("dev", "docs")))
    used = imported()
    assert wanted <= set(used), f"asked for, but never imported: {sorted(wanted - set(used))}"
    for module, where in used.items():
        assert BROUGHT.get(module, module) in known | AROUND, f"{module} is imported in {where}, but not asked for"


def test_a_release_tag_is_the_version() -> None:
    tags = subprocess.run(
        ["git", "tag", "--points-at", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    assert all(tag == f"v{VERSION}" for tag in tags if re.fullmatch(r"v\d.*", tag)), (tags, VERSION)
    assert "version" in PROJECT["dynamic"]


def build(source: Path, into: Path) -> Path:
    """The wheel of ``source``, made without a network where this environment has a new enough setuptools."""
    pip = [sys.executable, "-m", "pip"]
    if subprocess.run([*pip, "--version"], capture_output=True, check=False).returncode:
        pytest.skip("this environment has no pip")
    try:
        here = int(version("setuptools").split(".")[0]) >= 77
    except PackageNotFoundError:
        here = False
    words = ["wheel", "--no-deps", "--quiet", "--wheel-dir", str(into), *(["--no-build-isolation"] if here else [])]
    done = subprocess.run([*pip, *words, str(source)], capture_output=True, text=True, check=False, timeout=300)
    if done.returncode and not here:
        pytest.skip(f"no setuptools of 77 or later is here, and pip could fetch none: {done.stderr.strip()[-300:]}")
    assert not done.returncode, done.stderr[-3000:]
    (wheel,) = into.glob("memprof_vlm-*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy, so that nothing that is built stays in the checkout, and nothing of before gets in."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "memprof", source / "memprof", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    return build(source, tmp_path_factory.mktemp("wheel"))


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    there = {
        str(path.relative_to(ROOT)) for path in (ROOT / "memprof").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }  # fmt: skip
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == there
    assert "memprof/py.typed" in packed
    assert wheel.name.startswith(f"memprof_vlm-{VERSION}-")


class Installed:
    """An installed wheel, and an interpreter that knows it and the libraries it asks for, but not the checkout."""

    def __init__(self, wheel: Path, folder: Path) -> None:
        self.target, self.elsewhere = folder / "packages", folder / "elsewhere"
        self.elsewhere.mkdir()
        subprocess.run(["git", "init", "--quiet", folder], check=False)  # as of a project whose environment this is
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
        subprocess.run([*pip, "--target", self.target, wheel], check=True, timeout=300)
        libraries = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        self.env = {
            **os.environ, "PYTHONPATH": os.pathsep.join([str(self.target), *libraries]), "COLUMNS": "100",
            "MEMPROF_CACHE": str(folder / "cache"), "HOME": str(folder),
        }  # fmt: skip

    def python(self, *words: str) -> str:
        """What an interpreter says; ``-S`` reads no .pth file, by which an editable install puts a checkout there."""
        done = subprocess.run(
            [sys.executable, "-S", *words], cwd=self.elsewhere, env=self.env, capture_output=True, text=True,
            check=False, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, (words, done.stderr[-3000:])
        return done.stdout


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(wheel, tmp_path_factory.mktemp("installed"))


@pytest.mark.slow
def test_an_installed_wheel_works_away_from_the_checkout(installed: Installed) -> None:
    code = "import memprof, sys; print(memprof.__file__, memprof.__version__, *sys.path)"
    said = installed.python("-c", code).split()
    assert Path(said[0]).is_relative_to(installed.target)
    assert said[1] == VERSION
    assert str(ROOT) not in said
    memprof = ("-m", "memprof")
    assert "internvl2-2b" in installed.python(*memprof, "list")
    run = ("run", "--device", "sim", "--limit", "1", "--method", "baseline", "-o", "run")
    assert "predicted" in installed.python(*memprof, *run)
    assert json.loads((installed.elsewhere / "run" / "run.json").read_text())["environment"]["git_commit"] is None
    assert "fits" in installed.python(*memprof, "fit", "--gpu", "4090", "--model", "internvl2-2b")
    installed.python(*memprof, "report", "run", "--format", "html", "-o", "page.html")
    page = (installed.elsewhere / "page.html").read_text(encoding="utf-8")
    assert page.lower().startswith("<!doctype html>")
    assert "<script" in page
    assert "<style" in page
    installed.python(*memprof, "plot", "run")
    assert [*(installed.elsewhere / "run" / "figures").glob("*.png")]


@pytest.mark.slow
def test_the_small_model_comes_with_its_weights(installed: Installed) -> None:
    said = installed.python("-m", "memprof", "run", "--model", "proving", "--limit", "1", "-o", "small")
    assert "measured" in said


@pytest.mark.slow
def test_its_command_is_installed(installed: Installed) -> None:
    command = installed.target / "bin" / ("memprof.exe" if os.name == "nt" else "memprof")
    assert "memprof" in installed.python(str(command), "--version")
