"""What a published KV figure counts: several definitions are in use, and few papers say which is theirs.

Every definition is a number of tokens in each layer, times the bytes of one token's keys and values. Nothing runs.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memprof.errors import BadValue
from memprof.families import Model
from memprof.prompts import Shape
from memprof.pruning import Pruner, build_pruner, kept_share, method_spec, visual_tokens_per_layer
from memprof.units import DISPLAY_UNITS, parse_bytes

#: Bytes of one number of the cache, by dtype.
DTYPE_BYTES: Mapping[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
#: The definition of most published tables: a budget times all layers, whatever the layers hold.
BUDGET = "the budget of visual tokens, in all layers, without text"
#: Off by so much and less, a figure is what a definition gives: published ones have three digits.
_SAME = 0.01


@dataclass(frozen=True)
class Definition:
    """One way to count.

    Attributes:
        name: What is counted, in words.
        bytes: What that gives.
        held: Whether it is what the cache holds after prefill.
    """

    name: str
    bytes: int
    held: bool = False


@dataclass(frozen=True)
class Match:
    """How a definition stands to a published figure, read in one unit: ``off`` is its error, 0.01 for 1 % too high."""

    definition: Definition
    unit: str
    off: float

    @property
    def same(self) -> bool:
        """Whether the figure may be this."""
        return abs(self.off) <= _SAME

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {"definition": self.definition.name, "unit": self.unit, "off": self.off}


def definitions(model: Model, pruner: Pruner, shape: Shape, dtype: str) -> list[Definition]:
    """What each definition gives for one prompt; several may give the same.

    Args:
        model: Whose layers and heads count.
        pruner: The method; its own plan says how many tokens each layer runs.
        shape: The prompt.
        dtype: Of the cache.
    """
    n, text, layers = shape.visual_tokens, shape.text_tokens, model.layers
    token = 2 * model.kv_numbers * DTYPE_BYTES[dtype]
    stages = pruner.stages(n, layers)
    visual = visual_tokens_per_layer(stages, n, layers)
    if pruner.mask_only:
        visual = [n] * layers
    pruned = visual[stages[0].layer :] if stages else visual
    last, share = visual[-1], kept_share(pruner)
    counted = [
        ("what each layer holds: text and visual tokens", sum(visual) + text * layers, True),
        ("visual tokens each layer holds, without text", sum(visual), False),
        ("visual tokens behind the last cut, in all layers, without text", last * layers, False),
        ("tokens behind the last cut, in all layers, with text", (last + text) * layers, False),
        ("visual tokens of ONE layer behind the last cut, without text", last, False),
        ("visual tokens of the layers behind the first cut, without text", sum(pruned), False),
        ("tokens of the layers behind the first cut, with text", sum(pruned) + text * len(pruned), False),
    ]
    budget = n if share is None else round(share * n)
    counted.append((BUDGET, budget * layers, False))
    counted.append(("the budget of visual tokens, in all layers, with text", (budget + text) * layers, False))
    return [Definition(name, tokens * token, held) for name, tokens, held in counted]


def readings(figure: str) -> dict[str, int]:
    """``'31.5 MB'`` as bytes, in the unit it names and in the one often meant by that name.

    Raises:
        BadValue: It is no size in GiB, GB, MiB or MB.
    """
    match = re.fullmatch(r"\s*([0-9][0-9,]*\.?[0-9]*)\s*([GMgm])([iI]?)[bB]\s*", figure)
    if match is None:
        raise BadValue(f"cannot read {figure!r} as a published figure; write for example '31.5 MB' or '0.3 GiB'")
    number, size, binary = match[1].replace(",", ""), match[2].upper(), bool(match[3])
    units = [f"{size}iB", f"{size}B"] if binary else [f"{size}B", f"{size}iB"]
    assert set(units) <= set(DISPLAY_UNITS)
    return {unit: parse_bytes(f"{number}{unit}") for unit in units}


def matches(figure: str, ways: Sequence[Definition]) -> list[Match]:
    """Every definition under every reading of ``figure``, the nearest first."""
    read = [(unit, n_bytes, way) for unit, n_bytes in readings(figure).items() for way in ways if way.bytes]
    found = [Match(way, unit, n_bytes / way.bytes - 1) for unit, n_bytes, way in read]
    return sorted(found, key=lambda match: abs(match.off))


def explain(figure: str, model: Model, method: str, shape: Shape, dtype: str, stack: str = "current") -> dict[str, Any]:
    """What ``figure`` may count under ``method``, as one JSON-ready document."""
    pruner = build_pruner(method, stack)
    ways = definitions(model, pruner, shape, dtype)
    ranked = matches(figure, ways)
    return {
        "figure": figure,
        "model": model.name,
        "method": method_spec(pruner),
        "dtype": dtype,
        "visual_tokens": shape.visual_tokens,
        "text_tokens": shape.text_tokens,
        "bytes_per_token_and_layer": 2 * model.kv_numbers * DTYPE_BYTES[dtype],
        "layers": model.layers,
        "definitions": [dataclasses.asdict(way) for way in ways],
        "matches": [match.to_json() for match in ranked if match.same],
        "nearest": ranked[0].to_json(),
    }


def told(document: Mapping[str, Any]) -> str:
    """:func:`explain` as text."""
    d = document
    lines = [
        f"{d['figure']} for {d['method']} on {d['model']}: {d['visual_tokens']:,} visual and {d['text_tokens']:,} text "
        f"tokens, {d['layers']} layers, {d['bytes_per_token_and_layer']:,} bytes a token and layer ({d['dtype']})"
    ]
    for way in d["definitions"]:
        units = ", ".join(f"{way['bytes'] / DISPLAY_UNITS[unit]:,.2f} {unit}" for unit in ("MB", "MiB"))
        same = [match["unit"] for match in d["matches"] if match["definition"] == way["name"]]
        verdict = f"   <- the figure, read in {' or '.join(same)}" if same else ""
        lines.append(f"  {units:28} {way['name']}{' (what memprof measures)' if way['held'] else ''}{verdict}")
    if not d["matches"]:
        near = d["nearest"]
        lines.append(
            f"none gives it within {100 * _SAME:.0f} %; nearest, {100 * near['off']:+.1f} %, in {near['unit']}: "
            f"{near['definition']}"
        )
    return "\n".join(lines) + "\n"
