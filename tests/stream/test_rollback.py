"""Taking tokens back, from the cache to the command: as if they had never come, or an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from folder import make_folder
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from tiny import TOLERANCE, build, every, mixed, random_tokens, run

import mlx_sink
from mlx_sink import CacheError, SinkCache, SinkConfig, Stream, UnsupportedModelError, attach
from mlx_sink.models.attach import make_cache
from mlx_sink.stream.loop import Loop
from mlx_sink.stream.sampler import Sampling

S, W, R, E = 3, 10, 4, 18
CONFIG = SinkConfig(S, W, epoch=E, rollback=R)
"""Wraps after 13 tokens, begins a new epoch every 18 or so."""


def spoil(cache: SinkCache) -> None:
    """Fill the rows of tokens that were taken back with NaN: to be seen, they must be read."""
    ring = cache.ring
    for token in range(ring.tokens, ring.tokens + ring.taken_back):
        cache.keys[:, :, ring.slot(token)] = mx.nan
        cache.values[:, :, ring.slot(token)] = mx.nan


@pytest.mark.parametrize("cut", [[1] * R, [R], [1, R - 1], [3, 9]], ids=str)
@pytest.mark.parametrize("family", ["llama", "smollm3", "phi3, partial longrope"])
def test_what_follows_is_as_if_it_had_never_come(family: str, cut: list[int]):
    """At every place of two laps and two epochs: go wrong, take back, go on, in any pieces."""
    model, right = build(family, layers=3), random_tokens(60)
    attach(model, CONFIG)
    straight = run(model, right, make_cache(model), every(1))
    wrong, taken = random_tokens(sum(cut), seed=7), min(R, sum(cut))
    begun = make_cache(model)
    for t in range(1, 48):
        run(model, right[:, t - 1 : t], begun)
        if family != "llama" and t % 4:
            continue
        caches = make_cache(model)
        for cache, other in zip(caches, begun, strict=True):
            cache.state = tuple(mx.array(x) if isinstance(x, mx.array) else x for x in other.state)
        text = np.concatenate([right[:, : t + sum(cut) - taken], wrong], axis=1)[:, t:]
        run(model, text[:, : sum(cut)], caches, cut)
        back = t + sum(cut) - taken
        for cache in caches:
            assert cache.trim(taken) == taken
            spoil(cache)
        lengths = mixed(1, 2, seed=t) if t % 2 else mixed(3, 1, 1, seed=t)
        ours = run(model, right[:, back:], caches, lengths)
        np.testing.assert_allclose(ours, straight[:, back:], atol=TOLERANCE, rtol=0)


def test_more_than_the_spare_slots_is_refused():
    """It raises, and changes nothing: mlx-lm would go on with what it was not given."""
    model = build("llama")
    attach(model, CONFIG)
    (cache,) = caches = make_cache(model)
    assert cache.is_trimmable()
    run(model, random_tokens(40), caches, mixed())
    ring = cache.ring
    with pytest.raises(CacheError, match=f"cannot take back {R + 1} tokens, only {R}"):
        cache.trim(R + 1)
    assert cache.ring == ring
    assert cache.trim(1) == 1
    with pytest.raises(CacheError, match=f"cannot take back {R} tokens, only {R - 1}"):
        cache.trim(R)
    assert cache.trim(R - 1) == R - 1
    assert cache.spare == 0


def test_spare_slots_are_reported_to_the_byte():
    model = build("llama", layers=2)
    report = attach(model, CONFIG)
    caches = make_cache(model)
    run(model, random_tokens(100), caches, mixed())
    assert report.nbytes == sum(cache.nbytes for cache in caches)
    assert [layer.slots for layer in report.layers] == [S + W + R] * 2
    assert f"= 13 tokens + {R} spare slots" in str(report)
    without = attach(model, SinkConfig(S, W, epoch=E))
    assert report.nbytes - without.nbytes == R * sum(x.bytes_per_token for x in report.layers)
    assert "spare" not in str(without)


def test_without_spare_slots_a_ring_is_what_it_was():
    model = build("llama")
    attach(model, SinkConfig(S, W, epoch=E))
    (cache,) = caches = make_cache(model)
    run(model, random_tokens(40), caches, mixed())
    assert not cache.is_trimmable()
    assert cache.keys.shape[2] == S + W
    fetched, _ = cache.update_and_fetch(mx.zeros((1, 2, 1, 8)), mx.zeros((1, 2, 1, 8)))
    assert fetched is cache.keys, "a full ring is handed out as it is, not a slice of it"


def test_a_layer_that_cannot_take_tokens_back_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(SinkCache, "is_trimmable", lambda self: False)
    with pytest.raises(UnsupportedModelError, match=r"layer 0 .* cannot take tokens back: leave"):
        attach(build("llama"), CONFIG)
    attach(build("llama"), SinkConfig(S, W))


# The loop and the stream.


def loop(model: Any, **options: Any) -> Loop:
    made = Loop(model, make_cache(model), key=mx.random.key(3), **options)
    made.read([5, 9, 2, 44, 17, 5, 5, 30, 8, 1, 60, 2, 7])
    return made


def take(loop: Loop, n: int, sampling: Sampling | None = None) -> list[int]:
    return [
        made.token for _, made in zip(range(n), loop.tokens(sampling or Sampling()), strict=False)
    ]


@pytest.mark.parametrize("n", range(R + 1))
@pytest.mark.parametrize("made", [0, 1, 2, 30, 31, 47])
def test_a_loop_stands_where_it_stood(made: int, n: int):
    """The logits, the penalties' tokens and what is made next."""
    model = build("llama", layers=2)
    attach(model, CONFIG)
    sampling = Sampling(processors=make_logits_processors(repetition_penalty=1.3))
    straight, back = loop(model, penalty_window=7), loop(model, penalty_window=7)
    take(straight, made, sampling)
    take(back, made, sampling)
    back.read([33, 12, 9, 8][:n]) if n else None
    back.rollback(n)
    assert back.position == straight.position
    assert [*back.recent][-7:] == [*straight.recent][-7:]
    np.testing.assert_allclose(np.array(back.logits), np.array(straight.logits), atol=TOLERANCE)
    assert take(back, 60, sampling) == take(straight, 60, sampling)


def test_a_loop_takes_back_what_its_caches_can():
    model = build("llama")
    attach(model, CONFIG)
    mine = loop(model)
    take(mine, 30)
    with pytest.raises(CacheError, match=f"cannot take back {R + 1} tokens, only {R}"):
        mine.rollback(R + 1)
    with pytest.raises(CacheError, match="cannot take back -1 tokens"):
        mine.rollback(-1)
    mine.rollback(R)
    with pytest.raises(CacheError, match="only 0"):
        mine.rollback(1)
    fresh = loop(model)
    fresh.rollback(13)
    assert (fresh.position, fresh.logits, len(fresh.recent)) == (0, None, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "plain")


def test_a_stream_takes_an_edit_back(folder: Path, tmp_path: Path):
    """Between saving and resuming too, and with what was sampled in between."""
    model, tokenizer = mlx_sink.load(folder, SinkConfig(4, 20, epoch=40, rollback=8))
    sampler = make_sampler(0.9)

    def write(stream: Stream, n: int) -> str:
        made = stream.generate(n, sampler=sampler, ignore_eos=True, flush=False)
        return "".join(response.text for response in made)

    straight, edited = (Stream(model, tokenizer, seed=4) for _ in range(2))
    for stream in (straight, edited):
        stream.feed("the cat went")
        write(stream, 60)
    read = edited.feed(" to sea")
    assert 1 <= read <= 8
    edited.save(tmp_path / "s")
    edited = Stream.resume(tmp_path / "s", model, tokenizer)
    edited.rollback(read)
    assert edited.position == straight.position
    for stream in (straight, edited):
        stream.feed(" and the dog")
    assert write(edited, 50) == write(straight, 50)


def test_a_rollback_ends_the_open_answer(folder: Path):
    model, tokenizer = mlx_sink.load(folder, SinkConfig(4, 20, rollback=8))
    stream = Stream(model, tokenizer)
    stream.feed("the cat went")
    answer = stream.generate(10, ignore_eos=True)
    next(answer)
    stream.rollback(1)
    with pytest.raises(mlx_sink.InputError, match="moved on"):
        next(answer)
