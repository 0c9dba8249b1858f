"""Rings of chunked attention: a token sees what came since its own chunk began, and nothing else.

Llama 4's layers, but for every fourth. Where the calls are cut must not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from brute_force import BASE, Heads, Stream, rotated, rotation_of, softmax
from every import WINDOW, tiny
from feeding import feed
from mlx_lm.models.cache import ChunkedKVCache
from tiny import TOLERANCE, cut, every, mixed, random_tokens

from mlx_sink import SinkConfig, attach
from mlx_sink.attention.dispatch import sink_attention
from mlx_sink.attention.layout import Layout, blocks_of, layout_of
from mlx_sink.attention.reference import visible
from mlx_sink.attention.ring import Ring, Turn
from mlx_sink.cache.sink_cache import SinkCache

CUTS: dict[str, Callable[[], Iterable[int]]] = {
    "steps": lambda: every(1),
    "at once": lambda: [1000],
    "3": lambda: every(3),
    "5": lambda: every(5),
    "to the edges": lambda: mixed(5, 5, 4, 1, 1, 9),
    "across them": lambda: mixed(3, 7, 1, 12, 2),
    "random": lambda: mixed(seed=4),
}
each_cut = pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())


def seen(t: int, W: int) -> list[int]:
    """Return which tokens token t attends to."""
    return [a for a in range(t + 1) if a // W == t // W]


def met(layout: Layout, size: int) -> Iterable[tuple[int, list[int], list[Turn]]]:
    """Yield, for each query of a call, the tokens that it meets and the turns towards them."""
    token_of = {run.row + i: run.token + i for run in layout.runs for i in range(run.length)}
    for block in blocks_of(layout, size):
        assert 0 < block.n <= size
        tokens = [r.token + i for r in block.ranges for i in range(r.length)]
        turns = [r.turn for r in block.ranges for _ in range(r.length)]
        rows = [r.row + i for r in block.ranges for i in range(r.length)]
        assert [token_of[row] for row in rows] == tokens
        mask = np.array(visible(block))
        if block.everything:
            assert np.array_equal(mask, np.tri(*mask.shape, k=mask.shape[1] - block.n, dtype=bool))
        for i in range(block.n):
            chosen = np.flatnonzero(mask[i])
            yield block.first + i, [tokens[c] for c in chosen], [turns[c] for c in chosen]


@each_cut
@pytest.mark.parametrize("size", [1, 2, 4, 64])
@pytest.mark.parametrize(("W", "E"), [(1, 1), (2, 5), (5, 5), (5, 8), (5, 13), (8, 1000)])
def test_visible_sets_and_distances(cuts: Callable[[], Iterable[int]], size: int, W: int, E: int):
    """In blocks of any size, the tokens of the own chunk, each at its true distance."""
    n = 50
    ring, position, began = Ring(0, W, E, chunked=True), list[int](), list[int]()
    for piece in cut(n, cuts()):
        layout, length = layout_of(ring, piece.stop - piece.start), piece.stop - piece.start
        position += range(ring.position, ring.position + length)
        began += [ring.start] * length
        queries: list[int] = []
        for t, tokens, turns in met(layout, size):
            queries.append(t)
            assert sorted(tokens) == seen(t, W)
            for a, turn in zip(tokens, turns, strict=True):
                turned = layout.turns(turn)[t - ring.tokens]
                assert position[t] + turned - position[a] == t - a
        assert queries == list(range(ring.tokens, layout.end))
        ring = layout.after
        assert ring.chunked
        assert ring.live == min(ring.tokens, W)


def test_a_block_ends_with_its_chunk():
    """Or its last queries would have the first ones' chunk in their keys."""
    layout = layout_of(Ring(0, 5, 1000, tokens=3, chunked=True), 14)
    assert [(b.first, b.last) for b in blocks_of(layout, 64)] == [
        (3, 5),
        (5, 10),
        (10, 15),
        (15, 17),
    ]
    assert [(b.first, b.last) for b in blocks_of(layout, 4)] == [
        *((3, 5), (5, 9), (9, 10)),
        *((10, 14), (14, 15), (15, 17)),
    ]


@each_cut
@pytest.mark.parametrize("block", [2, 64], indirect=True)
@pytest.mark.parametrize("epoch", [5, 9, 1000])
@pytest.mark.parametrize("rope", [nn.RoPE(8, base=BASE), None], ids=["rope", "no positions"])
def test_equals_brute_force(
    cuts: Callable[[], Iterable[int]], block: int, epoch: int, rope: nn.RoPE | None
):
    W, scale, stream = 5, 0.5, Stream.random(Heads(4, 2), 48)
    q, k, v = (np.array(x, np.float64) for x in (stream.q, stream.k, stream.v))
    k, v = (np.repeat(x, 2, axis=1) for x in (k, v))
    exact = np.empty(q.shape)
    for t in range(48):
        tokens = seen(t, W)
        keys = rotated(k[:, :, tokens], np.array(tokens) - t, rope)
        weights = softmax(scale * (keys @ q[:, :, t, :, None])[..., 0])
        exact[:, :, t] = (weights[:, :, None] @ v[:, :, tokens])[:, :, 0]

    cache = SinkCache(SinkConfig(0, W, epoch=epoch), rotation_of(rope), chunked=True)
    pieces: list[mx.array] = []
    for piece in cut(48, cuts()):
        x, y, z = (a[:, :, piece] for a in (stream.q, stream.k, stream.v))
        if rope is not None:
            x, y = rope(x, offset=cache.offset), rope(y, offset=cache.offset)
        fetched = cache.update_and_fetch(y, z)
        layout = cache.take_layout(fetched[0], mx.ones((1,)))
        pieces.append(
            sink_attention(x, *fetched, layout=layout, rotation=cache.rotation, scale=scale)
        )
    ours = np.array(mx.concatenate(pieces, axis=2))
    np.testing.assert_allclose(ours, exact, atol=1e-5)
    assert cache.keys.shape[2] == W


@each_cut
@pytest.mark.parametrize("epoch", [WINDOW, 11, 1000])
def test_equals_llama4_with_its_own_cache(cuts: Callable[[], Iterable[int]], epoch: int):
    """Its other layers see all, up to the capacity, so that nothing else differs."""
    model, tokens = tiny("llama4"), random_tokens(50) % 60
    theirs = feed(model, tokens, model.make_cache(), every(7))
    assert sum(isinstance(c, ChunkedKVCache) for c in model.make_cache()) == 3
    report = attach(model, SinkConfig(2, 60))
    assert [layer.cache for layer in report.layers].count("chunk ring") == 3
    caches = model.make_cache()
    for c in caches:
        if c.ring.chunked:
            assert (c.ring.num_sinks, c.ring.window) == (0, WINDOW)
            c.ring = replace(c.ring, epoch=epoch)
    np.testing.assert_allclose(feed(model, tokens, caches, cuts()), theirs, atol=TOLERANCE)


def test_state_and_copies_keep_the_kind():
    cache = SinkCache(SinkConfig(0, 5), rotation_of(None), chunked=True)
    other = SinkCache(SinkConfig(0, 5), rotation_of(None), chunked=True)
    other.state = cache.state
    assert other.ring.chunked
    ring = replace(cache.ring, tokens=9, rollback=2)
    assert ring.trimmed(1).chunked
    assert ring.reopened().chunked
    assert ring.advanced(3).chunked


def test_what_a_model_of_chunked_attention_asks_its_cache():
    """It trims the front of mlx-lm's cache and counts columns from there: a ring needs neither."""
    cache: Any = SinkCache(SinkConfig(0, 5), rotation_of(None), chunked=True)
    before = cache.ring
    cache.maybe_trim_front()
    assert cache.ring is before
    assert cache.start_position == cache.offset == 0
