"""What profiling costs on a card, and what pruning does: InternVL2-2B at 13 tiles, random weights of the true size.

    python benchmarks/gpu_overhead.py -o plots/gpu_overhead.json     # about 3 minutes on an H100
    python benchmarks/gpu_overhead.py --dry-run                      # a tiny model on the CPU: only that it runs

Three parts, each chosen by ``--part``:

decode      Time of a decode step while something watches, over that of the same step unwatched in the same round: the
            median of these ratios, with the middle half of them. Ways take turns within a round, so that a drifting
            clock meets all of them. Counters alone may cost 1 %, memprof as it is by default 10 %; beside them
            attribution of every token, ``torch.profiler(profile_memory=True)`` and ``_record_memory_history()``.
prefill     Seconds of a prefill of each method over Baseline's, whole and in the decoder layers alone, and the ratios
            that counted FLOPs promise. FastV's map needs eager attention, so its Baseline is eager too.
selection   One choice of tokens in place: wall time to the last kernel's end, time between device events, and the bytes
            it took above what was held. TopV at 3,328 tokens may take 1 ms and 24 MiB.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from memprof.anatomy import anatomy
from memprof.environment import environment
from memprof.families import find_model
from memprof.families._build import build_model
from memprof.meters import METERS
from memprof.profiler import Profiler
from memprof.pruning import build_pruner, layer_flops
from memprof.pruning.surgery import Surgery
from memprof.runner import Prompt, make_prompt, place

MODEL, SIZE, TEXT = "internvl2-2b", (1792, 1344), 53  # 13 tiles
PARTS = ("decode", "prefill", "selection")
SDPA, EAGER = ("baseline", "topv", "fastv:scores=row", "random"), ("baseline", "fastv:scores=map")
#: Ways of watching that have a goal, and the goal: a decode step's time over that of an unwatched one.
GOALS = {"memprof, counters": 1.01, "memprof": 1.10}
MOST_MS, MOST_MIB = 1.0, 24.0

Watch = Callable[[], AbstractContextManager[Any]]


class Stand:
    """A model on a device, a prompt, and a clock that waits for the device."""

    def __init__(self, device: str, attention: str) -> None:
        self.device, self.cuda = device, device == "cuda"
        family, card = find_model(MODEL)
        if not self.cuda:
            text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
                    "num_key_value_heads": 2}  # fmt: skip
            vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
            card = dataclasses.replace(card, text={**card.text, **text}, vision={**card.vision, **vision})
        self.card = card
        dtype = card.dtype if self.cuda else "float32"
        self.model: Any = build_model(family, card, device=device, dtype=dtype, attention=attention)
        size = SIZE if self.cuda else (448, 448)
        self.prompt: Prompt = make_prompt(family, card, family.shape(card, *size, TEXT, None))
        self.layers = [layer for _, layer in anatomy(self.model).layers]

    def clock(self) -> float:
        """Seconds, once the device has done what it was given."""
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def release(self) -> None:
        """As before any prompt."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def generate(self, tokens: int, method: str = "baseline") -> None:
        """Make ``tokens`` tokens from the prompt."""
        with Surgery(self.model, build_pruner(method), self.prompt.layout):
            self.model.generate(**place(self.prompt, self.model), max_new_tokens=tokens, do_sample=False)

    def ways(self) -> dict[str, Watch]:
        """Everything that can watch a generate() here; ``plain`` is nothing."""
        meter: Any = METERS.load(self.device)
        every: dict[str, Watch] = {"plain": nullcontext}
        if self.cuda:
            every |= {
                "memprof, counters": lambda: Profiler(self.model, meter(self.model, "none")),
                "memprof": lambda: Profiler(self.model, meter(self.model)),
                "memprof, every token attributed": lambda: Profiler(self.model, meter(self.model, "all")),
                "memprof, driver asked at every token": lambda: Profiler(
                    self.model, meter(self.model, "none", "always")
                ),
                "_record_memory_history()": _history,
            }
        else:
            every["memprof"] = lambda: Profiler(self.model, meter(self.model))
        return every | {"torch.profiler(profile_memory=True)": lambda: torch.profiler.profile(profile_memory=True)}


@contextmanager
def _history() -> Any:
    torch.cuda.memory._record_memory_history(max_entries=1_000_000)
    try:
        yield
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def decode(stand: Stand, rounds: int, tokens: int) -> dict[str, Any]:
    """Ratio of each way's decode steps to plain ones, step by step within a round."""
    ways = stand.ways()
    steps: dict[str, list[list[float]]] = {name: [] for name in ways}
    starts: list[float] = []
    hook = stand.model.register_forward_pre_hook(lambda *_: starts.append(time.perf_counter()), prepend=True)
    for number in range(rounds + 1):
        order = list(ways)[number % len(ways) :] + list(ways)[: number % len(ways)]
        for name in order:
            stand.release()
            starts.clear()
            stand.clock()
            with ways[name]():
                stand.generate(tokens)
            if number:  # the first round warms up
                # From the second decode step on: the first may load kernels, and what watches prefill rests by then.
                steps[name].append([b - a for a, b in pairwise(starts[2:])])
    hook.remove()
    plain = steps["plain"]
    found = {}
    for name, seen in steps.items():
        ratios = [b / a for one, other in zip(plain, seen, strict=True) for a, b in zip(one, other, strict=True)]
        low, middle, high = quantiles(ratios, n=4)
        milliseconds = 1e3 * median(step for one in seen for step in one)
        found[name] = {"ratio": middle, "middle_half": [low, high], "ms": milliseconds, "steps": len(ratios)}
        goal = GOALS.get(name) if stand.cuda else None
        if goal is not None:
            found[name] |= {"goal": goal, "met": middle <= goal}
    return found


def prefill(stand: Stand, methods: Sequence[str], repeats: int) -> dict[str, Any]:
    """Seconds of a prefill, whole and of its decoder layers, over those of the first of ``methods``."""
    spent: dict[str, list[tuple[float, float]]] = {method: [] for method in methods}
    marks: list[float] = []
    hooks = [
        stand.layers[0].register_forward_pre_hook(lambda *_: marks.append(stand.clock()), prepend=True),
        stand.layers[-1].register_forward_hook(lambda *_: marks.append(stand.clock())),
    ]
    for number in range(repeats + 1):
        for method in methods:
            marks.clear()
            begin = stand.clock()
            stand.generate(1, method)
            if number:
                spent[method].append((stand.clock() - begin, marks[1] - marks[0]))
    for hook in hooks:
        hook.remove()
    whole, inside = (
        {method: median(pair[which] for pair in pairs) for method, pairs in spent.items()} for which in (0, 1)
    )
    first = methods[0]
    flops = {method: _flops(stand, method) for method in methods}
    return {
        method: {
            "ms": 1e3 * whole[method],
            "ratio": whole[method] / whole[first],
            "flops_promise": sum(flops[method]) / sum(flops[first]),
            "layers_ms": 1e3 * inside[method],
            "layers_ratio": inside[method] / inside[first],
            "layers_flops_promise": flops[method][1] / flops[first][1],
        }
        for method in methods
    }


def _flops(stand: Stand, method: str) -> tuple[float, float]:
    """FLOPs of the vision tower and of the decoder layers, by FastV's published form (:func:`layer_flops`)."""
    text, vision, shape = stand.card.text, stand.card.vision, stand.prompt.shape
    patches = (vision["image_size"][0] // vision["patch_size"][0]) ** 2 + 1
    tower = vision["num_hidden_layers"] * layer_flops(patches, vision["hidden_size"], vision["intermediate_size"])
    visual = Surgery(stand.model, build_pruner(method), stand.prompt.layout).visual_tokens
    tokens = [shape.text_tokens + n for n in visual]
    layers = layer_flops(tokens, text["hidden_size"], text["intermediate_size"]).sum()
    return float(shape.tiles * tower), float(layers)


def selection(stand: Stand, methods: Sequence[str], repeats: int) -> dict[str, Any]:
    """Time and bytes of one selection in place, in a prefill."""
    found = {}
    for method in methods:
        pruner: Any = build_pruner(method)
        if not pruner.stages(stand.prompt.shape.visual_tokens, len(stand.layers)):
            continue
        select, seen = pruner.select, list[tuple[float, float, int]]()

        def timed(view: Any, kept: int, select: Any = select, seen: Any = seen) -> Any:
            held = 0
            begin = stand.clock()
            if stand.cuda:
                held = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                begin = stand.clock()
                events[0].record()
            out = select(view, kept)
            if stand.cuda:
                events[1].record()
            wall = stand.clock() - begin
            between = events[0].elapsed_time(events[1]) if stand.cuda else 1e3 * wall
            taken = torch.cuda.max_memory_allocated() - held if stand.cuda else 0
            seen.append((1e3 * wall, between, taken))
            return out

        object.__setattr__(pruner, "select", timed)  # in the way of the class's own, for this one object
        for _ in range(repeats + 3):
            with Surgery(stand.model, pruner, stand.prompt.layout), torch.no_grad():
                stand.model(**place(stand.prompt, stand.model), logits_to_keep=1)
        wall, between, taken = zip(*seen[3:], strict=True)
        found[method] = {"ms": median(wall), "device_ms": median(between), "bytes": max(taken)}
        if stand.cuda and method == "topv":
            met = median(wall) <= MOST_MS and max(taken) <= MOST_MIB * 2**20
            found[method] |= {"goal": f"{MOST_MS} ms, {MOST_MIB} MiB", "met": met}
    return found


def main() -> int:
    """Measure, print, write; 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part; repeatable")
    parser.add_argument(
        "--rounds", type=int, default=8, help="rounds of decode; repeats of prefill and selection: thrice"
    )
    parser.add_argument("--tokens", type=int, default=32, help="tokens of a decode round")
    parser.add_argument("-o", "--output", type=Path, help="write everything as JSON, too")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU")
    asked = parser.parse_args()
    device, parts = "cpu" if asked.dry_run else "cuda", asked.part or list(PARTS)
    METERS.load(device).check()
    stand = Stand(device, "sdpa")
    stand.generate(2)
    meter: Any = METERS.load(device)(stand.model)
    shape = stand.prompt.shape
    found: dict[str, Any] = {
        "schema": 1, "status": "measured", "model": MODEL, "dry_run": asked.dry_run,
        "prompt": {"tiles": shape.tiles, "visual_tokens": shape.visual_tokens, "text_tokens": shape.text_tokens},
        "environment": environment() | meter.environment(),
    }  # fmt: skip
    card = found["environment"].get("gpu", device)
    print(f"{card}, torch {torch.__version__}, {shape.tiles} tiles, {shape.length} tokens")
    if "decode" in parts:
        found["decode"] = decode(stand, asked.rounds, asked.tokens)
    if "selection" in parts:
        found["selection"] = selection(stand, SDPA, 3 * asked.rounds)
    if "prefill" in parts:
        found["prefill"] = prefill(stand, SDPA, 3 * asked.rounds)
        del stand, meter
        gc.collect()
        eager = Stand(device, "eager")
        eager.release()
        found["prefill_eager"] = prefill(eager, EAGER, 3 * asked.rounds)
    for part in ("decode", "selection", "prefill", "prefill_eager"):
        for name, row in found.get(part, {}).items():
            cells = (f"{key} {value:.4g}" for key, value in row.items() if type(value) in (int, float))
            verdict = {True: "met", False: "MISSED", None: ""}[row.get("met")]
            print(f"{part:14}{name:38}{', '.join(cells)}  {verdict}")
    if asked.output is not None:
        asked.output.parent.mkdir(parents=True, exist_ok=True)
        asked.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    rows = [row for part in found.values() if isinstance(part, dict) for row in part.values() if isinstance(row, dict)]
    return int(any(row.get("met") is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
