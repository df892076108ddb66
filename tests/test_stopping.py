"""Whatever ends the process: copies end with it, the lock is free, and the user is told what is kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from memprof.records import RunRecord, RunSpec, SampleRecord
from memprof.store import RunFolder, read_run

PREDICTED = RunSpec(model="internvl2-2b", method="baseline", task="ai2d", device="sim")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are copied on Linux alone")

#: Takes a lock, makes two copies that work for ever, and says so.
COPIES = """
import sys, time
from pathlib import Path
from memprof import files, forks, stopping
forks._cores = lambda: 2
if sys.argv[2] == "listening":
    stopping.listen()
def work(n):
    Path(sys.argv[1], str(n)).touch()
    time.sleep(600)
with files.locked(Path(sys.argv[1])):
    list(forks.forked(work, range(2), 1))
"""


@contextmanager
def started(*words: str) -> Iterator[subprocess.Popen[str]]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite under nohup hands on that it ignores it
    process = subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    signal.signal(signal.SIGINT, before)
    try:
        yield process
    finally:
        for kill in (process.kill, lambda: os.killpg(process.pid, signal.SIGKILL)):
            with suppress(ProcessLookupError):
                kill()
        process.communicate()


def children(parent: int) -> list[int]:
    return [
        int(stat.parent.name)
        for stat in Path("/proc").glob("[0-9]*/stat")
        if _parent(stat) == parent
    ]  # fmt: skip


def _parent(stat: Path) -> int:
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except OSError:
        return -1


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(true: object, seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():  # type: ignore[operator]
            return True
        time.sleep(0.05)
    return False


@linux
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("listening", ["listening", "as it is"])
def test_copies_and_the_lock_end_with_their_parent(tmp_path: Path, how: signal.Signals, listening: str) -> None:
    from memprof import files

    with started("-c", COPIES, str(tmp_path), listening) as process:
        assert until(lambda: len(list(tmp_path.iterdir())) == 2), process.poll()
        copies = children(process.pid)
        assert len(copies) >= 2
        process.send_signal(how)
        process.wait(timeout=20)
        with files.locked(tmp_path, wait=False):  # free at once, even where copies still close down
            pass
        assert until(lambda: not any(map(alive, copies)), 10)


@linux
def test_a_copy_holds_no_lock_of_its_parent(tmp_path: Path) -> None:
    from memprof import files

    ready, told = os.pipe()
    with files.locked(tmp_path):
        pid = os.fork()
        if not pid:
            os.write(told, b"x")
            signal.pause()
            os._exit(0)
        os.read(ready, 1)
    os.close(ready)
    os.close(told)
    try:
        with files.locked(tmp_path, wait=False):
            pass
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def caught(pid: int, number: int) -> bool:
    """Whether the process answers this signal with a function of its own."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    mask = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(mask.split()[1], 16) >> number - 1 & 1)


RUN = ("-m", "memprof", "run", "--model", "proving", "--device", "sim", "--task", "ocrbench")


@linux
@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("after", [0.0, 0.15, 0.6, 2.0])
def test_a_run_that_is_ended_says_so_at_any_time(
    tmp_path: Path, how: signal.Signals, code: int, after: float
) -> None:
    with started(*RUN, "-o", str(tmp_path / "r")) as process:
        assert until(lambda: process.poll() is not None or caught(process.pid, signal.SIGALRM))
        time.sleep(after)
        if process.poll() is not None:
            pytest.skip("this machine was done before")
        process.send_signal(how)
        _, said = process.communicate(timeout=20)
    assert "Traceback" not in said
    assert said.count("\n") <= 2
    if process.returncode == 0:  # it came when all was done and said
        assert "saved in" in said
        assert read_run(tmp_path / "r").unfinished is None
    else:
        assert process.returncode == code, said
        assert "memprof: " in said


#: Ends as the command line does, and sends itself a signal at one of the instants after that.
STOPPED = """
import signal, time
from memprof import stopping
stopping.listen()
stopping.GRACE_SECONDS = 1
def work():
    signal.raise_signal(signal.SIGTERM)
def hung():
    try:
        work()
    except KeyboardInterrupt:
        time.sleep(60)
try:
    with stopping.kept(lambda: "one is kept"):
        pass
    {}
except BaseException as error:
    stopping.finish(error)
    stopping.leave()
"""


@pytest.mark.parametrize(
    ("doing", "said"),
    [
        ("work()", "nothing was kept; run the same command again"),
        ("hung()", "nothing was kept; run the same command again"),
        ("with stopping.kept(lambda: 'two are kept'): work()", "two are kept"),
        ("with stopping.kept(lambda: 'two are kept'): hung()", "two are kept"),
        ("with stopping.kept(lambda: 1 / 0): hung()", "nothing was kept; run the same command again"),
    ],
)
def test_what_is_said_to_be_kept_is_what_the_command_keeps(doing: str, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", STOPPED.format(doing)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, f"memprof: terminated; {said}\n")


LATE = """
import atexit, os, signal, sys, threading
import memprof.cli
from memprof.__main__ import main

how, when = int(sys.argv[1]), sys.argv[2]

class Last:
    def __del__(self, kill=os.kill, pid=os.getpid()):
        if when == "the interpreter ends":
            kill(pid, how)

kept = Last()
if when == "at exit":
    atexit.register(lambda: os.kill(os.getpid(), how))
if when == "threads are waited for":
    def late():
        threading.main_thread().join()
        os.kill(os.getpid(), how)
    threading.Thread(target=late).start()
memprof.cli.main = lambda: sys.exit(3)
main()
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", ["threads are waited for", "at exit", "the interpreter ends"])
def test_a_signal_that_comes_when_all_is_said_changes_nothing(when: str, how: signal.Signals) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LATE, str(int(how)), when], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")


def memprof(*words: str, **how: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "memprof", *words], text=True, check=False, **{"capture_output": True, **how}
    )  # type: ignore[call-overload,no-any-return]


def test_a_reader_that_goes_away_is_no_failure() -> None:
    words = f"{sys.executable} -m memprof list"
    for command in (f"{words} | head -1", f"{words} --json | head -c 5"):
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, ""), command


DRAWN = Path(__file__).parents[1] / "plots" / "internvl2-2b_ai2d_breakdown.json"


def test_what_stdout_refuses_is_not_said_of_the_figures_folder(tmp_path: Path) -> None:
    words = f"{sys.executable} -m memprof plot {DRAWN} -o {tmp_path}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {words} | head -1"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / "file").touch()
    refused = memprof("plot", str(DRAWN), "-o", str(tmp_path / "file" / "x"))
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"memprof: cannot write to {tmp_path / 'file' / 'x'}: ")


@linux
def test_a_full_stdout_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = memprof("list", "--json", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr.startswith("memprof: ")
    assert done.stderr.count("\n") == 1


@linux
@pytest.mark.parametrize(("closed", "lines"), [(">&-", 1), ("<&- >&-", 1), ("<&- >&- 2>&-", 0)])
def test_a_closed_stdout_is_one_line_and_no_file_takes_its_place(closed: str, lines: int, tmp_path: Path) -> None:
    for words in ("list cards", f"report {tmp_path / 'r'}"):
        with RunFolder.open(tmp_path / "r", RunRecord(PREDICTED, "predicted"), force=True) as folder:
            folder.append(SampleRecord(id="a"))
        done = subprocess.run(
            ["bash", "-c", f"{sys.executable} -m memprof {words} {closed}"], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", lines), done.stderr
        assert "stdout is closed" in done.stderr or not lines


def test_ascii_is_enough(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "r", RunRecord(PREDICTED, "predicted")) as folder:
        folder.append(SampleRecord(id="a"))
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "COLUMNS": "40"}
    for form in ("table", "markdown"):
        done = memprof("report", str(tmp_path / "r"), "-f", form, env=env)
        assert done.returncode == 0, done.stderr
        assert done.stdout.isascii()
        assert "Baseline" in done.stdout
        assert "\\u" not in done.stdout
