"""The TopV paper's supplement, predicted: both tables of dynamic memory and figures 6 to 11, beside what was published
and what a card measured of the same prompts (reference/h200-runs).

    python scripts/reproduce_supplement.py            tables, plots/supplement.json and plots/supplement_*
    python scripts/reproduce_supplement.py --json     one JSON document, and no figures

Takes a few minutes on two cores and needs no GPU. What is done is in memprof/analysis/supplement.py. To be predicted
under the transformers that the card ran, it is run in that environment (``make figures`` does).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from memprof.analysis.supplement import FIGURES, METHODS, PUBLISHED, TASKS, make_runs, reproduce
from memprof.figures import draw_data, plan
from memprof.figures.style import KeyItem, Look, Sheet, save
from memprof.files import write_json
from memprof.records import Run
from memprof.store import find_runs
from memprof.telling import facts, palette
from memprof.units import DISPLAY_UNITS

ROOT = Path(__file__).parents[1]
#: What a card measured of the setting.
MEASURED = ROOT / "reference" / "h200-runs"


def main() -> None:
    """The recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as JSON and draw nothing")
    parser.add_argument("--candidates", type=int, default=4, help="settings that the predictor tries (default: 4)")
    parser.add_argument("--plots", type=Path, default=ROOT / "plots", help="where figures go")
    parser.add_argument("--runs", type=Path, default=Path("runs/supplement"), help="where run folders go")
    options = parser.parse_args()
    setting, result = reproduce(options.candidates, say, find_runs(sorted(MEASURED.glob("supp-*"))))
    if options.json:
        print(json.dumps(result, indent=1, ensure_ascii=False))
        return
    print(text(result))
    shutil.rmtree(options.runs, ignore_errors=True)
    runs = make_runs(setting, options.runs, progress=say)
    options.plots.mkdir(parents=True, exist_ok=True)
    write_json(options.plots / "supplement.json", result)
    figures = [{**data, "name": f"supplement_{data['name']}"} for data in plan(runs)]
    for path in draw_data(figures, options.plots, width="double", unit=setting.unit, formats=("png", "pdf")):
        say(f"wrote {path}")
    beside(result, runs, options.plots / "supplement_beside_published")


def say(what: str) -> None:
    """Progress, for people only."""
    if sys.stderr.isatty():
        print(what, file=sys.stderr)


def text(result: dict[str, Any]) -> str:
    """The tables and the words."""
    setting, unit, card = result["setting"], result["setting"]["unit"], result["measured"]
    under = " and ".join(f"{name} {version}" for name, version in result["predicted_under"].items())
    lines = [f"InternVL2-2B, stack paper, dynamic memory in {unit}; predicted under {under}"]
    if card is not None:
        lines.append(f"{card['where']}, torch {card['torch']}, transformers {card['transformers']}")
    heads = ["published", *(["measured"] if card else []), "predicted"]
    lines += ["", f"{'':10}" + "".join(f"{task + ' ' + head:>20}" for task in TASKS for head in heads)]
    for method in METHODS:
        tables = [result["published"], *([card["dynamic_gb"]] if card else []), result["dynamic_gb"]]
        cells = (f"{table[method][task]:20.3f}" for task in TASKS for table in tables)
        lines.append(f"{palette.method_label(method):10}" + "".join(cells))
    lines.append("")
    for task in TASKS:
        for other, saved in result["savings"][task].items():
            known = f"published {result['published_savings'][task][other]} %"
            known += f", measured {card['savings'][task][other]:.1f} %" if card else ""
            lines.append(f"TopV saves against {other} on {task}: {saved:.1f} % ({known})")
    lines += ["", f"Setting found among {result['searched']:,}, {'met' if result['met'] else 'NOT met'}: {setting}"]
    lines += ["Near equals, as predicted (up to 1, all figures and savings are met):"]
    lines += [f"  {near['misfit']:.2f}  {near['setting']}" for near in result["near_equals"]]
    best = ", ".join(f"{form} {off:.2f}" for form, off in result["best_of_each_form"].items())
    lines += [f"Best of each form of FastV, in closed form: {best}", ""]
    today = result["current_stack"]["dynamic_gb"]
    lines += ["Today's stack: " + "; ".join(f"{m} " + ", ".join(f"{today[m][t]:.3f}" for t in TASKS) for m in METHODS)]
    return "\n".join([*lines, "", *result["words"], ""])


def beside(result: dict[str, Any], runs: list[Run], path: Path) -> None:
    """Six published figures, each beside what a card measured, its prediction, and that on today's stack."""
    unit = result["setting"]["unit"]
    scale, look, card = DISPLAY_UNITS[unit], Look.of("print", "double", unit), result["measured"]
    rows = {
        "published": (PUBLISHED, palette.MUTED),
        **({"measured": (card["dynamic_gb"], palette.RULE)} if card else {}),
        "predicted": (result["dynamic_gb"], None),
        "predicted, today's stack": (result["current_stack"]["dynamic_gb"], palette.STATIC),
    }
    data = facts.header("beside", path.name, runs) | {"bars": {name: table for name, (table, _) in rows.items()}}
    if card:
        data["said"] = [f"{card['where']}, torch {card['torch']}, transformers {card['transformers']}"]
    with look.settings():
        key = [
            KeyItem("published", palette.MUTED),
            *([KeyItem("measured", palette.RULE)] if card else []),
            KeyItem("predicted, in the method's colour", palette.method_colour("topv")),
            KeyItem("predicted on today's stack", palette.STATIC),
        ]
        title = f"The supplement's dynamic memory, published{', measured' if card else ''} and predicted"
        sheet = Sheet(look, data, title, body=130, key=key)
        axes = sheet.axes()
        places = [(m, t) for t in TASKS for m in METHODS]
        for at, (method, task) in enumerate(places):
            for step, (table, colour) in enumerate(rows.values()):
                wide = 0.94 / len(rows)
                bytes_, x = table[method][task] * scale, at + wide * (step - (len(rows) - 1) / 2)
                axes.bar(x, table[method][task], width=0.93 * wide, color=colour or palette.method_colour(method))
                axes.text(x, table[method][task], look.value(bytes_), ha="center", va="bottom", fontsize=look.small)
        axes.set_xticks(
            range(len(places)),
            [f"{palette.method_label(m)}\n{palette.task_label(t)} (Fig. {FIGURES[m, t]})" for m, t in places],
        )
        axes.tick_params(axis="x", length=0)
        axes.set_xlim(-0.5, len(places) - 0.5)
        axes.margins(y=0.08)
        axes.set_ylabel(f"dynamic peak ({unit})")
        for suffix in (".png", ".pdf"):
            save(sheet.figure, path.with_suffix(suffix), look)
    write_json(path.with_suffix(".json"), data)


if __name__ == "__main__":
    main()
