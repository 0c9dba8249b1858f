"""The one entry to sink-plus-window attention, and the rule that says what computes it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import mlx.core as mx

from mlx_sink import reference
from mlx_sink.kernels import selfcheck
from mlx_sink.kernels.decode import decode, fits, tables_of
from mlx_sink.ring import Block, Layout, Turn, blocks_of
from mlx_sink.rope import Rotation

BLOCK = 64
"""Queries attended together: keys that none of them sees are never multiplied.

A block multiplies ``S + W + BLOCK`` keys a query where ``S + W`` are needed; smaller blocks
waste less and cost more calls. On a CPU 64 is the fastest for windows up to 1,024 and as fast
as any other for longer ones.
"""
STILL = frozenset([Turn.NONE])


@dataclass(frozen=True, slots=True)
class Attended:
    """What one layer's call of `sink_attention` was given; the names are its arguments'."""

    queries: mx.array
    keys: mx.array
    layout: Layout
    scale: float
    softcap: float | None
    learned_sinks: mx.array | None


_observer: ContextVar[Callable[[Attended], None] | None] = ContextVar("observer", default=None)


@contextmanager
def observed(observer: Callable[[Attended], None]) -> Generator[None]:
    """Let a function see what every call of this thread attends with, while the block runs."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def sink_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    layout: Layout,
    rotation: Rotation,
    scale: float,
    softcap: float | None = None,
    learned_sinks: mx.array | None = None,
) -> mx.array:
    """Attend from new tokens to the sinks and the window, at StreamingLLM's distances.

    The distance to a window token a is ``t - a``, to sink i ``min(t, S + W - 1) - i``
    (arXiv:2309.17453, section 3.2: positions within the cache). Keys stay as they were rotated
    when they came; the queries are turned instead.

    Args:
        queries: ``[B, n_heads, L, head_dim]`` after RoPE, L as ``layout.n``.
        keys: ``[B, n_kv_heads, rows, head_dim]`` after RoPE; rows as ``layout.runs`` says.
        values: ``[B, n_kv_heads, rows, v_head_dim]``.
        layout: Which token each query and each row is.
        rotation: The layer's rotary embedding.
        scale: Factor on q.k, usually ``head_dim ** -0.5``.
        softcap: Scores become ``softcap * tanh(score / softcap)`` before the softmax (Gemma 2).
        learned_sinks: A logit a head, ``[n_heads]``, that takes its share of the softmax and has
            no value (gpt-oss).

    Returns:
        ``[B, n_heads, L, v_head_dim]``.

    Rule: where no key of a block needs a turn (before the first wrap, without sinks, or in a
    layer without positions) and no score is capped, MLX's fused attention; elsewhere, for a
    call of at most 8 new tokens whose keys lie in at most 8 ranges (`kernels.decode.fits`), the
    kernel `kernels.decode` if it has passed its check on this machine, for as many tokens
    (`kernels.selfcheck.serves`); for everything else `reference.attend`.
    """
    if (observer := _observer.get()) is not None:
        observer(Attended(queries, keys, layout, scale, softcap, learned_sinks))
    turned: dict[Turn, mx.array] = {}
    start, window = layout.ring.tokens, layout.ring.window

    def under(turn: Turn) -> mx.array:
        if turn not in turned:
            if turn is Turn.NONE or rotation.is_identity:
                turned[turn] = queries * scale
            else:
                positions = layout.turns(turn)
                turned[turn] = rotation.turn(under(Turn.NONE), positions, key=(layout, turn))
        return turned[turn]

    def attend(block: Block) -> mx.array:
        rows = slice(block.first - start, block.last - start)
        q = queries if block.n == layout.n else queries[:, :, rows]
        if softcap is None and (rotation.is_identity or block.turns == STILL):
            return reference.attend_fused(q, keys, values, block, window, scale, learned_sinks)
        if fits(layout, block) and selfcheck.serves(
            *(q, keys, values, rotation), softcap=softcap, learned_sinks=learned_sinks
        ):
            tables = tables_of(layout, block, rotation)
            return decode(
                *(q, keys, values, tables),
                scale=scale,
                softcap=softcap,
                learned_sinks=learned_sinks,
            )
        qs = {turn: under(turn) for turn in block.turns}
        if block.n < layout.n:
            qs = {turn: q[:, :, rows] for turn, q in qs.items()}
        return reference.attend(
            qs, keys, values, block, window, softcap=softcap, learned_sinks=learned_sinks
        )

    outputs = [attend(block) for block in blocks_of(layout, BLOCK)]
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)
