"""Losses of a text's tokens over some caches, and their means by position."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.nn import losses as nn_losses

from mlx_sink.config import SinkConfig
from mlx_sink.errors import InputError
from mlx_sink.measure.machine import evaluate_caches

Losses = np.ndarray[Any, np.dtype[np.float32]]
Tokens = np.ndarray[Any, np.dtype[np.int32]]

LOGITS = 1 << 26
"""Logits that are computed at once: a model returns those of every token it is fed."""

DRAWN_TOGETHER = 64
"""Neighbouring tokens that are drawn together for an interval: their losses correlate."""

DRAWS = 1000


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean loss of some tokens.

    Attributes:
        count: How many tokens.
        loss: Their mean loss in nats.
        perplexity: ``exp(loss)``.
    """

    count: int
    loss: float
    perplexity: float

    @classmethod
    def of(cls, losses: Losses) -> Mean:
        """Return the mean of losses, an array of any shape."""
        loss = float(losses.mean(dtype=np.float64))
        return cls(losses.size, loss, math.exp(loss))


@dataclass(frozen=True, slots=True)
class Bucket:
    """The mean loss of the tokens at positions ``start`` to ``end``, the latter not included."""

    start: int
    end: int
    mean: Mean

    def to_dict(self) -> dict[str, Any]:
        """Return the bucket as a JSON-ready dictionary."""
        mean = self.mean
        return {
            "from": self.start,
            "to": self.end,
            "count": mean.count,
            "loss": mean.loss,
            "perplexity": mean.perplexity,
        }


def cut(
    ids: Sequence[int], bos: int | None, streams: int = 1, tokens: int | None = None
) -> tuple[Tokens, Tokens]:
    """Cut tokens into streams, and return what is fed and what is to be predicted.

    Args:
        ids: Tokens of the text, without special ones.
        bos: The token that each stream begins with, or ``None``.
        streams: How many.
        tokens: Of each; as many as there are if left out.

    Returns:
        Two arrays ``[streams, tokens]``: position i predicts the token fed at i + 1.

    Raises:
        InputError: The text has too few tokens.
    """
    room = (len(ids) - (bos is None)) // streams
    n = room if tokens is None else tokens
    if not 1 <= n <= room:
        raise InputError(f"the text has {room} tokens for each of {streams} streams, not {n}")
    body = np.array(ids[: streams * n + (bos is None)], np.int32)
    if bos is None:
        return body[:-1].reshape(-1, n), body[1:].reshape(-1, n)
    targets = body.reshape(-1, n)
    first = np.full((streams, 1), bos, np.int32)
    return np.concatenate([first, targets[:, :-1]], axis=1), targets


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """Return the loss of each target in nats, float32."""
    return nn_losses.cross_entropy(logits.astype(mx.float32), targets)


def chunk_losses(
    model: nn.Module, caches: Sequence[Any], inputs: Tokens, targets: Tokens, chunk: int
) -> Iterator[tuple[int, Losses]]:
    """Feed streams in chunks; yield where each chunk begins, and its losses.

    Args:
        model: The model.
        caches: One for each layer; they are filled.
        inputs: Tokens to feed, ``[streams, tokens]``.
        targets: Those to predict, of the same shape.
        chunk: Tokens that are fed at once. Their logits are dropped before the next ones.
    """
    for i in range(0, inputs.shape[1], chunk):
        logits = model(mx.array(inputs[:, i : i + chunk]), cache=caches)
        losses = cross_entropy(logits, mx.array(targets[:, i : i + chunk]))
        mx.eval(losses)
        # Rows written by the last chunk may still be pending when its losses are there.
        evaluate_caches(caches)
        yield i, np.array(losses)


def recompute(
    model: nn.Module, config: SinkConfig, inputs: Tokens, targets: Tokens, sampled: Sequence[int]
) -> Iterator[Losses]:
    """Yield the losses ``[streams]`` of sampled tokens from a plain model.

    For each of them the model is fed its visible tokens alone, from position 0: the oracle of an
    attention window with sinks. A token costs as much as a whole window.
    """
    capacity, S = config.capacity, config.num_sinks
    vocabulary = int(model(mx.zeros((1, 1), mx.int32)).shape[-1])
    rows = max(1, LOGITS // (capacity * vocabulary))
    for t in sampled:
        recent = np.arange(max(S, t - config.window + 1), t + 1)
        visible = inputs[:, np.concatenate([np.arange(min(S, t + 1)), recent])]
        parts: list[Losses] = []
        for i in range(0, len(inputs), rows):
            logits = model(mx.array(visible[i : i + rows]))[:, -1]
            loss = cross_entropy(logits, mx.array(targets[i : i + rows, t]))
            parts.append(np.asarray(loss, np.float32))
        yield np.concatenate(parts)


def by_position(
    losses: Losses, positions: Sequence[int] | np.ndarray[Any, Any], edges: Sequence[int]
) -> list[Bucket]:
    """Return the mean loss of each bucket of positions that has any tokens.

    Args:
        losses: ``[streams, tokens]``.
        positions: Of the tokens.
        edges: Where the buckets begin, and where the last one ends.
    """
    where = np.asarray(positions)
    buckets: list[Bucket] = []
    for start, end in pairwise(edges):
        is_inside = (where >= start) & (where < end)
        if is_inside.any():
            buckets.append(Bucket(start, end, Mean.of(losses[:, is_inside])))
    return buckets


def interval(losses: Losses, block: int = DRAWN_TOGETHER) -> tuple[float, float]:
    """Return the 95% interval of the mean loss: a bootstrap over blocks of neighbours.

    Args:
        losses: ``[tokens]``, in order.
        block: Tokens that are drawn together; 1 for tokens that are far apart.
    """
    starts = range(0, losses.size, block)
    sums = np.array([losses[i : i + block].sum(dtype=np.float64) for i in starts])
    sizes = np.array([losses[i : i + block].size for i in starts])
    drawn = np.random.default_rng(0).integers(0, len(sums), (DRAWS, len(sums)))
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
