"""The one entry to sink-plus-window attention, and the rule that says what computes it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import groupby

import mlx.core as mx

from mlx_sink.attention import recall, reference
from mlx_sink.attention.kernels import check_decode, check_prefill
from mlx_sink.attention.kernels.decode import decode, fits
from mlx_sink.attention.kernels.decode_packed import decode_packed
from mlx_sink.attention.kernels.prefill import prefill
from mlx_sink.attention.kernels.tables import MAX_QUERIES, decode_tables, prefill_tables
from mlx_sink.attention.layout import Block, Layout, blocks_of
from mlx_sink.attention.packed import Packed
from mlx_sink.attention.recall import Archived, retrieve
from mlx_sink.attention.reference import BLOCK
from mlx_sink.attention.ring import Turn
from mlx_sink.attention.rope import Rotation

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
    packed: tuple[Packed, Packed] | None = None,
    archived: Archived | None = None,
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
        packed: The same keys and values as they are held, if quantised.
        archived: The evicted blocks, where the layout says that the call recalls.

    Returns:
        ``[B, n_heads, L, v_head_dim]``.

    Rule, for blocks of the call's queries:

    1. Quantised keys and values, and a call of at most 8 tokens whose keys lie in at most 8
       ranges (`kernels.decode.fits`): the kernel `kernels.decode_packed`, if it has passed its
       check on this machine (`kernels.check_decode.serves`). Elsewhere they are expanded first,
       and then are as any others.
    2. No key of the block needs a turn (before the first wrap, without sinks, or in a layer
       without positions), and no score is capped: MLX's fused attention.
    3. Such a short call: the kernel `kernels.decode`, if it has passed its check on this machine,
       for as many tokens.
    4. A longer call: the kernel `kernels.prefill`, for all its blocks together, if it has passed
       its check on this machine and was faster there than the plain operations
       (`kernels.check_prefill.serves`). It knows no chunked attention (Llama 4).
    5. Everything else: the plain operations, `reference.attend`.

    The kernels serve heads that begin with the rotated dimensions. What looks up evicted blocks,
    and longer calls whose window begins at the edge of a block, the plain operations serve.
    """
    if (observer := _observer.get()) is not None:
        observer(Attended(queries, keys, layout, scale, softcap, learned_sinks))
    start = layout.ring.tokens
    options: reference.Extras = {"softcap": softcap, "learned_sinks": learned_sinks}
    turned = reference.Turned(queries, layout, rotation, scale)

    def rows(first: int, last: int) -> mx.array:
        whole = last - first == layout.n
        return queries if whole else queries[:, :, first - start : last - start]

    def is_still(block: Block) -> bool:
        if softcap is not None or block.evicted:
            return False
        return rotation.is_identity or block.turns == STILL

    def attend(block: Block) -> mx.array:
        q = rows(block.first, block.last)
        if (
            packed is not None
            and rotation.start == 0
            and fits(layout, block, packed=True)
            and check_decode.serves(q, keys, values, rotation, packed=packed, **options)
        ):
            tables = decode_tables(layout, block, rotation, packed=True)
            return decode_packed(q, *packed, tables, scale=scale, **options)
        if is_still(block):
            return reference.attend_fused(q, keys, values, block, scale, learned_sinks)
        if (
            rotation.start == 0
            and fits(layout, block)
            and check_decode.serves(q, keys, values, rotation, **options)
        ):
            tables = decode_tables(layout, block, rotation)
            return decode(q, keys, values, tables, scale=scale, **options)
        retrieved = None
        if block.evicted and archived is not None:
            far = turned.rows(block, Turn.FAR)
            retrieved = retrieve(far, archived, block, layout.recalls, rotation)
        return reference.attend(
            turned.of(block), keys, values, block, retrieved=retrieved, **options
        )

    is_band = layout.ring.block == 1 and not layout.ring.chunked
    is_chunk = layout.n > MAX_QUERIES and rotation.start == 0 and is_band
    outputs: list[mx.array] = []
    size = recall.BLOCK if layout.recalls else BLOCK
    for still, group in groupby(blocks_of(layout, size), is_still):
        blocks = list(group)
        tile = None
        if is_chunk and not still:
            tile = check_prefill.serves(queries, keys, values, rotation, **options)
        if tile is None:
            outputs += map(attend, blocks)
            continue
        first, last = blocks[0].first, blocks[-1].last
        tables = prefill_tables(layout, first, last, rotation, tile.queries)
        outputs.append(prefill(rows(first, last), keys, values, tables, scale=scale, **options))
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)
