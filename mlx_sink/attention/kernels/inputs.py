"""Check the arrays of a launch, and make the small inputs that every kernel has."""

from __future__ import annotations

import functools
import math

import mlx.core as mx

from mlx_sink.errors import KernelError

DTYPES = (mx.float16, mx.bfloat16, mx.float32)
MAX_GROUP = 16
"""Query heads for each kv head."""

Shape = tuple[int, ...]


def validate(
    q: Shape,
    k: Shape,
    v: Shape,
    dtypes: tuple[mx.Dtype, mx.Dtype, mx.Dtype],
    *,
    batch: int,
    n: int,
    last: int,
    dims: int,
    learned: Shape | None,
) -> None:
    """Raise for what a kernel would read wrongly.

    Args:
        q: Shape of the queries, ``[B, n_heads, L, head_dim]``.
        k: Shape of the keys, ``[B, n_kv_heads, rows, head_dim]``.
        v: Shape of the values, ``[B, n_kv_heads, rows, v_head_dim]``.
        dtypes: Those of the three.
        batch: Sequences that the tables are for.
        n: Queries that they are for.
        last: The last row that they name, plus 1.
        dims: Dimensions that they turn.
        learned: Shape of the learned sinks, if there are any.

    Raises:
        KernelError: The message names the argument, what it got and what would work.
    """
    shapes = {"queries": q, "keys": k, "values": v}
    for name, shape in shapes.items():
        if len(shape) != 4 or 0 in shape:
            raise KernelError(f"{name} must be [B, heads, rows, dim], none 0, got {shape}")
    for (name, shape), dtype in zip(shapes.items(), dtypes, strict=True):
        if shape[0] != q[0]:
            raise KernelError(f"{name} must have the queries' batch of {q[0]}, got {shape[0]}")
        if dtype not in DTYPES or dtype != dtypes[0]:
            kinds = "float16, bfloat16 or float32, all the same"
            raise KernelError(f"{name} must be {kinds}, got {dtype} where queries are {dtypes[0]}")
        if shape[3] % 16:
            raise KernelError(f"{name} must have a head_dim that 16 divides, got {shape[3]}")
    if k[3] != q[3]:
        raise KernelError(f"keys must have the queries' head_dim of {q[3]}, got {k[3]}")
    if v[1:3] != k[1:3]:
        raise KernelError(f"values must have the keys' heads and rows {k[1:3]}, got {v[1:3]}")
    if q[1] % k[1] or q[1] // k[1] > MAX_GROUP:
        raise KernelError(
            f"queries must have 1 to {MAX_GROUP} times the {k[1]} kv heads, got {q[1]}"
        )
    if q[2] != n:
        raise KernelError(f"queries must have the tables' {n} rows, got {q[2]}")
    if batch not in (1, q[0]):
        raise KernelError(f"tables must be for 1 or {q[0]} sequences, got {batch}")
    if last > k[2]:
        raise KernelError(f"keys must have the {last} rows of the tables, got {k[2]}")
    if dims > q[3] or dims % 2:
        raise KernelError(f"tables must turn at most {q[3]} dims, in pairs, got {dims}")
    if learned not in (None, (q[1],)):
        raise KernelError(f"learned_sinks must be [{q[1]}], got {learned}")


@functools.lru_cache(maxsize=64)
def scalars(scale: float, softcap: float | None, n_sinks: int = 0) -> mx.array:
    """Return a kernel's scalars: log2(e) goes on the scores last, as exp2 needs it."""
    log2e = math.log2(math.e)
    pair = (scale * log2e, 0.0) if softcap is None else (scale / softcap, softcap * log2e)
    return mx.array([*pair, n_sinks, 0, 0, 0, 0, 0], mx.float32)


def logits(learned_sinks: mx.array | None) -> mx.array:
    """Return learned sinks as a kernel reads them: float32, and at least 8.

    MLX hands smaller arrays over in another address space.
    """
    if learned_sinks is None:
        return _zeros()
    exact = mx.contiguous(learned_sinks.astype(mx.float32))
    return mx.pad(exact, (0, 8 - exact.size)) if exact.size < 8 else exact


@functools.cache
def _zeros() -> mx.array:
    return mx.zeros((8,), mx.float32)
