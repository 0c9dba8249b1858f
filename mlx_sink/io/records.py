"""Frozen dataclasses as JSON, and JSON from outside as frozen dataclasses, checked.

The keys are the names of the fields; ``field(metadata={"key": "from"})`` names another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from types import NoneType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from mlx_sink.errors import InputError, SinkError

T = TypeVar("T")

LARGEST = 2**63
"""Numbers stay below this: what is larger measures nothing, and overflows where it is used."""


def to_dict(record: Any) -> dict[str, Any]:
    """Return a dataclass as a JSON-ready dictionary.

    A field whose class has a ``to_dict`` of its own is written by that.
    """
    return {_key(field): _plain(getattr(record, field.name)) for field in fields(record)}


def _plain(value: Any) -> Any:
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in cast("Mapping[str, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in cast("list[Any]", value)]
    return value


def from_dict(kind: type[T], value: object) -> T:
    """Return what JSON holds as a dataclass.

    Args:
        kind: The dataclass. Its fields are integers, finite numbers, strings, booleans, other
            dataclasses, ``tuple[T, ...]``, ``Mapping[str, T]``, or one of these ``| None``. Keys
            that it does not know are passed over: later versions may add some.
        value: What `json.loads` returned.

    Raises:
        InputError: A field is missing or is something else, named by its place in the JSON, as
            ``methods.full.at[0].length``.
    """
    return cast("T", _read(kind, value, ""))


def _read(kind: Any, value: object, place: str) -> Any:
    options = get_args(kind)
    if NoneType in options:
        (other,) = (option for option in options if option is not NoneType)
        return None if value is None else _read(other, value, place)
    if is_dataclass(kind):
        return _record(cast("type[Any]", kind), _object(value, place), place)
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise _wrong(place, "a list", value)
        items = enumerate(cast("list[object]", value))
        return tuple(_read(options[0], item, f"{place}[{i}]") for i, item in items)
    if options:
        items = _object(value, place).items()
        return {key: _read(options[1], item, _inside(place, key)) for key, item in items}
    return _leaf(kind, value, place)


def _record(kind: type[Any], values: Mapping[str, object], place: str) -> Any:
    hints = get_type_hints(kind)
    arguments: dict[str, Any] = {}
    for field in fields(kind):
        key = _key(field)
        if key in values:
            arguments[field.name] = _read(hints[field.name], values[key], _inside(place, key))
        elif field.default is MISSING and field.default_factory is MISSING:
            raise InputError(f"it lacks {_inside(place, key)}")
    try:
        return kind(**arguments)
    except SinkError as error:
        raise InputError(f"{place or kind.__name__}: {error}") from None


_LEAVES = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}


def _leaf(kind: Any, value: object, place: str) -> Any:
    # To Python true is an integer, and every integer a number.
    accepted = int | float if kind is float else kind
    is_right = isinstance(value, accepted) and isinstance(value, bool) == (kind is bool)
    if is_right and isinstance(value, int | float):
        is_right = abs(value) < LARGEST  # False for NaN too
    elif is_right and isinstance(value, str):
        is_right = _is_unicode(value)
    if not is_right:
        raise _wrong(place, _LEAVES[kind], value)
    return value


def _is_unicode(text: str) -> bool:
    """Tell whether a text can be written: JSON can spell half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _object(value: object, place: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise _wrong(place, "an object", value)
    return cast("dict[str, object]", value)


def _key(field: Field[Any]) -> str:
    return str(field.metadata.get("key", field.name))


def _inside(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key


def _wrong(place: str, expected: str, value: object) -> InputError:
    kinds: dict[type, str] = {list: "a list", dict: "an object"}
    text = kinds.get(type(value)) or ascii(value)
    short = text if len(text) <= 40 else text[:37] + "..."
    return InputError(f"{place or 'it'} must be {expected}, got {short}")
