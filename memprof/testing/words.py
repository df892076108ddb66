"""A test that took too much memory, in words: how much, since when, who grew by part and by line of code."""

from __future__ import annotations

import re
from dataclasses import dataclass

from memprof.records import PARTS, Holder, Run
from memprof.telling.facts import where_text
from memprof.telling.palette import PART_LABELS
from memprof.testing.baselines import Taken
from memprof.units import KIB, MIB, in_unit, unit_for

#: Lines of code that are told.
MOST_LINES = 8
_NUMBER = re.compile(r"\.\d+(?=\.|$)")


@dataclass(frozen=True)
class Verdict:
    """What exceeded what.

    Attributes:
        test: The test's name.
        part: Of what was held; None: of all.
        now: Its bytes.
        most: What they might have been.
        reason: Where that comes from, in words.
        taken: All that the test took.
        before: What it took before, or None where nobody wrote it down.
        run: Where it was taken.
    """

    test: str
    part: str | None
    now: int
    most: int
    reason: str
    taken: Taken
    before: Taken | None
    run: Run


def text_of(n_bytes: int) -> str:
    """``'1.352 GiB'``, ``'12.3 MiB'``, ``'24.0 KiB'``."""
    if n_bytes < MIB:
        return f"{n_bytes / KIB:.1f} KiB"
    unit = unit_for(n_bytes)
    return f"{in_unit(n_bytes, unit):.{3 if unit == 'GiB' else 1}f} {unit}"


def grown(verdict: Verdict) -> str:
    """The message of a test that failed."""
    part = "peak memory" if verdict.part in (None, "peak") else PART_LABELS.get(verdict.part or "", verdict.part or "")
    over = verdict.now - verdict.most
    lines = [
        f"{part} is {text_of(verdict.now)}, {text_of(over)} above what {verdict.test} may take ({verdict.reason})",
        f"  {verdict.taken.what}",
        f"  {where_text(verdict.run.record)}" + f", called from {verdict.taken.caller}" * bool(verdict.taken.caller),
        "",
        *_parts(verdict),
        "",
        *_lines(verdict),
    ]
    return "\n".join(line.rstrip() for line in lines)


def _parts(verdict: Verdict) -> list[str]:
    """A row for each part: before, now and the change."""
    now, before = verdict.taken, verdict.before
    rows = [("static", before.static if before else None, now.static)]
    rows += [
        (PART_LABELS[part], before.parts.get(part, 0) if before else None, now.parts.get(part, 0))
        for part in PARTS
        if now.parts.get(part, 0) or (before and before.parts.get(part, 0))
    ]
    if before is not None:
        rows[1:] = sorted(rows[1:], key=lambda row: -(row[2] - (row[1] or 0)))
    rows.append(("peak", before.peak if before else None, now.peak))
    if verdict.part in PARTS:  # which may be largest at another instant
        most = f"most {PART_LABELS[verdict.part]} at any"
        rows.append((most, before.bytes_of(verdict.part) if before else None, now.bytes_of(verdict.part)))
    unit = unit_for(now.peak)
    wide = max(len(name) for name, _, _ in rows)
    title = f"at the highest instant, {unit}"
    wide = max(wide, len(title))
    if before is None:
        return [f"  {title:{wide}}  {'now':>10}", *(f"  {name:{wide}}  {_number(n, unit):>10}" for name, _, n in rows)]
    lines = [f"  {title:{wide}}  {'baseline':>10}  {'now':>10}  {'change':>10}"]
    for name, was, n in rows:
        change = n - (was or 0)
        told = f"{'+' if change > 0 else '-'}{_number(abs(change), unit)}" if change else ""
        lines.append(f"  {name:{wide}}  {_number(was or 0, unit):>10}  {_number(n, unit):>10}  {told:>10}")
    return lines


def _number(n_bytes: int, unit: str) -> str:
    text = f"{in_unit(n_bytes, unit):.3f}"
    return "<0.001" if n_bytes and float(text) == 0 else text


def _lines(verdict: Verdict) -> list[str]:
    """The lines of code whose tensors grew most, or hold most where nobody knows what they held."""
    now = _by_line(verdict.taken.holders, verdict.part)
    before = _by_line(verdict.before.holders, verdict.part) if verdict.before else {}
    changes = {place: n - before.get(place, 0) for place, n in now.items()}
    grew = {place: n for place, n in changes.items() if n > 0} if verdict.before else {}
    sign, title = ("+", "who grew") if grew else ("", "who holds it")
    shown = sorted((grew or now).items(), key=lambda item: -item[1])[:MOST_LINES]
    if not shown:
        return []
    numbers = [f"{sign}{text_of(n)}" for _, n in shown]
    wide = max(map(len, numbers))
    return [f"  {title}, of the largest tensors then:", *(
        f"  {number:>{wide}}  {place}" for number, (place, _) in zip(numbers, shown, strict=True)
    )]  # fmt: skip


def _by_line(holders: list[Holder], part: str | None) -> dict[str, int]:
    """Bytes by line of code, layers of a kind together; with a part, of that part alone."""
    total: dict[str, int] = {}
    for holder in holders:
        if part in PARTS and holder.part != part:
            continue
        module = _NUMBER.sub(".*", holder.module) or "outside any layer"
        where = f"{holder.line}  " if holder.line else ""
        place = f"{where}{PART_LABELS[holder.part]}, {module}"
        total[place] = total.get(place, 0) + holder.bytes
    return total
