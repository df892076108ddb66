"""What profiling costs on a card, and what pruning does: InternVL2-2B at 13 tiles, random weights of the true size.

    python benchmarks/gpu_overhead.py -o plots/gpu_overhead.json     # at most 150 s on an H100
    python benchmarks/gpu_overhead.py --dry-run                      # a tiny model on the CPU: only that it runs

Parts, each chosen by ``--part``; without one, all but ``eager``:

selection   One choice of tokens in place: wall time to the last kernel's end; time between device events; the same
            where the device has other work until the host has handed all of it out (``queued_ms``: the device's own
            time); and the bytes above what was held. TopV at 3,328 tokens may take 1 ms, and no more than its layer.
prefill     Prefill of every method, whole and in the decoder layers alone, over Baseline's of the same round, beside
            what counted FLOPs promise; and over that of Random at the same cut, which may be exceeded by 3 %. Peaks,
            too: TopV's is Random's.
layers      What the layers' time is spent on: the host's time to hand out the work, the device's by kind of kernel,
            what pruning itself launches, and what a length costs that was never run before.
decode      Time of a decode step while memprof watches every other one, over that of the two unwatched steps beside it,
            and the time inside its hooks. Counters alone may cost 1 %, memprof as it is by default 3 %. Beside them
            other ways, ``torch.profiler(profile_memory)`` and ``_record_memory_history()`` among them, over the same
            steps of an unwatched generate() of the same round.
eager       Prefill with FastV's map, which needs eager attention, so its Baseline is eager too.

How it is timed. cuDNN builds a plan for every length of keys it has not met, so every length that is timed was run
before. Ways take turns within a round, and a figure is the median over rounds of a ratio inside one round, so that a
drifting clock meets both sides. The garbage collector rests while anything is timed. No round is begun once
``--budget`` is spent, and what is worth most comes first.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from memprof.anatomy import anatomy
from memprof.bench.generate import place
from memprof.environment import environment
from memprof.errors import MemprofError
from memprof.meters import METERS
from memprof.models.build import build_model
from memprof.models.find import find
from memprof.profiler import Profiler
from memprof.prompts import Prompt
from memprof.pruning import METHODS, OneCut, build_pruner, layer_flops
from memprof.pruning.methods.topv import TopV
from memprof.pruning.surgery import Surgery

#: When it began, all imported.
BEGIN = time.monotonic()
MODEL, SIZE, TEXT = "internvl2-2b", (1792, 1344), 53  # 13 tiles
PARTS = ("selection", "prefill", "layers", "decode", "eager")
#: Ways of watching that have a goal, and the goal: a decode step's time over that of an unwatched one.
GOALS = {"memprof, counters": 1.01, "memprof": 1.03}
#: A choice of TopV's, in ms; a method's prefill over Random's; the layers' time over what FLOPs promise.
MOST_MS, MOST_OVER_RANDOM, MOST_OVER_FLOPS = 1.0, 1.03, 1.15
#: Kinds of kernels, the first that fits; what memprof itself launches is told by its own range.
KINDS = {
    "attention": r"sdpa|flash|fmha|cudnn.*attention|mha",
    "matrix products": r"gemm|nvjet|cutlass|xmma|cublas|gemv|splitk|dot_kernel",
    "gathers and copies": r"index|gather|scatter|copy|memcpy|cat",
    "sorting": r"sort|topk|radix|merge|scan",
    "reductions": r"reduce|softmax|norm",
    "elementwise": r"elementwise|vectorized|fill|memset",
}

Watch = Callable[[], AbstractContextManager[Any]]


class Stand:
    """A model on a device, a prompt, and a clock that waits for the device."""

    def __init__(self, device: str, attention: str) -> None:
        self.device, self.cuda = device, device == "cuda"
        card = find(MODEL)
        if not self.cuda:
            text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
                    "num_key_value_heads": 2}  # fmt: skip
            vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
            card = card.but(text, vision)
        self.card = card
        dtype = card.dtype if self.cuda else "float32"
        self.model: Any = build_model(card, device=device, dtype=dtype, attention=attention)
        self.prompt = self.prompt_of(TEXT)
        self.layers = [layer for _, layer in anatomy(self.model).layers]
        gc.collect()
        gc.freeze()  # collecting before what is timed need not walk through all of transformers

    def prompt_of(self, text: int) -> Prompt:
        """The picture with another number of text tokens."""
        size = SIZE if self.cuda else (448, 448)
        family = self.card.family
        return family.drawn(self.card, family.shape(self.card, *size, text, None))

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

    def generate(self, tokens: int, method: str = "baseline", prompt: Prompt | None = None) -> None:
        """Make ``tokens`` tokens from the prompt."""
        prompt = prompt or self.prompt
        with Surgery(self.model, build_pruner(method), prompt.places):
            self.model.generate(**place(prompt, self.model), max_new_tokens=tokens, do_sample=False)

    def methods(self) -> dict[str, str | None]:
        """Every method that runs on this model as it is, and the control with the same cut, if there is one."""
        found: dict[str, str | None] = {"baseline": None, "random": None}
        for name in METHODS.names():
            spec = "fastv:scores=row" if name == "fastv" else name
            pruner: Any = build_pruner(spec)
            if spec in found or pruner.eager:
                continue
            try:
                self.generate(1, spec)
            except MemprofError as error:
                print(f"without {spec}: {error}", file=sys.stderr)
                continue
            control = "random" if getattr(pruner, "layer", 0) == 2 else f"random:layer={getattr(pruner, 'layer', 0)}"
            found[spec] = control if isinstance(pruner, OneCut) else None
        return {control: None for control in found.values() if control} | found

    def ways(self) -> dict[str, tuple[Watch, bool]]:
        """Everything that can watch a generate() here, and whether it is slow; ``plain`` is nothing."""
        meter: Any = METERS.load(self.device)
        every: dict[str, tuple[Watch, bool]] = {"plain": (nullcontext, False)}
        if self.cuda:
            every |= {
                "memprof, counters": (lambda: Profiler(self.model, meter(self.model, "none")), False),
                "memprof": (lambda: Profiler(self.model, meter(self.model)), False),
                "memprof, driver asked at every token": (
                    lambda: Profiler(self.model, meter(self.model, "none", "always")), True,
                ),
                "memprof, every token attributed": (lambda: Profiler(self.model, meter(self.model, "all")), True),
                "_record_memory_history()": (_history, True),
            }  # fmt: skip
        else:
            every["memprof"] = (lambda: Profiler(self.model, meter(self.model)), False)
        traced = "torch.profiler(profile_memory=True)"
        return every | {traced: (lambda: torch.profiler.profile(profile_memory=True), True)}


@contextmanager
def _history() -> Any:
    torch.cuda.memory._record_memory_history(max_entries=1_000_000)
    try:
        yield
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


class EveryOther(Profiler):
    """Watches prefill and then every other decode step: a step differs from those beside it in nothing else."""

    def __init__(self, model: Any, meter: Any, begin: int) -> None:
        super().__init__(model, meter)
        self.forwards, self.begin = 0, begin
        self.spent: dict[int, float] = {}  # seconds inside the hooks, by the number of the forward

    def watches(self, forward: int) -> bool:
        """Whether this forward is watched; two at the beginning are, so that decoding has begun."""
        return forward <= 2 or forward % 2 == self.begin

    def _before_forward(self, *given: Any) -> None:
        self.forwards += 1
        self._timed(super()._before_forward, given)

    def _after_forward(self, *given: Any) -> None:
        self._timed(super()._after_forward, given)

    def _timed(self, way: Callable[..., None], given: Any) -> None:
        if self.watches(self.forwards):
            begin = time.perf_counter()
            way(*given)
            self.spent[self.forwards] = self.spent.get(self.forwards, 0.0) + time.perf_counter() - begin


@contextmanager
def still() -> Iterator[None]:
    """No garbage is collected inside."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Budget:
    """Says when to stop; a part is given so many seconds, and all of them together no more than there are."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def rounds(self, most: int, part: float, least: int = 2) -> Iterator[int]:
        """Numbers of rounds, up to ``most``, or until the part has taken ``part`` seconds; ``least`` in any case."""
        begin = time.monotonic()
        for number in range(most):
            spent = time.monotonic() - begin > part or time.monotonic() - BEGIN > self.seconds
            if number >= least and spent:
                return
            yield number


def decode(stand: Stand, rounds: int, tokens: int, budget: Budget) -> dict[str, Any]:
    """Ratio of each way's decode steps to plain ones, step by step within a round."""
    ways = stand.ways()
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}  # a way's step and the plain one
    starts: list[float] = []
    hook = stand.model.register_forward_pre_hook(lambda *_: starts.append(time.perf_counter()), prepend=True)

    def steps(name: str) -> list[float]:
        stand.release()
        starts.clear()
        stand.clock()
        with still(), ways[name][0]():
            stand.generate(tokens)
        # From the second decode step on: the first may load kernels, and what watches prefill rests by then.
        return [b - a for a, b in pairwise(starts[2:])]

    def round_of(names: Sequence[str], number: int) -> None:
        turn = number % len(names)
        seen = {name: steps(name) for name in [*names[turn:], *names[:turn]]}
        for name, each in seen.items():
            pairs[name] += zip(each, seen["plain"], strict=True)

    steps("plain")  # every length of keys meets cuDNN for the first time here
    found = _every_other(stand, starts, rounds, tokens, budget)
    slow = ["plain", *(name for name, (_, slow) in ways.items() if slow)]
    for number in budget.rounds(2, 10, least=1):
        round_of(slow, number)
    hook.remove()
    for name, seen in pairs.items():
        if not seen:
            continue
        low, middle, high = quantiles([way / plain for way, plain in seen], n=4)
        found[name] = {
            "ratio": middle, "middle_half": [low, high], "added_us": 1e6 * median(a - b for a, b in seen),
            "ms": 1e3 * median(way for way, _ in seen), "steps": len(seen),
        }  # fmt: skip
    return found


def _every_other(stand: Stand, starts: list[float], rounds: int, tokens: int, budget: Budget) -> dict[str, Any]:
    """Ways of memprof that keep decoding's speed: each watched step over the two unwatched ones beside it."""
    meter: Any = METERS.load(stand.device)
    ways = {"memprof, counters": "none", "memprof": "prefill"} if stand.cuda else {"memprof": ""}
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    inside: dict[str, list[float]] = {name: [] for name in ways}
    plain: list[float] = []
    for number in budget.rounds(rounds, 35):
        for name in list(ways)[:: 1 if number % 2 else -1]:
            stand.release()
            starts.clear()
            stand.clock()
            of = meter(stand.model, ways[name]) if stand.cuda else meter(stand.model)
            with still(), EveryOther(stand.model, of, number // 2 % 2) as seen:
                stand.generate(tokens)
            if not number:
                continue  # the first round warms up
            took = dict(enumerate((b - a for a, b in pairwise(starts)), start=1))
            for step in range(4, len(took)):
                if seen.watches(step):
                    beside = (took[step - 1] + took[step + 1]) / 2
                    ratios[name].append(took[step] / beside)
                    inside[name].append(seen.spent[step])
                    plain.append(beside)
    found: dict[str, Any] = {}
    for name, each in ratios.items():
        low, middle, high = quantiles(each, n=4)
        hooks, step = median(inside[name]), median(plain)
        found[name] = {
            "ratio": middle, "middle_half": [low, high], "in_hooks_us": 1e6 * hooks, "in_hooks_ratio": 1 + hooks / step,
            "plain_ms": 1e3 * step, "steps": len(each),
        }  # fmt: skip
        if name in GOALS and stand.cuda:
            found[name] |= {"goal": GOALS[name], "met": max(middle, 1 + hooks / step) <= GOALS[name]}
    return found


def prefill(stand: Stand, methods: dict[str, str | None], repeats: int, budget: Budget) -> dict[str, Any]:
    """Seconds of a prefill, whole and of its decoder layers, over Baseline's and the control's of the same round."""
    spent: dict[str, list[tuple[float, float]]] = {method: [] for method in methods}
    peaks: dict[str, int] = {}
    marks: list[float] = []
    hooks = [
        stand.layers[0].register_forward_pre_hook(lambda *_: marks.append(stand.clock()), prepend=True),
        stand.layers[-1].register_forward_hook(lambda *_: marks.append(stand.clock())),
    ]
    for method in methods:  # what is run for the first time is not timed; the second time shows the peak
        stand.generate(1, method)
        stand.release()
        if stand.cuda:
            torch.cuda.reset_peak_memory_stats()
        stand.generate(1, method)
        peaks[method] = torch.cuda.max_memory_allocated() if stand.cuda else 0
    for number in budget.rounds(repeats, 25):
        turn = number % len(methods)
        for method in [*list(methods)[turn:], *list(methods)[:turn]]:
            with still():
                marks.clear()
                begin = stand.clock()
                stand.generate(1, method)
                spent[method].append((stand.clock() - begin, marks[1] - marks[0]))
    for hook in hooks:
        hook.remove()

    def over(method: str, other: str, which: int) -> float:
        return median(a[which] / b[which] for a, b in zip(spent[method], spent[other], strict=True))

    flops = {method: _flops(stand, method) for method in methods}
    found = {}
    for method, control in methods.items():
        promise = flops[method][1] / flops["baseline"][1]
        row: dict[str, Any] = {
            "ms": 1e3 * median(whole for whole, _ in spent[method]),
            "ratio": over(method, "baseline", 0),
            "flops_promise": sum(flops[method]) / sum(flops["baseline"]),
            "layers_ms": 1e3 * median(inside for _, inside in spent[method]),
            "layers_ratio": over(method, "baseline", 1),
            "layers_flops_promise": promise,
            "peak_bytes": peaks[method],
            "rounds": len(spent[method]),
        }
        row["layers_over_promise"] = row["layers_ratio"] / promise
        if control is not None:
            row |= {"control": control, "over_control": over(method, control, 0)}
            row["peak_over_control"] = peaks[method] - peaks[control]
            if stand.cuda:
                row |= {"goal": MOST_OVER_RANDOM, "met": row["over_control"] <= MOST_OVER_RANDOM}
                if method == "topv":
                    row["met"] = row["met"] and not row["peak_over_control"]
        elif method == "random" and stand.cuda:
            row |= {"goal": MOST_OVER_FLOPS, "met": row["layers_over_promise"] <= MOST_OVER_FLOPS}
        found[method] = row
    return found


def _flops(stand: Stand, method: str) -> tuple[float, float]:
    """FLOPs of the vision tower and of the decoder layers, by FastV's published form (:func:`layer_flops`)."""
    text, vision, shape = stand.card.text, stand.card.vision, stand.prompt.shape
    patches = (vision["image_size"][0] // vision["patch_size"][0]) ** 2 + 1
    tower = vision["num_hidden_layers"] * layer_flops(patches, vision["hidden_size"], vision["intermediate_size"])
    visual = Surgery(stand.model, build_pruner(method), stand.prompt.places).visual_tokens
    tokens = [shape.text_tokens + n for n in visual]
    layers = layer_flops(tokens, text["hidden_size"], text["intermediate_size"]).sum()
    return float(shape.tiles * tower), float(layers)


def selection(stand: Stand, methods: Sequence[str], repeats: int, budget: Budget) -> dict[str, Any]:
    """Time and bytes of one selection in place, in a prefill."""
    found = {}
    for method in methods:
        pruner: Any = build_pruner(method)
        if not pruner.stages(stand.prompt.shape.visual_tokens, len(stand.layers)):
            continue
        select, seen, alike = pruner.select, list[tuple[float, float, float, int]](), list[float]()

        def timed(
            view: Any, kept: int, pruner: Any = pruner, select: Any = select, seen: Any = seen, alike: Any = alike
        ) -> Any:
            held = 0
            begin = stand.clock()
            if stand.cuda:
                held = torch.cuda.memory_stats_as_nested_dict()["allocated_bytes"]["all"]["current"]
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
            queued = _queued(lambda: select(view, kept)) if stand.cuda else between
            seen.append((1e3 * wall, between, queued, taken))
            if not alike and isinstance(pruner, TopV):
                alike.append(_share_of_float64(pruner, view, out))
            return out

        object.__setattr__(pruner, "select", timed)  # in the way of the class's own, for this one object
        for number in budget.rounds(repeats + 3, 1.5, least=5):
            if number == 3:
                seen.clear()  # kernels were loaded
            with still(), Surgery(stand.model, pruner, stand.prompt.places), torch.no_grad():
                stand.model(**place(stand.prompt, stand.model), logits_to_keep=1)
        wall, between, queued, taken = zip(*seen, strict=True)
        found[method] = {"ms": median(wall), "device_ms": median(between), "bytes": max(taken), "choices": len(seen)}
        if stand.cuda:
            found[method]["queued_ms"] = median(queued)
        if alike:
            found[method]["as_in_float64"] = alike[0]
        if stand.cuda and method == "topv":
            room = 2 * 2 * stand.prompt.shape.visual_tokens * stand.card.text["intermediate_size"]
            met = median(wall) <= MOST_MS and max(taken) <= room
            found[method] |= {"goal": MOST_MS, "room_bytes": room, "met": met}
    return found


def _queued(work: Callable[[], Any]) -> float:
    """Milliseconds the device takes for ``work`` that the host hands out while the device is busy with other things."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda._sleep(20_000_000)  # cycles: some 10 ms, longer than any host takes to hand a choice out
    events[0].record()
    work()
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1])


def _share_of_float64(pruner: TopV, view: Any, chosen: torch.Tensor) -> float:
    """Share of TopV's choice that the same transport chooses in float64 with every matrix whole (its defaults)."""
    source, target = (torch.nn.functional.normalize(x.double(), dim=1) for x in (view.source, view.target))
    at, kernel = view.positions.double(), (1 - source @ target.T).clamp_(min=0).div_(2).sqrt_().mul_(pruner.alpha)
    near = (at[:, None] - at).square().sum(2).div_(-2 * pruner.sigma**2).exp_()
    near.mul_(view.images[:, None] == view.images)
    kernel.add_(1 - near, alpha=pruner.beta).div_(-pruner.eps).exp_()
    v = torch.ones_like(kernel[0])
    for _ in range(pruner.iterations):
        u = 1 / len(v) / (kernel @ v)
        v = 1 / len(v) / (u @ kernel)
    best = (kernel * v).amax(1).mul_(u).topk(len(chosen)).indices
    return float(torch.isin(best, chosen).double().mean())


def layers(stand: Stand, methods: Sequence[str], repeats: int, budget: Budget) -> dict[str, Any]:
    """What the decoder layers' time in a prefill is spent on.

    ``host_ms`` is what the host takes to hand the layers' work out, the device not waited for; ``device_ms`` what the
    device works on it, kernel by kernel. Where the first is the larger, the layers take that long whatever they
    compute.
    """
    found: dict[str, Any] = {}
    for method in methods:
        found[method] = {"host_ms": _host(stand, method, repeats, budget)} | _kernels(stand, method)
    first = found[methods[0]]
    for method in methods:
        row = found[method]
        promise = _flops(stand, method)[1] / _flops(stand, methods[0])[1]
        if first["device_ms"]:
            row |= {"device_ratio": row["device_ms"] / first["device_ms"], "layers_flops_promise": promise}
            row["device_over_promise"] = row["device_ratio"] / promise
            row["bound_by"] = "host" if row["host_ms"] > row["device_ms"] else "device"
    found["a new length"] = _new_lengths(stand, 4)
    return found


@contextmanager
def _around_layers(stand: Stand, enter: Callable[[], Any], leave: Callable[[], Any]) -> Iterator[None]:
    hooks = [
        stand.layers[0].register_forward_pre_hook(lambda *_: enter() and None, prepend=True),
        stand.layers[-1].register_forward_hook(lambda *_: leave() and None),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _named() -> Iterator[None]:
    """What the surgery does in prefill is called ``pruning`` in a profile."""
    ways = {name: getattr(Surgery, name) for name in ("_begin", "_choose", "_cut", "_adjust")}

    def named(way: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with torch.profiler.record_function("pruning"):
                return way(*args, **kwargs)

        return call

    for name, way in ways.items():
        setattr(Surgery, name, named(way))
    try:
        yield
    finally:
        for name, way in ways.items():
            setattr(Surgery, name, way)


def _host(stand: Stand, method: str, repeats: int, budget: Budget) -> float:
    """Milliseconds to hand out the layers' work to a device that has nothing else to do."""
    marks: list[float] = []
    begin, end = lambda: marks.append(stand.clock()), lambda: marks.append(time.perf_counter())
    with _around_layers(stand, begin, end):
        for _ in budget.rounds(repeats, 3):
            with still():
                stand.generate(1, method)
    return 1e3 * median(b - a for a, b in zip(marks[::2], marks[1::2], strict=True))


def _kernels(stand: Stand, method: str) -> dict[str, Any]:
    """Device time of the layers by kind of kernel, and how much of it the surgery and the choice launched."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if stand.cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    marks: list[Any] = []

    def begin() -> None:
        stand.clock()
        marks.append(torch.profiler.record_function("decoder layers"))
        marks[-1].__enter__()

    def end() -> None:
        stand.clock()
        marks.pop().__exit__(None, None, None)

    with _around_layers(stand, begin, end), _named(), torch.profiler.profile(activities=activities) as seen:
        stand.generate(1, method)
        stand.clock()
    events = list(seen.events())
    host = torch.autograd.DeviceType.CPU
    span = next(e.time_range for e in events if e.name == "decoder layers" and e.device_type == host)
    kernels = [
        e
        for e in events
        if e.device_type != host
        and span.start <= e.time_range.start <= span.end
        and e.name not in ("decoder layers", "pruning")  # a profile has ranges on the device, too
    ]
    kinds = dict.fromkeys([*KINDS, "other"], 0.0)
    names: dict[str, float] = {}
    for event in kernels:
        ms = event.time_range.elapsed_us() / 1e3
        kind = next((k for k, pattern in KINDS.items() if re.search(pattern, event.name.lower())), "other")
        kinds[kind] += ms
        names[event.name[:80]] = names.get(event.name[:80], 0.0) + ms
    largest = sorted(names.items(), key=lambda item: -item[1])[:14]
    ours = [e.time_range for e in events if e.name == "pruning" and e.device_type == host]
    launched = [
        kernel
        for e in events
        if e.device_type == host and any(o.start <= e.time_range.start <= o.end for o in ours)
        for kernel in e.kernels
    ]
    return {
        "device_ms": sum(kinds.values()), "launches": len(kernels), "kinds_ms": kinds, "largest_ms": dict(largest),
        "pruning_device_ms": sum(kernel.duration for kernel in launched) / 1e3, "pruning_launches": len(launched),
        "pruning_host_ms": sum(o.elapsed_us() for o in ours) / 1e3,
    }  # fmt: skip


def _new_lengths(stand: Stand, count: int) -> dict[str, Any]:
    """Milliseconds of a prefill at lengths that were never run, and of the same prefill again."""
    first, again = [], []
    for number in range(count):
        prompt = stand.prompt_of(TEXT + 3 + number)
        for into in (first, again):
            with still():
                begin = stand.clock()
                stand.generate(1, "baseline", prompt)
                into.append(1e3 * (stand.clock() - begin))
    return {"first_ms": median(first), "again_ms": median(again), "adds_ms": median(first) - median(again)}


def measure(stand: Stand, parts: Sequence[str], asked: argparse.Namespace, budget: Budget) -> Iterator[tuple[str, Any]]:
    """Each part and what it found; a part that fails says so, and the others go on."""
    methods = stand.methods()
    of_layers = ["baseline", "random", "topv"]
    ways: dict[str, Callable[[], Any]] = {
        "selection": lambda: selection(stand, list(methods), 3 * asked.rounds, budget),
        "prefill": lambda: prefill(stand, methods, 2 * asked.rounds, budget),
        "layers": lambda: layers(stand, of_layers, asked.rounds, budget),
        "decode": lambda: decode(stand, asked.rounds, asked.tokens, budget),
    }
    for part in parts:
        if part == "eager":
            continue
        begin = time.monotonic()
        try:
            found = ways[part]()
        except Exception as error:  # what the other parts find is worth having
            found = {"failed": {"error": f"{type(error).__name__}: {error}".partition("\n")[0], "met": False}}
        yield part, found
        print(f"{part}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)


def main() -> int:
    """Measure, print, write; 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part; repeatable")
    parser.add_argument("--rounds", type=int, default=12, help="rounds of decode; of prefill twice, selection thrice")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of a decode round")
    parser.add_argument("--budget", type=float, default=115, help="seconds after which no further round is begun")
    parser.add_argument("-o", "--output", type=Path, help="write everything as JSON, too; after each part")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU")
    asked = parser.parse_args()
    device, parts = "cpu" if asked.dry_run else "cuda", asked.part or [part for part in PARTS if part != "eager"]
    METERS.load(device).check()
    budget = Budget(asked.budget)
    stand = Stand(device, "sdpa")
    stand.generate(2)
    meter: Any = METERS.load(device)(stand.model)
    shape = stand.prompt.shape
    found: dict[str, Any] = {
        "schema": 2, "status": "measured", "model": MODEL, "dry_run": asked.dry_run,
        "prompt": {"tiles": shape.tiles, "visual_tokens": shape.visual_tokens, "text_tokens": shape.text_tokens},
        "environment": environment() | meter.environment(),
    }  # fmt: skip
    card = found["environment"].get("gpu", device)
    print(f"{card}, torch {torch.__version__}, {shape.tiles} tiles, {shape.length} tokens")
    print(f"ready: {time.monotonic() - BEGIN:.0f} s", file=sys.stderr, flush=True)

    def keep(part: str, rows: dict[str, Any]) -> None:
        found[part] = rows
        found["seconds"] = time.monotonic() - BEGIN
        show(part, rows)
        if asked.output is not None:
            asked.output.parent.mkdir(parents=True, exist_ok=True)
            asked.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    for part, rows in measure(stand, parts, asked, budget):
        keep(part, rows)
    if "eager" in parts:
        del stand, meter
        gc.collect()
        eager = Stand(device, "eager")
        keep("eager", prefill(eager, {"baseline": None, "fastv:scores=map": None}, asked.rounds, Budget(1e9)))
    rows = [row for part in PARTS for row in found.get(part, {}).values()]
    return int(any(row.get("met") is False for row in rows))


def show(part: str, rows: dict[str, Any]) -> None:
    """One line a row."""
    for name, row in rows.items():
        cells = (f"{key} {value:.4g}" for key, value in row.items() if type(value) in (int, float))
        kinds = (f"{key} {value:.3g}" for key, value in row.get("kinds_ms", {}).items())
        verdict = {True: "met", False: "MISSED", None: ""}[row.get("met")]
        print(f"{part:10}{name:38}{', '.join([*cells, *kinds])} {row.get('error', '')} {verdict}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
