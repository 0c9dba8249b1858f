"""Quantised rings: what is held, what a query sees of it, in whatever pieces the text arrives."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from folder import make_folder
from mlx_lm.sample_utils import make_sampler
from tiny import TOLERANCE, build, cut, every, mixed, random_tokens, run

import mlx_sink
from mlx_sink import CacheError, SessionError, SinkConfig, Stream, UnsupportedModelError, attach
from mlx_sink.attention.dispatch import sink_attention
from mlx_sink.attention.layout import layout_of
from mlx_sink.attention.packed import Packed, packed
from mlx_sink.attention.rope import Rotation
from mlx_sink.cache.sink_cache import SinkCache
from mlx_sink.cache.storage import GROWTH, Plain, Quantised
from mlx_sink.models.attach import make_cache

S, W, R, E = 3, 10, 2, 17
SIZE = 32
BITS = [(8, 8), (4, 4), (8, 4)]


def config(k: int, v: int, **options: Any) -> SinkConfig:
    given = {"num_sinks": S, "window": W, "epoch": E, "rollback": R, "kv_group_size": SIZE}
    return SinkConfig(**given | {"k_bits": k, "v_bits": v} | options)


def model_of(family: str = "llama", layers: int = 2, **options: Any) -> Any:
    return build(family, layers, **{"head_dim": 32, **options})


# What is held.


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_rows_are_what_the_words_say(dtype: mx.Dtype, bits: int, size: int):
    """The layout of the docstring, read with numpy; halves are rounded once, at the end."""
    x = mx.random.normal((2, 3, 7, 128), key=mx.random.key(1)).astype(dtype)
    rows = packed(x, 2, bits, size)
    assert rows.shape == x.shape
    assert rows.dtype == dtype
    got = np.array(rows.expanded().astype(mx.float32))
    np.testing.assert_array_equal(got[:, :, :2], np.array(x[:, :, :2].astype(mx.float32)))
    words = np.array(rows.words)
    assert words.dtype == np.uint32
    e = np.arange(128)
    q = words[..., e * bits // 32] >> (e * bits % 32).astype(np.uint32) & (2**bits - 1)
    scale, bias = (
        np.array(p.astype(mx.float32))[..., e // size] for p in (rows.scales, rows.biases)
    )
    exact = (scale.astype(np.float64) * q + bias).astype(np.float32)
    rounded = np.array(mx.array(exact).astype(dtype).astype(mx.float32))
    step = {mx.float32: 2e-7, mx.float16: 1e-3, mx.bfloat16: 8e-3}[dtype]
    np.testing.assert_allclose(got[:, :, 2:], rounded, rtol=step, atol=4 * step)
    assert np.abs(got - np.array(x.astype(mx.float32))).max() < 8 / 2**bits + 4 * step


@pytest.mark.parametrize(
    "chunks", [[1] * 40, [3] * 14, [7, 7, 1, 1, 9, 15], [40, 1, 2], [2, 30, 8]]
)
@pytest.mark.parametrize("sinks", [0, S])
def test_a_key_is_quantised_once_and_seen_so_from_the_start(chunks: list[int], sinks: int):
    """Bit by bit: what each call fetches, over wraps, however the text is cut; and the bytes."""
    settings = config(8, 8, num_sinks=sinks, epoch=40)
    storage = Quantised(settings, 4)
    x = mx.random.normal((1, 2, sum(chunks), 64), key=mx.random.key(2))
    seen = np.array(packed(x, sinks, 4, SIZE).expanded())
    cache = SinkCache(settings, Rotation([]))
    ring = cache.ring
    for n in chunks:
        layout = layout_of(ring, n)
        fetched = np.array(
            storage.update(layout, x[:, :, ring.tokens : ring.tokens + n]).expanded()
        )
        for run_ in layout.runs:
            rows, tokens = (slice(a, a + run_.length) for a in (run_.row, run_.token))
            np.testing.assert_array_equal(fetched[:, :, rows], seen[:, :, tokens])
        ring = layout.after
    assert storage.nbytes == 2 * (sinks * 64 * 4 + (W + R) * (64 // 2 + 2 * 2 * 4))


@pytest.mark.parametrize("bits", BITS, ids=str)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_bytes_as_reported(bits: tuple[int, int], dtype: mx.Dtype):
    """To the byte, layer by layer; and what they must be, worked out by hand."""
    model = model_of()
    model.set_dtype(dtype)
    report = attach(model, config(*bits))
    caches = make_cache(model)
    run(model, random_tokens(60), caches, mixed())
    assert [layer.nbytes for layer in report.layers] == [cache.nbytes for cache in caches]
    assert report.nbytes == sum(cache.nbytes for cache in caches)
    sink = 2 * 2 * 32 * dtype.size
    row = sum(2 * (32 * b // 8 + 2 * dtype.size) for b in bits)
    for layer in report.layers:
        assert (layer.bytes_per_sink, layer.bytes_per_token) == (sink, row)
        assert layer.nbytes == S * sink + (W + R) * row
    words = f"{bits[0]} bits" if bits[0] == bits[1] else "8 (keys) and 4 bits (values)"
    assert f"quantised to {words} in groups of 32, " in str(report)
    assert report.to_dict()["layers"][0]["bytes_per_sink"] == sink


def test_arrays_grow_in_steps_up_to_the_capacity():
    settings = SinkConfig(4, 2 * GROWTH + 40, kv_bits=8, kv_group_size=32)
    storage, ring = Quantised(settings, 8), SinkCache(settings, Rotation([])).ring
    sizes: set[int] = set()
    for _ in range(700):
        storage.update(layout_of(ring, 1), mx.zeros((1, 1, 1, 32)))
        ring = ring.advanced(1)
        sizes.add(storage.nbytes)
    row = 32 + 2 * 4
    assert sorted(sizes)[-3:] == [4 * 128 + n * row for n in (GROWTH, 2 * GROWTH, 2 * GROWTH + 40)]


# What a model makes of it.


def mean_off(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).mean())


class Rounded(Plain):
    """Plain storage that is given what quantising would leave of each row that is no sink."""

    bits: int

    def update(self, layout: Any, rows: mx.array) -> mx.array:
        sinks = min(max(S - layout.ring.tokens, 0), layout.n)
        return super().update(layout, packed(rows, sinks, self.bits, SIZE).expanded())


@pytest.mark.parametrize("bits", BITS, ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "smollm3"])
def test_a_ring_of_rounded_rows_is_the_same(family: str, bits: tuple[int, int]):
    """Bit by bit what a plain ring gives, which the other tests hold to the contract."""
    model, tokens = model_of(family), random_tokens(80)
    attach(model, SinkConfig(S, W, epoch=E, rollback=R))
    expected = make_cache(model)
    for cache in expected:
        cache._keys, cache._values = Rounded(config(*bits)), Rounded(config(*bits))
        cache._keys.bits, cache._values.bits = bits
    attach(model, config(*bits))
    caches = make_cache(model)
    for cuts in ([5, 1, 1, 9, 1, 30, 1, 1, 7], [1] * 80):
        ours, theirs = (run(model, tokens, copy.deepcopy(c), cuts) for c in (caches, expected))
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("bits", BITS, ids=str)
@pytest.mark.parametrize("sinks", [0, S])
def test_cuts_change_nothing(bits: tuple[int, int], sinks: int):
    """For given queries, keys and values the outputs are the same, however they come."""
    n, rotation = 90, Rotation(100.0 ** -(np.arange(0, 32, 2) / 32))
    q, k, v = (
        mx.random.normal((1, heads, n, 32), key=mx.random.key(i))
        for i, heads in enumerate((4, 2, 2))
    )

    def outputs(cuts: Iterable[int]) -> np.ndarray:
        # One epoch: keys are given, and not rotated anew.
        cache = SinkCache(config(*bits, num_sinks=sinks, epoch=None), rotation)
        parts: list[mx.array] = []
        for piece in cut(n, cuts):
            keys, values = cache.update_and_fetch(k[:, :, piece], v[:, :, piece])
            layout = cache.take_layout()
            parts.append(
                sink_attention(
                    *(q[:, :, piece], keys, values),
                    layout=layout,
                    rotation=rotation,
                    scale=0.5,
                    packed=cache.take_packed(keys),
                )
            )
        return np.array(mx.concatenate(parts, axis=2))

    one_by_one = outputs(every(1))
    for cuts in (every(7), every(3 * W + 1), (), mixed(S + W, 1, 1, 40, 1)):
        np.testing.assert_allclose(outputs(cuts), one_by_one, atol=2e-6)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", ["llama", "qwen3", "smollm3"])
def test_cuts_change_no_logits(family: str, bits: int):
    """In a whole model, where a query sees the quantised form of its own call's keys too.

    A model's sums round otherwise in other pieces, by 1e-7 or so. A value that lies where the
    quantiser rounds may then go the other way, and is off by a step: rare, and all there is.
    """
    model, tokens = model_of(family, layers=3), random_tokens(80)
    attach(model, SinkConfig(S, W))
    plain = run(model, tokens, make_cache(model), every(1))
    attach(model, config(bits, bits, epoch=None))
    one_by_one = run(model, tokens, make_cache(model), every(1))
    off = np.abs(one_by_one - plain)[:, S:].max(axis=-1)
    assert np.median(off) > 10 * TOLERANCE, "quantising would not show"
    for cuts in (every(7), every(3 * W + 1), (), mixed(S + W, 1, 1, E, 1)):
        ours = run(model, tokens, make_cache(model), cuts)
        apart = np.abs(ours - one_by_one).max(axis=-1)
        assert np.median(apart) < TOLERANCE
        assert apart.mean() < off.mean() / 10


def test_an_epoch_that_begins_elsewhere_rounds_otherwise():
    """Its keys lie at the same distances, but rotated from another place, and quantised there."""
    model, tokens = model_of(), random_tokens(100)
    attach(model, SinkConfig(S, W, epoch=E))
    plain = run(model, tokens, make_cache(model), every(1))
    attach(model, config(8, 8))
    one_by_one, in_chunks = (
        run(model, tokens, make_cache(model), cuts) for cuts in (every(1), every(7))
    )
    off = mean_off(one_by_one, plain)
    assert mean_off(in_chunks, one_by_one) < 1.5 * off
    assert mean_off(in_chunks, plain) < 1.5 * off


def test_it_is_near_the_plain_ring_and_not_the_same():
    """8 bits nearer than 4: the option does something, and not too much."""
    model, tokens = model_of(layers=3), random_tokens(100)
    attach(model, SinkConfig(S, W, epoch=E))
    plain = run(model, tokens, make_cache(model), mixed())
    off = {}
    for bits in (8, 4):
        attach(model, config(bits, bits))
        off[bits] = np.abs(run(model, tokens, make_cache(model), mixed()) - plain).mean()
    assert 0.02 > off[8] > 10 * TOLERANCE
    assert off[4] > 5 * off[8]
    # Sinks are plain: nothing is lost while there is nothing else.
    attach(model, config(4, 4, num_sinks=20, epoch=40))
    first = run(model, tokens[:, :20], make_cache(model), every(3))
    attach(model, SinkConfig(20, W))
    np.testing.assert_array_equal(first, run(model, tokens[:, :20], make_cache(model), every(3)))


@pytest.mark.parametrize("n", range(1, R + 1))
def test_taking_back(n: int):
    """Bit by bit; the rows that are taken back hold NaN."""
    settings = config(8, 4)
    x = mx.random.normal((1, 2, 60, 32), key=mx.random.key(3))

    def fed(back_at: Sequence[int]) -> np.ndarray:
        cache = SinkCache(settings, Rotation([]))
        for t in range(60):
            fetched, _ = cache.update_and_fetch(x[:, :, t : t + 1], x[:, :, t : t + 1])
            cache.take_layout()
            if t in back_at:
                wrong = mx.full((1, 2, n, 32), 9.0)
                cache.update_and_fetch(wrong, wrong)
                cache.take_layout()
                cache.trim(n)
                for token in range(max(t + 1, S), t + 1 + n):
                    for held in (cache.keys, cache.values):
                        held[2][:, :, cache.ring.slot(token) - S] = mx.nan
        live = [run.row + i for run in cache.ring.live_runs() for i in range(run.length)]
        return np.array(fetched)[:, :, live]

    np.testing.assert_array_equal(fed((3, 9, 15, 40, 57)), fed(()))


@pytest.mark.parametrize("tokens", [0, 2, 9, 26])
def test_state_is_all_there_is(tokens: int):
    model = model_of()
    attach(model, config(8, 4))
    caches, others, text = make_cache(model), make_cache(model), random_tokens(tokens + 12)
    if tokens:
        run(model, text[:, :tokens], caches, mixed(4, 1))
    for cache, other in zip(caches, others, strict=True):
        other.state = copy.deepcopy(cache.state)
    going, resumed = (run(model, text[:, tokens:], c, mixed(1, 5)) for c in (caches, others))
    np.testing.assert_array_equal(going, resumed)


def test_states_that_do_not_fit_are_refused():
    model = model_of()
    attach(model, config(8, 4))
    (cache, other), like = make_cache(model), make_cache(model)
    run(model, random_tokens(30), [cache, other])
    (sinks, words, scales, biases), *rest = cache.state
    for keys in (
        (sinks, words, scales[:, :, 1:], biases),
        (sinks, words[:, :, :5], scales[:, :, :5], biases[:, :, :5]),
        (sinks[:, :, :2], words, scales, biases),
        (sinks, words.astype(mx.int32), scales, biases),
        (sinks, None, scales, biases),
        (sinks, None, None, None),
        None,
    ):
        with pytest.raises(CacheError):
            like[0].state = (keys, *rest)


# The library and the command.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "wide", head_dim=32)


def test_a_stream_is_copied_saved_and_gone_on_with(folder: Path, tmp_path: Path):
    """And its session is refused where the cache is of another kind."""
    settings = SinkConfig(4, 20, epoch=32, rollback=4, kv_bits=8, v_bits=4, kv_group_size=32)
    model, tokenizer = mlx_sink.load(folder, settings)
    options: dict[str, Any] = {"sampler": make_sampler(0.9), "ignore_eos": True, "flush": False}

    def write(stream: Stream, n: int) -> list[int]:
        return [r.token for r in stream.generate(n, **options)]

    stream = Stream(model, tokenizer, seed=3)
    stream.feed("the cat went")
    write(stream, 40)
    fork = stream.fork()
    stream.save(tmp_path / "s")
    later = write(stream, 60)
    assert write(fork, 60) == write(Stream.resume(tmp_path / "s", model, tokenizer), 60) == later
    quantised = SinkConfig(4, 20, epoch=32, rollback=4, kv_bits=8, kv_group_size=32)
    for other in (SinkConfig(4, 20, epoch=32, rollback=4), quantised):
        attach(model, other)
        with pytest.raises(SessionError, match="was made with"):
            Stream.resume(tmp_path / "s", model, tokenizer)


def test_head_dims_that_do_not_fit_are_refused():
    cases = [
        (96, 64, r"kv_group_size 64 does not divide a head_dim of 96: use 32"),
        (64, 128, r"does not divide a head_dim of 64: use 32 or 64"),
        (80, 32, r"kv_group_size 32 does not divide a head_dim of 80: leave kv_bits out"),
    ]
    for head_dim, size, words in cases:
        with pytest.raises(UnsupportedModelError, match=f"^llama is not supported: .*{words}$"):
            attach(
                build("llama", head_dim=head_dim), SinkConfig(4, 20, kv_bits=8, kv_group_size=size)
            )


def test_the_rows_handed_to_a_kernel_are_not_kept():
    """A reference to them would make MLX copy the ring at every step."""
    model = model_of(layers=1)
    attach(model, config(8, 8))
    (cache,) = make_cache(model)
    x = mx.zeros((1, 2, 1, 32))
    keys, _ = cache.update_and_fetch(x, x)
    cache.take_layout()
    first = cache.take_packed(keys)
    assert isinstance(first[0], Packed)
    assert cache.take_packed(keys) is None
