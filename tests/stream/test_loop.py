"""The generation loop against mlx-lm's own, and that nothing in it grows."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from tiny import VOCABULARY, build

from mlx_sink import CacheError, SinkConfig, attach
from mlx_sink.models.attach import make_cache
from mlx_sink.stream.loop import Loop
from mlx_sink.stream.sampler import Sampling, fresh_key, greedy, seeded

CONFIG = SinkConfig(num_sinks=2, window=10, epoch=16)
PROMPT = [5, 9, 2, 44, 17, 5, 5, 30, 8, 1, 60, 2, 7]

PENALTIES: dict[str, Any] = {
    "repetition_penalty": 1.3,
    "repetition_context_size": 6,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.2,
    "frequency_context_size": 9,
    "logit_bias": {3: 1.5, 4: -2.0},
}

SAMPLERS: dict[str, Any] = {
    "greedy": {},
    "temp": {"temp": 0.9},
    "top-p": {"temp": 0.8, "top_p": 0.7},
    "min-p": {"temp": 1.1, "min_p": 0.05, "min_tokens_to_keep": 2},
    "top-k": {"temp": 1.0, "top_k": 7},
    "xtc": {"temp": 1.0, "xtc_probability": 0.6, "xtc_threshold": 0.05},
}


@pytest.fixture(scope="module")
def model() -> Any:
    made = build("llama", layers=2)
    attach(made, SinkConfig(num_sinks=2, window=100))
    return made


def small(layers: int = 1) -> Any:
    made = build("llama", layers=layers)
    attach(made, CONFIG)
    return made


def loop(model: Any, seed: int = 3, penalty_window: int = 32) -> Loop:
    return Loop(model, make_cache(model), key=mx.random.key(seed), penalty_window=penalty_window)


def take(loop: Loop, n: int, sampling: Sampling | None = None) -> list[tuple[int, np.ndarray]]:
    pairs = zip(range(n), loop.tokens(sampling or Sampling()), strict=False)
    return [(made.token, np.array(made.logprobs)) for _, made in pairs]


@pytest.mark.parametrize("penalties", [False, True], ids=["", "penalties"])
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("step", [4, 2048])
def test_same_as_mlx_lm_to_the_last_bit(model: Any, name: str, penalties: bool, step: int):
    """Tokens and log probabilities, for the same seed, while nothing is evicted."""
    processors = make_logits_processors(**PENALTIES) if penalties else []
    mx.random.seed(3)
    theirs = [
        (token, np.array(logprobs))
        for token, logprobs in generate_step(
            mx.array(PROMPT),
            model,
            max_tokens=40,
            sampler=make_sampler(**SAMPLERS[name]),
            logits_processors=processors,
            prompt_cache=[KVCache() for _ in model.layers],
            prefill_step_size=step,
        )
    ]
    mx.random.seed(99)  # ours draws from its own key
    mine = loop(model)
    mine.read(PROMPT, step)
    ours = take(mine, 40, Sampling(make_sampler(**SAMPLERS[name]), processors))
    assert [token for token, _ in ours] == [token for token, _ in theirs]
    assert len({token for token, _ in ours}) > 2
    for (_, mine_p), (_, theirs_p) in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine_p, theirs_p, atol=2e-5)


def test_a_loop_is_gone_on_with_exactly():
    """Breaking off after any token, also past the wrap, changes nothing: not the sampling."""
    model = small()
    sampling = Sampling(
        make_sampler(0.9, top_p=0.95), make_logits_processors(repetition_penalty=1.2)
    )
    whole = loop(model)
    whole.read(PROMPT)
    expected = [token for token, _ in take(whole, 60, sampling)]
    for at in (1, 7, 33):
        parts = loop(model)
        parts.read(PROMPT)
        tokens = [token for token, _ in take(parts, at, sampling)]
        mx.random.normal((3,))
        assert parts.position == len(PROMPT) + at
        tokens += [token for token, _ in take(parts, 60 - at, sampling)]
        assert tokens == expected


def test_what_is_chosen_counts_only_once_it_is_yielded():
    """One step ahead, a token is chosen that another sampler, or other input, then replaces."""
    model = small()
    one, two = loop(model), loop(model)
    for each in (one, two):
        each.read(PROMPT)
    first = take(one, 5, Sampling(make_sampler(1.0)))
    greedily = take(one, 5)
    two.read([token for token, _ in first])
    assert [t for t, _ in take(two, 5)] == [t for t, _ in greedily]


def test_mlx_s_random_state_is_left_alone(model: Any):
    """Neither what a stream draws depends on the caller's numbers, nor the other way round."""
    mx.random.seed(5)
    expected = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(5)
    drawn: list[float] = []
    mine = loop(model)
    mine.read(PROMPT)
    for _, _ in zip(range(4), mine.tokens(Sampling(make_sampler(1.0, top_p=0.9))), strict=False):
        drawn.append(mx.random.uniform().item())
    mx.random.seed(5)
    singly = [mx.random.uniform().item() for _ in range(4)]
    assert drawn == singly
    assert len(expected) == 4


def test_two_streams_in_turn_in_one_thread(model: Any):
    """Each draws what it draws alone."""
    sampling = Sampling(make_sampler(1.0))
    alone: list[list[int]] = []
    for seed in (1, 2):
        one = loop(model, seed)
        one.read(PROMPT)
        alone.append([t for t, _ in take(one, 20, sampling)])
    assert alone[0] != alone[1]
    pair = [loop(model, seed) for seed in (1, 2)]
    for each in pair:
        each.read(PROMPT)
    runs = [each.tokens(sampling) for each in pair]
    turns = [[next(run)[0] for run in runs] for _ in range(20)]
    assert [list(tokens) for tokens in zip(*turns, strict=True)] == alone


def test_a_key_drawn_is_another_each_time_and_follows_mlx_s_seed():
    mx.random.seed(1)
    keys = [fresh_key(None).tolist() for _ in range(2)]
    mx.random.seed(1)
    assert fresh_key(None).tolist() == keys[0] != keys[1]
    assert fresh_key(7).tolist() == mx.random.key(7).tolist()


def test_the_random_state_comes_back_after_an_error():
    mx.random.seed(8)

    def fail() -> None:
        mx.random.uniform()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        seeded(mx.random.key(1), fail)
    after = mx.random.uniform().item()
    mx.random.seed(8)
    assert mx.random.uniform().item() == after


def test_processors_see_the_penalty_window_and_nothing_more():
    """The newest tokens in order: of the prompt, of what was made, across breaks."""
    seen: list[list[int]] = []

    def look(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append(tokens.tolist())
        return logits

    model = small()
    mine = loop(model, penalty_window=5)
    mine.read(PROMPT)
    made = [t for t, _ in take(mine, 8, Sampling(processors=[look]))]
    everything = PROMPT + made
    assert seen == [everything[: len(PROMPT) + n][-5:] for n in range(9)]
    seen.clear()
    take(mine, 1, Sampling(processors=[look]))
    assert seen[0] == everything[-5:]


def test_a_processor_may_write_into_its_logits():
    """mlx-lm's penalties do; what the stream goes on from must not change by it."""

    def spoil(tokens: mx.array, logits: mx.array) -> mx.array:
        logits[:, :] = 0.0
        return logits

    mine = loop(small())
    mine.read(PROMPT)
    before = np.array(mine.logits)
    next(mine.tokens(Sampling(processors=[spoil])))
    one = loop(small())
    one.read(PROMPT)
    np.testing.assert_array_equal(before, np.array(one.logits))
    assert np.ptp(np.array(mine.logits)) > 0


def test_progress_and_cancelling_between_chunks():
    """Asked to stop, it reads one token more, and stands where those tokens lead."""
    model = small()
    mine, seen = loop(model), []
    read = mine.read(
        PROMPT, 3, lambda done, total: seen.append((done, total)), lambda: mine.position >= 6
    )
    assert read == 7 == mine.position
    assert seen == [(0, 13), (3, 13), (6, 13), (7, 13)]
    other = loop(model)
    other.read(PROMPT[:7], 3)
    assert [t for t, _ in take(mine, 5)] == [t for t, _ in take(other, 5)]


def test_nothing_to_go_on_from():
    with pytest.raises(CacheError, match="read nothing"):
        next(loop(small()).tokens(Sampling()))


def test_a_broken_step_is_not_gone_on_from():
    """Ctrl-C in the middle of the layers leaves some with the token and some without."""
    model = small()
    mine = loop(model)
    mine.read(PROMPT)
    mine.model = lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        next(mine.tokens(Sampling()))
    mine.model = model
    with pytest.raises(CacheError, match="interrupted"):
        next(mine.tokens(Sampling()))


def test_a_bad_sampler_breaks_nothing():
    mine = loop(small())
    mine.read(PROMPT)
    with pytest.raises(ValueError, match="top_k"):
        next(mine.tokens(Sampling(make_sampler(1.0, top_k=VOCABULARY))))
    assert len(take(mine, 3)) == 3


def test_the_random_state_is_computed_though_nobody_reads_it(tmp_path: Path):
    """MLX is lazy: a state that is only ever put back is a graph that grows by every token."""
    key = mx.random.key(1)
    for _ in range(30):
        seeded(key, lambda: mx.random.uniform())
    mx.export_to_dot(str(tmp_path / "graph"), mx.random.state[0])
    assert len((tmp_path / "graph").read_text()) < 200


def test_arrays_go_with_the_call_that_made_them():
    """In a reference cycle they would stay until Python's collector comes by."""
    mine = loop(small(2))
    mine.read(PROMPT * 20, 70)
    take(mine, 3, Sampling(make_sampler(0.9)))
    gc.collect()
    gc.disable()
    try:
        mine.read(PROMPT * 20, 70)
        take(mine, 30, Sampling(make_sampler(0.9), make_logits_processors(repetition_penalty=1.1)))
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        assert [thing for thing in gc.garbage if isinstance(thing, mx.array)] == []
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def test_nothing_grows_in_eight_thousand_tokens():
    """MLX's memory and Python's objects, with sampling and penalties, far past the window."""
    mine = loop(small())
    mine.read(PROMPT)
    sampling = Sampling(
        make_sampler(0.9, top_p=0.9), make_logits_processors(repetition_penalty=1.1)
    )
    marks: list[tuple[int, int, int]] = []
    for n, _ in zip(range(8001), mine.tokens(sampling), strict=False):
        if n and n % 2000 == 0:
            gc.collect()
            marks.append((mx.get_active_memory(), sys.getallocatedblocks(), len(mine.recent)))
    assert mine.position > 8000
    active, blocks, recent = zip(*marks, strict=True)
    assert max(active) - active[0] < 64_000
    assert blocks[-1] - blocks[0] < 500
    assert set(recent) == {32}
    assert greedy(mx.array([[1.0, 3.0, 2.0]])).item() == 1
