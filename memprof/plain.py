"""Plain data that goes to JSON and comes back, checked: what is damaged, or of something else, is not taken in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from types import UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints


def _plain(value: Any) -> Any:
    """``value`` with records as dicts; lists of numbers stay as they are, since copying each is most of the cost."""
    if isinstance(value, Plain):
        return value.to_json()
    if isinstance(value, list | tuple) and value and isinstance(value[0], Plain | tuple):
        return [_plain(item) for item in value]
    return list(value) if isinstance(value, tuple) else value


class Plain:
    """Base of plain dataclasses: to a JSON-ready dict and back, ignoring keys of later versions."""

    def to_json(self) -> dict[str, Any]:
        """This record as plain dicts and lists."""
        return {name: _plain(getattr(self, name)) for name in _names(type(self))}  # type: ignore[arg-type]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The record in ``data``, nested ones rebuilt; unknown keys are ignored.

        Raises:
            ValueError: A field is missing or is of another type: the data are damaged, or of something else.
        """
        given = {}
        for name, required, plain, read in _plan(cls):  # type: ignore[arg-type]
            if name in data:
                value = data[name]
                given[name] = _sound(name, value) if type(value) in plain else read(name, value)
            elif required:
                raise ValueError(f"{name} is missing")
        return cls(**given)


#: No count, size or time is beyond it.
_MOST = 2**63


def _sound(name: str, value: Any) -> Any:
    """``value``, unless it is a number that nothing can have: NaN, infinite, or beyond 64 bits."""
    if isinstance(value, int | float) and not -_MOST < value < _MOST:
        raise ValueError(f"{name} is {str(value)[:40]}, which is no number of anything")
    return value


def check_values(hints: type, name: str, values: Mapping[str, Any]) -> None:
    """Hold a dict to the annotations of the ``TypedDict`` ``hints``; keys that it does not name may hold anything.

    Raises:
        ValueError: A value is of another type, or a number that nothing can have.
    """
    for key, read in _readers(hints).items():
        if key in values:
            read(f"{name}.{key}", values[key])


@cache
def _readers(hints: type) -> dict[str, _Reader]:
    return {key: _reader(hint) for key, hint in get_type_hints(hints).items()}


def _all_sound(name: str, values: Iterable[Any]) -> None:
    for value in values:
        if value.__class__ is int or value.__class__ is float:
            _sound(name, value)


@cache
def _names(cls: Any) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(cls))


#: Takes a field's name and value, and gives the value as its annotation has it; ValueError if it is not.
_Reader = Callable[[str, Any], Any]


@cache
def _plan(cls: Any) -> list[tuple[str, bool, frozenset[type], _Reader]]:
    """Each field's name, whether it must be there, the types it may be of as it stands, and what reads the rest."""
    hints, missing = get_type_hints(cls), dataclasses.MISSING
    return [
        (
            f.name,
            f.default is missing and f.default_factory is missing,
            _plain_types(hints[f.name]),
            _reader(hints[f.name]),
        )
        for f in dataclasses.fields(cls)
    ]


#: What JSON holds where a field is of a plain type.
_ITEMS: dict[Any, tuple[type, ...]] = {
    int: (int,), float: (float, int), str: (str,), bool: (bool,), type(None): (type(None),),
}  # fmt: skip


def _kinds(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


@cache
def _plain_types(hint: Any) -> frozenset[type]:
    """The types of what is taken as it stands."""
    return frozenset(one for kind in _kinds(hint) for one in _ITEMS.get(kind, ()))


@cache
def _reader(hint: Any) -> _Reader:
    """What reads values of an annotation, with lists and dicts of records rebuilt."""
    plain, readers = _plain_types(hint), [_reader_of(kind) for kind in _kinds(hint) if kind not in _ITEMS]

    def read(name: str, value: Any) -> Any:
        if type(value) in plain:
            return _sound(name, value)
        for fits, take in readers:
            if fits(value):
                return take(name, value)
        raise ValueError(f"{name} is {str(value)[:40]!r}, and not {getattr(hint, '__name__', hint)}")

    return read


def _reader_of(kind: Any) -> tuple[Callable[[Any], bool], _Reader]:
    """Whether a value is of this kind, and what it is then."""
    origin, inside = get_origin(kind) or kind, get_args(kind)
    if kind is Any:
        return lambda value: True, lambda name, value: value
    if origin is Literal:
        return lambda value: value in inside, lambda name, value: value
    if origin is dict:
        return lambda value: isinstance(value, dict), partial(_read_dict, inside[1])
    if origin in (list, tuple):
        return lambda value: isinstance(value, list), partial(_read_list, kind)
    return lambda value: isinstance(value, Mapping), lambda name, value: origin.from_json(value)


def _read_dict(item: Any, name: str, value: dict[str, Any]) -> dict[str, Any]:
    """A dict, value by value unless all of them are plain."""
    if item is Any:
        return value
    if set(map(type, value.values())) <= _plain_types(item):
        _all_sound(name, value.values())
        return value
    return {key: _reader(item)(f"{name}.{key}", one) for key, one in value.items()}


def _read_list(kind: Any, name: str, values: list[Any]) -> Any:
    """A list or tuple, item by item unless all of them are plain."""
    inside, sequence = get_args(kind), get_origin(kind)
    if sequence is tuple and inside[-1] is not Ellipsis and len(values) != len(inside):
        raise ValueError(f"{name} has {len(values)} entries, and not {len(inside)}")
    if set(map(type, values)) <= _plain_types(inside[0]):
        _all_sound(name, values)
        return values if sequence is list else tuple(values)
    assert sequence is not None
    return sequence(_reader(inside[0])(f"{name}[{i}]", value) for i, value in enumerate(values))
