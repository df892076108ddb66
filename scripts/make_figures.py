"""Every figure in plots/ and the tables in README, from one command: ``make figures``.

InternVL2-2B under Baseline, FastV and TopV on the bundled samples of AI2D and OCRBench, in both stacks, 16 new tokens,
predicted. Runs go to runs/figures and are made anew; figures lie in plots/ with the data they are drawn from. Beside
them the proving model's answers to its first held-out picture, measured on the CPU.
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


def ask(folder: Path) -> None:
    """What the proving model reads, and the tokens each method keeps, at a quarter of them."""
    from memprof.families._proving.drawing import HELD_OUT, draw_scene, read_question

    scene = draw_scene(HELD_OUT)
    folder.mkdir(parents=True, exist_ok=True)
    scene.image().save(folder / "picture.png")
    methods = [word for method in ("baseline", "fastv:keep=0.25", "topv:keep=0.25") for word in ("--method", method)]
    memprof("ask", str(folder / "picture.png"), read_question(scene, 0).text, "--model", "proving", "--device", "cpu",
            *methods, "--max-new-tokens", "8", "-o", str(folder / "ask.md"))  # fmt: skip


def main() -> None:
    """Make the runs, draw the figures, print the tables."""
    ask(Path("plots/ask"))
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
