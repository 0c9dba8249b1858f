"""The contract on whole models: what a stream computes, in whatever pieces, for ever.

Logits are float32 and agree within `tiny.TOLERANCE` unless a test says otherwise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from tiny import (
    FAMILIES,
    TOLERANCE,
    build,
    every,
    mixed,
    moved,
    plain,
    random_tokens,
    recompute,
    run,
    stream,
)

from mlx_sink import SinkConfig, attach
from mlx_sink.attention.layout import blocks_of, layout_of
from mlx_sink.attention.rope import RECENT
from mlx_sink.config import DEFAULT_EPOCH
from mlx_sink.models.architectures import VERIFIED

S, W, E = 3, 10, 17
CONFIG = SinkConfig(S, W, epoch=E)
"""Wraps after 13 tokens, begins a new epoch every 17 or so: 100 tokens cover all of it."""

DEEP = 3
"""Layers, so that what one layer gets wrong reaches the keys of the next."""

shared: Callable[..., nn.Module] = cache(build)
"""Build each model once; a test that changes its weights builds its own."""


def assert_close(ours: np.ndarray, theirs: np.ndarray, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(ours, theirs, atol=tolerance, rtol=0)


def farthest(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Return each token's largest difference, ``[B, n]``."""
    return np.abs(ours - theirs).max(axis=-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_families_are_of_verified_architectures(family: str):
    """What is shown here in depth must be among what is shown for all (`test_every`)."""
    assert type(shared(family)).__module__.removeprefix("mlx_lm.models.") in VERIFIED


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_mlx_lm_up_to_the_first_wrap(family: str):
    """Until something is evicted, a user must see no difference at all."""
    model, tokens = shared(family, DEEP), random_tokens(36)
    config = SinkConfig(4, 20, epoch=24)
    theirs = plain(model, tokens)
    for lengths in ([24], every(1), mixed(9, 1, 1), every(5)):
        ours = stream(model, config, tokens, lengths)
        full = config.capacity
        assert_close(ours[:, :full], theirs[:, :full])
        assert farthest(ours, theirs)[:, full + 2 :].max() > 50 * TOLERANCE, "evicted, and seen?"


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_recompute_oracle(family: str):
    """The definition of StreamingLLM: the model fed only what a token sees, from position 0."""
    model, tokens = shared(family), random_tokens(60, seed=1)
    oracle = recompute(model, tokens, CONFIG)
    for lengths in ((), every(1), mixed(S + W, 1, 1, 11)):
        assert_close(stream(model, CONFIG, tokens, lengths), oracle)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_tells_neighbours_apart(family: str):
    """The tests above could not fail if one key more or less did not show."""
    model, tokens = shared(family), random_tokens(60, seed=1)
    oracle = recompute(model, tokens, CONFIG)
    for other in (SinkConfig(S, W - 1), SinkConfig(S, W + 1), SinkConfig(S - 1, W + 1)):
        differences = farthest(recompute(model, tokens, other), oracle)[:, S + W + 1 :]
        assert np.median(differences) > 100 * TOLERANCE


@pytest.mark.parametrize("block", [4], indirect=True)
@pytest.mark.parametrize("longer", [0, 30])
@pytest.mark.parametrize(
    ("num_sinks", "window"), [(0, 1), (0, 8), (1, 1), (1, 8), (6, 2), (4, 31)]
)
def test_oracle_over_sizes(num_sinks: int, window: int, longer: int, block: int):
    """Without sinks, with a window of one token or shorter than the sinks, in small blocks."""
    config = SinkConfig(num_sinks, window, epoch=num_sinks + window + longer)
    model, tokens = shared("llama"), random_tokens(80, seed=2)
    oracle = recompute(model, tokens, config)
    for lengths in ((), mixed(3, 1, 1, 30, seed=longer)):
        assert_close(stream(model, config, tokens, lengths), oracle)


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param(lambda: every(7), id="7"),
        pytest.param(lambda: every(W), id="W"),
        pytest.param(lambda: every(3 * W + 1), id="3W+1"),
        pytest.param(tuple, id="all at once"),
        pytest.param(lambda: mixed(seed=1), id="random 1"),
        pytest.param(lambda: mixed(seed=2), id="random 2"),
        pytest.param(lambda: mixed(S + W, 1, 1, E, 1, 1, 2 * E + 1, 1), id="to the edges"),
    ],
)
@pytest.mark.parametrize(
    "family", ["llama", "phi3, partial longrope", "qwen3, yarn", "smollm3", "stablelm"]
)
def test_chunks_change_nothing(family: str, lengths: Callable[[], Iterable[int]]):
    """However the text arrives, in a deep model, over nine wraps and five epochs."""
    assert_close(
        stream(shared(family, DEEP), CONFIG, random_tokens(100), lengths()), one_by_one(family)
    )


@cache
def one_by_one(family: str) -> np.ndarray:
    """Return the logits of the stream that `test_chunks_change_nothing` cuts otherwise."""
    return stream(shared(family, DEEP), CONFIG, random_tokens(100), every(1))


@pytest.mark.parametrize("epoch", [S + W, 40, None])
def test_the_epoch_changes_nothing(epoch: int | None):
    """Epochs keep positions small; where they begin must not show."""
    config = SinkConfig(S, W, epoch=epoch)
    ours = stream(shared("llama", DEEP), config, random_tokens(100), mixed(8, 1, 30))
    assert_close(ours, one_by_one("llama"))


@pytest.mark.parametrize("far", [W, 2**31, 2**40])
@pytest.mark.parametrize("family", ["llama", "smollm3"])
@pytest.mark.parametrize("read", [S + W, E, 40])
def test_two_billion_tokens_on_nothing_has_changed(family: str, far: int, read: int):
    """A full stream moved ahead by whole windows must go on with the very same logits."""
    model, tokens = shared(family, DEEP), random_tokens(read + 60)
    attach(model, CONFIG)
    near = model.make_cache()
    run(model, tokens[:, :read], near, mixed(9, 1, 1))
    there, shift = copy.deepcopy(near), -(-far // W) * W
    for c in there:
        moved(c, shift)
    here = run(model, tokens[:, read:], near, mixed(1, 1, 12, 1, 35, 1))
    far_on = run(model, tokens[:, read:], there, mixed(1, 1, 12, 1, 35, 1))
    assert np.array_equal(far_on, here)
    assert [c.tokens for c in there] == [read + 60 + shift] * DEEP
    assert [c.offset for c in there] == [c.offset for c in near]


@pytest.mark.parametrize(
    ("shift", "position"),
    [(2**31, 5), (2**31, 900), (2**31, DEFAULT_EPOCH - 100), (DEFAULT_EPOCH - 100,) * 2],
    ids=["begins", "early", "ends", "first epoch ends"],
)
@pytest.mark.parametrize("family", ["llama", "qwen3, yarn", "phi3, partial longrope"])
def test_any_position_in_an_epoch(family: str, shift: int, position: int):
    """Wherever in an epoch of the default length a stream is, it equals the oracle.

    Large positions cost float32 digits, in the model's own RoPE: 7e-4 was seen at 32,000.
    """
    config = SinkConfig(S, W)
    model, tokens = shared(family), random_tokens(S + W + 60, seed=3)
    attach(model, config)
    caches = model.make_cache()
    run(model, tokens[:, : S + W], caches)
    shift -= shift % W
    for c in caches:
        moved(c, shift, start=max(0, shift - position))
    # The window's keys are now at the wrong positions: W tokens later they are gone.
    ours = run(model, tokens[:, S + W :], caches, mixed(W, 1, 1, 20))
    oracle = recompute(model, tokens, config)[:, S + W :]
    assert farthest(ours, oracle)[:, : W - 1].max() > 100 * TOLERANCE
    assert_close(ours[:, W:], oracle[:, W:], max(TOLERANCE, 5e-8 * position))
    assert caches[0].offset == min(position, shift) + S + W + 60


@pytest.mark.parametrize("read", [1, 3, 5, S + W - 1])
def test_slots_never_written_are_never_read(read: int):
    """What lies in memory beyond the stream must not reach the logits, not even times 0."""
    model, tokens = shared("llama", DEEP), random_tokens(50)
    attach(model, CONFIG)
    clean, dirty = model.make_cache(), model.make_cache()
    for caches in (clean, dirty):
        run(model, tokens[:, :read], caches, every(2))
    for c in dirty:
        assert c.keys.shape[2] == S + W, "unused slots to spoil"
        c.keys[:, :, read:] = mx.nan
        c.values[:, :, read:] = mx.nan
    after = tokens[:, read:]
    expected = run(model, after, clean, mixed(1, 2, 1, 9))
    assert not np.isnan(expected).any()
    assert np.array_equal(run(model, after, dirty, mixed(1, 2, 1, 9)), expected)


def test_slots_trimmed_away_are_never_read():
    """The same for tokens that were taken back."""
    model, tokens = shared("llama", DEEP), random_tokens(50)
    attach(model, CONFIG)
    caches = model.make_cache()
    run(model, tokens[:, : S + W], caches)
    for c in caches:
        c.trim(6)
        c.keys[:, :, S + W - 6 :] = mx.nan
        c.values[:, :, S + W - 6 :] = mx.nan
    ours = run(model, tokens[:, S + W - 6 :], caches, mixed(1, 2, 1, 9))
    assert_close(ours, one_by_one_until(50)[:, S + W - 6 :])


@cache
def one_by_one_until(n: int) -> np.ndarray:
    return stream(shared("llama", DEEP), CONFIG, random_tokens(n), every(1))


def test_nothing_grows():
    """Bytes, shapes, positions and tables after 60 times the capacity are those of a full ring."""
    model = shared("llama")
    attach(model, CONFIG)
    (c,) = caches = model.make_cache()
    n, longest = 60 * (S + W), 24
    tokens = random_tokens(n)
    run(model, tokens[:, : S + W], caches)
    nbytes, shapes = c.nbytes, (c.keys.shape, c.values.shape)
    lengths, read = mixed(most=longest), S + W
    while read < n:
        piece = tokens[:, read : read + next(lengths)]
        run(model, piece, caches)
        read += piece.shape[1]
        assert (c.nbytes, (c.keys.shape, c.values.shape)) == (nbytes, shapes)
        assert c.offset < E + longest
        assert c.size() == S + W
    assert c.tokens == n
    assert len(c.rotation._recent) <= RECENT
    for memory in (layout_of, blocks_of):
        assert memory.cache_info().currsize <= memory.cache_info().maxsize


@pytest.mark.parametrize("family", ["llama", "phi3", "smollm3", "stablelm, per-head norm"])
def test_rows_of_a_batch_are_streams_of_their_own(family: str):
    """Sequences that move in step share the integers and nothing else."""
    model, tokens = shared(family, 2), random_tokens(60, batch=3)
    together = stream(model, CONFIG, tokens, mixed(9, 1, 1))
    for i in range(3):
        alone = stream(model, CONFIG, tokens[i : i + 1], mixed(9, 1, 1))
        assert_close(together[i : i + 1], alone)


@pytest.mark.parametrize(
    ("dtype", "worst", "mean"),
    [(mx.float16, 5e-2, 5e-3), (mx.bfloat16, 2e-1, 2e-2)],
    ids=["float16", "bfloat16"],
)
@pytest.mark.parametrize("family", ["llama", "qwen3", "stablelm"])
def test_half_precision_follows_float32(family: str, dtype: mx.Dtype, worst: float, mean: float):
    """Logits of size 4, as far off as mlx-lm's own before the first wrap, and no farther later."""
    model, tokens = build(family, 2), random_tokens(100)
    model.set_dtype(dtype)
    half = stream(model, CONFIG, tokens, mixed(9, 1))
    assert model(mx.array(tokens[:, :2]), cache=model.make_cache()).dtype == dtype
    model.set_dtype(mx.float32)
    exact = stream(model, CONFIG, tokens, mixed(9, 1))
    assert_close(half, exact, worst)
    assert np.abs(half - exact).mean() < mean
    early, late = (np.abs(half - exact)[:, part].mean() for part in (np.s_[:20], np.s_[-20:]))
    assert late < 4 * early, "errors pile up as the stream runs"
