"""What a user would take instead of memprof, asked about one ``generate()``: what each says, and how long it takes.

Two runs. **small**: an InternVL small enough to run for real on this CPU (random weights, bfloat16), where
``torch.profiler`` and ``MemTracker`` can look on, and say what was. **full**: InternVL2-2B with 13 tiles and 16 tokens,
which nobody can look on at without a card: only what works without weights answers. Writes
``benchmarks/results/alternatives.json`` and ``alternatives.md``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memprof.bench import Bench
from memprof.bench.generate import place, profile_prompt
from memprof.families import Family, Model
from memprof.meters import meter_for, weights_of
from memprof.models.build import build_model
from memprof.models.find import find
from memprof.models.weightless import RealScores
from memprof.prompts import Prompt, Shape
from memprof.pruning import build_pruner
from memprof.records import RunSpec
from memprof.runner import complete_spec

RESULTS = Path(__file__).parent / "results"
MIB = 2**20


def small_card(card: Model) -> Model:
    """InternVL2-2B, narrow and shallow: about 30 million parameters."""
    small = card.but(
        text={"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6,
              "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 20_000,
              "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        vision={"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
                "intermediate_size": 1024},
        image_token_id=19_000,
    )  # fmt: skip
    return dataclasses.replace(small, name="internvl-small")


def generate(model: Any, prompt: Prompt, tokens: int, inside: AbstractContextManager[Any]) -> None:
    """The one ``generate()`` everybody is asked about."""
    fake = type(next(model.parameters())) is not nn.Parameter
    scores = [RealScores(model.get_output_embeddings().weight.shape[0])] if fake else []
    with inside:
        model.generate(**place(prompt, model), max_new_tokens=tokens, do_sample=False, logits_processor=scores)


def by_profiler(model: Any, prompt: Prompt, tokens: int) -> int:
    """Highest sum of the allocations and frees that ``torch.profiler`` saw, in bytes above the weights."""
    profiler = torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU])
    generate(model, prompt, tokens, profiler)
    changes = [(e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for _, n_bytes in sorted(changes, key=lambda change: change[0]):
        level += n_bytes
        peak = max(peak, level)
    return peak


def by_tracker(model: Any, prompt: Prompt) -> int:
    """Peak of torch's MemTracker less the weights it was told of, in bytes.

    It refuses a module that runs twice (``MemTracker does not support memory tracking for multiple iterative calls``),
    so it is asked about one new token: the prefill, in which the peak of both runs lies.
    """
    from torch.distributed._tools.mem_tracker import MemTracker

    tracker = MemTracker()
    tracker.track_external(model)
    generate(model, prompt, 1, tracker)
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    return int(peak["Total"] - peak["Parameter"] - peak["Buffer"])


def by_formula(card: Model, shape: Shape, tokens: int) -> int:
    """Keys and values of every token at 2 bytes: what "weights + KV cache" calculators add to the weights."""
    return 2 * 2 * card.layers * card.kv_numbers * (shape.length + tokens)


def by_memprof(model: Any, prompt: Prompt, tokens: int) -> int:
    """The dynamic peak that memprof itself says."""
    outcome = profile_prompt(
        model, meter_for(model), build_pruner("baseline"), "current", prompt, new_tokens=tokens
    )
    return outcome.memory.fullest.dynamic_peak_bytes


def asked(name: str, kind: str, ask: Callable[[], int]) -> dict[str, Any]:
    """One answer, or why there is none."""
    start = time.perf_counter()
    try:
        answer: int | None = ask()
        problem = None
    except Exception as error:
        answer, problem = None, f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    row = {"tool": name, "kind": kind, "dynamic_peak_bytes": answer, "seconds": time.perf_counter() - start,
           "problem": problem}  # fmt: skip
    print(row, file=sys.stderr)
    return row


def small(family: Family, card: Model) -> dict[str, Any]:
    """A run that really happens."""
    tokens, shape = 4, family.shape(card, 900, 450, 40, 6)
    model = build_model(card, device="cpu", dtype="bfloat16")
    weightless = build_model(card, device="sim", dtype="bfloat16")
    prompt = card.family.drawn(card, shape)
    generate(model, prompt, 1, nullcontext())
    start = time.perf_counter()
    generate(model, prompt, tokens, nullcontext())
    alone = time.perf_counter() - start
    return {
        "model": card.name, "tiles": shape.tiles, "prompt_tokens": shape.length, "new_tokens": tokens,
        "weights_bytes": sum(t.untyped_storage().nbytes() for _, t in weights_of(model)), "generate_seconds": alone,
        "answers": [
            asked("torch.profiler(profile_memory=True)", "measured on the CPU",
                  lambda: by_profiler(model, prompt, tokens)),
            asked("MemTracker, real tensors, prefill only", "measured on the CPU", lambda: by_tracker(model, prompt)),
            asked("memprof --device cpu", "measured on the CPU", lambda: by_memprof(model, prompt, tokens)),
            asked("MemTracker, fake tensors, prefill only", "predicted", lambda: by_tracker(weightless, prompt)),
            asked("weights + KV formula", "formula", lambda: by_formula(card, shape, tokens)),
            asked("memprof --device sim", "predicted for CUDA", lambda: by_memprof(weightless, prompt, tokens)),
        ],
    }  # fmt: skip


def full(family: Family, card: Model) -> dict[str, Any]:
    """A run that needs a card, asked about without one."""
    tokens, shape = 16, family.shape(card, 1600, 1200, 53, None)
    model = build_model(card, device="sim", dtype="bfloat16")
    prompt = card.family.drawn(card, shape)
    spec = RunSpec(model=card.name, method="baseline", task="ai2d", device="sim")
    done = complete_spec(spec)
    bench = Bench(done.setup)
    bench.ready()
    shapes = [family.shape(card, w, 448, text, None) for w in (448, 1300, 2700) for text in (20, 53, 80)]
    bench.foresee(map(done.ask, [*shapes, shape]))
    return {
        "model": card.name, "tiles": shape.tiles, "prompt_tokens": shape.length, "new_tokens": tokens,
        "weights_bytes": sum(t.untyped_storage().nbytes() for _, t in weights_of(model)), "generate_seconds": None,
        "answers": [
            {"tool": "torch.profiler(profile_memory=True)", "kind": "-", "dynamic_peak_bytes": None, "seconds": None,
             "problem": "needs the weights and the card"},
            asked("MemTracker, fake tensors, prefill only", "predicted", lambda: by_tracker(model, prompt)),
            asked("weights + KV formula", "formula", lambda: by_formula(card, shape, tokens)),
            asked("memprof, traced", "predicted for CUDA", lambda: by_memprof(model, prompt, tokens)),
            asked("memprof, from its program", "predicted for CUDA",
                  lambda: bench.outcome(done.ask(shape)).memory.fullest.dynamic_peak_bytes),
        ],
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """Both runs as Markdown."""
    lines = []
    for run in results["runs"]:
        lines += [
            f"**{run['model']}**, {run['tiles']} tiles, {run['prompt_tokens']} prompt tokens, "
            f"{run['new_tokens']} new tokens, weights {run['weights_bytes'] / MIB:,.1f} MiB"
            + (f"; `generate()` alone takes {run['generate_seconds']:.2f} s" if run["generate_seconds"] else ""),
            "",
            "| asked | kind | peak above the weights | seconds |",
            "|---|---|---:|---:|",
        ]
        for row in run["answers"]:
            peak = (
                f"{row['dynamic_peak_bytes'] / MIB:,.1f} MiB"
                if row["dynamic_peak_bytes"] is not None
                else row["problem"]
            )
            seconds = f"{row['seconds']:.2f}" if row["seconds"] is not None else "-"
            lines.append(f"| {row['tool']} | {row['kind']} | {peak} | {seconds} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Ask everybody, and write down what they say."""
    os.environ["MEMPROF_CACHE"] = ""
    torch.manual_seed(0)
    card = find("internvl2-2b")
    family = card.family
    runs = [small(family, small_card(card)), full(family, card)]
    results = {"torch": torch.__version__, "threads": torch.get_num_threads(), "runs": runs}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "alternatives.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "alternatives.md").write_text(table(results), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
