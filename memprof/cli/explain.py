"""``memprof explain RUN``: who holds the peak, and what would lower it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from memprof.cli import _options as opt

if TYPE_CHECKING:
    from memprof.analysis.explain import Explanation
    from memprof.reports._paper import Screen

Row = tuple[str, ...]


def explain(
    run: opt.ARun,
    sample: Annotated[
        str | None, typer.Option("--sample", help="A sample's id; default: the one with the highest peak.")
    ] = None,
    what_if: Annotated[
        bool, typer.Option("--what-if/--no-what-if", help="Predict what would lower the peak (seconds to a minute).")
    ] = True,
    top: Annotated[int, typer.Option("--top", min=0, help="How many of the largest tensors to name.")] = 6,
    unit: opt.FittingUnit = None,
    json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Tell who holds the highest instant of a run, and predict what would lower it, best first.

    Examples:
    memprof explain runs/first

    memprof explain runs/first --sample ai2d-17 --json
    """
    from memprof.analysis.explain import explain as explain_run
    from memprof.analysis.whatif import Benches
    from memprof.cli._runs import find
    from memprof.reports._paper import Screen
    from memprof.units import check_unit, unit_for

    if unit is not None:
        check_unit(unit)
    benches, found = Benches(), []
    errors = Screen(stderr=True)
    with errors.status("reading the run") as status:
        if quiet or json or not errors.is_terminal:
            status.stop()
        for one in find([run]):
            found.append(
                explain_run(
                    one, sample, what_if=what_if, benches=benches,
                    progress=lambda name: status.update(f"predicting: {name}"),
                )
            )  # fmt: skip
    if json:
        import json as encoder

        document = {"schema": 1, "explanations": [one.to_json() for one in found]}
        sys.stdout.write(encoder.dumps(document, indent=1, ensure_ascii=False) + "\n")
        return
    if len(found) == 1:
        _show(found[0], unit_for(found[0].dynamic_peak_bytes, unit), top)
    else:
        _show_side_by_side(found, unit_for(max(one.dynamic_peak_bytes for one in found), unit))


def _show(found: Explanation, unit: str, top: int) -> None:
    from rich.text import Text

    from memprof.analysis.explain import floor_sentence, sentence
    from memprof.reports._paper import Screen
    from memprof.units import format_bytes

    def size(n_bytes: int) -> str:
        return format_bytes(n_bytes, unit, 2)

    console = Screen(highlight=False)
    console.print(Text(sentence(found, size), style="bold"))
    _where(console, found, unit)
    _holders(console, found, unit, top)
    if found.predicted_peak_bytes is None:
        return
    _answers(console, found, unit)
    for line in (floor_sentence(found, size), *found.notes):
        if line:
            console.print(Text(line))
    console.print()


def _show_side_by_side(found: list[Explanation], unit: str) -> None:
    """Several methods on one page: a sentence each, their parts beside each other, and what would lower each."""
    from rich.text import Text

    from memprof.analysis.explain import floor_sentence, sentence
    from memprof.reports._paper import Screen
    from memprof.telling.palette import PART_LABELS
    from memprof.units import format_bytes

    console = Screen(highlight=False)
    names = _names(found)
    for one in found:
        console.print(Text(sentence(one, lambda n: format_bytes(n, unit, 2)), style="bold"))
    held = [p for p in PART_LABELS if any(one.parts.get(p) for one in found)]
    rows: list[Row] = [
        (f"  {PART_LABELS[p]}", *(_number(one.parts[p], unit) if one.parts.get(p) else "-" for one in found))
        for p in sorted(held, key=lambda p: -max(one.parts.get(p, 0) for one in found))
    ]
    rows.insert(0, ("dynamic", *(_number(one.dynamic_peak_bytes, unit) for one in found)))
    rows.insert(0, ("static: weights and buffers", *(_number(one.static_bytes, unit) for one in found)))
    _columns(console, f"Who holds it at that instant, in {unit}", "what", names, rows)
    _cache(console, found)
    if any(one.predicted_peak_bytes is None for one in found):
        return
    _columns(console, f"Peak above static with one change, in {unit} (predicted; * may change answers)", "change",
             names, _lowering(found, unit))  # fmt: skip
    for name, one in zip(names, found, strict=True):
        if line := floor_sentence(one, lambda n: format_bytes(n, unit, 2)):
            console.print(Text(f"{name}: {line}"))
    for line in dict.fromkeys(note for one in found for note in one.notes):
        console.print(Text(line))


def _names(found: list[Explanation]) -> list[str]:
    """Titles, and the whole spec where two have the same."""
    titles = [one.method for one in found]
    return [t if titles.count(t) == 1 else one.spec["method"] for t, one in zip(titles, found, strict=True)]


def _lowering(found: list[Explanation], unit: str) -> list[Row]:
    """The peak as it is, then a row a change that lowers any of them; where it does not, a dash."""
    lower: dict[str, dict[int, int]] = {}
    most: dict[str, int] = {}
    for number, one in enumerate(found):
        for answer in one.answers:
            if not answer.refused and answer.saved_bytes >= (one.predicted_peak_bytes or 0) / 1000:
                name = answer.name if answer.exact else f"{answer.name} *"
                lower.setdefault(name, {})[number] = answer.dynamic_peak_bytes
                most[name] = max(most.get(name, 0), answer.saved_bytes)
    base: Row = ("as it is", *(_number(one.predicted_peak_bytes or 0, unit) for one in found))
    return [
        base,
        *(
            (name, *(_number(lower[name][i], unit) if i in lower[name] else "-" for i in range(len(found))))
            for name in sorted(lower, key=lambda name: -most[name])
        ),
    ]


def _columns(console: Screen, title: str, first: str, names: list[str], rows: list[Row]) -> None:
    """A table with a column a method, or so many tables that every column has its room."""
    room = max(1, (console.width - 30) // (max(map(len, [*names, "0.000"])) + 2))
    for start in range(0, len(names), room):
        part = slice(1 + start, 1 + start + room)
        _print(console, title, first, names[start : start + room], [(row[0], *row[part]) for row in rows])


def _where(console: Screen, found: Explanation, unit: str) -> None:
    from memprof.telling.palette import PART_LABELS

    def share(n_bytes: int) -> str:
        return f"{n_bytes / found.dynamic_peak_bytes:.1%}"

    parts = sorted(found.parts.items(), key=lambda item: -item[1])
    rows: list[Row] = [
        ("static: weights and buffers", _number(found.static_bytes, unit), ""),
        ("dynamic", _number(found.dynamic_peak_bytes, unit), "100.0%"),
        *((f"  {PART_LABELS[name]}", _number(n, unit), share(n)) for name, n in parts if n),
        ("reserved beyond allocated: rounding, fragmentation", _number(found.rounding_bytes, unit), ""),
    ]
    if found.context_bytes is not None:
        rows.append(("CUDA context and libraries: device beyond reserved", _number(found.context_bytes, unit), ""))
    _print(console, f"Who holds it at that instant ({found.status})", "what", [unit, "of dynamic"], rows)
    _cache(console, [found])


def _cache(console: Screen, found: list[Explanation]) -> None:
    """Reports count the cache otherwise: say which number this is."""
    from rich.text import Text

    if any(one.parts.get("kv_cache") for one in found):
        line = "KV cache: what it holds at that instant; in memprof report it is the most that a token left."
        console.print(Text(line, style="dim"))


def _holders(console: Screen, found: Explanation, unit: str, top: int) -> None:
    from memprof.telling.holders import line

    rows: list[Row] = [(line(holder), _number(holder.bytes, unit)) for holder in found.holders[:top]]
    if rows:
        _print(console, "Largest tensors then", "module: operator, shape, dtype", [unit], rows)


def _answers(console: Screen, found: Explanation, unit: str) -> None:
    """The changes that lower the peak, best first, then in one line those that do not."""
    assert found.predicted_peak_bytes is not None
    base = found.predicted_peak_bytes
    rows: list[Row] = [("as it is", _number(base, unit), "", "", found.words)]
    idle, failed = [], []
    for answer in found.answers:
        if answer.refused:
            failed.append(f"{answer.name}: could not be predicted ({answer.refused})")
        elif answer.saved_bytes < base / 1000:
            idle.append(answer.name)
        else:
            name, saved = answer.name if answer.exact else f"{answer.name} *", answer.saved_bytes
            numbers = (_number(answer.dynamic_peak_bytes, unit), _number(saved, unit), f"{saved / base:.0%}")
            rows.append((name, *numbers, answer.words))
    title = "What would lower it (predicted; * may change answers)"
    _print(console, title, "change", [f"peak {unit}", "saves", ""], rows, last="then held by")
    for line in ([f"Would not lower it: {'; '.join(idle)}."] if idle else []) + failed:
        console.print(line, markup=False)


def _number(n_bytes: int, unit: str) -> str:
    from memprof.units import in_unit

    text = f"{in_unit(n_bytes, unit):.3f}"
    return "<0.001" if n_bytes > 0 and float(text) == 0 else text


def _print(
    console: Screen, title: str, first: str, numbers: list[str], rows: list[Row], last: str | None = None
) -> None:
    """A table: text, numbers, and maybe text again."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    if last is not None:
        table.add_column(last, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
