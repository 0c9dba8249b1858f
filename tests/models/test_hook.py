"""The hook: whose keys an attention call is about, and what it then computes."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import base

from mlx_sink import CacheError, SinkConfig
from mlx_sink.attention.dispatch import sink_attention
from mlx_sink.attention.rope import Rotation
from mlx_sink.cache.kv_sharing import _lenders, lender_of, note
from mlx_sink.cache.sink_cache import SinkCache
from mlx_sink.models import hook as seam
from mlx_sink.models.trace import rope_call

CONFIG = SinkConfig(2, 5, epoch=9)
ROPE = nn.RoPE(8, base=50.0)
ROTATION = Rotation.of(rope_call(ROPE, 8))


@pytest.fixture
def attention() -> Callable[..., mx.array]:
    """The function as a hooked module has it."""
    module = ModuleType("hooked")
    vars(module)[seam.HOOKED] = base.scaled_dot_product_attention
    seam._hook(vars(module))
    return vars(module)[seam.HOOKED]


def cache_at(tokens: int, lends: bool = False) -> SinkCache:
    """Return a cache that has read some tokens, one at a time."""
    cache = SinkCache(CONFIG, ROTATION, lends=lends)
    for _ in range(tokens):
        fetch(cache, 1)
        cache.take_layout()
    return cache


def fetch(cache: SinkCache, n: int) -> tuple[mx.array, mx.array]:
    random = np.random.default_rng(cache.tokens)
    k, v = (mx.array(random.standard_normal((1, 2, n, 8), np.float32)) for _ in range(2))
    return cache.update_and_fetch(ROPE(k, offset=cache.offset), v)


def queries(n: int) -> mx.array:
    return mx.array(np.random.default_rng(n).standard_normal((1, 4, n, 8), np.float32))


@pytest.mark.parametrize("n", [1, 4])
def test_our_cache_gets_our_attention(attention: Callable[..., mx.array], n: int):
    cache = cache_at(12)
    keys, values = fetch(cache, n)
    out = attention(queries(n), keys, values, cache=cache, scale=0.3, mask="causal")
    layout = cache.take_layout(keys)
    ours = sink_attention(*(queries(n), keys, values), layout=layout, rotation=ROTATION, scale=0.3)
    assert mx.array_equal(out, ours)
    plain = base.scaled_dot_product_attention(
        *(queries(n), keys, values), cache=None, scale=0.3, mask="causal" if n > 1 else None
    )
    assert mx.abs(out - plain).max().item() > 1e-2


@pytest.mark.parametrize("n", [1, 4])
def test_a_lender_is_found_by_its_keys(attention: Callable[..., mx.array], n: int):
    """A layer that attends to another layer's rows and names no cache, more than once."""
    others, lender = [cache_at(12, lends=True) for _ in range(2)], cache_at(12, lends=True)
    keys, values = fetch(lender, n)
    for other in others:
        fetch(other, n)
    first = attention(queries(n), keys, values, cache=lender, scale=0.3, mask="causal")
    for _ in range(2):
        again = attention(queries(n), keys, values, cache=None, scale=0.3, mask="causal")
        assert mx.array_equal(again, first)
    assert not lender.is_pending
    assert all(other.is_pending for other in others)


def test_a_lender_comes_before_the_cache_that_is_named(attention: Callable[..., mx.array]):
    """The rows are the lender's, whoever's the cache: some models name the layer's own."""
    lender, named = cache_at(12, lends=True), cache_at(4)
    keys, values = fetch(lender, 1)
    expected = attention(queries(1), keys, values, cache=lender, scale=0.3, mask=None)
    assert seam.owner_of(keys, named) is lender
    out = attention(queries(1), keys, values, cache=named, scale=0.3, mask=None)
    assert mx.array_equal(out, expected)


def test_without_a_lender_the_call_is_mlx_lms(attention: Callable[..., mx.array]):
    """Keys of no cache of ours, none named: what the model computes elsewhere is its own."""
    cache = cache_at(12)
    keys, values = fetch(cache, 1)
    assert seam.owner_of(keys, None) is None
    out = attention(queries(1), keys, values, cache=None, scale=0.3, mask=None)
    plain = mx.fast.scaled_dot_product_attention(queries(1), keys, values, scale=0.3)
    assert mx.array_equal(out, plain)


def test_keys_of_another_call_raise(attention: Callable[..., mx.array]):
    cache = cache_at(12)
    old, values = fetch(cache, 1)
    attention(queries(1), old, values, cache=cache, scale=0.3, mask=None)
    with pytest.raises(CacheError, match="keys of another layer or call"):
        attention(queries(1), mx.array(old), values, cache=cache, scale=0.3, mask=None)


def test_another_mask_raises(attention: Callable[..., mx.array]):
    """A mask says what is seen, and so does the layout: they must be one."""
    cache = cache_at(12)
    mask = cache.make_mask(4, return_array=True)
    keys, values = fetch(cache, 4)
    attention(queries(4), keys, values, cache=cache, scale=0.3, mask=mask)
    keys, values = fetch(cache, 4)
    with pytest.raises(CacheError, match="under a mask of its own"):
        attention(queries(4), keys, values, cache=cache, scale=0.3, mask=mask)


@pytest.mark.parametrize("elsewhere", [True, False])
def test_other_calls_do_not_take_a_mask_away(attention: Callable[..., mx.array], elsewhere: bool):
    """Streams of other threads, or the windows of a model that has a few of them."""
    cache, others = cache_at(12), 40 if elsewhere else 6
    mask = cache.make_mask(4, return_array=True)

    def ask() -> None:
        for n in range(5, 5 + others):
            cache.make_mask(n, return_array=True)

    if elsewhere:
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    else:
        ask()
    keys, values = fetch(cache, 4)
    attention(queries(4), keys, values, cache=cache, scale=0.3, mask=mask)


def test_rings_that_are_alike_share_a_mask():
    """Models ask one cache for the mask of all layers of its kind."""
    one, other = cache_at(12), cache_at(12)
    assert one.make_mask(4, return_array=True) is other.make_mask(4, return_array=True)


def test_learned_sinks_reach_our_attention(attention: Callable[..., mx.array]):
    cache, sinks = cache_at(12), mx.array([3.0, -1.0, 0.5, 9.0])
    keys, values = fetch(cache, 4)
    out = attention(queries(4), keys, values, cache=cache, scale=0.3, mask="causal", sinks=sinks)
    ours = sink_attention(
        *(queries(4), keys, values),
        layout=cache.take_layout(keys),
        rotation=ROTATION,
        scale=0.3,
        learned_sinks=sinks,
    )
    assert mx.array_equal(out, ours)


# Lenders.


def test_lenders_are_forgotten_when_they_are_gone():
    """Every stream of a server makes some: noting them must not keep or count them for ever."""
    lender = cache_at(3, lends=True)
    keys, _ = fetch(lender, 1)
    assert lender_of(keys) is lender
    gone = weakref.ref(lender)
    del lender
    gc.collect()
    assert gone() is None
    assert lender_of(keys) is None
    for _ in range(20):
        note(cache_at(1))
    gc.collect()
    stays = cache_at(1, lends=True)
    assert len([known for known in _lenders.known.values() if known() is None]) == 0
    assert stays in [known() for known in _lenders.known.values()]


def test_only_what_was_fetched_last_is_lent():
    lender = cache_at(3, lends=True)
    old, _ = fetch(lender, 1)
    lender.take_layout()
    new, values = fetch(lender, 1)
    assert lender_of(old) is None
    assert lender_of(new) is lender
    assert lender.keys_and_values()[0] is new
    assert lender.keys_and_values()[1] is values
    with pytest.raises(CacheError, match="reads keys of a layer"):
        cache_at(3).keys_and_values()


def test_what_is_lent_ends_with_the_state():
    """A fork or a resumed stream must not answer for keys of another one."""
    lender = cache_at(3, lends=True)
    keys, _ = fetch(lender, 1)
    lender.state = lender.state
    assert lender_of(keys) is None
    with pytest.raises(CacheError, match="reads keys of a layer"):
        lender.keys_and_values()


def test_lenders_are_known_by_thread():
    lender = cache_at(3, lends=True)
    keys, _ = fetch(lender, 1)
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(lender_of(keys)))
    thread.start()
    thread.join()
    assert found == [None]
    assert lender_of(keys) is lender


def test_lent_rows_are_let_go_before_the_ring_is_written(monkeypatch: pytest.MonkeyPatch):
    """MLX writes in place only while nobody else holds the array: it would copy every ring."""
    lender, held = cache_at(12, lends=True), list[object]()
    update = lender._keys.update

    def noted(*given: Any) -> Any:
        held.append(lender._lent)
        return update(*given)

    monkeypatch.setattr(lender._keys, "update", noted)
    for n in (1, 1, 3):
        fetch(lender, n)
        lender.take_layout()
        assert lender._lent is not None
    assert held == [None] * 3
