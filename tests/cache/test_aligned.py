"""Rings for models that multiply queries and keys on their own, against brute force in float64.

The attention here is such a model's: it knows its queries, what the cache hands out, and the
cache's mask; it has never heard of turns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from brute_force import BASE, Heads, Stream, brute_force, softmax
from every import tiny
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from tiny import cut, distance, every, mixed, visible

from mlx_sink import CacheError, SinkConfig, attach, detach
from mlx_sink.attention.layout import layout_of
from mlx_sink.attention.ring import Turn
from mlx_sink.attention.rope import Rotation
from mlx_sink.cache.aligned import AlignedCache, AlignedRope, Rows, is_doubled, whole
from mlx_sink.models.trace import rope_call

N = 60
CONFIG = SinkConfig(3, 7, epoch=12)
SCALE = 0.5


@dataclass(frozen=True)
class Shape:
    """A head: a part without position, then one of which RoPE rotates some.

    Attributes:
        still: Dimensions of the first part.
        width: Those that RoPE gets.
        dims: Those that it rotates.
        apart: Keys are the first part, values the second, as latent attention keeps them.
    """

    still: int = 0
    width: int = 8
    dims: int = 8
    traditional: bool = False
    apart: bool = False


SHAPES = {
    "all": Shape(),
    "interleaved": Shape(traditional=True),
    "some of it": Shape(dims=6),
    "behind": Shape(still=5),
    "some of it, behind": Shape(still=5, dims=4, traditional=True),
    "apart": Shape(still=5, width=6, dims=6, apart=True),
    "apart, some of it": Shape(still=5, dims=6, apart=True),
}


class Layer:
    """A layer of one kv head that attends by plain products."""

    def __init__(self, shape: Shape, config: SinkConfig = CONFIG):
        rope = nn.RoPE(shape.dims, traditional=shape.traditional, base=BASE)
        call = rope_call(rope, shape.width)
        widths = (shape.still, shape.width) if shape.apart else (shape.still + shape.width, 3)
        rotated = int(shape.apart)
        rows = Rows(widths, rotated, Rotation.of(call, widths[rotated]))
        self.shape, self.rope, self.plain = shape, AlignedRope(rope), rope
        self.cache = AlignedCache(config, Rotation.of(call), rows)

    def __call__(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Attend from new tokens, ``[1, heads, L, still + width]`` before RoPE."""
        mask = self.cache.make_mask(q.shape[2])
        still = self.shape.still
        q_part, k_part = (self.rope(x[..., still:], offset=self.cache.offset) for x in (q, k))
        q_rest, k_rest = q[..., :still], k[..., :still]
        if self.shape.apart:
            latent, turned = self.cache.update_and_fetch(k_rest, k_part)
            scores = q_rest @ latent.swapaxes(-1, -2) + q_part @ turned.swapaxes(-1, -2)
            values = latent
        else:
            keys, values = self.cache.update_and_fetch(mx.concatenate([k_rest, k_part], -1), v)
            scores = mx.concatenate([q_rest, q_part], -1) @ keys.swapaxes(-1, -2)
        scores = SCALE * scores
        if mask is not None:
            scores = mx.where(mask, scores, -mx.inf)
        return mx.softmax(scores, axis=-1) @ values


def random_stream(shape: Shape, n: int = N) -> Stream:
    width = shape.still + shape.width
    return Stream.random(Heads(2, 1, width, shape.still if shape.apart else 3), n)


def run(layer: Layer, stream: Stream, lengths: Iterable[int]) -> np.ndarray:
    n = stream.q.shape[2]
    pieces = [
        layer(*(x[:, :, piece] for x in (stream.q, stream.k, stream.v)))
        for piece in cut(n, lengths)
    ]
    return np.array(mx.concatenate(pieces, axis=2)).astype(np.float64)


def part(stream: Stream, start: int, stop: int) -> Stream:
    return Stream(*(x[:, :, start:stop] for x in (stream.q, stream.k, stream.v)))


def exact(stream: Stream, shape: Shape, config: SinkConfig) -> np.ndarray:
    """Attend by the contract in float64: each visible key turned back by its distance."""
    q, k, v = (np.array(x, np.float64) for x in (stream.q, stream.k, stream.v))
    v = k[..., : shape.still] if shape.apart else v
    out = np.empty((*q.shape[:3], v.shape[3]))
    pairs = shape.dims // 2
    for t in range(q.shape[2]):
        tokens = visible(t, config.num_sinks, config.window)
        back = -np.array([distance(t, a, config.num_sinks, config.window) for a in tokens])
        keys = k[:, :, tokens].copy()
        for i in range(pairs):
            a, b = (2 * i, 2 * i + 1) if shape.traditional else (i, i + pairs)
            x, y = k[:, :, tokens, shape.still + a], k[:, :, tokens, shape.still + b]
            angle = back * BASE ** (-2 * i / shape.dims)
            keys[..., shape.still + a] = x * np.cos(angle) - y * np.sin(angle)
            keys[..., shape.still + b] = x * np.sin(angle) + y * np.cos(angle)
        scores = SCALE * (keys @ q[:, :, t, :, None])[..., 0]
        out[:, :, t] = (softmax(scores)[:, :, None] @ v[:, :, tokens])[:, :, 0]
    return out


def test_two_ways_to_be_exact_agree():
    """This file's brute force and that of `test_attention`."""
    shape = Shape()
    stream = random_stream(shape)
    theirs = brute_force(stream, CONFIG, nn.RoPE(8, base=BASE), SCALE)
    np.testing.assert_allclose(exact(stream, shape, CONFIG), theirs, atol=1e-12)


@pytest.mark.parametrize(
    "lengths",
    [
        lambda: every(1),
        lambda: every(7),
        lambda: [N],
        lambda: mixed(10, 1, 1, 25, 1),
        lambda: mixed(2, 9, 13, 1, 1, seed=3),
    ],
    ids=["steps", "7", "at once", "mixed", "mixed too"],
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        SinkConfig(0, 6, epoch=6),
        SinkConfig(5, 1, epoch=9),
        SinkConfig(3, 7, epoch=13, rollback=2),
    ],
    ids=["usual", "no sinks", "no window", "spare slots"],
)
def test_equals_brute_force(
    shape: Shape, lengths: Callable[[], Iterable[int]], config: SinkConfig
):
    """Chunks with queries at many distances from the sinks, steps, epochs, wraps."""
    stream, layer = random_stream(shape), Layer(shape, config)
    ours = run(layer, stream, lengths())
    np.testing.assert_allclose(ours, exact(stream, shape, config), atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "n", "turns", "doubled"),
    [
        (0, 5, {Turn.NONE}, False),
        (4, 6, {Turn.NONE}, False),
        (4, 7, {Turn.NONE, Turn.SINK}, True),
        (10, 1, {Turn.NONE, Turn.SINK}, False),
        (14, 1, {Turn.NONE, Turn.SINK, Turn.PREVIOUS}, False),
        (14, 4, {Turn.NONE, Turn.SINK, Turn.PREVIOUS}, True),
    ],
)
def test_when_queries_are_doubled(tokens: int, n: int, turns: set[Turn], doubled: bool):
    """Only in a chunk that has sinks to turn to: before that, and in steps, it costs nothing."""
    shape = Shape(still=5)
    layer, stream = Layer(shape), random_stream(shape)
    if tokens:
        run(layer, part(stream, 0, tokens), every(1))
    layout = layout_of(layer.cache.ring, n)
    assert whole(layout).turns == turns
    assert is_doubled(layout) == doubled
    x = mx.ones((1, 2, n, 8))
    rotated = layer.rope(x, offset=layer.cache.offset)
    assert rotated.shape[-1] == (16 if doubled else 8)
    keys, _ = layer.cache.update_and_fetch(
        mx.concatenate([mx.ones((1, 1, n, 5)), rotated[:, :1]], -1), mx.ones((1, 1, n, 3))
    )
    assert keys.shape[-1] == (21 if doubled else 13)
    assert layer.cache.keys.shape[-1] == 13


def test_stored_keys_are_never_rewritten():
    """What is handed out is aligned; what is kept stays as it came."""
    layer, stream = Layer(Shape()), random_stream(Shape())
    run(layer, part(stream, 0, 10), [10])
    sinks = np.array(layer.cache.keys[:, :, :3])
    run(layer, part(stream, 10, N), mixed(1, 9))
    assert np.array_equal(np.array(layer.cache.keys[:, :, :3]), sinks)


# The rotary embedding that knows which stream is at work.


def half_read() -> Layer:
    layer, stream = Layer(Shape()), random_stream(Shape(), 11)
    run(layer, stream, [11])
    return layer


def test_a_forward_without_a_cache_is_not_touched():
    """Training, or scoring a text, with an attached model."""
    layer, x = half_read(), mx.array(np.random.default_rng(0).standard_normal((1, 2, 5, 8)))
    plain = layer.plain(x, offset=0)
    assert mx.array_equal(layer.rope(x, offset=0), plain)
    assert mx.array_equal(layer.rope(x), layer.plain(x))
    assert layer.cache.offset == 11  # Read, and then another forward comes.
    assert mx.array_equal(layer.rope(x, offset=0), plain)
    assert mx.array_equal(layer.rope(x, offset=mx.array([11])), layer.plain(x, offset=11))
    assert layer.rope(x, offset=11).shape[-1] == 16


def test_another_cache_at_the_same_position_is_not_touched():
    """After the keys of a call are in, no stream is at work any more."""
    layer, x = half_read(), mx.ones((1, 2, 5, 8))
    rotated = layer.rope(x[:, :1], offset=layer.cache.offset)
    layer.cache.update_and_fetch(rotated, mx.ones((1, 1, 5, 3)))
    assert layer.rope(x, offset=layer.cache.ring.position).shape[-1] == 8


def test_a_cache_that_is_gone_is_not_at_work():
    layer, x = half_read(), mx.ones((1, 2, 5, 8))
    position = layer.cache.offset
    del layer.cache
    assert layer.rope(x, offset=position).shape[-1] == 8


def test_other_threads_have_streams_of_their_own():
    layer, x = half_read(), mx.ones((1, 2, 5, 8))
    position, widths = layer.cache.offset, list[int]()
    thread = threading.Thread(
        target=lambda: widths.append(layer.rope(x, offset=position).shape[-1])
    )
    thread.start()
    thread.join()
    assert widths == [8]
    assert layer.rope(x, offset=position).shape[-1] == 16


def test_a_window_that_is_not_the_layers_is_refused():
    layer = Layer(Shape())
    with pytest.raises(CacheError, match="wants a window of 5 tokens for this layer"):
        layer.cache.make_mask(4, window_size=5)
    with pytest.raises(CacheError, match="wants a window of 5 tokens"):
        Layer(Shape(), SinkConfig(0, 6)).cache.make_mask(4, window_size=5)
    assert Layer(Shape(), SinkConfig(0, 6)).cache.make_mask(4, window_size=6).shape == (4, 4)


# On a model.


def ropes(model: nn.Module) -> list[str]:
    return [name for name, part in model.named_modules() if name.endswith("rope")]


@pytest.mark.parametrize("name", ["deepseek_v3", "longcat_flash"])
def test_attach_and_detach_leave_the_model_as_it_was(name: str):
    model = tiny(name)
    tokens = mx.array(np.random.default_rng(0).integers(0, 60, (1, 30)))
    parameters = [(path, np.array(w)) for path, w in tree_flatten(model.parameters())]
    parts = [path for path, _ in model.named_modules()]
    before = [np.array(model(tokens)), np.array(model(tokens, cache=make_prompt_cache(model)))]
    for _ in range(2):
        attach(model, CONFIG)
        attach(model, CONFIG)
        after = tree_flatten(model.parameters())
        assert [path for path, _ in after] == [path for path, _ in parameters]
        assert np.array_equal(np.array(model(tokens)), before[0])
        wrapped = [v for m in model.modules() for v in vars(m).values()]
        wrapped = [v for v in wrapped if isinstance(v, AlignedRope)]
        assert wrapped
        assert not any(isinstance(rope.rope, AlignedRope) for rope in wrapped)
        detach(model)
        detach(model)
        assert [path for path, _ in model.named_modules()] == parts
        assert ropes(model)
        assert not any(
            isinstance(v, AlignedRope) for m in model.modules() for v in vars(m).values()
        )
        after = [np.array(model(tokens)), np.array(model(tokens, cache=make_prompt_cache(model)))]
        assert np.array_equal(after, before)
    for (path, value), (_, w) in zip(parameters, tree_flatten(model.parameters()), strict=True):
        assert np.array_equal(np.array(w), value), path
