"""What every output says about runs: which belong side by side, what each is called and saves, where it comes from."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from memprof.plugins import split_spec
from memprof.records import GIVEN, SCHEMA, Run, RunRecord
from memprof.telling.palette import method_label, model_label, task_label

BASELINE = "baseline"


def method_of(run: Run) -> str:
    """The method's name, without its settings."""
    return split_spec(run.record.spec.method)[0]


def keep_of(run: Run) -> float | None:
    """The share of visual tokens kept: 1 for Baseline, what the method's spec says, or None where it does not say."""
    name, settings = split_spec(run.record.spec.method)
    return _share(settings["keep"]) if "keep" in settings else (1.0 if name == BASELINE else None)


def _share(text: str) -> float | None:
    """A share as a damaged or later record has it: None where it is none."""
    try:
        share = float(text)
    except ValueError:
        return None
    return share if 0 <= share <= 1 else None


def keep_text(run: Run) -> str:
    """``'0.50 / 0.50'``: the share kept, and beside it the share pruned."""
    keep = keep_of(run)
    return "-" if keep is None else f"{keep:.2f} / {1 - keep:.2f}"


def method_text(run: Run) -> str:
    """``'TopV (keep 0.5, pruned 0.5, layer 2)'``."""
    name, settings = split_spec(run.record.spec.method)
    shown = [f"{key} {value}" for key, value in settings.items() if key != "keep"]
    share = _share(settings.get("keep", ""))
    if share is not None:
        shown = [f"keep {settings['keep']}, pruned {1 - share:.4g}", *shown]
    return f"{method_label(name)} ({', '.join(shown)})" if shown else method_label(name)


def data_title(record: RunRecord) -> str:
    """``'AI2D'`` for a task's own data, else the data themselves: ``'mine.csv'``, ``'its own drawn questions'``."""
    if _is_the_tasks(record):
        return task_label(record.spec.task)
    if record.spec.data in ("bundled", "hub", GIVEN):
        return record.data_label.partition(" (")[0]
    return Path(record.spec.data).name or record.spec.data


def _is_the_tasks(record: RunRecord) -> bool:
    """Whether the data are the task's: bundled or of the hub, and no model's own in their place."""
    return record.spec.data in ("bundled", "hub") and " own " not in record.data_label


def data_text(record: RunRecord) -> str:
    """``'AI2D (bundled sample)'``: the task and how its data are to be named."""
    task, label = task_label(record.spec.task), record.data_label or record.spec.data
    if not _is_the_tasks(record):
        named = label.startswith(("shapes from", "pictures in")) or record.spec.data in ("bundled", "hub", GIVEN)
        return label if named else f"{data_title(record)}, asked as {task}"
    return label if record.spec.task.lower() in label.lower() else f"{task} ({label})"


def where_text(record: RunRecord) -> str:
    """``'predicted for h100'``, ``'measured on cuda (NVIDIA H200)'``."""
    card = record.environment.get("gpu") or record.spec.gpu
    if record.status == "predicted":
        return f"predicted for {card}" if card else "predicted for no card in particular"
    return f"{record.status} on {device_text(record)}"


def device_text(record: RunRecord) -> str:
    """The device as the run recorded it, with the GPU's name where there is one."""
    name = record.environment.get("gpu") or record.spec.gpu
    return f"{record.spec.device} ({name})" if name else record.spec.device


def version_of(record: RunRecord, package: str) -> str:
    """The version of ``package`` that made the run, or ``unknown``."""
    there = record.environment
    return str(there.get(package) or there.get("packages", {}).get(package) or "unknown")


def groups(runs: Iterable[Run]) -> list[list[Run]]:
    """``runs`` sorted into those that may be compared: one model, task, data, stack, dtype, status and device.

    Groups and the runs in them keep their order, but Baseline comes first.
    """
    found: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        spec = run.record.spec
        key = (
            spec.model, spec.task, run.record.data_label, spec.stack, spec.dtype, run.record.status,
            device_text(run.record), spec.max_new_tokens, spec.max_tiles, spec.limit, spec.shard,
        )  # fmt: skip
        found.setdefault(key, []).append(run)
    return [sorted(group, key=lambda r: method_of(r) != BASELINE) for group in found.values()]


def labels(group: Sequence[Run]) -> list[str]:
    """A short name for each run of a group: the method, and of its settings only those that tell it from its like."""
    specs = [split_spec(run.record.spec.method) for run in group]
    named = []
    for name, settings in specs:
        like = [other for other_name, other in specs if other_name == name]
        telling = [
            f"{key} {value}"
            for key, value in settings.items()
            if any(key != "layer" or o.get("keep") == settings.get("keep") for o in like)
            and any(o.get(key) != value for o in like)
        ]
        named.append(" ".join([method_label(name), *telling]))
    seen: Counter[str] = Counter()
    for i, name in enumerate(named):
        seen[name] += 1
        if seen[name] > 1:
            named[i] = f"{name} #{seen[name]}"
    return named


def saving(run: Run, group: Sequence[Run]) -> float | None:
    """Share of Baseline's dynamic peak that ``run`` saves (negative: it needs more), or None without a Baseline.

    Both peaks are over the samples that both finished: where a card refuses Baseline the largest, what is left of it is
    no measure of a run that finished that one as well.
    """
    base = _baseline(group)
    if base is None or base is run:
        return None
    pairs = _finished_in_both(run, base)
    most = max((theirs for _, theirs in pairs), default=0)
    return 1 - max(own for own, _ in pairs) / most if most else None


def comparisons(group: Sequence[Run]) -> list[str]:
    """What savings are over, where that is fewer samples than Baseline or the run itself finished; else nothing."""
    base, found = _baseline(group), dict[str, list[str]]()
    for run, name in zip(group, labels(group), strict=True):
        if base is None or saving(run, group) is None:
            continue
        both = len(_finished_in_both(run, base))
        every = len({sample.id for one in (run, base) for sample in one.finished})
        if both < every:
            text = f"saved against Baseline: over the {both} of {every} samples that both finished"
            found.setdefault(text, []).append(name)
    return [f"{text} ({', '.join(names)})" for text, names in found.items()]


def _baseline(group: Sequence[Run]) -> Run | None:
    return next((run for run in group if method_of(run) == BASELINE), None)


def _finished_in_both(run: Run, base: Run) -> list[tuple[int, int]]:
    """Dynamic peaks under ``run`` and ``base`` of each sample that both finished."""
    there = {sample.id: sample.dynamic_peak_bytes for sample in base.finished}
    return [(sample.dynamic_peak_bytes, there[sample.id]) for sample in run.finished if sample.id in there]


def change_text(saved: float | None) -> str:
    """A saving as the change it makes: ``0.456`` -> ``'−46 %'``, ``-0.15`` -> ``'+15 %'``, None -> ``''``."""
    if saved is None:
        return ""
    percent = round(-100 * saved)
    return f"{'+' if percent > 0 else '−' if percent < 0 else '±'}{abs(percent)} %"


def peak_text(value: str, saved: float | None) -> str:
    """A dynamic peak and, where there is a Baseline, the change against it: ``'0.98 GiB −46 %'``."""
    return f"{value} {change_text(saved)}".rstrip()


def _count(run: Run) -> str:
    """How many samples finished: ``'9 of 48'`` where the run did not come to its end."""
    asked = run.record.samples_asked
    return f"{len(run.finished)} of {asked}" if run.unfinished and asked else str(len(run.finished))


def status_text(run: Run) -> str:
    """``'predicted'``, and ``'predicted, unfinished'`` where the run did not come to its end."""
    return run.record.status + (", unfinished" if run.unfinished else "")


def unfinished(runs: Sequence[Run]) -> list[str]:
    """A line for each run that is not whole, and for what was mended in reading it."""
    found = []
    for run, name in zip(runs, labels(runs), strict=True):
        where = f" ({run.path})" if run.path else ""
        if run.unfinished:
            own = run.record.spec.data == GIVEN  # a program's own calls are its own to repeat
            how = "run the program again" if own else "memprof run --resume finishes it"
            found.append(f"{name} is unfinished: {run.unfinished}; {how}{where}")
        found += [f"{name}: {text}{where}" for text in run.healed]
    return found


def provenance(runs: Sequence[Run]) -> dict[str, Any]:
    """Where the numbers of ``runs`` come from; a value they do not share is the distinct values joined by `` / ``."""

    def shared(values: Iterable[str]) -> str:
        return " / ".join(dict.fromkeys(values))

    records = [run.record for run in runs]
    return {
        "model": shared(model_label(r.spec.model) for r in records),
        "methods": list(dict.fromkeys(method_text(run) for run in runs)),
        "data": shared(data_text(r) for r in records),
        "samples": shared(_count(run) for run in runs),
        "failed": shared(str(len(run.samples) - len(run.finished)) for run in runs),
        "stack": shared(r.spec.stack for r in records),
        "dtype": shared(r.spec.dtype for r in records),
        "status": shared(status_text(run) for run in runs),
        "device": shared(device_text(r) for r in records),
        "where": shared(where_text(r) for r in records),
        "torch": shared(version_of(r, "torch") for r in records),
        "transformers": shared(version_of(r, "transformers") for r in records),
        "memprof": shared(version_of(r, "memprof") for r in records),
    }


def provenance_lines(origin: dict[str, Any]) -> list[str]:
    """``provenance`` as short phrases, to be set in one line or broken between any two."""
    counted = f"{origin['samples']} sample{'' if origin['samples'] == '1' else 's'}"
    return [
        origin["model"],
        *origin["methods"],
        f"{origin['data']}, {counted}" + (f", {origin['failed']} failed" if origin["failed"] != "0" else ""),
        f"stack {origin['stack']}",
        origin["dtype"],
        origin.get("where") or f"{origin['status']} on {origin['device']}",
        f"torch {origin['torch']}",
        f"transformers {origin['transformers']}",
        f"memprof {origin['memprof']}",
    ]


def header(kind: str, name: str, runs: Sequence[Run], said: Sequence[str] = ()) -> dict[str, Any]:
    """The first keys of a figure's data: what it is, where it comes from, and what else is to be said, if anything."""
    return {
        "schema": SCHEMA,
        "kind": kind,
        "name": name,
        "provenance": provenance(runs),
        "specs": [run.record.spec.to_json() for run in runs],
        **({"said": list(said)} if said else {}),
    }


def memory_text(data: Mapping[str, Any]) -> str:
    """What a figure's axis measures: ``GPU memory``, and ``memory`` where a run of its data was on no GPU."""
    return "memory" if any(spec.get("device") == "cpu" for spec in data.get("specs", ())) else "GPU memory"


def slug(text: str) -> str:
    """``text`` as part of a file name."""
    return re.sub(r"[^a-z0-9.=-]+", "-", text.lower()).strip("-.") or "x"


def file_stems(all_groups: Sequence[Sequence[Run]]) -> tuple[list[str], list[list[str]]]:
    """File name stems, unique among themselves: one a group, and one a run of each group.

    A stem names model and task (and a run's its method), and the stack when it is not today's. Settings, status and
    device join it only where they are needed to tell two apart.
    """

    def stem(run: Run, *, full: bool) -> str:
        spec = run.record.spec
        words = [spec.model, _stem(run.record), *([] if spec.stack == "current" else [spec.stack])]
        return "_".join(map(slug, words + ([run.record.status, device_text(run.record)] if full else [])))

    group_stems = _unique([stem(g[0], full=False) for g in all_groups], [stem(g[0], full=True) for g in all_groups])
    flat = [(head, run) for head, group in zip(group_stems, all_groups, strict=True) for run in group]
    names = _unique(
        [f"{head}_{slug(method_of(run))}" for head, run in flat],
        [f"{head}_{slug(run.record.spec.method)}" for head, run in flat],
    )
    each = iter(names)
    return group_stems, [[next(each) for _ in group] for group in all_groups]


def _stem(record: RunRecord) -> str:
    """The data as part of a file's name."""
    if _is_the_tasks(record):
        return record.spec.task
    if record.spec.data == GIVEN:
        return record.spec.task
    return "own-questions" if record.spec.data in ("bundled", "hub") else Path(record.spec.data).stem or "data"


def _unique(short: list[str], long: list[str]) -> list[str]:
    """``short`` names, ``long`` ones where short ones clash, numbered where these clash too."""
    many, seen, out = Counter(short), Counter[str](), []
    for brief, full in zip(short, long, strict=True):
        name = brief if many[brief] == 1 else full
        seen[name] += 1
        out.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return out
