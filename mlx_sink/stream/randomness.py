"""Random numbers of a stream's own: mlx-lm's samplers draw from MLX's state, which is shared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import mlx.core as mx

from mlx_sink.errors import InputError

T = TypeVar("T")

# MLX annotates its arguments as nothing in particular.
_start: Callable[..., None] = cast("Any", mx).async_eval


def seeded(key: mx.array | None, draw: Callable[[], T]) -> tuple[T, mx.array | None]:
    """Call a function while MLX's random state stands at a key, and put the state back.

    MLX's state belongs to the thread, and its array can be written in place, lazily. So every
    sampler that is built on ``mx.random`` draws as it would after ``mx.random.seed``, and neither
    another stream nor the caller's own random numbers are touched.

    Args:
        key: The key to draw from, uint32 ``[2]``; ``None`` to leave MLX's state alone.
        draw: The function.

    Returns:
        What the function returns, and the key to draw from next.
    """
    if key is None:
        return draw(), None
    outer = mx.array(_state())
    _state()[...] = key
    try:
        drawn = draw()
        return drawn, mx.array(_state())
    finally:
        # Looked up again: a compiled sampler replaces the array.
        _state()[...] = outer
        # Never used, it would never be computed either: a graph that grows with every call.
        _start(_state())


def _state() -> mx.array:
    """Return the array of MLX's random state in this thread."""
    return cast("list[mx.array]", mx.random.state)[0]


def fresh_key(seed: int | None) -> mx.array:
    """Return the key that ``mx.random.seed`` would set, or one drawn from MLX's state.

    Raises:
        InputError: The seed has more than 64 bits, or is negative.
    """
    if seed is not None:
        if not 0 <= seed < 2**64:
            raise InputError(f"seed must be from 0 to 2**64 - 1, got {seed}")
        return mx.random.key(seed)
    return mx.random.randint(0, 2**31 - 1, (2,), mx.uint32)
