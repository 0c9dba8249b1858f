"""Which rows the queries of a call see, and how the queries are turned, as the kernels read it.

What changes from step to step comes in these tables, and is no constant of the kernels' text. All
layers of a model ask for the same tables in a step.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_sink.attention.layout import Block, KeyRange, Layout
from mlx_sink.attention.ring import Turn
from mlx_sink.attention.rope import Rotation
from mlx_sink.errors import KernelError

MAX_QUERIES = 8
"""New tokens of a call that the decode kernel serves."""
MAX_RANGES = 8
"""Rows of a range table: runs of rows under one turn that a block of queries may see."""
_FAR = 1 << 30
"""The reach towards sinks: a query sees all up to its own token."""


@dataclass(frozen=True, slots=True)
class DecodeTables:
    """What the queries of a call see, as the kernel reads it.

    Attributes:
        ranges: Runs of live rows, ``[B or 1, 8, 8]`` int32; the columns are in the kernel's text.
        turns: Cosines and sines of the queries' turns, ``[B or 1, 2 * L * dims]`` float32 (at
            least 8, as MLX hands smaller arrays over in another address space).
        n: L, queries of the call.
        live: Rows that the longest sequence of the batch sees.
        last: The last row that is read, plus 1.
        dims: Rotated dimensions.
        interleaved: As in `Rotation`.
    """

    ranges: mx.array
    turns: mx.array
    n: int
    live: int
    last: int
    dims: int
    interleaved: bool

    @classmethod
    def stack(cls, rows: Sequence[DecodeTables]) -> DecodeTables:
        """Return the tables of a batch whose sequences stand at different tokens."""
        return replace(
            rows[0],
            ranges=mx.concatenate([t.ranges for t in rows]),
            turns=mx.concatenate([t.turns for t in rows]),
            live=max(t.live for t in rows),
            last=max(t.last for t in rows),
        )


@functools.lru_cache(maxsize=4)
def decode_tables(
    layout: Layout, block: Block, rotation: Rotation, *, packed: bool = False
) -> DecodeTables:
    """Make the tables of a block of queries; all layers of a model ask for the same in a step.

    Args:
        layout: The call.
        block: Its queries.
        rotation: The layer's rotary embedding.
        packed: No range is to have sinks and others: they lie in different arrays.

    Raises:
        KernelError: More queries or ranges than the kernel serves.
    """
    if not 1 <= block.n <= MAX_QUERIES:
        raise KernelError(f"queries must be 1 to {MAX_QUERIES}, got {block.n}")
    rows = _decode_ranges(block, layout.ring.window, packed)
    if len(rows) > MAX_RANGES:
        raise KernelError(f"the keys must lie in at most {MAX_RANGES} ranges, got {len(rows)}")
    ranges = np.zeros((1, MAX_RANGES, 8), np.int32)
    ranges[0, : len(rows)] = rows
    start = layout.ring.tokens
    queries = slice(block.first - start, block.last - start)
    turns = [*layout.turns(Turn.PREVIOUS)[queries], *layout.turns(Turn.SINK)[queries]]
    return DecodeTables(
        mx.array(ranges),
        _cosines_and_sines(turns, rotation),
        block.n,
        sum(row[1] for row in rows),
        max(row[0] + row[1] for row in rows),
        rotation.dims,
        rotation.interleaved,
    )


def _decode_ranges(block: Block, window: int, packed: bool) -> list[tuple[int, ...]]:
    if block.n == 1 and not packed:
        # Everything in the ranges is visible: neighbours under one turn are one range.
        return [(s.start, s.stop - s.start, int(s.turn), 0, 0, 0, 0, 0) for s in block.spans]
    rows: list[tuple[int, ...]] = []
    for r in block.ranges:
        edge = int(_is_edge(r, block, window))
        token, reach = _token_and_reach(r, block, window)
        rows.append((r.row, r.length, int(r.turn), edge, token, reach, 0, 0))
    return rows


def _is_edge(r: KeyRange, block: Block, window: int) -> bool:
    """Tell whether a query of the block does not see all keys of a range."""
    if block.n == 1:
        return False
    ahead = r.token + r.length - 1 > block.first
    behind = not r.sinks and r.token <= block.last - 1 - window
    return ahead or behind


@dataclass(frozen=True, slots=True)
class PrefillTables:
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
    def stack(cls, rows: Sequence[PrefillTables]) -> PrefillTables:
        """Return the tables of a batch whose sequences stand at different tokens."""
        return replace(
            rows[0],
            ranges=mx.concatenate([t.ranges for t in rows]),
            turns=mx.concatenate([t.turns for t in rows]),
            last=max(t.last for t in rows),
        )


@functools.lru_cache(maxsize=4)
def prefill_tables(
    layout: Layout, first: int, last: int, rotation: Rotation, size: int
) -> PrefillTables:
    """Make the tables of some queries of a call; all layers ask for the same in a step.

    Args:
        layout: The call.
        first: Token of the first query.
        last: Token after the last query.
        rotation: The layer's rotary embedding.
        size: Queries of a tile, of `prefill.tile_of`.

    Raises:
        KernelError: A tile's keys lie in more ranges than the kernel serves.
    """
    starts = range(first, last, size)
    ranges = np.zeros((1, len(starts), MAX_RANGES, 8), np.int32)
    end = 0
    for i, start in enumerate(starts):
        block = layout.block(start, min(start + size, last))
        rows = [_prefill_range(r, block, layout.ring.window) for r in block.ranges]
        if len(rows) > MAX_RANGES:
            raise KernelError(
                f"the keys of a tile must lie in at most {MAX_RANGES} ranges, got {len(rows)}"
            )
        ranges[0, i, : len(rows)] = rows
        end = max(end, *(r.row + r.length for r in block.ranges))
    queries = slice(first - layout.ring.tokens, last - layout.ring.tokens)
    turns = [layout.turns(Turn.PREVIOUS)[0], *layout.turns(Turn.SINK)[queries]]
    return PrefillTables(
        mx.array(ranges),
        _cosines_and_sines(turns, rotation),
        last - first,
        size,
        end,
        rotation.dims,
        rotation.interleaved,
    )


def _prefill_range(r: KeyRange, block: Block, window: int) -> tuple[int, ...]:
    token, reach = _token_and_reach(r, block, window)
    # The last query sees no window key before `oldest`, the first none after itself.
    oldest = r.token if r.sinks else block.last - window
    seen_from, seen_to = max(0, oldest - r.token), min(r.length, block.first + 1 - r.token)
    return (r.row, r.length, int(r.turn), token, reach, seen_from, seen_to, 0)


def _token_and_reach(keys: KeyRange, block: Block, window: int) -> tuple[int, int]:
    """Return the token of a range's first row, and how far back queries see in that range.

    The token counts from the block's first query: tokens of an endless stream outgrow int32. That
    of sinks, which may be any distance away, is cut to what still puts them all before the query.
    """
    token = keys.token - block.first
    return (max(token, -keys.length), _FAR) if keys.sinks else (token, window)


def _cosines_and_sines(turns: Sequence[int], rotation: Rotation) -> mx.array:
    """Return the cosines of every pair under a turn, then the sines, for each turn.

    Args:
        turns: Positions to turn by.
        rotation: The layer's rotary embedding, of ``dims`` rotated dimensions.

    Returns:
        ``[1, len(turns) * dims]`` float32, computed in float64; at least 8 wide, as MLX hands
        smaller arrays over in another address space.
    """
    angles = np.multiply.outer(np.asarray(turns, np.float64), rotation.frequencies)
    row = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32).ravel()
    return mx.array(np.pad(row, (0, max(0, 8 - row.size)))[None])
