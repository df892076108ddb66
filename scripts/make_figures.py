"""Every figure in plots/ and the tables in README, from one command: ``make figures``.

InternVL2-2B under Baseline, FastV and TopV on the bundled samples of AI2D and OCRBench, in both stacks, 16 new tokens,
predicted. Runs go to runs/figures and are made anew; figures lie in plots/ with the data they are drawn from.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

METHODS = ("baseline", "fastv", "topv")
STACKS = ("paper", "current")
TASKS = ("ai2d", "ocrbench")


def memprof(*words: str) -> str:
    """Run a memprof command and return what it printed."""
    done = subprocess.run([sys.executable, "-m", "memprof", *words], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def main() -> None:
    """Make the runs, draw the figures, print the tables."""
    folders = []
    for stack in STACKS:
        for task in TASKS:
            folder = Path("runs/figures") / stack / task
            methods = [word for method in METHODS for word in ("--method", method)]
            memprof(
                "run", *methods, "--task", task, "--stack", stack, "--device", "sim", "-q", "-o", str(folder), "--force"
            )
            folders.append(str(folder))
    sys.stdout.write(memprof("report", *folders))
    memprof("plot", *folders, "-o", "plots", "--quiet")


if __name__ == "__main__":
    main()
