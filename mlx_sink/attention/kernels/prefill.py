"""Prefill attention over a sink ring as a Metal kernel: checks, grid, launch.

The kernel's text, and what each of its threads owns, is in ``metal/prefill.metal``. Queries go in
tiles, and a table names for each tile the runs of rows that it sees: rows that no query of a tile
sees are neither loaded nor multiplied, and there is no mask.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_sink.attention.kernels import inputs, source
from mlx_sink.attention.kernels.tables import PrefillTables
from mlx_sink.errors import KernelError

TEXTS = ("decode_common", "prefill_common", "prefill")
"""Files of kernel text."""

_THREADGROUP_BYTES = 32768
_TILES = ((32, 32), (32, 16), (16, 16), (16, 8))
"""Queries and keys of a tile, the best first. MLX's own attention has the first two."""
_INPUTS = ("q", "k", "v", "ranges", "turns", "learned", "scalars")


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries that a threadgroup owns, and keys that it holds at a time."""

    queries: int
    keys: int


@functools.cache
def tile_of(head_dim: int, v_head_dim: int, dtype: mx.Dtype) -> Tile | None:
    """Return the largest tile whose queries and keys fit, or None: such heads are not served.

    Tiles of 32 keys are for heads below 128 only, as in MLX's own attention: what they save in
    barriers they cost in threadgroups that run at once.
    """
    pad = 16 // dtype.size
    for queries, keys in _TILES:
        keys_or_values = max(head_dim * (keys + pad), keys * (v_head_dim + pad))
        fits = (queries * (head_dim + pad) + keys_or_values) * dtype.size <= _THREADGROUP_BYTES
        if fits and (keys <= 16 or max(head_dim, v_head_dim) < 128):
            return Tile(queries, keys)
    return None


@dataclass(frozen=True, slots=True)
class PrefillLaunch:
    """How arrays of some shapes are served: what is compiled, and over which grid."""

    template: list[tuple[str, Any]]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    shape: tuple[int, ...]


def prefill(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    tables: PrefillTables,
    *,
    scale: float,
    softcap: float | None = None,
    learned_sinks: mx.array | None = None,
) -> mx.array:
    """Attend from the queries of a chunk to the rows that they see.

    Args:
        queries: ``[B, n_heads, L, head_dim]`` after RoPE; float16, bfloat16 or float32. Copied
            where they are strided, which costs little beside the attention.
        keys: ``[B, n_kv_heads, rows, head_dim]`` after RoPE; strided ones are read where they
            lie. Where a row's elements are neighbours, rows lie 4 elements or a multiple of
            that apart and begin likewise: the kernel loads up to 16 bytes at once.
        values: ``[B, n_kv_heads, rows, v_head_dim]``, likewise.
        tables: Which rows each tile of queries sees, and how its queries are turned.
        scale: Factor on q.k.
        softcap: Scores become ``softcap * tanh(score / softcap)``.
        learned_sinks: A logit a head that takes part in the softmax, ``[n_heads]``.

    Returns:
        ``[B, n_heads, L, v_head_dim]`` in the dtype of the queries. Turned queries are rounded to
        that dtype, as those of the model are; everything after is float32, rounded once.

    Raises:
        KernelError: A shape or dtype does not fit; the message names the argument.
    """
    launch = _launch(
        tuple(queries.shape),
        tuple(keys.shape),
        tuple(values.shape),
        (queries.dtype, keys.dtype, values.dtype),
        (tables.ranges.shape[0], tables.n, tables.last, tables.size),
        (tables.dims, tables.interleaved),
        (softcap is not None, None if learned_sinks is None else tuple(learned_sinks.shape)),
    )
    (out,) = _kernel()(
        inputs=[
            mx.contiguous(queries),
            keys,
            values,
            tables.ranges,
            tables.turns,
            inputs.logits(learned_sinks),
            inputs.scalars(scale, softcap),
        ],
        template=launch.template,
        grid=launch.grid,
        threadgroup=launch.threadgroup,
        output_shapes=[launch.shape],
        output_dtypes=[queries.dtype],
    )
    return out


@functools.lru_cache(maxsize=64)
def _launch(
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...],
    dtypes: tuple[mx.Dtype, mx.Dtype, mx.Dtype],
    tables: tuple[int, int, int, int],
    rotation: tuple[int, bool],
    options: tuple[bool, tuple[int, ...] | None],
) -> PrefillLaunch:
    """Check a call and lay it out; once for all calls that look alike."""
    batch, n, last, size = tables
    capped, learned = options
    inputs.validate(
        q, k, v, dtypes, batch=batch, n=n, last=last, dims=rotation[0], learned=learned
    )
    (B, H, L, D), DV, dtype = q, v[3], dtypes[0]
    tile = tile_of(D, DV, dtype)
    if tile is None:
        raise KernelError(f"queries must have a head_dim whose tiles fit 32 KB, got {D}, {DV}")
    if size != tile.queries:
        raise KernelError(f"tables must be for tiles of {tile.queries} queries, got {size}")
    threads = 4 * size  # a simdgroup for every 8 queries
    template = [
        ("T", dtype),
        ("D", D),
        ("DV", DV),
        ("SG", size // 8),
        ("BK", tile.keys),
        ("DIMS", rotation[0]),
        ("INTERLEAVED", rotation[1]),
        ("SOFTCAP", capped),
        ("LSINK", learned is not None),
    ]
    grid = (threads * -(-L // size), H, B)
    return PrefillLaunch(template, grid, (threads, 1, 1), (B, H, L, DV))


@functools.cache
def _kernel() -> source.Kernel:
    return source.build(("prefill",), ("decode_common", "prefill_common"), _INPUTS, ("out",))


def forget() -> None:
    """Forget the kernel that was built: tests put a runner in the place of MLX's."""
    for cached in (source.build, _kernel):
        cached.cache_clear()
