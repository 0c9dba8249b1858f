"""Attention from one new token in plain MLX operations: what a decode step costs without a kernel.

The same arithmetic as `reference.attend`, with as few operations as it takes: a GPU waits while
Python builds them, and every layer does. What depends on the step alone is worked out once for
all layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx

from mlx_sink.attention.layout import Layout, blocks_of
from mlx_sink.attention.ring import Turn
from mlx_sink.attention.rope import Rotation


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What all layers of a model share in a step.

    Attributes:
        start: The first row that is seen.
        stop: The row after the last.
        cuts: Where the turn changes, counted from ``start``.
        turns: For each piece between, which of the matrices turns the query.
        matrices: Rotations that scale too; ``None`` for the query as it is, only scaled.
        is_still: The query is right as it is for all rows.
    """

    start: int
    stop: int
    cuts: list[int]
    turns: tuple[int, ...]
    matrices: tuple[mx.array | None, ...]
    is_still: bool


def attend_one(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    step: Step,
    scale: float,
    softcap: float | None,
    learned_sinks: mx.array | None,
) -> mx.array:
    """Attend from a call of one token to rows that are neighbours.

    Args:
        queries: ``[B, n_heads, 1, head_dim]`` after RoPE.
        keys: ``[B, n_kv_heads, rows, head_dim]``.
        values: ``[B, n_kv_heads, rows, v_head_dim]``.
        step: What it sees, and how it is turned.
        scale: Factor on q.k.
        softcap: As in `reference.attend`.
        learned_sinks: As in `reference.attend`.

    Returns:
        ``[B, n_heads, 1, v_head_dim]``.
    """
    B, H, _, D = queries.shape
    n_kv_heads, rows = keys.shape[1], keys.shape[2]
    dtype = queries.dtype
    if step.is_still and softcap is None:
        return _fused(queries, keys, values, step, scale, learned_sinks)
    shape = (B, n_kv_heads, H // n_kv_heads, D)
    turned = [
        mx.reshape(
            queries * scale if m is None else (queries.astype(mx.float32) @ m).astype(dtype), shape
        )
        for m in step.matrices
    ]
    if step.stop - step.start != rows:
        keys, values = keys[:, :, step.start : step.stop], values[:, :, step.start : step.stop]
    if step.cuts:
        pieces = mx.split(keys, step.cuts, axis=2)
        parts = [turned[i] @ x.swapaxes(2, 3) for i, x in zip(step.turns, pieces, strict=True)]
        scores = mx.concatenate(parts, axis=3)
    else:
        scores = turned[step.turns[0]] @ keys.swapaxes(2, 3)
    if softcap is not None:
        scores = softcap * mx.tanh(scores / softcap)
    if learned_sinks is not None:
        logits = mx.reshape(learned_sinks.astype(dtype), (1, n_kv_heads, H // n_kv_heads, 1))
        scores = mx.concatenate([scores, mx.broadcast_to(logits, (*shape[:3], 1))], axis=3)
    weights = mx.softmax(scores, axis=3, precise=True)
    if learned_sinks is not None:
        weights = weights[..., :-1]  # a sink has no value
    return mx.reshape(weights @ values, (B, H, 1, -1))


def _fused(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    step: Step,
    scale: float,
    learned_sinks: mx.array | None,
) -> mx.array:
    """Attend with MLX's own kernel, as `reference.attend_fused` does."""
    if step.stop - step.start != keys.shape[2]:
        keys, values = keys[:, :, step.start : step.stop], values[:, :, step.start : step.stop]
    sinks = None if learned_sinks is None else learned_sinks.astype(queries.dtype)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, sinks=sinks)


@lru_cache(maxsize=8)
def step_of(layout: Layout, rotation: Rotation, scale: float, head_dim: int) -> Step | None:
    """Return what all layers share that ask alike; ``None`` for what `attend_one` cannot.

    Args:
        layout: A call of one token.
        rotation: The layer's rotary embedding.
        scale: Factor on q.k.
        head_dim: Of queries and keys.
    """
    (block,) = blocks_of(layout, 1)
    if block.evicted or not block.in_a_row:
        return None
    spans, turns = block.spans, list[Turn]()
    cuts: list[int] = []
    of_span: list[int] = []
    for span in spans:
        turn = Turn.NONE if rotation.is_identity else span.turn
        if turn not in turns:
            turns.append(turn)
        which = turns.index(turn)
        if of_span and of_span[-1] == which:
            continue
        if of_span:
            cuts.append(span.start - spans[0].start)
        of_span.append(which)
    matrices = [
        None if turn is Turn.NONE else rotation.matrix(layout.turns(turn)[0], head_dim, scale)
        for turn in turns
    ]
    still = matrices == [None]
    return Step(spans[0].start, spans[-1].stop, cuts, tuple(of_span), tuple(matrices), still)
