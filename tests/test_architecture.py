"""The house: who may know whom, and what loads no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import memprof

ROOT = Path(memprof.__file__).parent

#: For each room, the rooms it may import; arrows go one way (ARCHITECTURE.md).
GROUND = {"errors", "units", "records", "plugins", "scopes", "environment", "intervals"}
ALLOWED = {
    "errors": set(), "units": {"errors"}, "records": {"intervals"}, "scopes": set(), "environment": set(),
    "plugins": {"errors"}, "intervals": {"errors"}, "asked": {"records"}, "forks": set(),
    "store": {"errors", "records"},
    "anatomy": {"errors"},
    "simulator": GROUND,
    "stacks": GROUND | {"anatomy"},
    "families": GROUND | {"simulator"},
    "tasks": GROUND,
    "pruning": GROUND | {"anatomy"},
    "meters": GROUND | {"simulator", "anatomy"},
    "profiler": GROUND | {"anatomy", "meters", "simulator"},
    "predict": GROUND | {"anatomy", "families", "forks", "meters", "pruning", "simulator"},
    "runner": GROUND | {
        "anatomy", "families", "forks", "meters", "predict", "profiler", "pruning", "simulator", "stacks", "store",
        "tasks",
    },
    "figures": GROUND | {"store", "asked"},
    "reports": GROUND | {"store", "figures", "asked"},
    "analysis": GROUND | {
        "store", "simulator", "runner", "families", "meters", "profiler", "pruning", "tasks", "anatomy", "stacks",
        "asked",
    },
    "tuning": GROUND | {"store", "runner", "analysis", "families", "pruning", "tasks", "meters", "simulator"},
    "cli": {"*"}, "__main__": {"cli"},
}  # fmt: skip
NO_TORCH = GROUND | {"asked", "store", "tasks", "figures", "reports"}


def imports(path: Path, *, top_level: bool) -> set[str]:
    """Modules a file imports; with ``top_level`` only those that loading it loads."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes: list[ast.AST] = list(tree.body) if top_level else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "memprof":
                found |= {f"memprof.{alias.name}" for alias in node.names if not alias.name.startswith("_")}
    return found


def files() -> list[Path]:
    return sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_go_one_way(path: Path) -> None:
    here = room(path)
    assert here in ALLOWED, f"{here} is a new room: say in ALLOWED and ARCHITECTURE.md whom it may know"
    if ALLOWED[here] == {"*"}:
        return
    others = {m.split(".")[1] for m in imports(path, top_level=False) if m.startswith("memprof.")} - {here}
    assert others <= ALLOWED[here], f"{here} must not know {sorted(others - ALLOWED[here])}"


@pytest.mark.parametrize("path", [p for p in files() if room(p) in NO_TORCH], ids=lambda p: str(p.relative_to(ROOT)))
def test_readers_know_no_torch(path: Path) -> None:
    assert not {m.split(".")[0] for m in imports(path, top_level=False)} & {"torch", "transformers"}


@pytest.mark.parametrize("words", ["--help", "--version", "list", "run --help", "report --help", "ask --help"])
def test_light_commands_load_no_torch(words: str) -> None:
    code = (
        "import sys\nfrom memprof.cli import main\n"
        f"try: main({words.split()!r})\nexcept SystemExit as e: assert not e.code, e.code\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'plotly'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_surface_is_frozen() -> None:
    assert memprof.__all__ == ["Profiler", "__version__"]
    from memprof.cli import commands

    assert set(commands()) >= {"ask", "doctor", "list", "plot", "report", "run", "snapshot"}
