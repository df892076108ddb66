"""A folder is a registry: one file adds one method, family, task or meter; another package does by an entry point.

A plug-in is the one class in its file that derives from the registry's base. Its name is the file's name with ``-`` for
``_``. A dataclass plug-in's fields are its settings, and a *spec string* such as ``topv:keep=0.5,layer=2`` names the
plug-in and sets fields, every one checked by name, type and range before anything runs.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import math
import pkgutil
import typing
from collections.abc import Iterator
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any, Generic, TypeVar

from memprof.errors import BadValue, MemprofError, UnknownName

T = TypeVar("T")
_TRUE, _FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}


def setting(
    default: Any,
    help: str,
    *,
    origin: str,
    gt: float | None = None,
    ge: float | None = None,
    le: float | None = None,
    choices: tuple[Any, ...] | None = None,
    search: tuple[Any, ...] | None = None,
    monotone: bool = False,
) -> Any:
    """Declare one field of a plug-in: its default, its range, and who says so.

    Args:
        default: The value used when a spec string does not name the field.
        help: One line for ``memprof list``.
        origin: Where the value comes from: ``paper``, ``code``, or ``memprof`` where the source is silent.
        gt: The value must be above this.
        ge: The value must be at least this.
        le: The value must be at most this.
        choices: The only values allowed.
        search: What ``memprof tune`` may try: ``(low, high)`` for numbers, or the values to choose from.
        monotone: Whether memory never falls as this number rises, so that a search may halve its range.
    """
    limits = {
        "help": help, "origin": origin, "gt": gt, "ge": ge, "le": le, "choices": choices, "search": search,
        "monotone": monotone,
    }  # fmt: skip
    return dataclasses.field(default=default, metadata=limits)


def check_settings(plugin: Any) -> None:
    """Raise :class:`BadValue` if a field of the dataclass instance ``plugin`` is outside its declared range."""
    for f in dataclasses.fields(plugin):
        value, limits = getattr(plugin, f.name), f.metadata
        choices = limits.get("choices")
        if choices is not None and value not in choices:
            raise BadValue(f"{f.name}={value} is not one of {', '.join(map(str, choices))}")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        gt, ge, le = limits.get("gt"), limits.get("ge"), limits.get("le")
        if number and (
            not math.isfinite(value)
            or (gt is not None and value <= gt)
            or (ge is not None and value < ge)
            or (le is not None and value > le)
        ):
            low = f"({gt}" if gt is not None else f"[{ge}" if ge is not None else "(-inf"
            raise BadValue(f"{f.name}={value} is outside {low}, {'inf)' if le is None else f'{le}]'}")


def _parse(name: str, text: str, annotation: Any) -> Any:
    """Read ``text`` as the type of a field; raises :class:`BadValue` naming the field."""
    options = [a for a in (typing.get_args(annotation) or (annotation,)) if a is not type(None)]
    kind = options[0]
    try:
        if kind is bool:
            lowered = text.lower()
            if lowered not in _TRUE | _FALSE:
                raise ValueError
            return lowered in _TRUE
        return kind(text)
    except ValueError:
        raise BadValue(f"{name}={text!r} is not a {kind.__name__}") from None


def split_spec(spec: str) -> tuple[str, dict[str, str]]:
    """``'topv:keep=0.5,layer=2'`` -> ``('topv', {'keep': '0.5', 'layer': '2'})``."""
    name, _, rest = spec.partition(":")
    values: dict[str, str] = {}
    for item in filter(None, (p.strip() for p in rest.split(","))):
        key, eq, value = item.partition("=")
        if not eq or not key or not value:
            raise BadValue(f"cannot read {item!r} in {spec!r}; write name:field=value,field=value")
        if key.strip() in values:
            raise BadValue(f"{key.strip()!r} is given twice in {spec!r}")
        values[key.strip()] = value.strip()
    return name.strip(), values


@cache
def _added(group: str) -> dict[str, EntryPoint]:
    """Each plug-in that another package adds, by name; finding them reads every package's list."""
    return {found.name: found for found in entry_points(group=group)}


class BrokenPlugin(MemprofError):
    """A plug-in of another package cannot be imported, or its module holds none; memprof's own are never broken."""

    def __init__(self, kind: str, found: EntryPoint, why: str) -> None:
        package = found.dist.name if found.dist else "an installed package"
        super().__init__(
            f"the {kind} {found.name!r} of {package} (entry point {found.name} = {found.value}) cannot be used: {why}; "
            "mend or remove that package"
        )


@cache
def _tell(line: str) -> None:
    """Say it once a process, on stderr unless a program has set up its logs."""
    logging.getLogger("memprof").warning("memprof: %s", line)


class Registry(Generic[T]):
    """The plug-ins of one package, found by file name and imported only when asked for.

    Args:
        package: Dotted name of the folder, e.g. ``memprof.pruning.methods``.
        base: The class every plug-in derives from.
        kind: What to call one in messages, e.g. ``method``.
        entry_points: The entry-point group by which other packages add plug-ins; each names a module with one.
    """

    def __init__(self, package: str, base: type[T], kind: str, entry_points: str | None = None) -> None:
        self.package, self.base, self.kind, self.group = package, base, kind, entry_points

    def _modules(self) -> dict[str, str]:
        """The module of each plug-in, by name; memprof's own come before another's of the same name."""
        path = importlib.import_module(self.package).__path__
        own = [m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_")]
        found = {name: point.module for name, point in self._others().items()}
        return found | {name.replace("_", "-"): f"{self.package}.{name}" for name in own}

    def _others(self) -> dict[str, EntryPoint]:
        return {} if self.group is None else _added(self.group)

    def names(self) -> list[str]:
        """Every plug-in's name, sorted; imports none of them."""
        return sorted(self._modules())

    def name_of(self, plugin: type[T]) -> str:
        """The name that a plug-in's class is registered by."""
        own = plugin.__module__.removeprefix(f"{self.package}.")
        there = {module: name for name, module in self._modules().items()}
        return there.get(plugin.__module__, own.rpartition(".")[2].replace("_", "-"))

    def load(self, name: str) -> type[T]:
        """The plug-in class called ``name``.

        Raises:
            UnknownName: There is none; the valid names are listed.
            BrokenPlugin: It is another package's, and cannot be imported.
        """
        modules = self._modules()
        if name not in modules:
            raise UnknownName(self.kind, name, modules)
        other = self._others().get(name)
        if other is None or other.module != modules[name]:
            return self._class_in(importlib.import_module(modules[name]))
        try:
            return self._class_in(importlib.import_module(other.module))
        except Exception as error:  # whatever another's code may raise
            why = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise BrokenPlugin(self.kind, other, why) from error

    def _class_in(self, module: ModuleType) -> type[T]:
        found = [
            c
            for c in vars(module).values()
            if isinstance(c, type)
            and issubclass(c, self.base)
            and c.__module__ == module.__name__
            and not c.__name__.startswith("_")
        ]
        if len(found) != 1:
            raise TypeError(f"{module.__name__} must define exactly one public {self.base.__name__}, found {found}")
        return found[0]

    def __iter__(self) -> Iterator[tuple[str, type[T]]]:
        """Pairs of name and class, in name order; of one that is broken it is said so, and the others go on."""
        for name in self.names():
            try:
                plugin = self.load(name)
            except BrokenPlugin as error:
                _tell(str(error))
            else:
                yield name, plugin

    def build(self, spec: str) -> T:
        """A plug-in from a spec string, with every field checked.

        Raises:
            UnknownName: No such plug-in, or no such field of it.
            BadValue: A value of the wrong type or outside its range.
        """
        name, values = split_spec(spec)
        cls = self.load(name)
        fields = {f.name: f for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
        hints = typing.get_type_hints(cls) if fields else {}
        for key in values:
            if key not in fields:
                raise UnknownName(f"field of {self.kind} {name}", key, fields or ["(it has none)"])
        try:
            plugin = cls(**{key: _parse(key, text, hints[key]) for key, text in values.items()})
            if fields:
                check_settings(plugin)
        except BadValue as error:
            raise BadValue(f"{self.kind} {name}: {error}") from None
        return plugin


def spec_of(name: str, plugin: Any, always: tuple[str, ...] = ()) -> str:
    """The canonical spec string of a dataclass plug-in: the fields in ``always``, then those changed from defaults."""
    if not dataclasses.is_dataclass(plugin):
        return name
    shown = [
        f"{f.name}={str(value).lower() if isinstance(value := getattr(plugin, f.name), bool) else value}"
        for f in dataclasses.fields(plugin)
        if f.name in always or getattr(plugin, f.name) != f.default
    ]
    return f"{name}:{','.join(shown)}" if shown else name
