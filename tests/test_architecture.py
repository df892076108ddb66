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
GROUND = {
    "errors", "files", "plain", "version", "units", "intervals", "forks", "bracket", "scopes", "environment", "plugins",
    "alone", "allowance", "host", "lines", "prompts", "script", "records", "asked", "stopping", "store", "limits",
}
ALLOWED = {
    "errors": set(), "version": set(), "plain": set(), "scopes": set(), "bracket": set(), "host": set(),
    "alone": set(), "lines": set(), "stopping": set(),
    "forks": {"alone"}, "units": {"errors"}, "allowance": {"errors", "units"}, "script": {"errors"}, "catching": set(),
    "files": {"alone", "errors"}, "intervals": {"errors"}, "limits": {"errors"}, "plugins": {"errors"},
    "environment": {"version"}, "prompts": {"plain"},
    "records": {"errors", "intervals", "plain", "plugins", "prompts"}, "asked": {"records"},
    "store": {"errors", "files", "records"},
    "gpus": GROUND,
    "telling": GROUND,
    "tasks": GROUND,
    "families": GROUND,
    "anatomy": GROUND,
    "stacks": GROUND | {"anatomy"},
    "simulator": GROUND | {"gpus"},
    "snapshots": GROUND | {"gpus", "reports", "simulator"},
    "tracing": GROUND | {"gpus", "simulator"},
    "models": GROUND | {"anatomy", "families", "gpus"},
    "pruning": GROUND | {"anatomy"},
    "meters": GROUND | {"anatomy", "gpus", "models", "simulator", "tracing"},
    "profiler": GROUND | {"anatomy", "meters", "simulator"},
    "forecasts": GROUND | {"families", "gpus", "models", "pruning", "simulator"},
    "bench": GROUND | {
        "anatomy", "families", "forecasts", "meters", "models", "profiler", "pruning", "simulator", "stacks", "tasks",
        "tracing",
    },
    "runner": GROUND | {"anatomy", "bench", "families", "forecasts", "meters", "models", "pruning", "tasks"},
    "figures": GROUND | {"telling"},
    "reports": GROUND | {"figures", "telling"},
    "analysis": GROUND | {
        "anatomy", "bench", "families", "forecasts", "gpus", "meters", "models", "profiler", "pruning", "runner",
        "simulator", "snapshots", "stacks", "tasks", "telling", "tracing",
    },
    "tuning": GROUND | {
        "analysis", "bench", "families", "gpus", "meters", "models", "pruning", "runner", "tasks", "telling",
    },
    "calls": GROUND | {"anatomy", "bench", "families", "meters", "models", "profiler", "pruning"},
    "predicted": GROUND | {"bench", "families", "forecasts", "gpus", "meters", "models", "pruning"},
    "profiles": GROUND | {"analysis", "figures", "reports", "telling"},
    "api": GROUND | {
        "analysis", "calls", "families", "gpus", "models", "predicted", "profiler", "profiles", "pruning", "runner",
        "stacks", "tasks",
    },
    "execution": GROUND | {"calls", "catching", "models", "profiler", "pruning", "telling"},
    "testing": GROUND | {"api", "execution", "models", "profiles", "telling"},
    "harness": GROUND | {"calls"},
    "notebook": GROUND | {"api"},
    "cli": {"*"}, "__main__": {"cli", "stopping"},
}  # fmt: skip
NO_TORCH = (GROUND | {"gpus", "tasks", "telling", "figures", "reports", "snapshots"}) - {"forks", "host"}


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


HELPED = ("run", "report", "exec", "ask", "snapshot", "oom")
LIGHT = ["--help", "--version", "list", *(f"{name} --help" for name in HELPED)]


@pytest.mark.parametrize("words", LIGHT)
def test_light_commands_load_no_torch(words: str) -> None:
    code = (
        "import sys\nfrom memprof.cli import main\n"
        f"try: main({words.split()!r})\nexcept SystemExit as e: assert not e.code, e.code\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'plotly'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_named_model_is_known_without_torch() -> None:
    code = (
        "import sys\nfrom memprof.models.find import find, named\n"
        "assert all(model.layers and model.hidden and model.ffn and model.kv_numbers for model in named().values())\n"
        "model = find('internvl2-2b')\nshape = model.family.shape(model, 1600, 1200, 53)\n"
        "assert shape.visual_tokens == 13 * 256\n"
        "heavy = {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_surface_is_frozen() -> None:
    assert set(memprof.__all__) == {
        "Profile", "Profiler", "__version__", "fits", "predict", "profile", "prune", "read", "run", "spec",
        "weightless",
    }  # fmt: skip
    assert all(callable(getattr(memprof, name)) for name in memprof.__all__ if name != "__version__")
    from memprof.cli import commands

    assert set(commands()) >= {"ask", "doctor", "list", "oom", "plot", "report", "run", "snapshot"}
