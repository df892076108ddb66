"""One self-contained page of a snapshot: the curve to hover, parts stacked, the moment it ran out, who held what."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from memprof.reports.pages import asset, page
from memprof.snapshots import words
from memprof.snapshots.curve import curve
from memprof.snapshots.report import Studied
from memprof.snapshots.sites import WAYS, way
from memprof.units import DISPLAY_UNITS

#: Paul Tol's *light* scheme, made for areas; the last is for the rest.
COLOURS = ("#77AADD", "#EE8866", "#44BB99", "#EEDD88", "#FFAABB", "#99DDFF", "#BBCC33", "#AAAA00", "#DDDDDD")
LABELS = {"line": "line", "module": "module", "op": "operator"}


def render(studied: Studied, unit: str) -> str:
    """The page, sizes in ``unit``."""
    report = studied.report
    title, held = words.holders(report)
    data: dict[str, Any] = {
        "unit": unit,
        "per_unit": DISPLAY_UNITS[unit],
        "report": asdict(report),
        "about": words.about(report),
        "others": words.others(report, unit),
        "death": words.death(report.out_of_memory, unit) if report.out_of_memory else [],
        "by": LABELS[report.by],
        "holders_title": title,
        "holders": [asdict(each) for each in held],
        "memory": words.memory(report),
        "verdict": words.verdict(report),
        "colours": COLOURS,
        "ways": [],
        "curve": None,
    }
    data |= _drawn(studied)
    style = asset("memprof.reports", "page.css") + asset("memprof.snapshots", "page.css")
    return page("memprof.snapshots", f"memprof: {report.file}", data, style)


def _drawn(studied: Studied) -> dict[str, Any]:
    """The curve and its groups, by each way; the one that was asked for comes first."""
    if studied.replay is None:
        return {}
    first = studied.report.by
    found = {name: curve(studied.replay, studied.allocated, way(name)) for name in [first, *(WAYS.keys() - {first})]}
    drawn = found[first]
    sites: dict[str, int] = {}
    largest = [[(n, sites.setdefault(site, len(sites))) for n, site in here] for here in drawn.largest]
    thinned = f"{len(drawn.events):,} of {studied.report.events:,} instants are drawn: of each stretch the highest."
    return {
        "thinned": thinned if len(drawn.events) < studied.report.events else "",
        "ways": [
            {"key": name, "label": LABELS[name], "groups": each.groups, "levels": each.levels.tolist()}
            for name, each in sorted(found.items(), key=lambda item: (item[0] != first, item[0]))
        ],
        "curve": {
            "events": drawn.events.tolist(), "allocated": drawn.allocated.tolist(),
            "reserved": drawn.reserved.tolist(), "ooms": drawn.ooms.tolist(), "largest": largest,
        },
        "sites": list(sites),
    }  # fmt: skip
