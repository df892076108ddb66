"""kill -9 at any instant: what was finished is there, what goes on ends as an unbroken run does; and two writers.

A few instants in CI; ``make kills`` takes fifty of each (``MEMPROF_KILLS``).
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memprof.errors import MemprofError
from memprof.store import read_run

KILLS = int(os.environ.get("MEMPROF_KILLS", "3"))
SHAPES = "width,height,text_tokens\n" + "".join(f"{200 + 60 * n},{300 + 40 * n},{20 + n}\n" for n in range(12))


def command(folder: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "memprof", "run", "--model", "proving", "--device", "sim", "--max-new-tokens", "2", "-q",
        "--data", str(folder / "shapes.csv"), *more,
    ]  # fmt: skip


def samples_of(path: Path) -> list[dict[str, object]]:
    return [sample.to_json() for sample in read_run(path).samples]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A folder with the data and a run that nothing broke, and how long it took."""
    folder = tmp_path_factory.mktemp("kills")
    (folder / "shapes.csv").write_text(SHAPES)
    began = time.monotonic()
    subprocess.run(command(folder, "-o", str(folder / "whole")), check=True, capture_output=True)
    return folder, time.monotonic() - began


def killed(words: list[str], after: float) -> bool:
    """Whether the command still ran when it was killed, with everything that it had started."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        process.wait(timeout=after)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        return True
    return False


@pytest.mark.parametrize("number", range(KILLS))
def test_a_run_killed_at_any_instant_goes_on(unbroken: tuple[Path, float], number: int, tmp_path: Path) -> None:
    folder, lasted = unbroken
    path, before = tmp_path / "r", list[dict[str, object]]()
    killed(command(folder, "-o", str(path)), random.Random(number).uniform(0.4, 1) * lasted)
    if (path / "run.json").exists():
        before = samples_of(path)
    done = subprocess.run(command(folder, "-o", str(path), "--resume"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    after = samples_of(path)
    assert after == samples_of(folder / "whole")
    assert all(sample in after for sample in before)
    assert read_run(path).record.totals["samples"] == read_run(folder / "whole").record.totals["samples"]


@pytest.mark.parametrize("number", range(max(KILLS // 3, 1) if KILLS < 50 else KILLS))
def test_a_search_killed_at_any_instant_goes_on(unbroken: tuple[Path, float], number: int, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    folder, lasted = unbroken
    words = [
        sys.executable, "-m", "memprof", "tune", "--model", "proving", "--device", "sim", "--max-new-tokens", "2", "-q",
        "--data", str(folder / "shapes.csv"), "--method", "uniform", "--budget", "1GiB", "--trials", "3", "--json",
        "-o", str(tmp_path / "t"),
    ]  # fmt: skip
    killed(words, random.Random(number).uniform(0.5, 2) * lasted)
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["best"]["method"].startswith("uniform")


def test_two_writers_make_one_run(unbroken: tuple[Path, float], tmp_path: Path) -> None:
    folder, lasted = unbroken
    killed(command(folder, "-o", str(tmp_path / "r")), 0.9 * lasted)
    words = command(folder, "-o", str(tmp_path / "r"), "--resume")
    pair = [subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[1] for process in pair]
    assert 0 in [process.returncode for process in pair], said
    for process, text in zip(pair, said, strict=True):
        assert process.returncode in (0, 2), text
        assert "Traceback" not in text
    lines = (tmp_path / "r" / "samples.jsonl").read_bytes().count(b"\n")
    assert lines == len(samples_of(folder / "whole"))
    assert samples_of(tmp_path / "r") == samples_of(folder / "whole")


def test_a_disk_that_is_full_is_told_and_loses_nothing(unbroken: tuple[Path, float], tmp_path: Path) -> None:
    folder, _ = unbroken
    if os.geteuid() or subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(tmp_path)], capture_output=True, check=False
    ).returncode:
        pytest.skip("a small file system needs the right to mount one")
    try:
        words = command(folder, "-o", str(tmp_path / "r"))
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 1, done.stderr
        assert done.stderr.startswith("memprof: ")
        assert "Traceback" not in done.stderr
        try:
            there = samples_of(tmp_path / "r")
        except MemprofError:
            there = []
        assert all(sample in samples_of(folder / "whole") for sample in there)
        subprocess.run(["mount", "-o", "remount,size=8m", str(tmp_path)], check=True)
        done = subprocess.run([*words, "--resume"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert samples_of(tmp_path / "r") == samples_of(folder / "whole")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=False)
