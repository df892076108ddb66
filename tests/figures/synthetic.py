"""Runs as a meter would leave them, made up: three methods on two tasks, sizes like InternVL2-2B's, one sample failed.

``python tests/figures/synthetic.py DIR`` writes them as run folders.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from memprof.records import PARTS, Holder, Run, RunRecord, RunSpec, SampleRecord, TokenColumns
from memprof.store import RunFolder

STATIC = 4_411_508_736
NASTY = "</script><img src=x onerror=alert(1)>'\"&\u2028{{é}}"
METHODS = ("baseline", "fastv:keep=0.5,layer=2,scores=map", "topv:keep=0.5,layer=2")
TASKS = ("ai2d", "ocrbench")
GIB = 2**30


def sample(name: str, method: str, tiles: int, text: int, tokens: int, stack: str, measured: bool) -> SampleRecord:
    """One sample's record, by rough formulas for the paper's stack and for today's."""
    pruned = method != "baseline"
    visual = 256 * tiles
    positions, kept = visual + text, text + visual // (2 if pruned else 1)
    per_layer = [4096 * (positions if i < 3 else kept) for i in range(24)]
    kv = sum(per_layer)
    eager = method.startswith("fastv") and stack == "paper"
    vision = int(27.3e6 * tiles) + 30_000_000
    live = kept if pruned and not eager else positions
    logits = 92553 * (6 * live if stack == "paper" else 6)
    attention = 16 * 14 * positions**2 if eager else 24 * positions * 2048
    parts = dict.fromkeys(PARTS, 0)
    parts |= {"inputs": 602112 * tiles, "other": 2_400_000, "unexplained": 1_228_800 if tiles > 9 else 0}
    claimed = kv + max(logits, attention + 60_000_000) + positions * 2048 * 8
    if vision > claimed:
        parts["vision"], phase = vision, "vision"
    else:
        phase = "prefill"
        held = "attention" if eager and attention > logits else "logits" if stack == "paper" else "mlp"
        parts["kv_cache"], parts["mlp"] = kv if held == "logits" else kv // 4, positions * 2048 * 8
        parts[held] += {"attention": attention, "logits": logits, "mlp": positions * 8192 * 6}[held]
        parts["pruner"] = 9_000_000 if method.startswith("topv") else 0
    first, prefill, at, last = parts, sum(parts.values()), 0, kv + (tokens - 1) * 98304 + 8_000_000
    if last > prefill:  # a long answer: the cache outgrows prefill
        at, phase = tokens - 1, "decode"
        parts = dict.fromkeys(PARTS, 0) | {"kv_cache": last - 8_000_000, "mlp": 8_000_000}
    top = sum(parts.values())
    columns, every = TokenColumns(), {part: [n] for part, n in first.items()}
    for t in range(tokens):
        cache = kv + t * 98304
        if t:
            for part, column in every.items():
                column.append({"kv_cache": cache, "mlp": 8_000_000}.get(part, 0))
        columns.kv_bytes.append(cache)
        columns.allocated_bytes.append(STATIC + cache + 3_000_000)
        columns.peak_allocated_bytes.append(STATIC + prefill if t == 0 else STATIC + cache + 8_000_000)
        columns.reserved_bytes.append(STATIC + int(top * 1.11) // 2**21 * 2**21)
        columns.device_used_bytes.append(columns.reserved_bytes[-1] + 480_000_000 if measured else None)
        columns.seconds.append((0.21 if t == 0 else 0.022) if measured else None)
    return SampleRecord(
        id=name, width=448 * tiles, height=448, tiles=tiles, visual_tokens=visual, text_tokens=text,
        kept_visual_tokens=[visual if i < 3 or not pruned else visual // 2 for i in range(24)],
        kv_tokens_planned=[b // 4096 for b in per_layer], kv_tokens_found=[b // 4096 for b in per_layer],
        kv_bytes_per_layer=per_layer, category="food web", tokens=columns, peak_token=at, peak_phase=phase,
        vision_peak_bytes=STATIC + vision, peak_parts=parts, dynamic_peak_bytes=top,
        token_parts={part: column for part, column in every.items() if any(column)},
        peak_holders=[Holder(logits, "logits", "lm_head", "aten.mm", [1, positions, 92553], "bfloat16", "prefill")],
    )  # fmt: skip


def make_run(
    method: str = METHODS[0], task: str = "ai2d", samples: int = 24, tokens: int = 16, stack: str = "paper",
    measured: bool = False, seed: int = 0,
) -> Run:  # fmt: skip
    """One run; equal arguments give equal records. The fourth sample fails, the second one's id is an attack."""
    draw = random.Random(f"{task}-{seed}")
    done = []
    for i in range(samples):
        tiles = draw.choice((7, 9, 10, 11) if task == "ai2d" else (3, 5, 7, 7))
        text = draw.randint(60, 220)
        name = NASTY if i == 1 else f"{task}/{i:04d}"
        if i == 3:
            done.append(SampleRecord(id=name, status="failed", error="image cannot be read: truncated <PNG>"))
        else:
            done.append(sample(name, method, tiles, text, tokens, stack, measured))
    record = RunRecord(
        spec=RunSpec(
            model="internvl2-2b", method=method, task=task, device="cuda" if measured else "sim", stack=stack,
            max_new_tokens=tokens, limit=samples,
        ),
        status="measured" if measured else "predicted",
        environment={
            "memprof": "0.1.0", "python": "3.12.3", "packages": {"torch": "2.13.0", "transformers": "5.23.0"},
            **({"gpu": "NVIDIA H100 80GB HBM3"} if measured else {}),
        },
        static_bytes=STATIC,
        static_parts={"vision": 608_000_000, "language": STATIC - 608_000_000},
        layers=24,
        data_label="bundled sample",
        visual_flops_cut=None if method == "baseline" else 0.482,
        complete=True,
    )  # fmt: skip
    return Run(record, done, None)


def make_runs(tasks: tuple[str, ...] = TASKS, methods: tuple[str, ...] = METHODS, **how: object) -> list[Run]:
    """Every method on every task."""
    return [make_run(method, task, **how) for task in tasks for method in methods]  # type: ignore[arg-type]


def write_runs(folder: Path, runs: list[Run]) -> list[Path]:
    """``runs`` as run folders in ``folder``."""
    paths = []
    for run in runs:
        spec = run.record.spec
        path = folder / f"{spec.task}-{spec.method.partition(':')[0]}"
        with RunFolder.open(path, run.record) as there:
            for one in run.samples:
                there.append(one)
        paths.append(path)
    return paths


if __name__ == "__main__":
    print(*write_runs(Path(sys.argv[1]), make_runs()), sep="\n")
