"""The one entry to sink-plus-window attention, and the rule that says what computes it."""

from __future__ import annotations

import mlx.core as mx

from mlx_sink import reference
from mlx_sink.ring import Block, Layout, Turn, blocks_of
from mlx_sink.rope import Rotation

BLOCK = 256
"""Queries attended together: keys that none of them sees are never multiplied.

A block multiplies ``S + W + BLOCK`` keys a query where ``S + W`` are needed; smaller blocks
waste less and cost more calls.
"""


def sink_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    layout: Layout,
    rotation: Rotation,
    scale: float,
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

    Returns:
        ``[B, n_heads, L, v_head_dim]``.

    Rule: where no key of a block needs a turn (before the first wrap, without sinks, or in a
    layer without positions), MLX's fused attention; elsewhere `reference.attend`.
    """
    turned: dict[Turn, mx.array] = {Turn.NONE: queries}
    start, window = layout.ring.tokens, layout.ring.window

    def attend(block: Block) -> mx.array:
        rows = slice(block.first - start, block.last - start)

        def under(turn: Turn) -> mx.array:
            if turn not in turned:
                turned[turn] = rotation.turn(queries, layout.turns(turn), key=(layout, turn))
            q = turned[turn]
            return q if block.n == layout.n else q[:, :, rows]

        turning = not rotation.is_identity and any(r.turn is not Turn.NONE for r in block.ranges)
        if turning:
            return reference.attend(under, keys, values, block, window, scale)
        return reference.attend_fused(under(Turn.NONE), keys, values, block, window, scale)

    outputs = [attend(block) for block in blocks_of(layout, BLOCK)]
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)
