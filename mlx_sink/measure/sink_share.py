"""Measure how much of a model's attention lies on the first tokens of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_sink.attention import reference
from mlx_sink.attention.dispatch import Attended, observed
from mlx_sink.attention.layout import Block, blocks_of
from mlx_sink.config import SinkConfig
from mlx_sink.models.attach import attach, make_cache

FIRST = 8
"""Tokens at the start whose shares are kept apart."""
CHUNK = 256


@dataclass(frozen=True, slots=True)
class SinkShare:
    """The share of attention on each of the first tokens.

    Attributes:
        tokens: Tokens of the text.
        since: The first query that counts: earlier ones see few tokens, so the first ones get
            much attention in any case.
        layers: Indices of the caches that are attended to through mlx_sink: not those of
            recurrent layers, nor of models that multiply queries and keys on their own.
        shares: ``[layers, n_heads, FIRST]``, means over the queries from `since` on. A row of a
            layer with fewer heads than others ends in zeros.
    """

    tokens: int
    since: int
    layers: tuple[int, ...]
    shares: np.ndarray

    def of_layer(self, first: int) -> list[float]:
        """Return each layer's share on the first so many tokens, over all its heads."""
        return [float(heads.sum(axis=1).mean()) for heads in self.shares[:, :, :first]]

    def uniform(self, first: int) -> float:
        """Return the share of so many tokens if attention were spread evenly."""
        return float(np.mean(first / np.arange(self.since + 1, self.tokens + 1)))


def sink_share(model: nn.Module, tokens: Sequence[int]) -> SinkShare:
    """Measure the share of attention on the first tokens, in full causal attention.

    It is computed from the queries and keys that each layer hands to
    `attention.dispatch.sink_attention`: for every architecture that attends through it.

    Args:
        model: A model from mlx-lm; it is left attached with a window over the whole text.
        tokens: A text no longer than the model's trained context.
    """
    n = len(tokens)
    report = attach(model, SinkConfig(num_sinks=0, window=n))
    caches = make_cache(model)
    since = n // 2
    calls: list[mx.array] = []
    totals: list[np.ndarray] = []

    def observe(attended: Attended) -> None:
        calls.append(_on_first(attended, since))

    with observed(observe):
        for i in range(0, n, CHUNK):
            calls.clear()
            model(mx.array([tokens[i : i + CHUNK]]), cache=caches)
            mx.eval(calls, [cache.state for cache in caches])
            sums: list[np.ndarray] = [np.array(share) for share in calls]
            totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else sums
    heads = max((len(total) for total in totals), default=0)
    shares = np.zeros((len(totals), heads, FIRST))
    for row, total in zip(shares, totals, strict=True):
        row[: len(total)] = total / (n - since)
    ours = tuple(layer.index for layer in report.layers if layer.attention == "mlx_sink")
    layers = ours if len(ours) == len(totals) else tuple(range(len(totals)))
    return SinkShare(n, since, layers, shares)


def _on_first(attended: Attended, since: int) -> mx.array:
    """Return the attention on the first tokens, ``[n_heads, FIRST]``, summed over the queries."""
    start, H = attended.layout.ring.tokens, attended.queries.shape[1]
    total = mx.zeros((H, FIRST))
    for block in blocks_of(attended.layout, CHUNK):
        queries = attended.queries[:, :, block.first - start : block.last - start]
        weights = _weights(attended, queries, block)[:, :, max(0, since - block.first) :]
        tokens = [token for r in block.ranges for token in range(r.token, r.token + r.length)]
        for row, token in enumerate(tokens):
            if token < FIRST:
                total[:, token] += weights[..., row].sum(axis=(0, 2))
    return total


def _weights(attended: Attended, queries: mx.array, block: Block) -> mx.array:
    """Return a block's attention weights, ``[B, n_heads, L, keys]``, where no key needs a turn."""
    B, H, L, D = queries.shape
    n_kv_heads = attended.keys.shape[1]
    scaled = (queries * attended.scale).astype(mx.float32)
    grouped = mx.reshape(scaled, (B, n_kv_heads, H // n_kv_heads, L, D))
    keys = reference.rows_of(attended.keys, block.spans).astype(mx.float32)
    scores = grouped @ mx.expand_dims(keys, 2).swapaxes(-1, -2)
    if attended.softcap is not None:
        scores = attended.softcap * mx.tanh(scores / attended.softcap)
    scores = mx.reshape(scores, (B, H, L, -1))
    scores = mx.where(reference.visible(block), scores, -mx.inf)
    if attended.learned_sinks is not None:
        logits = mx.reshape(attended.learned_sinks.astype(mx.float32), (1, H, 1, 1))
        scores = mx.concatenate([scores, mx.broadcast_to(logits, (B, H, L, 1))], axis=-1)
    return mx.softmax(scores, axis=-1)
