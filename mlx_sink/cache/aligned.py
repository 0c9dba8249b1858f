"""Rings for models that multiply queries and keys on their own, as latent attention does.

Such a model knows one rotation of the queries. What `sink_attention` does by turning queries is
done here to the keys that are handed out (the stored ones are never rewritten): they are
*aligned* with the queries, so that the model's plain products meet them at StreamingLLM's
distances.

Keys of the epoch before, and in a decode step the sinks, need the same turn for every query of
the call: they are turned the other way. In a chunk after the first wrap each query has its own
distance to the sinks. There the rotated part is doubled: a query becomes ``[q | q turned to the
sinks]``, a key of the window ``[k | 0]``, a sink ``[0 | k]``, and the one product gives both.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mlx_sink.attention.layout import Block, Layout, Span, layout_of
from mlx_sink.attention.reference import mask_of
from mlx_sink.attention.ring import Turn
from mlx_sink.attention.rope import Rotation
from mlx_sink.cache.sink_cache import SinkCache
from mlx_sink.config import SinkConfig
from mlx_sink.errors import CacheError


@dataclass(frozen=True, slots=True)
class Rows:
    """What a layer keeps of a token.

    Attributes:
        widths: Last dimensions of the keys and of the values.
        rotated: Which of the two RoPE has rotated: 0 or 1.
        positions: The rotation in the place that it has in those rows.
        in_chunks: The rotation in the keys that the model makes of a chunk's rows, if it then
            leaves the attention to mlx-lm's function, which is ours (Mistral 4); else ``None``.
    """

    widths: tuple[int, int]
    rotated: int
    positions: Rotation
    in_chunks: Rotation | None = None


class AlignedCache(SinkCache):
    """A ring whose keys are handed out aligned with the queries of the call.

    Args:
        config: What to keep.
        rotation: The rotary embedding, as it rotates its own input.
        rows: What is kept.
        limit: As in `SinkCache`.
    """

    def __init__(
        self, config: SinkConfig, rotation: Rotation, rows: Rows, *, limit: int | None = None
    ):
        super().__init__(config, rows.in_chunks or rotation, limit=limit)
        self.rows = rows
        self.of_queries = rotation

    def leaves_to_model(self, keys: mx.array, mask: object) -> bool:
        """Say that it does, but for chunks that `Rows.in_chunks` speaks of."""
        return not self._is_pending

    @property
    def offset(self) -> int:
        """Position of the next token. Reading it tells `AlignedRope` which stream is at work."""
        _at_work.cache = weakref.ref(self)
        return self.ring.position

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Take in new tokens and return the rows that they attend to, aligned.

        A single token gets the rows that it sees and no others: spare slots hold some more, and a
        decode step has no mask.

        Arguments, result and errors as in `SinkCache`; what `AlignedRope` has doubled comes and
        goes doubled.
        """
        _at_work.cache = None
        k, v = self.rows.widths
        fetched = list(super().update_and_fetch(keys[..., :k], values[..., :v]))
        self._packed = None
        n = keys.shape[2]
        if n > 1 and self.rows.in_chunks is not None:
            return fetched[0], fetched[1]
        layout = self.take_layout()
        which = None if self.rotation.is_identity else self.rows.rotated
        for i, rows in enumerate(fetched):
            if i == which:
                fetched[i] = self._aligned(layout, rows)
            elif n == 1:
                fetched[i] = _seen(layout, rows)
        return fetched[0], fetched[1]

    def _aligned(self, layout: Layout, rows: mx.array) -> mx.array:
        double, parts, done = is_doubled(layout), list[mx.array](), 0
        for span in _spans(layout):
            if layout.n > 1:
                parts += self._unseen(rows[:, :, done : span.start], double)
            parts.append(self._span(layout, rows, span, double))
            done = span.stop
        if layout.n > 1:
            parts += self._unseen(rows[:, :, done:], double)
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)

    def _unseen(self, part: mx.array, double: bool) -> list[mx.array]:
        """Return rows that no query sees, if any, as they are: the mask leaves them out."""
        if not part.shape[2]:
            return []
        return [self._doubled(part, Turn.NONE) if double else part]

    def _span(self, layout: Layout, rows: mx.array, span: Span, double: bool) -> mx.array:
        part = rows[:, :, span.start : span.stop]
        by_query = double and span.turn is Turn.SINK
        if span.turn is not Turn.NONE and not by_query:
            back = -layout.turns(span.turn)[0]
            # A layer that attends through `sink_attention` may share the rotation.
            part = self.rows.positions.turn(part, [back], key=(layout, span.turn, "back"))
        return self._doubled(part, span.turn) if double else part

    def _doubled(self, part: mx.array, turn: Turn) -> mx.array:
        """Lay rows out as ``[rest | rotated | 0]``, sinks as ``[rest | 0 | rotated]``."""
        rest = self.rows.positions.start
        rotated = part[..., rest:]
        zeros = mx.zeros_like(rotated)
        pair = [zeros, rotated] if turn is Turn.SINK else [rotated, zeros]
        return mx.concatenate([part[..., :rest], *pair], axis=-1)

    def make_mask(
        self, n: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array | str | None:
        """Return which query sees which row, ``[n, rows]`` bool; ``None`` for one query.

        Raises:
            CacheError: The model asks for a window that is not this layer's.
        """
        if self.rows.in_chunks is not None:
            return super().make_mask(n, window_size, return_array)
        if window_size is not None and not self.has_window(window_size):
            raise CacheError(f"the model wants a window of {window_size} tokens for this layer")
        return None if n == 1 else mask_of(layout_of(self.ring, n))


class AlignedRope:
    """A rotary embedding that also turns queries to the sinks, where `AlignedCache` asks for it.

    Args:
        rope: The model's own.
    """

    def __init__(self, rope: Any):
        self.rope = rope

    def __call__(self, x: mx.array, offset: Any = 0) -> mx.array:
        """Rotate ``[B, heads, L, width]``; doubled in a chunk that has sinks to turn to."""
        y = self.rope(x, offset=offset)
        reference = _at_work.cache
        cache = None if reference is None else reference()
        if cache is None or isinstance(offset, mx.array) or offset != cache.ring.position:
            return y
        layout = layout_of(cache.ring, x.shape[2])
        if cache.rows.in_chunks is not None or not is_doubled(layout):
            return y
        turned = cache.of_queries.turn(y, layout.turns(Turn.SINK), key=(layout, "q"))
        return mx.concatenate([y, turned], axis=-1)


class _AtWork(threading.local):
    """The cache whose offset was read last in this thread, until it gets the keys."""

    cache: weakref.ref[AlignedCache] | None = None


_at_work = _AtWork()


def _spans(layout: Layout) -> list[Span]:
    """Return the rows that a call sees, in row order."""
    return sorted(whole(layout).spans, key=lambda span: span.start)


def _seen(layout: Layout, rows: mx.array) -> mx.array:
    """Return the rows that a call sees."""
    spans = _spans(layout)
    if sum(span.stop - span.start for span in spans) == rows.shape[2]:
        return rows
    return mx.concatenate([rows[:, :, span.start : span.stop] for span in spans], axis=2)


def is_doubled(layout: Layout) -> bool:
    """Tell whether the queries of a call have different distances to the sinks."""
    return layout.n > 1 and Turn.SINK in whole(layout).turns


@lru_cache(maxsize=8)
def whole(layout: Layout) -> Block:
    """Return a call as one block."""
    return layout.block(layout.ring.tokens, layout.end)


def align_ropes(model: nn.Module) -> None:
    """Put an `AlignedRope` in the place of each rotary embedding of a model; idempotent."""
    for module in cast("list[Any]", model.modules()):
        for name, child in list(module.items()):
            if isinstance(child, nn.Module) and _is_rope(child):
                setattr(module, name, AlignedRope(child))


def restore_ropes(model: nn.Module) -> None:
    """Undo `align_ropes`."""
    for module in cast("list[Any]", model.modules()):
        for name, value in list(cast("dict[str, Any]", vars(module)).items()):
            if isinstance(value, AlignedRope):
                delattr(module, name)
                module[name] = value.rope


def _is_rope(module: nn.Module) -> bool:
    code = getattr(cast("Any", type(module)).__call__, "__code__", None)
    names = () if code is None else code.co_varnames[: code.co_argcount]
    return "offset" in names and not module.parameters()
