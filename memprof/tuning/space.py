"""What a method lets a search change: its own fields, as it declares them with ``setting(search=...)``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memprof.bracket import on_grid
from memprof.plugins import split_spec
from memprof.pruning import METHODS, build_pruner, method_spec

#: Real-valued fields are searched on this grid: a half of a thousandth of the visual tokens is one or two of them.
GRID = 0.0005


@dataclass(frozen=True)
class Field:
    """One number or choice that a search may change.

    Attributes:
        name: The method's own name for it.
        default: Its value where nothing is searched.
        choices: The values to choose from, or None for a number.
        low, high: The ends of its range.
        step: 1 for whole numbers, else :data:`GRID`.
        monotone: Whether memory never falls as it rises.
    """

    name: str
    default: Any
    choices: tuple[Any, ...] | None = None
    low: float = 0.0
    high: float = 0.0
    step: float = GRID
    monotone: bool = False

    @property
    def floor(self) -> Any:
        """The value with the least memory where that is known, else the default."""
        return self.low if self.monotone else self.default

    def tidy(self, value: Any) -> Any:
        """``value`` without the noise of floating point."""
        if self.choices is not None:
            return value
        return int(value) if self.step == 1 else on_grid(float(value), self.low, self.step)


def fields_of(method: str, wanted: Sequence[str] | None, *, quality: bool) -> tuple[Field, ...]:
    """The fields of ``method`` that are searched: those it lets a search change and the spec string does not fix.

    Args:
        method: A spec string such as ``topv`` or ``topv:layer=3``.
        wanted: Names of fields, or None: all of them where ``quality`` is measured, else only those that rise with
            memory, as there is nothing that speaks for one choice or another.
        quality: Whether trials measure what a setting loses.
    """
    fixed = split_spec(method)[1]
    free = [f for f in searchable(method) if f.name not in fixed]
    chosen = [f for f in free if (f.name in wanted if wanted is not None else quality or f.metadata.get("monotone"))]
    return tuple(_field(f) for f in chosen)


def searchable(method: str) -> tuple[dataclasses.Field[Any], ...]:
    """Every field that the method named by ``method`` lets a search change; raises UsageError for a wrong spec."""
    build_pruner(method)
    cls: Any = METHODS.load(split_spec(method)[0])
    return tuple(f for f in dataclasses.fields(cls) if f.metadata.get("search"))


def _field(declared: dataclasses.Field[Any]) -> Field:
    search, default = declared.metadata["search"], declared.default
    number = isinstance(default, int | float) and not isinstance(default, bool)
    if not number or declared.metadata.get("choices"):
        return Field(declared.name, default, choices=tuple(search))
    low, high = search
    step = 1 if isinstance(default, int) else GRID
    return Field(declared.name, default, None, low, high, step, bool(declared.metadata.get("monotone")))


def with_values(method: str, values: Mapping[str, Any]) -> str:
    """The canonical spec string of ``method`` with ``values`` set."""
    name, fixed = split_spec(method)
    text = {**fixed, **{k: str(v).lower() if isinstance(v, bool) else str(v) for k, v in values.items()}}
    spec = f"{name}:{','.join(f'{k}={v}' for k, v in text.items())}" if text else name
    return method_spec(build_pruner(spec))
