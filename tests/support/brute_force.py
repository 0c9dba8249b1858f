"""The attention of the contract by brute force in float64, one query at a time.

It places each visible token at its position within the cache, as the paper does, and rotates it
there: no ring, no epochs, no turns, no blocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tiny import cut, distance, visible

from mlx_sink import SinkConfig
from mlx_sink.attention.dispatch import sink_attention
from mlx_sink.attention.rope import Rotation
from mlx_sink.cache.sink_cache import SinkCache
from mlx_sink.models.trace import rope_call

BASE = 100.0
"""Small, so that even the slowest pair turns visibly within a small window."""


@dataclass(frozen=True)
class Heads:
    """Numbers of heads, and their sizes."""

    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 8
    v_head_dim: int = 8


@dataclass(frozen=True)
class Stream:
    """Queries, keys and values of a stream before RoPE, ``[B, heads, n, dim]``, exact in dtype."""

    q: mx.array
    k: mx.array
    v: mx.array

    @classmethod
    def random(cls, heads: Heads, n: int, batch: int = 1, dtype: mx.Dtype = mx.float32) -> Stream:
        random = np.random.default_rng(n)
        shapes = (
            (batch, heads.n_heads, n, heads.head_dim),
            (batch, heads.n_kv_heads, n, heads.head_dim),
            (batch, heads.n_kv_heads, n, heads.v_head_dim),
        )
        return cls(*(mx.array(random.standard_normal(shape)).astype(dtype) for shape in shapes))


@dataclass(frozen=True)
class Extras:
    """What some models add to the attention: a cap on scores, a logit a head without a key."""

    softcap: float | None = None
    learned_sinks: tuple[float, ...] | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        sinks = self.learned_sinks
        given = None if sinks is None else mx.array(sinks)
        return {"softcap": self.softcap, "learned_sinks": given}

    def weights(self, scores: np.ndarray) -> np.ndarray:
        """Return what each key counts, ``[B, n_heads, keys]``."""
        if self.softcap is not None:
            scores = self.softcap * np.tanh(scores / self.softcap)
        if self.learned_sinks is None:
            return softmax(scores)
        logits = np.broadcast_to(np.array(self.learned_sinks)[:, None], (*scores.shape[:2], 1))
        return softmax(np.concatenate([scores, logits], axis=-1))[..., :-1]


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def rotation_of(rope: nn.RoPE | None) -> Rotation:
    return Rotation.of(None if rope is None else rope_call(rope, rope.dims))


def attended(
    stream: Stream,
    config: SinkConfig,
    rope: nn.RoPE | None,
    lengths: Iterable[int],
    scale: float,
    extras: Extras | None = None,
) -> np.ndarray:
    """Run the stream through a cache, as a model's attention layer does, in float64."""
    cache, outputs = SinkCache(config, rotation_of(rope)), []
    for piece in cut(stream.q.shape[2], lengths):
        q, k, v = stream.q[:, :, piece], stream.k[:, :, piece], stream.v[:, :, piece]
        if rope is not None:
            q, k = rope(q, offset=cache.offset), rope(k, offset=cache.offset)
        keys, values = cache.update_and_fetch(k, v)
        layout, rotation = cache.take_layout(), cache.rotation
        out = sink_attention(
            *(q, keys, values),
            layout=layout,
            rotation=rotation,
            scale=scale,
            **({} if extras is None else extras.arguments),
        )
        assert out.dtype == stream.q.dtype
        outputs.append(out)
    return np.array(mx.concatenate(outputs, axis=2).astype(mx.float32)).astype(np.float64)


def brute_force(
    stream: Stream,
    config: SinkConfig,
    rope: nn.RoPE | None,
    scale: float,
    extras: Extras | None = None,
) -> np.ndarray:
    """Attend as the contract says, ``[B, n_heads, n, v_head_dim]`` in float64."""
    q, k, v = (np.array(x.astype(mx.float32), np.float64) for x in (stream.q, stream.k, stream.v))
    S, W = config.num_sinks, config.window
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    out = np.empty((*q.shape[:3], v.shape[3]))
    for t in range(q.shape[2]):
        tokens = visible(t, S, W)
        # Turning a key back by the distance is turning the query forward by it.
        back = -np.array([distance(t, a, S, W) for a in tokens])
        scores = scale * (rotated(k[:, :, tokens], back, rope) @ q[:, :, t, :, None])[..., 0]
        weights = extras.weights(scores) if extras else softmax(scores)
        out[:, :, t] = (weights[:, :, None] @ v[:, :, tokens])[:, :, 0]
    return out


def rotated(x: np.ndarray, positions: np.ndarray, rope: nn.RoPE | None) -> np.ndarray:
    """Rotate rows by their positions, pair by pair; the pairs as in `mlx.nn.RoPE`."""
    out = x.copy()
    dims = 0 if rope is None else rope.dims
    for i in range(dims // 2):
        a, b = (2 * i, 2 * i + 1) if rope.traditional else (i, i + dims // 2)
        angles = positions * rope.base ** (-2 * i / dims)
        out[..., a] = x[..., a] * np.cos(angles) - x[..., b] * np.sin(angles)
        out[..., b] = x[..., a] * np.sin(angles) + x[..., b] * np.cos(angles)
    return out
