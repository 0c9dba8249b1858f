"""The attention in plain MLX operations: runs on every device.

This is what serves where no verified kernel does, and what kernels are compared with.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, TypedDict, cast

import mlx.core as mx
import numpy as np

from mlx_sink.attention.layout import Block, Layout, Span, layout_of
from mlx_sink.attention.recall import Retrieved
from mlx_sink.attention.ring import Ring, Turn
from mlx_sink.attention.rope import Rotation

BLOCK = 64
"""Queries attended together: keys that none of them sees are never multiplied.

A block multiplies ``S + W + BLOCK`` keys a query where ``S + W`` are needed; smaller blocks
waste less and cost more calls. On a CPU 64 is the fastest for windows up to 1,024 and as fast
as any other for longer ones.
"""


class Extras(TypedDict):
    """What some models add to the attention; the arguments of these names say how."""

    softcap: float | None
    learned_sinks: mx.array | None


class Turned:
    """A call's queries, scaled, under each turn that is asked for; worked out once a turn.

    Args:
        queries: ``[B, n_heads, L, head_dim]`` after RoPE.
        layout: Which token each query is.
        rotation: The layer's rotary embedding.
        scale: Factor on q.k.
    """

    def __init__(self, queries: mx.array, layout: Layout, rotation: Rotation, scale: float):
        self._queries, self._layout = queries, layout
        self._rotation, self._scale = rotation, scale
        self._under: dict[Turn, mx.array] = {}

    def under(self, turn: Turn) -> mx.array:
        """Return all queries under a turn."""
        if turn not in self._under:
            if turn is Turn.NONE or self._rotation.is_identity:
                self._under[turn] = self._queries * self._scale
            else:
                positions, key = self._layout.turns(turn), (self._layout, turn)
                still = self.under(Turn.NONE)
                self._under[turn] = self._rotation.turn(still, positions, key=key)
        return self._under[turn]

    def of(self, block: Block) -> dict[Turn, mx.array]:
        """Return a block's queries under each turn that its keys ask for."""
        return {turn: self.rows(block, turn) for turn in block.turns}

    def rows(self, block: Block, turn: Turn) -> mx.array:
        """Return a block's queries under one turn."""
        whole, start = self.under(turn), self._layout.ring.tokens
        if block.n == self._layout.n:
            return whole
        return whole[:, :, block.first - start : block.last - start]


def attend(
    queries: Mapping[Turn, mx.array],
    keys: mx.array,
    values: mx.array,
    block: Block,
    *,
    softcap: float | None = None,
    learned_sinks: mx.array | None = None,
    retrieved: Retrieved | None = None,
) -> mx.array:
    """Attend from a block of queries to the key ranges it sees, each under its turn.

    Args:
        queries: The block's queries under each turn that its ranges need, already scaled,
            ``[B, n_heads, L, head_dim]``.
        keys: ``[B, n_kv_heads, rows, head_dim]``, rows as `block.ranges` says.
        values: ``[B, n_kv_heads, rows, v_head_dim]``.
        block: The queries and the rows they see.
        softcap: Scores become ``softcap * tanh(score / softcap)``, before any is masked.
        learned_sinks: A logit a head that takes part in the softmax, ``[n_heads]``.
        retrieved: Rows that each query has looked up; they follow on the sinks, under their turn.

    Returns:
        ``[B, n_heads, L, v_head_dim]``; one softmax over all ranges.
    """
    B, H, L, D = next(iter(queries.values())).shape
    n_kv_heads = keys.shape[1]
    # The query heads of a kv head become rows: each key is read once for all of them.
    grouped = {
        turn: mx.reshape(q, (B, n_kv_heads, (H // n_kv_heads) * L, D))
        for turn, q in queries.items()
    }
    across = keys.swapaxes(-1, -2)
    parts = [grouped[s.turn] @ across[..., s.start : s.stop] for s in block.spans]
    if retrieved is not None:
        parts.append(_by_query(grouped[Turn.SINK], retrieved.keys.swapaxes(-1, -2)))
    scores = mx.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
    if softcap is not None:
        scores = softcap * mx.tanh(scores / softcap)
    if block.n > 1:
        by_query = mx.reshape(scores, (B, H, L, -1))
        by_query = mx.where(_seen(block, retrieved), by_query, -mx.inf)
        scores = mx.reshape(by_query, scores.shape)
    if learned_sinks is not None:
        logits = _by_row(learned_sinks.astype(scores.dtype), scores.shape, L)
        scores = mx.concatenate([scores, logits], axis=-1)
    weights = mx.softmax(scores, axis=-1, precise=True)
    if learned_sinks is not None:
        weights = weights[..., :-1]  # a sink has no value
    if retrieved is None:
        return mx.reshape(weights @ rows_of(values, block.spans), (B, H, L, -1))
    n = weights.shape[-1] - retrieved.keys.shape[3]
    out = weights[..., :n] @ rows_of(values, block.spans)
    return mx.reshape(out + _by_query(weights[..., n:], retrieved.values), (B, H, L, -1))


def _by_query(x: mx.array, rows: mx.array) -> mx.array:
    """Multiply every query's own rows.

    Args:
        x: ``[B, n_kv_heads, heads of one * L, m]``.
        rows: ``[B, n_kv_heads, L, m, n]``.

    Returns:
        ``[B, n_kv_heads, heads of one * L, n]``.
    """
    B, n_kv_heads, L = rows.shape[:3]
    by_query = mx.reshape(x, (B, n_kv_heads, -1, L, x.shape[-1])).swapaxes(2, 3)
    products = (by_query @ rows).swapaxes(2, 3)
    return mx.reshape(products, (*x.shape[:-1], -1))


def _seen(block: Block, retrieved: Retrieved | None) -> mx.array:
    mask = visible(block)
    if retrieved is None:
        return mask
    seen = retrieved.seen
    if seen is None:
        seen = mx.ones((block.n, retrieved.keys.shape[3]), mx.bool_)
    return mx.concatenate([mask, seen], axis=-1)


def attend_fused(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    block: Block,
    scale: float,
    learned_sinks: mx.array | None = None,
) -> mx.array:
    """Attend with MLX's own kernel, where one rotation of the queries serves for all keys.

    Arguments and result as in `attend`, but the queries are those of the model, which the
    kernel scales. It has no softcap.
    """
    mask = None
    if block.n > 1:
        mask = "causal" if block.everything else visible(block)
    return mx.fast.scaled_dot_product_attention(
        queries,
        rows_of(keys, block.spans),
        rows_of(values, block.spans),
        scale=scale,
        mask=mask,
        sinks=None if learned_sinks is None else learned_sinks.astype(queries.dtype),
    )


def _by_row(logits: mx.array, scores: Sequence[int], L: int) -> mx.array:
    """Return ``[n_heads]`` logits beside scores ``[B, n_kv_heads, heads of one * L, keys]``."""
    B, n_kv_heads, rows, _ = scores
    column = mx.repeat(mx.reshape(logits, (1, n_kv_heads, rows // L, 1)), L, axis=2)
    return mx.broadcast_to(column, (B, n_kv_heads, rows, 1))


def rows_of(x: mx.array, spans: Sequence[Span]) -> mx.array:
    """Return the rows of the spans in order: a view where they are neighbours."""
    if all(a.stop == b.start for a, b in pairwise(spans)):
        start, stop = spans[0].start, spans[-1].stop
        return x if stop - start == x.shape[2] else x[:, :, start:stop]
    return mx.concatenate([x[:, :, s.start : s.stop] for s in spans], axis=2)


def visible(block: Block) -> mx.array:
    """Return which query of the block sees which of its keys, ``[L, rows]`` bool.

    Query t sees window key a iff ``o(t) <= a <= t``, and sink i iff ``i <= t``.
    """
    # Counted from the block's first query, so that blocks in the steady state are all alike.
    spans = [
        (max(r.token - block.first, -r.length) if r.sinks else r.token - block.first, r)
        for r in block.ranges
    ]
    return _visible(block.edges, tuple((lead, r.length, r.sinks) for lead, r in spans))


def mask_of(layout: Layout) -> mx.array:
    """Return which query of a call sees which of its rows, ``[n, rows]`` bool.

    All layers whose rings are alike get the same array, and know it by that.
    """
    return _masks.of(layout.ring, layout.n)


class _Masks(threading.local):
    """Those of this thread's last calls: streams in other threads must not take them away."""

    def __init__(self) -> None:
        self.of = lru_cache(maxsize=8)(_mask)


def _mask(ring: Ring, n: int) -> mx.array:
    layout = layout_of(ring, n)
    token = np.concatenate([np.arange(run.token, run.token + run.length) for run in layout.runs])
    query = np.arange(layout.ring.tokens, layout.end)[:, None]
    edge = np.array([ring.edge(t) for t in range(ring.tokens, layout.end)])[:, None]
    near = (token >= edge) | (token < ring.num_sinks)
    return mx.array(cast("Any", (token <= query) & near))


_masks = _Masks()


@lru_cache(maxsize=4)
def _visible(edges: tuple[int, ...], spans: tuple[tuple[int, int, bool], ...]) -> mx.array:
    query, edge = np.arange(len(edges))[:, None], np.array(edges)[:, None]
    parts: list[np.ndarray] = []
    for lead, length, sinks in spans:
        key = lead + np.arange(length)[None]
        seen = key <= query
        parts.append(seen if sinks else seen & (key >= edge))
    return mx.array(np.concatenate(parts, axis=1))
