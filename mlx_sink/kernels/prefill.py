"""Prefill attention over a sink ring as a Metal kernel: tables, checks, grid, launch.

The kernel's text, and what each of its threads owns, is in ``metal/prefill.metal``. Queries go in
tiles, and a table names for each tile the runs of rows that it sees: rows that no query of a tile
sees are neither loaded nor multiplied, and there is no mask.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_sink.attention.ring import Block, KeyRange, Layout, Turn
from mlx_sink.attention.rope import Rotation
from mlx_sink.errors import KernelError
from mlx_sink.kernels import arguments, source

MAX_RANGES = 8
"""Runs of rows under one turn that a tile of queries may see."""
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


@dataclass(frozen=True, slots=True)
class Tables:
    """What the queries of a chunk see, as the kernel reads it.

    Attributes:
        ranges: Runs of rows for each tile, ``[B or 1, tiles, 8, 8]`` int32; the columns are in
            the kernel's text.
        turns: Cosines and sines, ``[B or 1, (1 + n) * dims]`` float32 (at least 8): those of the
            previous epoch's turn, then those of each query towards the sinks.
        n: Queries of the chunk.
        size: Queries of a tile.
        last: The last row that is read, plus 1.
        dims: Rotated dimensions.
        interleaved: As in `Rotation`.
    """

    ranges: mx.array
    turns: mx.array
    n: int
    size: int
    last: int
    dims: int
    interleaved: bool

    @classmethod
    def stack(cls, rows: Sequence[Tables]) -> Tables:
        """Return the tables of a batch whose sequences stand at different tokens."""
        a = rows[0]
        return cls(
            mx.concatenate([t.ranges for t in rows]),
            mx.concatenate([t.turns for t in rows]),
            *(a.n, a.size, max(t.last for t in rows), a.dims, a.interleaved),
        )


@functools.cache
def tile_of(head_dim: int, v_head_dim: int, dtype: mx.Dtype) -> Tile | None:
    """Return the largest tile whose queries and keys fit, or None: such heads are not served.

    Tiles of 32 keys are for heads below 128 only, as in MLX's own attention: what they save in
    barriers they cost in threadgroups that run at once.
    """
    pad = 16 // dtype.size
    for queries, keys in _TILES:
        held = max(head_dim * (keys + pad), keys * (v_head_dim + pad))
        fits = (queries * (head_dim + pad) + held) * dtype.size <= _THREADGROUP_BYTES
        if fits and (keys <= 16 or max(head_dim, v_head_dim) < 128):
            return Tile(queries, keys)
    return None


@functools.lru_cache(maxsize=4)
def tables_of(layout: Layout, first: int, last: int, rotation: Rotation, size: int) -> Tables:
    """Make the tables of some queries of a call; all layers ask for the same in a step.

    Args:
        layout: The call.
        first: Token of the first query.
        last: Token after the last query.
        rotation: The layer's rotary embedding.
        size: Queries of a tile, of `tile_of`.

    Raises:
        KernelError: A tile's keys lie in more ranges than the kernel serves.
    """
    starts = range(first, last, size)
    ranges = np.zeros((1, len(starts), MAX_RANGES, 8), np.int32)
    end = 0
    for i, start in enumerate(starts):
        block = layout.block(start, min(start + size, last))
        rows = [_range_row(r, block, layout.ring.window) for r in block.ranges]
        if len(rows) > MAX_RANGES:
            raise KernelError(
                f"the keys of a tile must lie in at most {MAX_RANGES} ranges, got {len(rows)}"
            )
        ranges[0, i, : len(rows)] = rows
        end = max(end, *(r.row + r.length for r in block.ranges))
    turns = _turn_row(layout, first, last, rotation)
    pairs = rotation.dims, rotation.interleaved
    return Tables(mx.array(ranges), mx.array(turns), last - first, size, end, *pairs)


def _range_row(r: KeyRange, block: Block, window: int) -> tuple[int, ...]:
    # Only small differences count, and tokens of an endless stream outgrow int32.
    token = max(r.token - block.first, -r.length) if r.sinks else r.token - block.first
    # The last query sees no window key before `oldest`, the first none after itself.
    oldest = r.token if r.sinks else block.last - window
    seen_from, seen_to = max(0, oldest - r.token), min(r.length, block.first + 1 - r.token)
    reach = arguments.FAR if r.sinks else window
    return (r.row, r.length, int(r.turn), token, reach, seen_from, seen_to, 0)


def _turn_row(layout: Layout, first: int, last: int, rotation: Rotation) -> np.ndarray:
    """Return cosines and sines of the previous epoch's turn and the sinks', worked out in f64."""
    queries = slice(first - layout.ring.tokens, last - layout.ring.tokens)
    previous, sinks = (list(layout.turns(turn))[queries] for turn in (Turn.PREVIOUS, Turn.SINK))
    angles = np.multiply.outer(np.array([previous[0], *sinks], np.float64), rotation.frequencies)
    row = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32).ravel()
    return np.pad(row, (0, max(0, 8 - row.size)))[None]


@dataclass(frozen=True, slots=True)
class Launch:
    """How arrays of some shapes are served: what is compiled, and over which grid."""

    template: list[tuple[str, Any]]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    shape: tuple[int, ...]


def prefill(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    tables: Tables,
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
            *(mx.contiguous(queries), keys, values, tables.ranges, tables.turns),
            *(arguments.logits(learned_sinks), arguments.scalars(scale, softcap)),
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
) -> Launch:
    """Check a call and lay it out; once for all calls that look alike."""
    batch, n, last, size = tables
    capped, learned = options
    arguments.check(
        *(q, k, v, dtypes), batch=batch, n=n, last=last, dims=rotation[0], learned=learned
    )
    (B, H, L, D), DV, dtype = q, v[3], dtypes[0]
    tile = tile_of(D, DV, dtype)
    if tile is None:
        raise KernelError(f"queries must have a head_dim whose tiles fit 32 KB, got {D}, {DV}")
    if size != tile.queries:
        raise KernelError(f"tables must be for tiles of {tile.queries} queries, got {size}")
    threads = 4 * size  # a simdgroup for every 8 queries
    template = [
        *(("T", dtype), ("D", D), ("DV", DV), ("SG", size // 8)),
        *(("BK", tile.keys), ("DIMS", rotation[0]), ("INTERLEAVED", rotation[1])),
        *(("SOFTCAP", capped), ("LSINK", learned is not None)),
    ]
    grid = (threads * -(-L // size), H, B)
    return Launch(template, grid, (threads, 1, 1), (B, H, L, DV))


@functools.cache
def _kernel() -> source.Kernel:
    return source.build(("prefill",), ("decode_common", "prefill_common"), _INPUTS, ("out",))


def forget() -> None:
    """Forget the kernel that was built: tests put a runner in the place of MLX's."""
    for cached in (source.build, _kernel):
        cached.cache_clear()
