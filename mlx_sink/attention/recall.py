"""Which evicted blocks a token looks up, and how they stand among what it sees.

What has left the window lies in blocks of b tokens in an archive, each block's keys rotated at
0..b-1, whatever their place in the text. Every token that recalls picks k blocks by its own query,
so that the choice does not depend on how the text was cut into calls:

1. A head's score of a block is its best single key, met at distance W: m(h, j) = max over tokens
   i of block j of <R(W) q(h), k_i> scale.
2. Every head spreads one vote over the evicted blocks, softmax_j m(h, j). The k blocks with the
   most votes of all heads are retrieved; of equal ones the older.
3. In the order of the text they follow on the sinks, at S, S + 1, ..., S + k b - 1, and the window
   follows on them. All are under one softmax.

While all evicted blocks are retrieved that is full attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlx_sink.attention.layout import Block
from mlx_sink.attention.packed import Packed
from mlx_sink.attention.rope import Rotation

BLOCK = 16
"""Queries that look up together: each gathers rows of its own."""

Rows = mx.array | Packed
"""Rows ``[B, n_kv_heads, rows, head_dim]``, plain or quantised without sinks."""


@dataclass(frozen=True, slots=True)
class Shelf:
    """Which block lies in which slot of an archive: integers only.

    Block j of ``first .. first + count - 1`` lies in slot ``j % size``; the ``new`` blocks after
    them, which came in this call, in the slots from ``slots`` on.

    Attributes:
        size: Slots of a full archive.
        slots: Slots that there are.
        first: The oldest block.
        count: Blocks in those slots.
        new: Blocks after them.
        limit: Newest evicted blocks that a query chooses among.
    """

    size: int
    slots: int
    first: int
    count: int
    new: int
    limit: int

    def blocks(self) -> np.ndarray:
        """Return the block in each slot, or -1, ``[slots + new]`` int64."""
        held = np.full(self.slots, -1, np.int64)
        block = np.arange(self.first, self.first + self.count)
        held[block % self.size] = block
        end = self.first + self.count
        return np.concatenate([held, np.arange(end, end + self.new)])


@dataclass(frozen=True, slots=True, eq=False)
class Archived:
    """The evicted blocks of one layer, as one call may look them up.

    Attributes:
        keys: Rows of keys, block by block in the order of the slots; each block's are rotated at
            0..b-1.
        values: Rows of values.
        shelf: Which block lies in which slot.
        block: b, tokens of a block.
        first_row: S, position of the first retrieved row.
    """

    keys: Rows
    values: Rows
    shelf: Shelf
    block: int
    first_row: int


@dataclass(frozen=True, slots=True, eq=False)
class Retrieved:
    """What a block of queries has looked up.

    Attributes:
        keys: ``[B, n_kv_heads, L, R, head_dim]``, rotated to follow on the sinks.
        values: ``[B, n_kv_heads, L, R, v_head_dim]``.
        seen: Which query sees which of its rows, ``[L, R]`` bool; ``None`` for all. What is not
            seen holds zeros.
        blocks: The blocks in the order of the text, ``[B, L, R / b]`` int32; where a query sees
            fewer, whatever follows.
    """

    keys: mx.array
    values: mx.array
    seen: mx.array | None
    blocks: mx.array


def retrieve(
    far: mx.array, archived: Archived, block: Block, most: int, rotation: Rotation
) -> Retrieved:
    """Look up the evicted blocks of a block of queries.

    Args:
        far: The queries, scaled, at distance W, ``[B, n_heads, L, head_dim]``.
        archived: What there is.
        block: The queries.
        most: k, blocks that each retrieves at the most.
        rotation: The layer's rotary embedding.
    """
    k = min(most, max(block.evicted))
    slots, blocks = choose(far, archived, block.evicted, k)
    (B, L), b = slots.shape[:2], archived.block
    rows = mx.reshape(slots[..., None] * b + mx.arange(b), (B, -1))
    keys, values = _rows(archived.keys, rows), _rows(archived.values, rows)
    heads, D, R = keys.shape[1], keys.shape[3], k * b
    keys = mx.reshape(keys, (B, heads * L, R, D))
    if not rotation.is_identity:
        positions = [archived.first_row + n - n % b for n in range(R)]
        keys = rotation.turn(keys, positions, key=("retrieved", archived.first_row, R, b))
    keys = mx.reshape(keys, (B, heads, L, R, D))
    values = mx.reshape(values, (B, heads, L, R, -1))
    if min(block.evicted) >= k:
        return Retrieved(keys, values, None, blocks)
    counts = np.minimum(block.evicted, k)[:, None] * b
    seen = mx.array(cast("Any", np.arange(R) < counts))
    return Retrieved(keys, mx.where(seen[..., None], values, 0), seen, blocks)


def choose(
    far: mx.array, archived: Archived, evicted: Sequence[int], k: int
) -> tuple[mx.array, mx.array]:
    """Choose the k evicted blocks that get most votes, for each query.

    Args:
        far: As in `retrieve`.
        archived: As in `retrieve`.
        evicted: Blocks that have left the window of each query.
        k: Blocks to choose; where fewer are evicted the last ones are any.

    Returns:
        Their slots, and their numbers in the text, ``[B, L, k]`` int32 in the order of the text.
    """
    n_slots, order = _slots(archived.shelf)
    votes = votes_of(far, archived, evicted)
    # One integer for the vote and, below it, the age: no two are equal, and none is 0. The bits
    # of floats that are not negative are in the order of the floats.
    ranks = mx.view(votes, mx.uint32).astype(mx.uint64) * (1 << 32) + order.seniority
    if (live := _live(archived.shelf, tuple(evicted))) is not None:
        ranks = mx.where(live, ranks, 0)
    best = mx.argpartition(ranks, n_slots - k, axis=-1)[..., n_slots - k :]
    ages = mx.sort(order.age[best], axis=-1)
    return order.slot[ages], order.block[ages]


def votes_of(far: mx.array, archived: Archived, evicted: Sequence[int]) -> mx.array:
    """Return the votes that all heads give to each slot's block, ``[B, L, slots]`` float32.

    Arguments as in `choose`. A block that is not evicted, or not there, gets none.
    """
    B, H, L, D = far.shape
    heads = archived.keys.shape[1]
    grouped = mx.reshape(far, (B, heads, (H // heads) * L, D))
    scores = _products(grouped, archived.keys).astype(mx.float32)
    best = mx.reshape(scores, (B, H, L, -1, archived.block)).max(axis=-1)
    live = _live(archived.shelf, tuple(evicted))
    if live is None:
        return mx.softmax(best, axis=-1).sum(axis=1)
    # A query from whose window nothing has gone has no block to vote for.
    shares = mx.softmax(mx.where(live, best, -1e30), axis=-1)
    return mx.where(live, shares, 0).sum(axis=1)


def _products(queries: mx.array, keys: Rows) -> mx.array:
    if isinstance(keys, mx.array):
        return queries @ keys.swapaxes(-1, -2)
    return mx.quantized_matmul(
        queries,
        cast("mx.array", keys.words),
        cast("mx.array", keys.scales),
        keys.biases,
        transpose=True,
        group_size=keys.group_size,
        bits=keys.bits,
    )


def _rows(x: Rows, rows: mx.array) -> mx.array:
    """Return some rows of each sequence, ``[B, n_kv_heads, rows, head_dim]``.

    Args:
        x: The rows to take them from.
        rows: Which, ``[B, rows]``.
    """
    if isinstance(x, mx.array):
        return _taken(x, rows)
    words, scales, biases = (
        _taken(cast("mx.array", part), rows) for part in (x.words, x.scales, x.biases)
    )
    return Packed(None, words, scales, biases, x.bits, x.group_size).expanded()


def _taken(x: mx.array, rows: mx.array) -> mx.array:
    if x.shape[0] == 1:
        return mx.take(x, rows[0], axis=2)
    return mx.take_along_axis(x, rows[:, None, :, None], axis=2)


@dataclass(frozen=True, slots=True, eq=False)
class _Order:
    """The blocks of a shelf by age.

    Attributes:
        age: Of each slot's block, from 0 for the oldest; empty slots are the youngest, int32.
        slot: The slot of each age, int32.
        block: The number in the text of each age's block, int32.
        seniority: More for an older block, never 0, uint64.
    """

    age: mx.array
    slot: mx.array
    block: mx.array
    seniority: mx.array


@lru_cache(maxsize=4)
def _slots(shelf: Shelf) -> tuple[int, _Order]:
    blocks = shelf.blocks()
    young = np.where(blocks < 0, np.iinfo(np.int64).max, blocks)
    slot = np.argsort(young, kind="stable")
    age = np.empty_like(slot)
    age[slot] = np.arange(len(slot))
    values = age.astype(np.int32), slot.astype(np.int32), blocks[slot].astype(np.int32)
    arrays = [mx.array(cast("Any", x)) for x in (*values, (len(slot) - age).astype(np.uint64))]
    return len(slot), _Order(*arrays)


@lru_cache(maxsize=8)
def _live(shelf: Shelf, evicted: tuple[int, ...]) -> mx.array | None:
    """Return which query chooses among which slots, ``[L, slots]`` bool; ``None`` for all."""
    blocks, end = shelf.blocks(), np.asarray(evicted)[:, None]
    live = (blocks < end) & (blocks >= np.maximum(0, end - shelf.limit))
    return None if live.all() else mx.array(cast("Any", live))
