"""Plans of caches: made once, they hold for every size of the context."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from every import one_attention_layer, tiny
from feeding import assert_close, feed, tokens_of
from tiny import every, recompute

from mlx_sink import SinkConfig, attach
from mlx_sink.attention.rope import Rotation
from mlx_sink.cache.aligned import AlignedCache
from mlx_sink.cache.group import leaves
from mlx_sink.cache.sink_cache import SinkCache

SIZES = [
    SinkConfig(3, 10, epoch=17),
    SinkConfig(0, 6),
    SinkConfig(0, 3, epoch=9),
    SinkConfig(1, 30),
]

ARCHITECTURES = {
    "deepseek_v3": "latent keys",
    "falcon_h1": "a state and a ring in one layer",
    "gemma3_text": "windows of the model's own",
    "gemma3n": "layers that lend their keys",
    "llama4": "chunks, and a limit of the positions",
    "mistral4": "latent keys, made into others in a chunk",
    "nemotron-nas": "a layer without keys",
    "plamo3": "masks of a longer window than its caches have",
}


def described(caches: list[Any]) -> list[Any]:
    """Return all that tells caches apart."""
    return [ring(part) if isinstance(part, SinkCache) else type(part) for part in leaves(caches)]


def ring(cache: SinkCache) -> tuple[Any, ...]:
    common = type(cache), cache.ring, cache.lends, cache.limit, angles(cache.rotation)
    if not isinstance(cache, AlignedCache):
        return common
    rows = cache.rows
    rotations = angles(cache.of_queries), angles(rows.positions), angles(rows.in_chunks)
    return *common, rows.widths, rows.rotated, *rotations


def angles(rotation: Rotation | None) -> Any:
    if rotation is None:
        return None
    return rotation.start, rotation.interleaved, rotation.frequencies.tolist()


@pytest.mark.parametrize("name", ARCHITECTURES, ids=str)
def test_a_plan_does_not_depend_on_the_size(name: str):
    """Or an unknown model would be checked with other caches than it gets."""
    model = tiny(name)
    attach(model, SIZES[0])
    plan = model.make_cache.plan
    for size in SIZES:
        attach(model, size)
        expected = described(model.make_cache())
        assert described(plan.caches(size)) == expected
        others = [described(model.make_cache.plan.caches(other)) for other in SIZES]
        assert others == [described(plan.caches(other)) for other in SIZES]


def test_streams_share_nothing_but_the_plan():
    """Recurrent layers keep mlx-lm's cache, of which each stream needs its own."""
    model = tiny("falcon_h1")
    attach(model, SIZES[0])
    plan = model.make_cache.plan
    tokens = tokens_of(model, 40)
    first, second = plan.caches(SIZES[0]), plan.caches(SIZES[0])
    expected = feed(model, tokens, first)
    assert np.array_equal(feed(model, tokens, second), expected)
    assert np.array_equal(feed(model, tokens, model.make_cache()), expected)


@pytest.mark.parametrize("name", ["cohere2", "exaone_moe"])
def test_a_window_that_is_asked_for_in_vain(name: str):
    """Without sinks too, a layer with full attention keeps what the configuration says."""
    model, config = one_attention_layer(name), SinkConfig(0, 3, epoch=5)
    tokens = tokens_of(model, 30)
    oracle = recompute(model, tokens, config)
    report = attach(model, config)
    assert [layer.slots for layer in report.layers] == [3]
    for cuts in ((), every(1)):
        assert_close(feed(model, tokens, model.make_cache(), cuts), oracle)
