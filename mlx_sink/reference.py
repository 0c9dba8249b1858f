"""The attention in plain MLX operations: runs on every device.

This is what serves where no verified kernel does, and what kernels are compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import mlx.core as mx
import numpy as np

from mlx_sink.ring import Block, KeyRange, Turn


def attend(
    queries: Callable[[Turn], mx.array],
    keys: mx.array,
    values: mx.array,
    block: Block,
    window: int,
    scale: float,
) -> mx.array:
    """Attend from a block of queries to the key ranges it sees, each under its turn.

    Args:
        queries: Gives the block's queries under a turn, ``[B, n_heads, L, head_dim]``.
        keys: ``[B, n_kv_heads, rows, head_dim]``, rows as `block.ranges` says.
        values: ``[B, n_kv_heads, rows, v_head_dim]``.
        block: The queries and the rows they see.
        window: W, own token included.
        scale: Factor on q.k.

    Returns:
        ``[B, n_heads, L, v_head_dim]``; one softmax over all ranges.
    """
    spans = merged(block.ranges)
    B, H, L, D = queries(spans[0].turn).shape
    n_kv_heads = keys.shape[1]
    grouped = (B, n_kv_heads, (H // n_kv_heads) * L)

    def scores_of(span: KeyRange) -> mx.array:
        # The query heads of a kv head become rows: each key is read once for all of them.
        q = mx.reshape(queries(span.turn) * scale, (*grouped, D))
        return q @ rows_of(keys, [span]).swapaxes(-1, -2)

    parts = [scores_of(span) for span in spans]
    scores = mx.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
    if block.n > 1:
        by_query = mx.reshape(scores, (B, H, L, -1))
        by_query = mx.where(visible(block, window), by_query, -mx.inf)
        scores = mx.reshape(by_query, scores.shape)
    weights = mx.softmax(scores, axis=-1, precise=True)
    return mx.reshape(weights @ rows_of(values, spans), (B, H, L, -1))


def attend_fused(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    block: Block,
    window: int,
    scale: float,
) -> mx.array:
    """Attend with MLX's own kernel, where one rotation of the queries serves for all keys.

    Arguments and result as in `attend`, the queries under their common turn.
    """
    mask = None
    if block.n > 1:
        mask = "causal" if block.everything else visible(block, window)
    return mx.fast.scaled_dot_product_attention(
        queries,
        rows_of(keys, block.ranges),
        rows_of(values, block.ranges),
        scale=scale,
        mask=mask,
    )


def merged(ranges: Sequence[KeyRange]) -> list[KeyRange]:
    """Join neighbouring rows under the same turn; tokens no longer run on within a range."""
    spans: list[KeyRange] = []
    for r in ranges:
        last = spans[-1] if spans else None
        if last and last.turn is r.turn and last.row + last.length == r.row:
            spans[-1] = replace(last, length=last.length + r.length)
        else:
            spans.append(r)
    return spans


def rows_of(x: mx.array, ranges: Sequence[KeyRange]) -> mx.array:
    """Return the rows of the ranges in order: a view where they are neighbours."""
    start, end = ranges[0].row, ranges[-1].row + ranges[-1].length
    if end - start == sum(r.length for r in ranges):
        return x if end - start == x.shape[2] else x[:, :, start:end]
    return mx.concatenate([x[:, :, r.row : r.row + r.length] for r in ranges], axis=2)


def visible(block: Block, window: int) -> mx.array:
    """Return which query of the block sees which of its keys, ``[L, rows]`` bool.

    Query t sees window key a iff ``t - W < a <= t``, and sink i iff ``i <= t``.
    """
    # Counted from the block's first query, so that blocks in the steady state are all alike.
    spans = [
        (max(r.token - block.first, -r.length) if r.sinks else r.token - block.first, r)
        for r in block.ranges
    ]
    return _visible(block.n, window, tuple((lead, r.length, r.sinks) for lead, r in spans))


@lru_cache(maxsize=4)
def _visible(n: int, window: int, spans: tuple[tuple[int, int, bool], ...]) -> mx.array:
    query = np.arange(n)[:, None]
    parts: list[np.ndarray] = []
    for lead, length, sinks in spans:
        key = lead + np.arange(length)[None]
        seen = key <= query
        parts.append(seen if sinks else seen & (key > query - window))
    return mx.array(np.concatenate(parts, axis=1))
