"""Did what was pruned leave the memory? Planned against found, layer by layer, for runs and for anyone's model.

Four faults are told apart, each seen in public code (METHODS.md): tokens that are masked and stay; a layer that ran
twice and caches twice; a cache that is a slice and keeps its whole buffer; attention maps that outlive their layer.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from memprof.bench import Bench
from memprof.bench.generate import place
from memprof.errors import DataError, GateFailed, UsageError
from memprof.families import Model
from memprof.meters import Meter, meter_for
from memprof.models import find
from memprof.profiler import Profiler, cache_tensors, storage_bytes
from memprof.prompts import Prompt
from memprof.pruning import Pruner, build_pruner, visual_tokens_per_layer
from memprof.pruning.surgery import Surgery
from memprof.records import Holder, Run, RunSpec, SampleRecord
from memprof.runner import complete_spec
from memprof.simulator.trace import Trace
from memprof.stacks import Stack
from memprof.telling.holders import is_map

_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


@dataclass(frozen=True)
class KeptMap:
    """An attention map that outlived its layer.

    Attributes:
        layer: The decoder layer that made it.
        bytes: Its size.
        until: The last layer that ran while it was alive; None where it was alive when prefill was done.
    """

    layer: int
    bytes: int
    until: int | None


@dataclass(frozen=True)
class Evidence:
    """One prompt's prefill. Lists have one entry a decoder layer.

    Attributes:
        prompt: What to call it.
        length: Tokens of the whole prompt.
        planned: KV length that the pruning plan leaves.
        found: KV length there was.
        held_bytes: Bytes of the storages behind each layer's KV, a view with all that it keeps alive.
        needed_bytes: Bytes that ``found`` tokens need.
        maps: Attention maps that outlived their layer longer than the method needs them.
    """

    prompt: str
    length: int
    planned: Sequence[int]
    found: Sequence[int]
    held_bytes: Sequence[int]
    needed_bytes: Sequence[int]
    maps: Sequence[KeptMap] = ()


@dataclass(frozen=True)
class Finding:
    """One fault: ``kind`` is ``masked``, ``doubled``, ``length``, ``view`` or ``map``; ``line`` says it."""

    kind: str
    line: str
    layers: list[int]
    bytes: int


@dataclass(frozen=True)
class Report:
    """What an audit came to.

    Attributes:
        subject: What was audited.
        prompts: How many prefills were looked at.
        layers: How many decoder layers each has.
        findings: The faults; none is a pass.
    """

    subject: str
    prompts: int
    layers: int
    findings: list[Finding] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def check(self) -> None:
        """Raise :class:`~memprof.errors.GateFailed` with every finding, if there is one."""
        if self.findings:
            raise GateFailed(f"{self.subject}: " + "; ".join(finding.line for finding in self.findings))

    def to_json(self) -> dict[str, Any]:
        """As plain dicts and lists."""
        return {**dataclasses.asdict(self), "passed": self.passed}


# -- judging -----------------------------------------------------------------------------------------------------------


def judge(evidence: Evidence) -> list[Finding]:
    """The faults in one prompt's evidence, the worst kind first."""
    if len(evidence.found) != len(evidence.planned):
        layers = f"{len(evidence.found)} layers have a KV cache and {len(evidence.planned)} were planned"
        return [Finding("length", layers, [], 0)]
    return [*_lengths(evidence), *_views(evidence), *_maps(evidence)]


def _lengths(e: Evidence) -> Iterator[Finding]:
    """Layers that cache another number of tokens than planned."""
    wrong = [i for i, (plan, found) in enumerate(zip(e.planned, e.found, strict=True)) if plan != found]
    doubled = [i for i in wrong if e.found[i] > e.length]
    if doubled:
        times = e.found[doubled[0]] / e.length
        yield Finding(
            "doubled",
            f"KV doubled in {_layers(doubled)}: {e.found[doubled[0]]:,} tokens cached, {times:.3g} times the prompt's "
            f"{e.length:,}; the layer ran more than once",
            doubled,
            sum(_excess(e, i) for i in doubled),
        )
    to_prune = [i for i, plan in enumerate(e.planned) if plan < e.length]
    masked = to_prune if all(e.found[i] == e.length for i in to_prune) else []
    if masked:
        yield Finding(
            "masked",
            f"nothing left the cache: {_layers(masked)} hold all {e.length:,} tokens where {e.planned[masked[0]]:,} "
            "were to stay; pruned tokens are masked at most, and save nothing",
            masked,
            sum(_excess(e, i) for i in masked),
        )
    rest = [i for i in wrong if i not in doubled and i not in masked]
    for (plan, found), layers in _grouped(rest, lambda i: (e.planned[i], e.found[i])):
        extra = sum(_excess(e, i) for i in layers)
        yield Finding("length", f"{_layers(layers)}: {found:,} tokens cached, {plan:,} planned", layers, extra)


def _views(e: Evidence) -> Iterator[Finding]:
    """Layers whose KV keeps more bytes alive than its tokens need."""
    wide = [i for i, (held, need) in enumerate(zip(e.held_bytes, e.needed_bytes, strict=True)) if held > need]
    if wide:
        i, extra = wide[0], sum(e.held_bytes[i] - e.needed_bytes[i] for i in wide)
        yield Finding(
            "view",
            f"the KV of {_layers(wide)} keeps {e.held_bytes[i]:,} bytes alive where its {e.found[i]:,} tokens need "
            f"{e.needed_bytes[i]:,}: a slice that holds on to its buffer ({extra:,} bytes in all)",
            wide,
            extra,
        )


def _maps(e: Evidence) -> Iterator[Finding]:
    """Attention maps that nobody needs any more."""
    if e.maps:
        layers, total = sorted({kept.layer for kept in e.maps}), sum(kept.bytes for kept in e.maps)
        ends = [kept.until for kept in e.maps]
        last = max((end for end in ends if end is not None), default=0)
        until = "the end of prefill" if None in ends else f"layer {last}"
        yield Finding(
            "map",
            f"attention maps of {_layers(layers)} ({total:,} bytes) are kept until {until}",
            layers,
            total,
        )


def _excess(e: Evidence, i: int) -> int:
    """Bytes that layer ``i``'s unplanned tokens take."""
    each = e.needed_bytes[i] // e.found[i] if e.found[i] else 0
    return max(0, e.found[i] - e.planned[i]) * each


def _grouped(layers: Iterable[int], key: Callable[[int], Any]) -> list[tuple[Any, list[int]]]:
    groups: dict[Any, list[int]] = {}
    for i in layers:
        groups.setdefault(key(i), []).append(i)
    return list(groups.items())


def _layers(numbers: Sequence[int]) -> str:
    """``[2, 3, 4, 7]`` -> ``'layers 2-4, 7'``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"layer{'s' if len(numbers) > 1 else ''} {text}"


# -- from a record -----------------------------------------------------------------------------------------------------


def audit_run(run: Run) -> Report:
    """Audit every finished sample of a recorded run; maps are seen only where they are among a peak's largest tensors.

    Raises:
        DataError: The run has no finished sample.
    """
    if not run.finished:
        raise DataError(f"{run.path or 'the run'} has no finished sample to audit")
    spec = run.record.spec
    pruner = build_pruner(spec.method, spec.stack)
    model = find.of_run(run.record)
    cases = [_recorded(sample, pruner, model, spec) for sample in run.finished]
    return _report(f"{spec.method} on {model.title} ({run.record.status})", cases)


def _recorded(sample: SampleRecord, pruner: Pruner, model: Model, spec: RunSpec) -> Evidence:
    layers, held = len(sample.kv_tokens_found), len(sample.kv_bytes_per_layer)
    if not layers or held != layers:
        raise DataError(f"sample {sample.id} is recorded with KV lengths of {layers} layers and KV bytes of {held}")
    each = _bytes_a_token(model, spec.dtype) * (sample.shape.batch if sample.shape is not None else 1)
    maps = _maps_at_peak(sample.peak_holders, allowed=_hold(pruner))
    return Evidence(
        prompt=sample.id,
        length=sample.visual_tokens + sample.text_tokens,
        planned=_plan(pruner, sample.visual_tokens, sample.text_tokens, layers),
        found=sample.kv_tokens_found,
        held_bytes=sample.kv_bytes_per_layer,
        needed_bytes=[tokens * each for tokens in sample.kv_tokens_found],
        maps=maps,
    )


def _plan(pruner: Pruner, visual: int, text: int, layers: int) -> list[int]:
    """KV lengths that the method's cuts leave. A mask-only method is held to the cuts it names, not to its mask."""
    return [text + n for n in visual_tokens_per_layer(pruner.stages(visual, layers), visual, layers)]


def _bytes_a_token(model: Model, dtype: str) -> int:
    """KV bytes of one token in one layer."""
    return 2 * model.kv_numbers * (4 if dtype == "float32" else 2)


def _hold(pruner: Pruner) -> int:
    """For how many layers a map may outlive its own: the reference's loop holds the one it is to read for one."""
    return 1 if "map" in pruner.needs else 0


def _maps_at_peak(holders: Sequence[Holder], allowed: int) -> list[KeptMap]:
    """Maps alive at a peak that belong to layers before the one at work."""
    numbered = [(int(found[1]), holder) for holder in holders if (found := _LAYER.search(f"{holder.module}."))]
    busy = max((n for n, holder in numbered if holder.part in ("attention", "mlp")), default=0)
    logits = any(holder.part == "logits" for holder in holders)
    return [
        KeptMap(n, holder.bytes, None if logits else busy)
        for n, holder in numbered
        if is_map(holder) and (logits or n < busy - allowed)
    ]


def _report(subject: str, cases: Sequence[Evidence]) -> Report:
    """Judge every case; the same fault in several prompts is one finding."""
    found: dict[tuple[str, tuple[int, ...]], list[tuple[str, Finding]]] = {}
    for case in cases:
        for finding in judge(case):
            found.setdefault((finding.kind, tuple(finding.layers)), []).append((case.prompt, finding))
    findings = []
    for same in found.values():
        prompt, worst = max(same, key=lambda item: item[1].bytes)
        more = f" ({len(same)} of {len(cases)} prompts; here {prompt})" if len(cases) > 1 else ""
        findings.append(dataclasses.replace(worst, line=worst.line + more))
    return Report(subject, len(cases), len(cases[0].found), findings)


# -- from a model that runs --------------------------------------------------------------------------------------------


def audit_method(model_name: str, method: str, device: str = "sim", stack: str = "current") -> Report:
    """Run one prompt of three tiles under a method of memprof's own and audit its prefill.

    Args:
        model_name: A model of ``memprof list``.
        method: A method's spec.
        device: ``sim``, ``cpu`` or ``cuda``; ``cpu`` and ``cuda`` build the model with random weights.
        stack: ``current`` or ``paper``.
    """
    asked = RunSpec(model_name, method, "ai2d", device, stack, max_new_tokens=2)
    known = find.model_of(asked)
    done = complete_spec(dataclasses.replace(asked, dtype=known.dtype))
    bench = Bench(done.setup)
    model, meter = bench.ready()
    prompt = bench.written(done.ask(known.family.shape(known, 896, 448, 30)))
    subject = f"{done.spec.method} on {known.title}"
    return audit_pruner(model, done.pruner, prompt, stack=stack, meter=meter, subject=subject)


def audit_pruner(
    model: nn.Module,
    pruner: Pruner,
    prompt: Prompt,
    *,
    stack: str = "current",
    meter: Meter | None = None,
    subject: str = "",
) -> Report:
    """Audit ``pruner`` as memprof's surgery carries it out on ``model`` and ``prompt``."""
    assert prompt.places is not None
    with Stack(model, stack), Surgery(model, pruner, prompt.places):
        watch = _Watch(model, meter or meter_for(model), _hold(pruner))
        with watch:
            inputs = place(prompt, model)
            _generate(model, watch.meter, inputs)
    planned = _plan(pruner, prompt.shape.visual_tokens, prompt.shape.text_tokens, len(watch.found))
    return _report(subject or pruner.title, [watch.evidence("prompt", prompt.places.length, planned)])


def audit_generate(
    model: nn.Module,
    inputs: Mapping[str, Any],
    planned: Sequence[int] | int,
    *,
    map_layers: int = 0,
    generate: Callable[..., Any] | None = None,
) -> Report:
    """Audit a model somebody else has patched to prune.

    ::

        report = audit_generate(model, inputs, planned=[n] * 2 + [n // 2] * 22)
        report.check()  # raises GateFailed with one line a finding

    Args:
        model: A transformers model, patched.
        inputs: What ``model.generate`` is given: batch size 1, with ``input_ids`` or ``inputs_embeds``.
        planned: KV length of each decoder layer after prefill, as the pruning is meant to leave it; one number for
            all layers alike.
        map_layers: For how many layers after its own the method needs a layer's attention map (FastV's reference: 1).
        generate: Called with ``inputs`` and generation settings in place of ``model.generate``.

    Raises:
        UsageError: The inputs say no length, or nothing was cached.
    """
    given = inputs.get("input_ids", inputs.get("inputs_embeds"))
    if given is None:
        raise UsageError("audit_generate needs input_ids or inputs_embeds to know the prompt's length")
    with _Watch(model, meter_for(model), map_layers) as watch:
        _generate(model, watch.meter, inputs, generate)
    if not watch.found:
        raise UsageError("generate() kept no KV cache: there is nothing to audit (use_cache=False?)")
    plan = [planned] * len(watch.found) if isinstance(planned, int) else list(planned)
    return _report(type(model).__name__, [watch.evidence("prompt", int(given.shape[1]), plan)])


def _generate(
    model: nn.Module, meter: Meter, inputs: Mapping[str, Any], generate: Callable[..., Any] | None = None
) -> None:
    call = generate or model.generate
    call(**inputs, max_new_tokens=2, do_sample=False, logits_processor=meter.logits_processors())  # type: ignore[operator]


class _Watch:
    """Profiles one ``generate()`` and notes each layer's cache when prefill is done."""

    def __init__(self, model: nn.Module, meter: Meter, map_layers: int) -> None:
        self.model, self.meter, self.map_layers = model, meter, map_layers
        self.found: list[int] = []
        self.held: list[int] = []
        self.needed: list[int] = []
        self._profiler = Profiler(model, meter)

    def __enter__(self) -> _Watch:
        self._profiler.__enter__()
        self._hook = self.model.register_forward_hook(self._look)
        return self

    def __exit__(self, *error: Any) -> None:
        self._hook.remove()
        self._profiler.__exit__(*error)

    def _look(self, model: nn.Module, args: Any, out: Any) -> None:
        if self.found:
            return
        cache = getattr(out, "past_key_values", None)
        for layer in getattr(cache, "layers", []):
            tensors = cache_tensors(layer)
            self.found.append(max((int(t.shape[-2]) for t in tensors), default=0))
            self.held.append(storage_bytes(tensors))
            self.needed.append(sum(t.numel() * t.element_size() for t in tensors))

    def evidence(self, prompt: str, length: int, planned: Sequence[int]) -> Evidence:
        """What was seen, against ``planned``."""
        trace: Trace | None = getattr(self.meter, "trace", None)
        if trace is None:
            maps = _maps_at_peak(self._profiler.reading.holders, self.map_layers)
        else:
            maps = _maps_in(trace, [name for name, _ in self._profiler.anatomy.layers], self.map_layers)
        return Evidence(prompt, length, planned, self.found, self.held, self.needed, maps)


def _maps_in(trace: Trace, layers: Sequence[str], allowed: int) -> list[KeptMap]:
    """Maps that were alive when a layer more than ``allowed`` behind their own ran, or when prefill was done."""
    number = {name: i for i, name in enumerate(layers)}

    def layer_of(slot: int) -> int | None:
        module = trace.sites[slot][0]
        return next((i for name, i in number.items() if module == name or module.startswith(name + ".")), None)

    alive: dict[int, int] = {}
    late: dict[int, int] = {}
    for event in trace.events[: trace.marks[0]]:
        if event < 0:
            alive.pop(~event, None)
            continue
        layer = layer_of(event)
        if layer is None:
            continue
        late |= {slot: layer for slot, own in alive.items() if layer > own + allowed}
        # Keys of fewer tokens than a head has numbers are shaped like a map, and are none.
        if _looks_like_map(trace.shapes[event]) and trace.parts[event] in ("attention", "other"):
            alive[event] = layer
    own = {slot: layer for slot in {*late, *alive} if (layer := layer_of(slot)) is not None}
    return [
        KeptMap(layer, trace.nbytes[slot], None if slot in alive else late[slot]) for slot, layer in sorted(own.items())
    ]


def _looks_like_map(shape: Sequence[int]) -> bool:
    return len(shape) == 4 and shape[1] > 1 and 1 < shape[2] <= shape[3] and shape[2] == shape[-2]
