"""Losses of a text's tokens over some caches, and what they say by position."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, cast

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
"""Logits that are worked out at once: a model returns those of every token it is fed."""

BLOCK = 64
"""Tokens that are drawn together for an interval: neighbours' losses hang together."""

DRAWS = 1000

_evaluate: Callable[..., None] = cast("Any", mx).eval


def cut(
    ids: Sequence[int], bos: int | None, streams: int = 1, tokens: int | None = None
) -> tuple[Tokens, Tokens]:
    """Cut tokens into streams, and return what is fed and what is to be predicted.

    Args:
        ids: Tokens of the text, without special ones.
        bos: What each stream begins with, if anything.
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
    """Return the loss of each target in nats."""
    loss = cast("Callable[..., mx.array]", nn_losses.cross_entropy)
    return loss(logits.astype(mx.float32), targets)


def chunk_losses(
    model: nn.Module, caches: Sequence[Any], inputs: Tokens, targets: Tokens, chunk: int
) -> Iterator[tuple[int, Losses]]:
    """Feed streams in chunks and yield where each began and its losses; logits are not kept."""
    for i in range(0, inputs.shape[1], chunk):
        logits = cast("Any", model)(mx.array(inputs[:, i : i + chunk]), cache=caches)
        losses = cross_entropy(logits, mx.array(targets[:, i : i + chunk]))
        _evaluate(losses)
        # Rows written by the last chunk may still be pending when its losses are there.
        evaluate_caches(caches)
        yield i, np.array(losses)


def recompute(
    model: nn.Module, config: SinkConfig, inputs: Tokens, targets: Tokens, sampled: Sequence[int]
) -> Iterator[Losses]:
    """Yield the losses ``[streams]`` of sampled tokens from a plain model.

    It is fed only what each token may see, from position 0: the oracle of an attention window
    with sinks, whose cost is that of a whole window for every token.
    """
    capacity, S = config.capacity, config.num_sinks
    vocabulary = int(cast("Any", model)(mx.zeros((1, 1), mx.int32)).shape[-1])
    rows = max(1, LOGITS // (capacity * vocabulary))
    for t in sampled:
        recent = np.arange(max(S, t - config.window + 1), t + 1)
        seen = inputs[:, np.concatenate([np.arange(min(S, t + 1)), recent])]
        parts: list[Losses] = []
        for i in range(0, len(inputs), rows):
            logits = cast("Any", model)(mx.array(seen[i : i + rows]))[:, -1]
            loss = cross_entropy(logits, mx.array(targets[i : i + rows, t]))
            parts.append(np.asarray(loss, np.float32))
        yield np.concatenate(parts)


def figures(losses: Losses) -> dict[str, Any]:
    """Return count, mean loss in nats and perplexity."""
    loss = float(losses.mean(dtype=np.float64))
    return {"count": losses.size, "loss": loss, "perplexity": math.exp(loss)}


def by_position(
    losses: Losses, positions: Sequence[int] | np.ndarray[Any, Any], edges: Sequence[int]
) -> list[dict[str, Any]]:
    """Return the figures of each bucket that has any tokens; losses are ``[streams, tokens]``."""
    where, rows = np.asarray(positions), list[dict[str, Any]]()
    for low, high in pairwise(edges):
        inside = (where >= low) & (where < high)
        if inside.any():
            rows.append({"from": low, "to": high} | figures(losses[:, inside]))
    return rows


def interval(losses: Losses, block: int = BLOCK) -> tuple[float, float]:
    """Return where 95 of 100 means of the loss lie: a bootstrap over blocks of neighbours.

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
