"""What was recorded before is answered by every command without torch, and to the byte as with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pinned import pinned

from memprof import environment
from memprof.forecasts.book import _release

#: Runs ``memprof WORDS`` in a process of its own: with or without the book that ships, and says whether torch came in.
CODE = """
import sys
from pathlib import Path
from memprof.forecasts import book
if sys.argv[1] == "alone": book.SHIPPED = Path("nowhere")
from memprof.cli import main
try: main(sys.argv[2:])
except SystemExit as end: code = end.code
print(*sorted({"torch", "transformers"} & set(sys.modules)), file=sys.stderr)
sys.exit(code)
"""
MODEL = ["--model", "proving", "--stack", "paper"]
COMMANDS = {
    "run": ["run", *MODEL, "--method", "baseline", "--method", "fastv", "--method", "topv", "--device", "sim",
            "--limit", "3", "-o", "{here}/run"],
    "fit": ["fit", *MODEL, "--method", "topv", "--gpu", "1GiB", "--context", "824MiB"],
    "explain": ["explain", "{here}/run/fastv"],
    "tune": ["tune", *MODEL, "--method", "topv", "--device", "sim", "--budget", "45MiB", "--limit", "3",
             "-o", "{here}/tune"],
}  # fmt: skip
#: What two answers do not share: where they were put, and who gave them.
APART = ("path", "storage", "preset", "worker", "git_commit")


def without(found: Any) -> Any:
    """An answer without what two do not share."""
    if isinstance(found, dict):
        return {key: without(value) for key, value in found.items() if key not in APART}
    return [without(one) for one in found] if isinstance(found, list) else found


class Place:
    """A folder with a cache and answers in it."""

    def __init__(self, folder: Path, book: str) -> None:
        self.folder, self.book = folder, book
        folder.mkdir()

    def answers(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> tuple[dict[str, Any], set[str]]:
        """What every command says, by its name, and what heavy was loaded for it."""
        monkeypatch.setenv("MEMPROF_CACHE", str(cache))
        said, heavy = {}, set[str]()
        for name, words in COMMANDS.items():
            words = [word.replace("{here}", str(self.folder)) for word in words]
            code = [sys.executable, "-c", CODE, self.book, *words, "--json"]
            done = subprocess.run(code, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            said[name] = without(json.loads(done.stdout))
            heavy |= {f"{name}: {module}" for module in done.stderr.rpartition("\n")[0].rpartition("\n")[2].split()}
        return said, heavy


def test_every_command_answers_without_torch_as_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    cache = tmp_path / "cache"
    with_torch, heavy = Place(tmp_path / "first", "alone").answers(monkeypatch, cache)
    assert heavy >= {"run: torch", "fit: torch", "explain: torch"}
    assert with_torch["fit"]["fits"]
    assert with_torch["tune"]["best"]
    again, heavy = Place(tmp_path / "again", "alone").answers(monkeypatch, cache)
    assert not heavy, "what is in the cache was answered by loading it"
    assert again == with_torch
    if not all(_release(package) == pinned(package) for package in ("torch", "transformers")):
        return  # the book that ships is of the versions in constraints.txt alone
    shipped, heavy = Place(tmp_path / "shipped", "shipped").answers(monkeypatch, tmp_path / "empty")
    assert not heavy, "what ships was answered by loading it: python scripts/record_book.py"
    assert shipped == with_torch


@pytest.mark.parametrize(("shown", "driver", "kernel", "may"), [
    (None, True, False, True), (None, False, False, False), (None, False, True, True), ("0", True, False, True),
    ("", True, False, False), (" -1", True, False, False), ("-1,0", True, False, False), ("GPU-8", True, False, True),
    ("0", False, False, False),
])  # fmt: skip
def test_a_card_is_looked_for_without_torch(
    monkeypatch: pytest.MonkeyPatch, shown: str | None, driver: bool, kernel: bool, may: bool
) -> None:
    def load(name: str) -> None:
        assert name == "libcuda.so.1"
        if not driver:
            raise OSError

    monkeypatch.setattr(environment.ctypes, "CDLL", load)
    monkeypatch.setattr(environment.os.path, "exists", lambda path: kernel and path == "/dev/kfd")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert environment.may_have_cuda() is may


def test_auto_asks_torch_only_where_there_is_a_driver() -> None:
    code = (
        "import sys\nfrom memprof import api, environment\n"
        "environment.may_have_cuda = lambda: False\n"
        "assert api.spec('internvl2-2b').device == 'sim'\nassert api.spec('proving').device == 'cpu'\n"
        "assert 'torch' not in sys.modules\n"
        "environment.may_have_cuda = lambda: True\n"
        "import torch\ntorch.cuda.is_available = lambda: True\nassert api.spec('internvl2-2b').device == 'cuda'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
