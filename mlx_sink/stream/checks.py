"""Arguments of the Python API that are slightly wrong: refused, before they do something else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

from mlx_sink.errors import InputError


def integer(name: str, value: object, least: int, *, besides: int | None = None) -> int:
    """Return an integer argument.

    Args:
        name: The argument's name.
        value: What was given.
        least: The smallest that is allowed.
        besides: One more value that is allowed.

    Raises:
        InputError: It is no integer, or too small.
    """
    also = "" if besides is None else f", or {besides} for no limit"
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{name} must be an integer of at least {least}{also}, got {value!r}")
    if value < least and value != besides:
        raise InputError(f"{name} must be at least {least}{also}, got {value}")
    return value


def strings(name: str, value: object) -> tuple[str, ...]:
    """Return an argument of several strings.

    Raises:
        InputError: It is one string, whose letters it would be, or holds something else.
    """
    if isinstance(value, str):
        raise InputError(f"{name} must be a list of strings, got {value!r}: use [{value!r}]")
    items: list[Any] = list(cast("Iterable[Any]", value)) if isinstance(value, Iterable) else [0]
    if not all(isinstance(item, str) for item in items):
        raise InputError(f"{name} must be a list of strings, got {value!r}")
    return tuple(items)


def functions(name: str, value: object) -> tuple[Callable[..., Any], ...]:
    """Return an argument of several functions.

    Raises:
        InputError: It is one function, or holds something else.
    """
    items: list[Any] = list(cast("Iterable[Any]", value)) if isinstance(value, Iterable) else [0]
    if not all(callable(item) for item in items):
        raise InputError(f"{name} must be a list of functions, got {value!r}")
    return tuple(items)
