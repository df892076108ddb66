"""A script is run as Python runs it: what it is told, what it writes, how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: Says all that a script can know of how it was started, and ends as it is asked to.
SCRIPT = """
import atexit, os, pickle, signal, sys, threading

class Own:
    pass

def deep():
    raise ValueError("wrong")

print(sys.argv, __name__, __file__, __package__, sys.path[0], __spec__ and __spec__.name, sys.modules["__main__"].Own)
print(pickle.loads(pickle.dumps(Own())).__class__, sys.stdout.errors, signal.getsignal(signal.SIGTERM))
print("to stderr", file=sys.stderr)
atexit.register(print, "at exit")
thread = threading.Thread(target=lambda: print("a thread"))
thread.start()
end = sys.argv[-1]
if end == "raise":
    deep()
elif end == "chained":
    try:
        deep()
    except ValueError as error:
        raise KeyError("second") from error
elif end == "kill":
    thread.join()  # what it says is said before, or never
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGTERM)
elif end == "interrupt":
    raise KeyboardInterrupt
sys.exit(int(end) if end.isdigit() else None if end == "none" else end)
"""


def start(here: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MEMPROF_CACHE": str(here / "cache")}
    return subprocess.run(
        [sys.executable, *words], cwd=here, env=env, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize("end", ["none", "0", "7", "text to say", "raise", "chained", "kill", "interrupt"])
def test_it_says_and_ends_as_without_memprof(tmp_path: Path, end: str) -> None:
    (tmp_path / "demo.py").write_text(SCRIPT)
    alone = start(tmp_path, "demo.py", "--gpu", "l4", end)
    watched = start(tmp_path, "-m", "memprof", "exec", "-q", "demo.py", "--gpu", "l4", end)
    assert watched.stdout == alone.stdout
    assert watched.returncode == alone.returncode
    assert watched.stderr == alone.stderr
    if end == "kill":
        assert alone.returncode == -signal.SIGTERM
    if end == "raise":
        assert "ValueError: wrong" in alone.stderr


@pytest.mark.parametrize("words", [["-m", "pack"], ["-m", "pack.tool"], ["pack"]])
def test_modules_packages_and_folders(tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "pack").mkdir()
    for name in ("__init__", "__main__", "tool"):
        (tmp_path / "pack" / f"{name}.py").write_text("" if name == "__init__" else SCRIPT)
    alone = start(tmp_path, *words, "3")
    watched = start(tmp_path, "-m", "memprof", "exec", "-q", *words, "3")
    assert (watched.stdout, watched.stderr, watched.returncode) == (alone.stdout, alone.stderr, 3)


def test_a_script_that_is_no_python(tmp_path: Path) -> None:
    (tmp_path / "demo.py").write_text("if:\n")
    alone, watched = start(tmp_path, "demo.py"), start(tmp_path, "-m", "memprof", "exec", "-q", "demo.py")
    assert "SyntaxError" in alone.stderr
    assert watched.stderr.splitlines()[-1] == alone.stderr.splitlines()[-1]
    assert "memprof" not in watched.stderr
    assert watched.returncode == alone.returncode == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["missing.py"], "cannot run missing.py"),
        (["-m", "missing.module"], "missing"),
        (["--gpu", "l4", "demo.py"], "goes with --predict"),
        (["--predict", "--gpu", "5x", "demo.py"], "5x"),
        (["-o", "taken", "demo.py"], "holds no run"),
    ],
)
def test_mistakes_are_one_line_before_anything_runs(tmp_path: Path, words: list[str], said: str) -> None:
    (tmp_path / "demo.py").write_text("print('ran')\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    done = start(tmp_path, "-m", "memprof", "exec", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.startswith("memprof: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("place", ["demo.py/run", "/proc/run", "n" * 300])
def test_a_place_that_cannot_be_written_is_refused_before_anything_runs(tmp_path: Path, place: str) -> None:
    (tmp_path / "demo.py").write_text("print('ran')\n")
    done = start(tmp_path, "-m", "memprof", "exec", "-o", place, "demo.py")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("memprof: cannot write to ")
    assert done.stderr.endswith("; give another folder with -o\n")
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.py"]


#: Calls generate() in another process alone, and ends there as a script does.
OTHERS = {
    "forked": "pid = os.fork()\nif pid == 0:\n    raise SystemExit(Model().generate())\nprint(os.waitpid(pid, 0)[1])",
    "multiprocessing": "import multiprocessing\n"
    "if __name__ == '__main__':\n"
    "    process = multiprocessing.get_context('spawn').Process(target=print)\n"
    "    process.start()\n    process.join()\n    print(process.exitcode)",
}


@pytest.mark.parametrize("way", OTHERS)
def test_another_process_is_left_alone_and_what_is_not_seen_is_said(tmp_path: Path, way: str) -> None:
    library = tmp_path / "transformers" / "generation"
    library.mkdir(parents=True)
    for package in (library, library.parent):
        (package / "__init__.py").touch()
    (library / "utils.py").write_text("class GenerationMixin:\n    def generate(self):\n        return 0\n")
    first = "import os\nfrom transformers.generation.utils import GenerationMixin as Model\n"
    (tmp_path / "demo.py").write_text(first + OTHERS[way])
    alone, done = start(tmp_path, "demo.py"), start(tmp_path, "-m", "memprof", "exec", "demo.py")
    assert done.stdout == alone.stdout
    assert done.stdout.split() == ["0"]
    told, missed = done.stderr.splitlines()  # of one process: the script's
    assert "called no generate()" in told
    assert way in missed
    assert "not counted" in missed


def test_a_script_that_generates_nothing_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "demo.py").write_text("import sys; print({'torch', 'transformers', 'numpy'} & set(sys.modules))\n")
    done = start(tmp_path, "-m", "memprof", "exec", "demo.py")
    assert done.stdout == "set()\n"  # what a script sets up before it loads torch still counts
    assert "called no generate()" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.py"]
