"""The supplement of the TopV paper, predicted: six figures of dynamic memory, and the setting that they must have had.

The paper leaves open how many tiles the images had, how long the prompts were, whether GB means 10^9 or 2^30 bytes,
and in which form FastV ran. :func:`search` tries every setting in closed form; the best are then run by the predictor,
which alone makes the numbers that are reported. No number is fitted: every candidate is a run that ``memprof run`` can
make.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from memprof import files
from memprof.analysis.whatif import Benches, Change
from memprof.bench import Bench
from memprof.environment import package_version
from memprof.families import Model
from memprof.models.find import find
from memprof.prompts import Image, Shape
from memprof.pruning import build_pruner, visual_flops_cut, visual_tokens_per_layer
from memprof.records import CardMemory, Run, RunSpec, SampleRecord
from memprof.runner import complete_spec
from memprof.runner import run as make_run
from memprof.store import RUN_FILE
from memprof.telling.facts import provenance
from memprof.telling.holders import leading_part, words_for
from memprof.units import DISPLAY_UNITS

MODEL = "internvl2-2b"
METHODS = ("topv", "baseline", "fastv")
TASKS = ("ai2d", "ocrbench")
#: Dynamic memory in "GB": figures 6, 8, 10 (AI2D) and 7, 9, 11 (OCRBench).
PUBLISHED: Mapping[str, Mapping[str, float]] = {
    "topv": {"ai2d": 0.98, "ocrbench": 0.71},
    "baseline": {"ai2d": 1.8, "ocrbench": 1.25},
    "fastv": {"ai2d": 2.07, "ocrbench": 1.26},
}
FIGURES = {("topv", "ai2d"): 6, ("topv", "ocrbench"): 7, ("baseline", "ai2d"): 8, ("baseline", "ocrbench"): 9,
           ("fastv", "ai2d"): 10, ("fastv", "ocrbench"): 11}  # fmt: skip
#: What TopV is said to save against the others, percent.
PUBLISHED_SAVINGS: Mapping[str, Mapping[str, float]] = {
    "ai2d": {"baseline": 45.6, "fastv": 52.7},
    "ocrbench": {"baseline": 43.2, "fastv": 43.7},
}
#: Forms of FastV that public codes have (METHODS.md), as memprof runs them.
FORMS: Mapping[str, str] = {
    "drop": "fastv:scores=map",
    "mask": "fastv:scores=map,drop=mask",
    "row": "fastv:scores=row",
}
#: A thumbnail follows every grid of more than one tile, so two tiles cannot be.
TILES = (1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13)
#: Prompt tokens that are text, template included: the shortest to the longest of the bundled prompts of each task.
TEXTS: Mapping[str, tuple[int, ...]] = {"ai2d": tuple(range(80, 140, 10)), "ocrbench": (60, 70, 80, 90)}
KEEPS = tuple(round(0.44 + 0.01 * step, 2) for step in range(15))
#: TopV is said to remove 48 % of the visual tokens' FLOPs and FastV 47 %; a keep must do so within two points.
PUBLISHED_FLOPS_CUT, CLOSE_FLOPS = 0.475, 0.02
UNITS = ("GB", "GiB")
#: The published numbers have two or three digits.
CLOSE_PERCENT, CLOSE_POINTS = 5.0, 3.0

Table = dict[str, dict[str, float]]
#: Told what is about to be predicted.
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    """What the supplement does not say.

    Attributes:
        tiles, text: Of each task's highest sample: tiles with thumbnail, and text tokens with the chat template.
        keep: Share of visual tokens that TopV and FastV keep.
        unit: What "GB" means.
        form: FastV's form, one of :data:`FORMS`.
    """

    tiles: tuple[int, int]
    text: tuple[int, int]
    keep: float
    unit: str
    form: str

    def to_json(self) -> dict[str, Any]:
        """By task, with FastV's form as a method spec."""
        per_task = {
            task: {"tiles": tiles, "visual_tokens": 256 * tiles, "text_tokens": text}
            for task, tiles, text in zip(TASKS, self.tiles, self.text, strict=True)
        }
        return {**per_task, "keep": self.keep, "layer": 2, "unit": self.unit, "fastv": self.method("fastv")}

    def method(self, name: str) -> str:
        """The spec of a method under this setting."""
        if name == "baseline":
            return name
        return f"{FORMS[self.form]},keep={self.keep}" if name == "fastv" else f"{name}:keep={self.keep}"


# -- closed form -------------------------------------------------------------------------------------------------------


def terms(method: str, model: Model, visual: float, text: int, keep: float) -> dict[str, float]:
    """What can be a prompt's dynamic peak, in bytes: ``logits``, and ``scores`` where maps are made.

    Logits take 6 bytes a vocabulary entry and position (bf16, and the fp32 copy), the cache 96 KiB a token over 24
    layers. An eager layer holds at its highest the masked scores (2 bytes), an fp32 copy (4) and the fp32 softmax (4).
    FastV holds the map of the layer before (2); where it only masks, also the map it ranked by (2), that map's mean
    over heads and a second mask, and by the last layer the cache is full.

    Args:
        method: ``topv``, ``baseline`` or one of :data:`FORMS`; in the paper's stack and bf16.
        model: The model.
        visual: Visual tokens.
        text: Text tokens.
        keep: Share of visual tokens kept.
    """
    sizes = model.text
    row, heads, layers = 2 * sizes["hidden_size"], sizes["num_attention_heads"], sizes["num_hidden_layers"]
    kv_row = 2 * row * sizes["num_key_value_heads"] / heads  # of one layer
    n, tiles = visual + text, visual / 256
    left = n if method in ("baseline", "mask") else text + visual * keep
    # All the time: the tower's last state (class token included), the projected features, the pixels.
    held = tiles * 2 * (1025 * model.vision["hidden_size"] + 3 * 448**2) + visual * row
    cache = kv_row * (2 * n + (layers - 2) * left)
    found = {"logits": held + cache + (6 * sizes["vocab_size"] + row) * left}
    states = 5 * row * n  # residual, normed, queries, and keys and values repeated for every head
    if method == "drop":
        found["scores"] = held + 2 * kv_row * n + states + (12 * heads + 2) * n**2
    elif method == "mask":
        found["scores"] = held + cache + states + (14 * heads + 6) * n**2
    return found


def closed_form(method: str, model: Model, tiles: int, text: int, keep: float) -> float:
    """Dynamic peak in bytes, from :func:`terms`."""
    return max(terms(method, model, 256 * tiles, text, keep).values())


def error_percent(dynamic: Mapping[str, Mapping[str, float]]) -> Table:
    """How far each figure is from the published one, percent."""
    return {m: {t: 100 * (dynamic[m][t] / PUBLISHED[m][t] - 1) for t in TASKS} for m in METHODS}


def savings(dynamic: Mapping[str, Mapping[str, float]]) -> Table:
    """What TopV saves, percent, by task and what it is held against."""
    return {t: {m: 100 * (1 - dynamic["topv"][t] / dynamic[m][t]) for m in PUBLISHED_SAVINGS[t]} for t in TASKS}


def misfit(dynamic: Mapping[str, Mapping[str, float]]) -> float:
    """One number to rank settings by: the worst figure's error as a share of 5 %, or the worst saving's of 3 points."""
    figures = max(abs(e) for row in error_percent(dynamic).values() for e in row.values()) / CLOSE_PERCENT
    found = savings(dynamic)
    points = max(abs(found[t][m] - PUBLISHED_SAVINGS[t][m]) for t in TASKS for m in found[t]) / CLOSE_POINTS
    return max(figures, points)


def search(model: Model) -> list[tuple[float, Setting]]:
    """Every setting that removes the published FLOPs, with its misfit in closed form, the best first.

    Up to 1, all six figures lie within 5 % and all four savings within 3 points. Of each task, only the eight shapes
    that suit its own three figures best are combined with the other's.
    """
    found = []
    for unit, form, keep in product(UNITS, FORMS, KEEPS):
        scale = DISPLAY_UNITS[unit]
        columns: dict[str, list[tuple[float, int, int, dict[str, float]]]] = {}
        for task in TASKS:
            rows = []
            for tiles, text in product(TILES, TEXTS[task]):
                kinds = {"topv": "topv", "baseline": "baseline", "fastv": "topv" if form == "row" else form}
                column = {m: closed_form(k, model, tiles, text, keep) / scale for m, k in kinds.items()}
                off = max(abs(column[m] / PUBLISHED[m][task] - 1) for m in METHODS)
                rows.append((off, tiles, text, column))
            columns[task] = sorted(rows, key=lambda r: r[0])[:8]
        for (_, tiles_a, text_a, a), (_, tiles_b, text_b, b) in product(columns["ai2d"], columns["ocrbench"]):
            setting = Setting((tiles_a, tiles_b), (text_a, text_b), keep, unit, form)
            if all(abs(flops_cut(tiles, keep) - PUBLISHED_FLOPS_CUT) <= CLOSE_FLOPS for tiles in setting.tiles):
                found.append((misfit({m: {"ai2d": a[m], "ocrbench": b[m]} for m in METHODS}), setting))
    return sorted(found, key=lambda item: item[0])


def distinct(found: Iterable[tuple[float, Setting]], most: int) -> list[tuple[float, Setting]]:
    """The best setting of each kind: those that differ only in their text's length or the share kept are one."""
    kinds: dict[Any, tuple[float, Setting]] = {}
    for item in found:
        setting = item[1]
        kinds.setdefault((setting.tiles, setting.unit, setting.form), item)
    return list(kinds.values())[:most]


# -- predicted ---------------------------------------------------------------------------------------------------------


def shape_of(model: Model, tiles: int, text: int) -> Shape:
    """The prompt of a setting: one image cut into the squarest grid that gives so many tiles."""
    cut = max(tiles - 1, 1)
    rows = max(r for r in range(1, int(cut**0.5) + 1) if cut % r == 0)
    columns, before = cut // rows, model.template[0]
    image = Image(((16, 16),) * tiles, columns, rows, width=448 * columns, height=448 * rows)
    return Shape((image,), (before, text - before), (tiles,))


def image_size(shape: Shape) -> tuple[int, int]:
    """Width and height in pixels of an image that is cut into ``shape``'s grid."""
    return shape.images[0].width, shape.images[0].height


def change_of(setting: Setting, method: str, task: str, stack: str = "paper") -> Change:
    """What the predictor is to run for one figure. Today's stack runs FastV in its default form."""
    model = find(MODEL)
    wanted = setting.method(method) if stack == "paper" or method != "fastv" else f"fastv:keep={setting.keep}"
    done = complete_spec(RunSpec(MODEL, wanted, task, "sim", stack, dtype=model.dtype, max_new_tokens=16))
    at = TASKS.index(task)
    shape = shape_of(model, setting.tiles[at], setting.text[at])
    return Change(done.spec, done.pruner, shape, model, name=f"{method} on {task}")


def predict(
    setting: Setting, benches: Benches, stack: str = "paper", progress: Progress | None = None
) -> dict[str, dict[str, CardMemory]]:
    """Run the predictor for all six figures: by method and task, what it says."""
    found: dict[str, dict[str, CardMemory]] = {method: {} for method in METHODS}
    for method, task in product(sorted(METHODS, key=lambda m: m == "fastv"), TASKS):  # eager attention last
        change = change_of(setting, method, task, stack)
        if progress is not None:
            progress(f"{change.name}, {setting.tiles} tiles, stack {stack}")
        found[method][task] = benches.memory(change).fullest
    return found


def dynamic_of(memory: Mapping[str, Mapping[str, CardMemory | SampleRecord]], unit: str) -> Table:
    """Dynamic peaks in ``unit``, by method and task."""
    return {m: {t: memory[m][t].dynamic_peak_bytes / DISPLAY_UNITS[unit] for t in TASKS} for m in METHODS}


def measured(setting: Setting, runs: Iterable[Run], stack: str = "paper") -> dict[str, dict[str, Run]]:
    """What a card measured of a setting: by method and task, of ``runs`` those that ran its very prompt and method."""
    found: dict[str, dict[str, Run]] = {method: {} for method in METHODS}
    ours = [run for run in runs if run.record.status == "measured" and run.record.spec.device == "cuda"]
    for method, (at, task) in product(METHODS, enumerate(TASKS)):
        spec = change_of(setting, method, task, stack).spec
        for run in ours:
            there = run.record.spec
            if (there.model, there.method, there.stack) == (spec.model, spec.method, stack) and [
                (sample.tiles, sample.text_tokens) for sample in run.finished
            ] == [(setting.tiles[at], setting.text[at])]:
                found[method].setdefault(task, run)
    return found


def _told_of(found: Mapping[str, Mapping[str, Run]], unit: str) -> dict[str, Any] | None:
    """Measured dynamic peaks, and where they come from; None unless every figure was measured."""
    runs = [found[method].get(task) for method in METHODS for task in TASKS]
    if not all(runs):
        return None
    dynamic = dynamic_of({m: {t: found[m][t].finished[0] for t in TASKS} for m in METHODS}, unit)
    origin = provenance([run for run in runs if run is not None])
    return {"dynamic_gb": dynamic} | {key: origin[key] for key in ("where", "torch", "transformers")}


def reproduce(
    candidates: int = 4, progress: Progress | None = None, runs: Sequence[Run] = ()
) -> tuple[Setting, dict[str, Any]]:
    """Find the setting and predict the supplement.

    Args:
        candidates: How many of the closed form's best are run by the predictor.
        progress: Told what is about to be predicted.
        runs: Measured runs, among which those of the setting are looked for.

    Returns:
        The setting found, and all else JSON-ready: ``dynamic_gb[method][task]`` in the setting's unit, ``setting``,
        ``published``, ``error_percent``, ``savings`` (percent), ``near_equals``, ``holders``, ``current_stack``,
        ``words``, and whether all is ``met``. ``measured`` is the same of a card, or None, also in ``current_stack``.
    """
    model = find(MODEL)
    benches = Benches()
    every = search(model)
    tried = []
    for closed, setting in distinct(every, candidates):
        memory = predict(setting, benches, progress=progress)
        dynamic = dynamic_of(memory, setting.unit)
        tried.append((misfit(dynamic), closed, setting, memory, dynamic))
    tried.sort(key=lambda item: item[0])
    off, _, setting, memory, dynamic = tried[0]
    today = predict(setting, benches, "current", progress)
    card = _told_of(measured(setting, runs), setting.unit)
    if card is not None:
        card |= {"error_percent": error_percent(card["dynamic_gb"]), "savings": savings(card["dynamic_gb"])}
    return setting, {
        "model": MODEL,
        "status": "predicted",
        "stack": "paper",
        "predicted_under": {name: package_version(name) for name in ("torch", "transformers")},
        "measured": card,
        "dynamic_gb": dynamic,
        "published": {m: dict(PUBLISHED[m]) for m in METHODS},
        "error_percent": error_percent(dynamic),
        "savings": savings(dynamic),
        "published_savings": {t: dict(PUBLISHED_SAVINGS[t]) for t in TASKS},
        "setting": setting.to_json(),
        "met": off <= 1,
        "misfit": off,
        "searched": len(every),
        "near_equals": [
            {"setting": s.to_json(), "misfit": m, "misfit_closed_form": c, "dynamic_gb": d} for m, c, s, _, d in tried
        ],
        "best_of_each_form": {form: next(off for off, found in every if found.form == form) for form in FORMS},
        "visual_flops_cut": {t: flops_cut(n, setting.keep) for t, n in zip(TASKS, setting.tiles, strict=True)},
        "holders": {m: {t: _holder(memory[m][t]) for t in TASKS} for m in METHODS},
        "current_stack": {
            "dynamic_gb": dynamic_of(today, setting.unit),
            "measured": _told_of(measured(setting, runs, "current"), setting.unit),
            "holders": {m: {t: _holder(today[m][t]) for t in TASKS} for m in METHODS},
        },
        "crossing_tokens": crossing(model, setting.text[0], setting.form),
        "words": words(setting, memory, today, model),
    }


def _holder(memory: CardMemory) -> str:
    return words_for(leading_part(memory.peak_parts), memory.peak_holders)


@cache
def flops_cut(tiles: int, keep: float) -> float:
    """Share of the visual tokens' FLOPs that one cut at layer 2 removes, by FastV's formula."""
    model = find(MODEL)
    visual, layers = 256 * tiles, model.layers
    kept = visual_tokens_per_layer(build_pruner(f"topv:keep={keep}").stages(visual, layers), visual, layers)
    return visual_flops_cut(kept, visual, model.hidden, model.ffn)


def crossing(model: Model, text: int, form: str = "mask") -> int | None:
    """Prompt tokens from which on FastV's scores pass the logits, by the closed form; None if not within 25 tiles."""
    for n in range(text + 1, 25 * 256):
        found = terms(form, model, n - text, text, 1.0)
        if found.get("scores", 0) > found["logits"]:
            return n
    return None


def words(
    setting: Setting,
    memory: Mapping[str, Mapping[str, CardMemory]],
    today: Mapping[str, Mapping[str, CardMemory]],
    model: Model,
) -> list[str]:
    """What the numbers mean, in sentences."""
    unit, lengths = setting.unit, [256 * v + t for v, t in zip(setting.tiles, setting.text, strict=True)]
    paper, now = dynamic_of(memory, unit), dynamic_of(today, unit)
    scores = terms(setting.form, model, 256 * setting.tiles[1], setting.text[1], setting.keep).get("scores", 0)
    dropped = closed_form("drop", model, setting.tiles[1], setting.text[1], setting.keep) / DISPLAY_UNITS[unit]
    ranking = sorted(METHODS, key=lambda m: -now[m]["ai2d"])
    below = "below" if now["baseline"]["ai2d"] < paper["topv"]["ai2d"] else "above"
    return [
        f"FastV's scores grow with the square of the prompt, the logits of all positions with its length; they meet at "
        f"about {crossing(model, setting.text[0], setting.form):,} tokens. AI2D's prompt of {lengths[0]:,} lies beyond"
        f": there {_holder(memory['fastv']['ai2d'])} set FastV's peak, {paper['fastv']['ai2d']:.2f} {unit} against "
        f"Baseline's {paper['baseline']['ai2d']:.2f}. OCRBench's of {lengths[1]:,} lies before: the scores reach "
        f"{scores / DISPLAY_UNITS[unit]:.2f} {unit} only, and both methods peak at the same logits.",
        "FastV can peak where Baseline does only if no token had left before the first logits: its first public code "
        f"masks and drops nothing. Had it dropped them, OCRBench would have shown {dropped:.2f} {unit}, not "
        f"{PUBLISHED['fastv']['ocrbench']}.",
        "On today's stack (last-position logits, SDPA, FastV from one row of scores) the same AI2D prompt peaks at "
        + ", ".join(f"{now[m]['ai2d']:.2f} {unit} under {build_pruner(m).title}" for m in ranking)
        + f". Baseline then lies {below} the paper's TopV, and the ranking of FastV and Baseline is turned round.",
    ]


# -- as run folders, for figures ---------------------------------------------------------------------------------------


def make_runs(setting: Setting, folder: Path, tokens: int = 8, progress: Progress | None = None) -> list[Run]:
    """Each figure as a run folder in ``folder``: its task's highest prompt after three smaller ones, ``tokens`` tokens.

    Runs that are there already are kept, so that a second call only reads them.
    """
    model = find(MODEL)
    folder.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[Run]] = {task: [] for task in TASKS}
    bench: Bench | None = None
    for at, task in enumerate(TASKS):
        shapes = folder / f"{task}.csv"
        lines = ["width,height,text_tokens"]
        for tiles in [n for n in TILES if n <= setting.tiles[at]][-4:]:
            width, height = image_size(shape_of(model, tiles, setting.text[at]))
            lines.append(f"{width},{height},{setting.text[at] - sum(model.template)}")
        files.replace(shapes, "\n".join(lines) + "\n")
    for method, task in product(sorted(METHODS, key=lambda m: m == "fastv"), TASKS):  # eager attention last
        if progress is not None:
            progress(f"{method} on {task}, token by token")
        spec = change_of(setting, method, task).spec
        spec = dataclasses.replace(spec, data=str(folder / f"{task}.csv"), max_new_tokens=tokens, warmup=0)
        path = folder / f"{task}-{method}"
        bench = bench or Bench(complete_spec(spec).setup)
        runs[task].append(make_run(spec, path, bench=bench, resume=(path / RUN_FILE).exists()))
    return [run for task in TASKS for run in runs[task]]
