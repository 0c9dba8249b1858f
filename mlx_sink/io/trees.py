"""Trees of arrays and plain values, such as a cache's state: to JSON and back, and copied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import mlx.core as mx

from mlx_sink.errors import CacheError


def pack(value: Any, name: str, arrays: dict[str, mx.array]) -> Any:
    """Turn a tree into JSON, its arrays put aside under names.

    Raises:
        CacheError: The tree holds something that is neither.
    """
    if isinstance(value, mx.array):
        arrays[name] = value
        return {"array": name}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        items = [pack(v, f"{name}.{i}", arrays) for i, v in enumerate(cast("list[Any]", value))]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if isinstance(value, dict):
        named = cast("dict[str, Any]", value)
        return {"dict": {k: pack(v, f"{name}.{k}", arrays) for k, v in named.items()}}
    raise CacheError(f"a cache holds a {type(value).__name__}, which cannot be saved")


def unpack(value: Any, arrays: Mapping[str, mx.array]) -> Any:
    """Turn what `pack` made into the tree again.

    Raises:
        ValueError: It is not what `pack` makes; other errors from values of other types.
    """
    if not isinstance(value, dict):
        if isinstance(value, list):
            raise ValueError(cast("object", value))
        return value
    ((kind, held),) = cast("dict[str, Any]", value).items()
    if kind == "array":
        return arrays[held]
    if kind == "list":
        return [unpack(v, arrays) for v in held]
    if kind == "tuple":
        return tuple(unpack(v, arrays) for v in held)
    if kind == "dict":
        return {name: unpack(v, arrays) for name, v in held.items()}
    raise ValueError(kind)


def copied(value: Any) -> Any:
    """Return a tree whose arrays may be written into without changing the original's."""
    arrays: dict[str, mx.array] = {}
    packed = pack(value, "", arrays)
    return unpack(packed, {name: mx.array(array) for name, array in arrays.items()})
