"""Every figure in plots/ and the tables in README, from one command: ``make figures``.

- predicted: InternVL2-2B under Baseline, FastV and TopV on the bundled samples of AI2D and OCRBench, in both stacks, 16
  new tokens (plots/);
- measured on an H200: the same on AI2D, and the supplement's six prompts (plots/measured/), from reference/h200-runs;
- the supplement, published beside measured beside predicted (scripts/reproduce_supplement.py);
- every point of every reference, predicted against measured (plots/predicted_against_measured);
- the proving model's answers to its first held-out picture, measured on the CPU (plots/ask/).

Runs go to runs/figures and are made anew; figures lie with the data they are drawn from. What a card measured is
predicted under the transformers it ran: where that is not this environment's, by the Python of ``--recorded-with``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from memprof import figures
from memprof.environment import package_version

METHODS = ("baseline", "fastv", "topv")
STACKS = ("paper", "current")
TASKS = ("ai2d", "ocrbench")
ROOT = Path(__file__).parents[1]
MEASURED = Path("reference/h200-runs")
#: The supplement's FastV, as it was measured.
MASKED = "fastv_keep=0.51_layer=2_scores=map_drop=mask"
AGREEMENT = "predicted_against_measured"


def memprof(*words: str, python: str = sys.executable, may_miss: bool = False) -> str:
    """Run a memprof command and return what it printed; one that ``may_miss`` a goal may end with 3."""
    done = subprocess.run([python, "-m", "memprof", *words], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in ((0, 3) if may_miss else (0,)):
        raise SystemExit(f"memprof {' '.join(words)} ended with {done.returncode}")
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


def predicted() -> None:
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
    memprof("plot", *folders, "-o", "plots", "--caption", "--quiet")


def measured() -> None:
    """Draw what an H200 measured: nothing is run."""
    folders = [str(MEASURED / f"ai2d-{stack}") for stack in STACKS]
    kinds = [word for kind in ("memory-curve", "overlay", "breakdown") for word in ("--only", kind)]
    memprof("plot", *folders, *kinds, "-o", "plots/measured", "--caption", "--quiet")
    six = [str(MEASURED / f"supp-{task}-paper" / method) for task in TASKS for method in ("topv", "baseline", MASKED)]
    memprof("plot", *six, "--only", "memory-curve", "-o", "plots/measured/supplement", "--caption", "--quiet")


def agreement(recorded_with: str) -> None:
    """Predict every reference under the transformers it was recorded with, and draw all of them in one figure."""
    parts = []
    for reference in sorted(Path("reference").glob("*/reference.json")):
        path = Path("runs/figures/agreement") / f"{reference.parent.name}.png"
        memprof("validate", str(reference.parent), "-o", str(path), python=python_for(reference, recorded_with),
                may_miss=True)  # fmt: skip
        parts.append(json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
    whole = reduce(joined, parts) | {"name": AGREEMENT}
    list(figures.draw_data([whole], "plots", width="double", formats=("pdf", "png")))


def python_for(reference: Path, recorded_with: str) -> str:
    """This Python where its transformers is the one that ``reference`` was recorded with, else the other one."""
    theirs = json.loads(reference.read_text(encoding="utf-8"))["environment"]["packages"]["transformers"]
    ours = package_version("transformers") or ""
    return sys.executable if theirs.split(".")[:2] == ours.split(".")[:2] else recorded_with


def joined(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The data of two agreements as one: the references of both, and where either comes from."""
    origin: dict[str, Any] = {}
    for key, value in one["provenance"].items():
        both = (value, other["provenance"][key])
        flat: Sequence[str] = [w for words in both for w in (words if isinstance(words, list) else words.split(" / "))]
        origin[key] = [*dict.fromkeys(flat)] if isinstance(value, list) else " / ".join(dict.fromkeys(flat))
    return one | {"provenance": origin, "references": one["references"] + other["references"]}


def main() -> None:
    """All of it, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ("ask", "predicted", "measured", "supplement", "agreement")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"some of {', '.join(kinds)} (default: all)")
    parser.add_argument("--recorded-with", default=".venv-reference/bin/python", help="Python of the references")
    options = parser.parse_args()
    if wrong := [kind for kind in options.kinds if kind not in kinds]:
        parser.error(f"unknown: {', '.join(wrong)}; valid: {', '.join(kinds)}")
    wanted = options.kinds or kinds
    if {"supplement", "agreement"} & {*wanted} and not Path(options.recorded_with).exists():
        parser.error(f"{options.recorded_with} is not there; `make figures` makes it, --recorded-with names another")
    if "ask" in wanted:
        ask(Path("plots/ask"))
    if "predicted" in wanted:
        predicted()
    if "measured" in wanted:
        measured()
    if "supplement" in wanted:
        subprocess.run([options.recorded_with, str(ROOT / "scripts/reproduce_supplement.py")], check=True)
    if "agreement" in wanted:
        agreement(options.recorded_with)


if __name__ == "__main__":
    main()
