"""SinkCache: what it holds, hands out, takes back and refuses."""

from __future__ import annotations

import copy

import mlx.core as mx
import numpy as np
import pytest
from tiny import build, every, mixed, random_tokens, run

from mlx_sink import CacheError, SinkConfig, attach
from mlx_sink.attention.rope import Rotation
from mlx_sink.cache.sink_cache import SinkCache
from mlx_sink.cache.storage import GROWTH

CONFIG = SinkConfig(2, 5, epoch=9)


def rows(first: int, n: int) -> mx.array:
    """Return keys that carry their token's index, ``[1, 2, n, 3]``."""
    return mx.broadcast_to(mx.arange(first, first + n)[:, None], (1, 2, n, 3)).astype(mx.float32)


def feed(cache: SinkCache, n: int) -> tuple[mx.array, mx.array]:
    """Feed the next n tokens, values 100 above keys, and take the layout."""
    keys = rows(cache.tokens, n)
    fetched = cache.update_and_fetch(keys, keys + 100)
    cache.take_layout()
    return fetched


def empty(config: SinkConfig = CONFIG) -> SinkCache:
    return SinkCache(config, Rotation([]))


def tokens_in(x: mx.array) -> list[int]:
    """Read the token indices back from keys ``[1, 2, rows, 3]``, all elements agreeing."""
    x = np.array(x)
    assert (x == x[:, :1, :, :1]).all()
    return x[0, 0, :, 0].astype(int).tolist()


@pytest.mark.parametrize("chunks", [[1] * 30, [3] * 10, [7, 7, 1, 1, 9], [30, 1, 2], [5, 2, 1, 4]])
def test_fetches_the_rows_that_the_layout_names(chunks: list[int]):
    """Keys and layout must agree row by row, also where a chunk overwrites what it still needs."""
    cache = empty()
    for n in chunks:
        keys = rows(cache.tokens, n)
        fetched, values = cache.update_and_fetch(keys, keys + 100)
        layout = cache.take_layout()
        named = [run.token + i for run in layout.runs for i in range(run.length)]
        assert tokens_in(fetched) == named
        assert tokens_in(values - 100) == named
        held = [run.token + i for run in cache.ring.live_runs() for i in range(run.length)]
        assert tokens_in(cache.keys[:, :, : cache.size()]) == held
    assert cache.tokens == sum(chunks)
    assert cache.size() == min(sum(chunks), CONFIG.capacity)


@pytest.mark.parametrize("chunk", [1, 100, 5000])
def test_arrays_grow_in_steps_up_to_the_capacity(chunk: int):
    """Short streams pay for what they use; long ones for the capacity, to the slot."""
    config = SinkConfig(4, 2 * GROWTH + 40)
    cache, seen = empty(config), set()
    while cache.tokens < 2 * config.capacity and cache.tokens < GROWTH + 2 * chunk + 2:
        feed(cache, chunk)
        slots = cache.keys.shape[2]
        seen.add(slots)
        assert min(cache.tokens, config.capacity) <= slots <= config.capacity
        assert slots < min(cache.tokens, config.capacity) + GROWTH
        assert cache.nbytes == 2 * slots * 2 * 3 * 4
    assert seen <= {GROWTH, 2 * GROWTH, config.capacity}


def test_grown_arrays_keep_their_rows():
    """Growing must not lose what was written before."""
    cache = empty(SinkConfig(2, 3 * GROWTH))
    feed(cache, GROWTH - 1)
    for _ in range(3):
        feed(cache, 1)
    assert tokens_in(feed(cache, 2 * GROWTH)[0]) == list(range(3 * GROWTH + 2))


def test_an_empty_cache():
    cache = empty()
    assert cache.empty()
    assert (cache.tokens, cache.offset, cache.size(), cache.nbytes) == (0, 0, 0, 0)
    assert cache.trim(3) == 0
    feed(cache, 1)
    assert not cache.empty()


def test_offset_is_the_position_in_the_epoch():
    """RoPE reads `offset`; the length of the stream is `tokens`."""
    cache = empty()
    offsets = [(feed(cache, n), cache.tokens, cache.offset)[1:] for n in (4, 4, 1, 1, 30, 1)]
    assert offsets == [(4, 4), (8, 8), (9, 0), (10, 1), (40, 0), (41, 1)]


def test_fetching_twice_is_refused():
    """Keys that nobody attended to mean a model that bypasses the hook: wrong in silence."""
    cache = empty()
    cache.update_and_fetch(rows(0, 2), rows(0, 2))
    assert cache.is_pending
    with pytest.raises(CacheError, match="does not attend through mlx_sink"):
        cache.update_and_fetch(rows(2, 1), rows(2, 1))


def test_attending_twice_is_refused():
    """Attention without new keys would use the layout of another call."""
    cache = empty()
    feed(cache, 2)
    assert not cache.is_pending
    with pytest.raises(CacheError, match="keys of another layer or call"):
        cache.take_layout()


def test_masks():
    """The layout masks; what the model passes on is a word at most."""
    cache = empty()
    assert cache.make_mask(1) is None
    assert cache.make_mask(3) == "causal"
    mask = cache.make_mask(3, return_array=True)
    assert np.array_equal(np.array(mask), np.tri(3, dtype=bool))


@pytest.mark.parametrize("epoch", [7, 8, None])
@pytest.mark.parametrize("lengths", [1, 7])
@pytest.mark.parametrize("n", [1, 3, 7])
def test_trimmed_tokens_leave_no_trace(epoch: int | None, lengths: int, n: int):
    """What follows must be as if the tokens taken back had never been read."""
    model, config = build("llama", layers=2), SinkConfig(2, 5, epoch=epoch)
    attach(model, config)
    wrong, right = random_tokens(7, seed=1), random_tokens(30, seed=2)
    right[:, : 7 - n] = wrong[:, : 7 - n]
    caches = model.make_cache()
    run(model, wrong, caches, every(lengths))
    assert all(cache.trim(n) == n for cache in caches)
    ours = run(model, right[:, 7 - n :], caches, mixed(2, 1))
    fresh = run(model, right, model.make_cache(), every(1))[:, 7 - n :]
    np.testing.assert_allclose(ours, fresh, atol=2e-5)


def test_trim_takes_at_most_what_is_there():
    cache = empty()
    feed(cache, 3)
    assert cache.trim(100) == 3
    assert cache.tokens == 0


def test_nothing_comes_back_after_an_eviction():
    cache = empty()
    feed(cache, CONFIG.capacity)
    feed(cache, 1)
    with pytest.raises(CacheError, match=r"cannot take back 1 tokens, only 0: .*rollback"):
        cache.trim(1)
    assert cache.tokens == CONFIG.capacity + 1


def test_deep_copies_go_their_own_way():
    """mlx-lm's server copies a prompt's cache and goes on with both."""
    model = build("llama", layers=2)
    attach(model, CONFIG)
    caches, tokens = model.make_cache(), random_tokens(40)
    run(model, tokens[:, :20], caches, mixed(9, 1))
    branch = copy.deepcopy(caches)
    run(model, random_tokens(11, seed=5), branch, mixed(1, 4))
    ours = run(model, tokens[:, 20:], caches, mixed(1, 3))
    straight = run(model, tokens, model.make_cache(), every(1))[:, 20:]
    np.testing.assert_allclose(ours, straight, atol=2e-5)
    assert [cache.tokens for cache in branch] == [31, 31]


@pytest.mark.parametrize("tokens", [0, 3, 7, 8, 26])
def test_state_is_all_there_is(tokens: int):
    """A cache given a copy of another's state must go on exactly as that one."""
    model = build("llama", layers=2)
    attach(model, CONFIG)
    caches, others = model.make_cache(), model.make_cache()
    text = random_tokens(tokens + 12)
    if tokens:
        run(model, text[:, :tokens], caches, mixed(4, 1))
    for cache, other in zip(caches, others, strict=True):
        other.state = copy.deepcopy(cache.state)
    going, resumed = (run(model, text[:, tokens:], c, mixed(1, 5)) for c in (caches, others))
    assert np.array_equal(going, resumed)


def test_a_copied_state_clears_a_half_done_call():
    """After an interrupted call, restoring the state must make the cache usable again."""
    cache = empty()
    feed(cache, 3)
    saved = copy.deepcopy(cache.state)
    cache.update_and_fetch(rows(3, 1), rows(3, 1))
    cache.state = saved
    assert not cache.is_pending
    assert cache.tokens == 3


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_keeps_the_dtype_of_the_keys(dtype: mx.Dtype):
    """Half-precision models must not pay float32's memory."""
    cache = empty()
    for n in (3, 1, 9):
        keys, values = cache.update_and_fetch(
            rows(0, n).astype(dtype), rows(0, n).astype(mx.float32)
        )
        cache.take_layout()
        assert (keys.dtype, values.dtype) == (dtype, mx.float32)
        assert (cache.keys.dtype, cache.values.dtype) == (dtype, mx.float32)
