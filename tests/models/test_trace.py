"""Watching a model: which rotation its keys have had, without computing or changing anything."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import made_up_broken
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from every import tiny
from made_up import HEAD_DIM, Attention, Model
from mlx_lm.models import muse_spark
from mlx_lm.models.llama import Model as Llama
from mlx_lm.models.llama import ModelArgs

from mlx_sink import SinkConfig, UnsupportedModelError, attach
from mlx_sink.attention.rope import RopeCall, Rotation
from mlx_sink.models.hook import hook
from mlx_sink.models.trace import CacheTrace, _watch, rope_call, watch

CONFIG = SinkConfig(3, 10, epoch=17)
ROPE = mx.fast.rope


def watched(kind: type[Attention], layers: int = 2) -> tuple[Sequence[CacheTrace], ...]:
    """Watch a made-up model near and far."""
    model = Model(kind, layers=layers)
    hook(model)
    trace = watch(model, CONFIG)
    return trace.chunk, trace.token


def rotate(
    x: mx.array, dims: int, base: float, offset: int, traditional: bool = False
) -> mx.array:
    return mx.fast.rope(x, dims, traditional=traditional, base=base, scale=1.0, offset=offset)


def base_of(trace: CacheTrace) -> float | None:
    return None if trace.rope is None else trace.rope.base


def test_shapes_and_calls():
    near, far = watched(Attention)
    for traces, n in ((near, 2), (far, 1)):
        assert [layer.layer for layer in traces] == [0, 1]
        for layer in traces:
            assert layer.keys == layer.values == (1, 2, n, HEAD_DIM)
            assert (layer.calls, layer.attended, layer.rotated, layer.length) == (1, 1, 0, 0)
            assert layer.attended_width == HEAD_DIM
            assert layer.rope.is_like(RopeCall(HEAD_DIM, HEAD_DIM, False, 100.0, 1.0, None))
            assert not layer.lends


class Decoy(Attention):
    """Rotates something else between its keys and its cache, as an indexer does."""

    def rotate(self, q: mx.array, k: mx.array, position: int) -> tuple[mx.array, mx.array]:
        q, k = super().rotate(q, k, position)
        rotate(q, 4, 7.0, position)
        return q, k


def test_the_rotation_is_that_of_the_very_keys():
    """Not the last one before the cache, and no quarrel between the two."""
    for traces in watched(Decoy):
        assert [base_of(layer) for layer in traces] == [100.0, 100.0]


class RotatedValues(Attention):
    """Latent attention keeps what is rotated in the place of the values."""

    def attend(self, q: mx.array, k: mx.array, v: mx.array, mask: Any, cache: Any) -> mx.array:
        if cache is not None:
            v, k = cache.update_and_fetch(v, k)
        return self.multiply(q, k, v, mask, cache)


def test_rotated_values_are_found():
    for traces in watched(RotatedValues):
        assert [layer.rotated for layer in traces] == [1, 1]
        assert [base_of(layer) for layer in traces] == [100.0, 100.0]


class Behind(Attention):
    """The rotated part of a head comes after one without a position."""

    def rotate(self, q: mx.array, k: mx.array, position: int) -> tuple[mx.array, mx.array]:
        still, turned = 3, HEAD_DIM - 3
        return tuple(
            mx.concatenate([x[..., :still], rotate(x[..., still:], turned - 1, 9.0, position)], -1)
            for x in (q, k)
        )


def test_parts_that_are_joined_are_found_by_what_was_called():
    """The keys are no call's output then: what was called since the layer before counts."""
    for traces in watched(Behind):
        for layer in traces:
            assert base_of(layer) == 9.0
            rotation = Rotation.of(layer.rope, layer.keys[-1])
            assert (rotation.start, rotation.dims) == (3, HEAD_DIM - 4)


class Alternating(Attention):
    """Layers with embeddings of their own, and a last one without any."""

    def rotate(self, q: mx.array, k: mx.array, position: int) -> tuple[mx.array, mx.array]:
        if self.layer == 2:
            return q, k
        q, k = (rotate(x, HEAD_DIM, 10.0 * (1 + self.layer), position) for x in (q, k))
        return q, 1.0 * k


def test_each_layer_has_its_own():
    """What rotated the queries of one layer must not be taken for the next one's."""
    for traces in watched(Alternating, layers=4):
        assert [base_of(layer) for layer in traces] == [10.0, 20.0, None, 40.0]


class QueriesLater(Attention):
    """Rotates the queries once the keys are in; every other layer has no positions."""

    def attend(self, q: mx.array, k: mx.array, v: mx.array, mask: Any, cache: Any) -> mx.array:
        k, v = cache.update_and_fetch(k, v)
        return self.multiply(q if self.layer % 2 else 1.0 * self.rope(q), k, v, mask, cache)

    def rotate(self, q: mx.array, k: mx.array, position: int) -> tuple[mx.array, mx.array]:
        return q, k if self.layer % 2 else 1.0 * self.rope(k, offset=position)


def test_queries_that_are_rotated_later_are_of_their_own_layer():
    for traces in watched(QueriesLater, layers=4):
        assert [base_of(layer) for layer in traces] == [100.0, None, 100.0, None]


def test_a_layer_with_two_embeddings_is_refused():
    with pytest.raises(UnsupportedModelError, match="more than one position embedding"):
        watched(made_up_broken.TwoRopes)


@pytest.mark.parametrize("late", ["base", "dims", "pairing", "freqs", "none"])
def test_an_embedding_that_is_another_far_away_is_refused(late: str):
    """Dynamic scaling in whatever form: one rotation has to serve for all of the epoch."""

    class Late(Attention):
        def rotate(self, q: mx.array, k: mx.array, position: int) -> tuple[mx.array, mx.array]:
            options: dict[str, Any] = {"traditional": False, "base": 50.0, "scale": 1.0}
            dims = HEAD_DIM
            if position > 1000:
                dims -= 2 * (late == "dims")
                options["base"] += late == "base"
                options["traditional"] = late == "pairing"
                if late == "freqs":
                    options.update(base=None, freqs=1.01 * 50.0 ** (mx.arange(4) / 4))
                if late == "none":
                    return q, k
            return tuple(mx.fast.rope(x, dims, offset=position, **options) for x in (q, k))

    message = "not a fixed rotation: it changes with the position"
    with pytest.raises(UnsupportedModelError, match=message):
        attach(Model(Late), SinkConfig(3, 10))


def test_frequencies_are_compared_by_value():
    """A base and the frequencies that it stands for are one and the same."""
    base = RopeCall(8, 8, False, 50.0, 1.0, None)
    same = RopeCall(8, 8, False, None, 1.0, mx.array(1 / base.frequencies()))
    assert base.is_like(base)
    np.testing.assert_allclose(same.frequencies(), base.frequencies(), rtol=1e-6)
    for other in (
        RopeCall(8, 8, False, 50.0, 0.5, None),
        RopeCall(8, 6, False, 50.0, 1.0, None),
        RopeCall(10, 8, False, 50.0, 1.0, None),
        RopeCall(8, 8, True, 50.0, 1.0, None),
        RopeCall(8, 8, False, 51.0, 1.0, None),
    ):
        assert not base.is_like(other)


def test_infinite_periods_are_no_rotation():
    """MLX spells dimensions that stand still as pairs with an infinite period."""
    call = RopeCall(4, 4, False, None, 1.0, mx.array([1.0, mx.inf]))
    assert call.frequencies().tolist() == [1.0, 0.0]


# What is not to be touched.


def test_other_threads_are_not_watched():
    """An app may generate with one model while it attaches to another."""
    done: list[np.ndarray] = []
    x = mx.array(np.random.default_rng(0).standard_normal((1, 1, 3, 6), np.float32))
    expected = np.array(rotate(x, 6, 3.0, 5))

    def elsewhere() -> None:
        done.append(np.array(rotate(x, 6, 3.0, 5)))

    class Threaded(Attention):
        def rotate(self, q: mx.array, k: mx.array, position: int) -> tuple[mx.array, mx.array]:
            q, k = super().rotate(q, k, position)
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            return q, 1.0 * k

    for traces in watched(Threaded):
        assert [base_of(layer) for layer in traces] == [100.0, 100.0]
    assert len(done) == 4
    assert all(np.array_equal(rotated, expected) for rotated in done)


def test_watching_takes_turns():
    """A patch over another one's, restored in the wrong order, would stay for ever."""
    others: list[threading.Thread] = []
    bases: list[float | None] = []

    class Meanwhile(Attention):
        def rotate(self, q: mx.array, k: mx.array, position: int) -> tuple[mx.array, mx.array]:
            if not others:
                others.append(threading.Thread(target=elsewhere))
                others[0].start()
                others[0].join(0.2)
                assert others[0].is_alive(), "another one watches at the same time"
            return super().rotate(q, k, position)

    def elsewhere() -> None:
        call = rope_call(nn.RoPE(8, base=7.0), 8)
        bases.append(None if call is None else call.base)

    assert [base_of(layer) for traces in watched(Meanwhile) for layer in traces] == [100.0] * 4
    others[0].join()
    assert bases == [7.0]
    assert mx.fast.rope is ROPE


def test_attaching_from_several_threads():
    models = [Model(Attention) for _ in range(4)]
    failed: list[BaseException] = []

    def work(model: nn.Module) -> None:
        try:
            attach(model, CONFIG)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert mx.fast.rope is ROPE


@pytest.mark.parametrize("kind", [made_up_broken.Fails, made_up_broken.TwoRopes, Attention])
def test_rope_is_what_it_was_afterwards(kind: type[Attention]):
    """Whatever happened: the patch of a moment would slow down and hold on to every call."""
    try:
        watched(kind)
    except UnsupportedModelError:
        assert kind is not Attention
    else:
        assert kind is Attention
    assert mx.fast.rope is ROPE
    assert _watch.calls is None, "the arrays of a forward pass are held"
    assert _watch.last is None


def test_functions_with_a_rotation_inside_are_restored_too():
    model, original = tiny("muse_spark"), muse_spark.qk_norm_rope
    report = attach(model, CONFIG)
    assert muse_spark.qk_norm_rope is original
    assert "rope" in {layer.positions for layer in report.layers}


def test_rotations_inside_of_other_functions_are_seen(monkeypatch: pytest.MonkeyPatch):
    """On Metal the kernel rotates itself, and `mx.fast.rope` is never called in those layers."""
    model = tiny("muse_spark")
    known = attach(model, CONFIG), [cache.rotation for cache in model.make_cache()]
    fused = muse_spark.qk_norm_rope

    def silent(*args: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(mx.fast, "rope", ROPE)
            return fused(*args, **options)

    monkeypatch.setattr(muse_spark, "qk_norm_rope", silent)
    report, rotations = attach(model, CONFIG), [c.rotation for c in model.make_cache()]
    assert str(report) == str(known[0])
    assert not all(rotation.is_identity for rotation in rotations)
    for ours, theirs in zip(rotations, known[1], strict=True):
        assert np.array_equal(ours.frequencies, theirs.frequencies)
        assert (ours.interleaved, ours.start) == (theirs.interleaved, theirs.start)


def test_a_rope_that_fails_restores_too():
    def fails(x: mx.array, offset: int) -> mx.array:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        rope_call(fails, 8)
    assert mx.fast.rope is ROPE


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (nn.RoPE(6, base=5.0, scale=0.5), RopeCall(8, 6, False, 5.0, 0.5, None)),
        (nn.RoPE(8, traditional=True), RopeCall(8, 8, True, 10000.0, 1.0, None)),
    ],
)
def test_rope_call(rope: Callable[..., mx.array], expected: RopeCall):
    assert rope_call(rope, 8).is_like(expected)


def test_no_rope_no_call():
    assert rope_call(lambda x, offset: x, 8) is None


def test_nothing_is_computed():
    """Nor loaded: weights of a petabyte would not fit."""
    args = ModelArgs(
        model_type="llama",
        hidden_size=1 << 24,
        num_hidden_layers=2,
        intermediate_size=1 << 24,
        num_attention_heads=1 << 10,
        num_key_value_heads=8,
        rms_norm_eps=1e-5,
        vocab_size=1 << 24,
        max_position_embeddings=4096,
    )
    report = attach(Llama(args), SinkConfig(4, 1020))
    assert report.nbytes == 2 * 1024 * 2 * 8 * (1 << 14) * 4
