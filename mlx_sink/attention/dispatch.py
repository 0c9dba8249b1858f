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
from mlx_sink.attention.single import attend_one, step_of

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
    if layout.n == 1 and packed is None:
        # What follows is a decode step's: a GPU, or a CPU, waits for every line of it.
        step = step_of(layout, rotation, scale, queries.shape[3])
        if step is not None and (step.is_still or not _may_serve(rotation)):
            return attend_one(queries, keys, values, step, scale, softcap, learned_sinks)
    call = _Call(
        queries, keys, values, layout, rotation, scale, softcap, learned_sinks, packed, archived
    )
    if layout.n == 1:
        return call.attend(blocks_of(layout, 1)[0])
    return call.in_blocks()


def _may_serve(rotation: Rotation) -> bool:
    """Tell whether the decode kernel may serve a layer on this machine."""
    return rotation.start == 0 and check_decode.is_possible()


@dataclass(slots=True, eq=False)
class _Call:
    """A call of `sink_attention`; the fields are its arguments."""

    queries: mx.array
    keys: mx.array
    values: mx.array
    layout: Layout
    rotation: Rotation
    scale: float
    softcap: float | None
    learned_sinks: mx.array | None
    packed: tuple[Packed, Packed] | None
    archived: Archived | None
    turned: reference.Turned | None = None

    def in_blocks(self) -> mx.array:
        """Attend block by block, neighbours in one launch where a kernel serves."""
        layout, rotation = self.layout, self.rotation
        is_band = layout.ring.block == 1 and not layout.ring.chunked
        is_chunk = layout.n > MAX_QUERIES and rotation.start == 0 and is_band
        outputs: list[mx.array] = []
        size = recall.BLOCK if layout.recalls else BLOCK
        for still, group in groupby(blocks_of(layout, size), self.is_still):
            blocks = list(group)
            tile = None
            if is_chunk and not still:
                tile = check_prefill.serves(
                    self.queries, self.keys, self.values, rotation, **self.options
                )
            if tile is None:
                outputs += map(self.attend, blocks)
                continue
            first, last = blocks[0].first, blocks[-1].last
            tables = prefill_tables(layout, first, last, rotation, tile.queries)
            queries = self.rows(first, last)
            outputs.append(
                prefill(queries, self.keys, self.values, tables, scale=self.scale, **self.options)
            )
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)

    @property
    def options(self) -> reference.Extras:
        return {"softcap": self.softcap, "learned_sinks": self.learned_sinks}

    def rows(self, first: int, last: int) -> mx.array:
        """Return the queries of some tokens."""
        if last - first == self.layout.n:
            return self.queries
        start = self.layout.ring.tokens
        return self.queries[:, :, first - start : last - start]

    def is_still(self, block: Block) -> bool:
        """Tell whether one rotation of the queries serves for all keys, and nothing is capped."""
        if self.softcap is not None or block.evicted:
            return False
        return block.turns == STILL or self.rotation.is_identity

    def attend(self, block: Block) -> mx.array:
        """Attend from one block."""
        layout, rotation, scale = self.layout, self.rotation, self.scale
        keys, values, softcap = self.keys, self.values, self.softcap
        q = self.rows(block.first, block.last)
        may_serve = rotation.start == 0 and layout.n <= MAX_QUERIES
        if (
            self.packed is not None
            and may_serve
            and fits(layout, block, packed=True)
            and check_decode.serves(q, keys, values, rotation, packed=self.packed, **self.options)
        ):
            tables = decode_tables(layout, block, rotation, packed=True)
            return decode_packed(q, *self.packed, tables, scale=scale, **self.options)
        if self.is_still(block):
            return reference.attend_fused(q, keys, values, block, scale, self.learned_sinks)
        if (
            may_serve
            and fits(layout, block)
            and check_decode.serves(q, keys, values, rotation, **self.options)
        ):
            tables = decode_tables(layout, block, rotation)
            return decode(q, keys, values, tables, scale=scale, **self.options)
        if layout.n == 1:
            step = step_of(layout, rotation, scale, q.shape[3])
            if step is not None:
                return attend_one(q, keys, values, step, scale, softcap, self.learned_sinks)
        return self.in_general(block)

    def in_general(self, block: Block) -> mx.array:
        """Attend from one block in the plain operations that know everything."""
        if self.turned is None:
            self.turned = reference.Turned(self.queries, self.layout, self.rotation, self.scale)
        retrieved = None
        if block.evicted and self.archived is not None:
            far = self.turned.rows(block, Turn.FAR)
            retrieved = retrieve(far, self.archived, block, self.layout.recalls, self.rotation)
        queries = self.turned.of(block)
        return reference.attend(
            queries, self.keys, self.values, block, retrieved=retrieved, **self.options
        )
