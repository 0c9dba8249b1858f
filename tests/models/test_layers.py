"""Which cache each layer gets, groups of caches, and the positions at which a model must stop."""

from __future__ import annotations

from copy import copy, deepcopy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from every import tiny
from feeding import feed
from mlx_lm.models import cache as theirs
from test_attach import refusal
from tiny import TOLERANCE, build, mixed, random_tokens

from mlx_sink import CacheError, SinkConfig, UnsupportedModelError, attach
from mlx_sink.attention.rope import Rotation
from mlx_sink.cache.group import CacheGroup, leaves
from mlx_sink.cache.sink_cache import SinkCache
from mlx_sink.models.architectures import position_limit
from mlx_sink.models.layers import Kind, bounded_caches, common_epoch, native_caches

CONFIG = SinkConfig(3, 10, epoch=17, rollback=2)


def make(config: SinkConfig, kind: Kind) -> SinkCache:
    cache = SinkCache(config, Rotation([]), chunked=kind is Kind.CHUNK)
    cache.kind = kind
    return cache


def bounded(*native: Any, config: SinkConfig = CONFIG) -> list[Any]:
    return bounded_caches(native, config, make)


@pytest.mark.parametrize(
    ("native", "num_sinks", "window", "kind"),
    [
        (theirs.KVCache(), 3, 10, Kind.FULL),
        (theirs.RotatingKVCache(max_size=6), 0, 6, Kind.WINDOW),
        (theirs.RotatingKVCache(max_size=6, keep=0), 0, 6, Kind.WINDOW),
        (theirs.ChunkedKVCache(8), 0, 8, Kind.CHUNK),
    ],
    ids=["full", "window", "keep 0", "chunks"],
)
def test_what_would_grow_becomes_a_ring(native: Any, num_sinks: int, window: int, kind: Kind):
    """In the same epochs and with the same spare slots: some models have one offset for all."""
    (cache,) = bounded(native)
    ring = cache.ring
    assert (ring.num_sinks, ring.window, cache.kind) == (num_sinks, window, kind)
    assert (ring.epoch, ring.rollback, ring.slots) == (17, 2, num_sinks + window + 2)


def test_what_does_not_grow_stays():
    recurrent = theirs.ArraysCache(2)
    assert bounded(recurrent) == [recurrent]


def test_several_caches_of_a_layer():
    native = theirs.CacheList(theirs.KVCache(), theirs.ArraysCache(1), theirs.KVCache())
    group, ring = bounded(native, theirs.RotatingKVCache(max_size=4))
    assert isinstance(group, CacheGroup)
    assert [type(part) for part in group.caches] == [SinkCache, theirs.ArraysCache, SinkCache]
    assert group[2].ring.capacity == 13
    assert leaves([group, ring]) == [*group.caches, ring]


KNOWN = {"KVCache", "RotatingKVCache", "ChunkedKVCache", "ArraysCache", "CacheList"}
KINDS = {
    name: kind
    for name, kind in vars(theirs).items()
    if isinstance(kind, type) and issubclass(kind, theirs._BaseCache)
}


def test_mlx_lm_has_the_kinds_that_are_known():
    assert KINDS.keys() > KNOWN
    assert len(KINDS) > 8


@pytest.mark.parametrize("name", sorted(KINDS.keys() - KNOWN))
def test_other_kinds_are_refused_by_name(name: str):
    """A later mlx-lm's too, and wherever in the list it stands."""
    native = KINDS[name].__new__(KINDS[name])
    message = f"layer 1 wants a {name}, which is not known"
    with pytest.raises(UnsupportedModelError, match=message):
        bounded(theirs.KVCache(), native)
    with pytest.raises(UnsupportedModelError, match=message):
        bounded(theirs.KVCache(), theirs.CacheList(theirs.KVCache(), native))


def test_a_ring_of_mlx_lm_that_keeps_first_tokens_is_refused():
    """They are no sinks of ours: positions and masks would be mlx-lm's."""
    with pytest.raises(UnsupportedModelError, match="layer 0 wants a RotatingKVCache"):
        bounded(theirs.RotatingKVCache(max_size=6, keep=2))


# One epoch for all.


@pytest.mark.parametrize(
    ("native", "epoch", "expected"),
    [
        ([theirs.KVCache()], 17, 17),
        ([theirs.KVCache()], None, 4096),
        ([theirs.KVCache(), theirs.RotatingKVCache(max_size=40)], 17, 42),
        ([theirs.KVCache(), theirs.RotatingKVCache(max_size=6000)], None, 6002),
        ([theirs.ChunkedKVCache(30)], 17, 32),
        ([theirs.CacheList(theirs.ArraysCache(1), theirs.RotatingKVCache(max_size=50))], 17, 52),
    ],
)
def test_an_epoch_holds_every_ring(native: list[Any], epoch: int | None, expected: int):
    """A window longer than the epoch would span more than two."""
    config = SinkConfig(3, 10, epoch=epoch, rollback=2)
    common = common_epoch(native, config, None)
    assert common.epoch == expected
    assert (common.num_sinks, common.window, common.rollback) == (3, 10, 2)


@pytest.mark.parametrize(
    ("window", "limit", "expected"),
    [(10, 5000, 2500), (10, 100_000, 4096), (10, 20, 15), (10, 16, 15), (3000, 5000, 3005)],
)
def test_an_epoch_ends_before_the_limit(window: int, limit: int, expected: int):
    """With room for a call, as far as the rings allow it."""
    config = SinkConfig(3, window, rollback=2)
    assert common_epoch([theirs.KVCache()], config, limit).epoch == expected


@pytest.mark.parametrize("native", [theirs.KVCache(), theirs.RotatingKVCache(max_size=13)])
@pytest.mark.parametrize("limit", [15, 8])
def test_rings_beyond_the_limit_are_refused(native: Any, limit: int):
    config = SinkConfig(3, 10, rollback=2)
    message = (
        f"its attention changes with the position from token {limit} on: "
        r"num_sinks \+ window must be less, not 13"
    )
    with pytest.raises(UnsupportedModelError, match=message):
        common_epoch([native], config, limit)


# The limit on a model.


def limited(name: str, limit: int) -> nn.Module:
    """Make a model whose attention changes with the position from ``limit`` on."""
    if name == "llama4":
        return tiny(name, attn_temperature_tuning=True, floor_scale=limit + 1)
    scaled = {
        "rope_theta": 10000.0,
        "rope_type": "default",
        "llama_4_scaling_beta": 0.5,
        "original_max_position_embeddings": limit,
    }
    return tiny(name, rope_parameters=scaled)


@pytest.mark.parametrize("name", ["ministral3", "mistral4", "llama4"])
def test_calls_up_to_the_limit(name: str):
    """The number in the error is the one that works, and what failed has changed nothing."""
    model, tokens = limited(name, 60), random_tokens(150) % 60
    assert position_limit(model) == 60
    report = attach(model, SinkConfig(3, 10))
    assert report.nbytes
    caches, other = model.make_cache(), model.make_cache()
    rings = [c.ring for c in leaves(caches)]
    assert {ring.epoch for ring in rings} == {30}
    with pytest.raises(CacheError) as caught:
        model(mx.array(tokens), cache=caches)
    assert str(caught.value) == "150 tokens at once are too many: read at most 60"
    assert [c.ring for c in leaves(caches)] == rings
    assert all(c.empty() for c in caches)
    ours = [feed(model, tokens[:, :60], caches)]
    with pytest.raises(CacheError, match="61 tokens at once are too many: read at most 60"):
        model(mx.array(tokens[:, 60:121]), cache=caches)
    ours += [feed(model, tokens[:, 60:70], caches)]
    with pytest.raises(CacheError, match="80 tokens at once are too many: read at most 50"):
        model(mx.array(tokens[:, 70:]), cache=caches)
    ours += [feed(model, tokens[:, 70:], caches, [50, 30])]
    theirs = feed(model, tokens, other, mixed(7, 1))
    np.testing.assert_allclose(np.concatenate(ours, axis=1), theirs, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["ministral3", "mistral4", "llama4"])
def test_a_capacity_beyond_the_limit_is_refused(name: str):
    assert refusal(limited(name, 12), SinkConfig(3, 10)) == (
        f"{name} is not supported: its attention changes with the position from token 12 on: "
        "num_sinks + window must be less, not 13"
    )


def test_most_models_have_no_limit():
    assert position_limit(build("llama")) is None
    assert position_limit(tiny("llama4", attn_temperature_tuning=False)) is None


def test_spare_slots_need_caches_that_can_go_back():
    message = refusal(tiny("qwen3_next"), SinkConfig(3, 10, rollback=2))
    assert message.endswith(
        "layer 0 has a ArraysCache, which cannot take tokens back: "
        "leave rollback (2) and draft models out"
    )


def test_native_caches_are_those_of_the_class():
    """An attached model must not be asked for its own bounded ones."""
    model = tiny("gemma3_text")
    native = [type(c) for c in native_caches(model)]
    attach(model, CONFIG)
    assert [type(c) for c in native_caches(model)] == native
    assert theirs.RotatingKVCache in native


# Groups.


def group_at(tokens: int, config: SinkConfig = CONFIG) -> CacheGroup:
    group = CacheGroup(
        SinkCache(config, Rotation([])), SinkCache(SinkConfig(0, 4, epoch=17), Rotation([]))
    )
    for part in group.caches:
        for i in range(tokens):
            part.update_and_fetch(mx.full((1, 1, 1, 2), i), mx.full((1, 1, 1, 2), -i))
            part.take_layout()
    return group


def same(a: CacheGroup, b: CacheGroup) -> bool:
    return all(
        x.ring == y.ring and mx.array_equal(x.keys, y.keys) and mx.array_equal(x.values, y.values)
        for x, y in zip(a.caches, b.caches, strict=True)
    )


def test_the_state_of_a_group_goes_round():
    group, other = group_at(20), group_at(0)
    assert not other.size()
    other.state = deepcopy(group.state)
    assert same(group, other)
    group_at(1).state = group.state
    assert (group.size(), other.size(), group.offset) == (13, 13, other.offset)
    with pytest.raises(ValueError, match="zip"):
        other.state = group.state[:1]


def test_a_copied_group_goes_its_own_way():
    group = group_at(20)
    before, other = group_at(20), copy(group)
    assert isinstance(other, CacheGroup)
    for part in other.caches:
        part.keys = mx.array(part.keys)
        part.values = mx.array(part.values)
        part.update_and_fetch(mx.ones((1, 1, 1, 2)), mx.ones((1, 1, 1, 2)))
    assert same(group, before)
    assert [part.tokens for part in other.caches] == [21, 21]


def test_a_group_takes_back_all_or_nothing_it_says():
    group = CacheGroup(*(group_at(20).caches[0] for _ in range(2)))
    assert group.is_trimmable()
    assert group.trim(2) == 2
    assert [part.tokens for part in group.caches] == [18, 18]
    assert not group_at(20).is_trimmable()
    assert not CacheGroup(group[0], theirs.ArraysCache(1)).is_trimmable()


def test_the_bytes_of_a_group():
    group = group_at(20)
    assert group.nbytes == sum(part.nbytes for part in group.caches) > 0
    assert not group.empty()
    assert group_at(0).empty()
