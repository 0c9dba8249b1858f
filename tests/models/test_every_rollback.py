"""Spare slots in every architecture: they change nothing, and tokens can be taken back."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from every import tiny
from feeding import assert_close, feed, tokens_of
from tiny import every, mixed

from mlx_sink import CacheError, SinkConfig, UnsupportedModelError, attach
from mlx_sink.cache.group import CacheGroup
from mlx_sink.models.architectures import VERIFIED
from mlx_sink.models.attach import make_cache
from mlx_sink.stream import session
from mlx_sink.stream.loop import Loop, Sampling
from mlx_sink.stream.speculative import Draft, check_caches

S, W, R, E = 3, 10, 4, 18
PLAIN, SPARE = SinkConfig(S, W, epoch=E), SinkConfig(S, W, epoch=E, rollback=R)
"""Wraps after 13 tokens, begins a new epoch every 18 or so."""

GROUPS = ("deepseek_v32", "glm_moe_dsa", "longcat_flash", "nemotron-nas")
"""Two caches in a layer, or a layer whose cache is never fed."""
# fmt: off
RECURRENT = {
    "baichuan_m1", "bailing_moe_v3", "falcon_h1", "gear", "granitemoehybrid", "jamba", "kimi_k3",
    "kimi_linear", "lfm2", "lfm2-vl", "lfm2_moe", "longcat_flash_ngram", "mamba", "mamba2",
    "nemotron_h", "olmo_hybrid", "plamo2", "prism_hadamard_qwen35", "qwen3_5", "qwen3_5_moe",
    "qwen3_next", "recurrent_gemma", "rwkv7",
}
# fmt: on
"""Layers with a state that every token changes: what a token did to it cannot be undone."""
WHOSE = {"model": "a", "tokenizer": "b"}

model_of = cache(tiny)


def with_spare_slots(name: str) -> nn.Module:
    model = model_of(name)
    attach(model, SPARE)
    return model


def loop_of(model: nn.Module, tokens: np.ndarray, draft: Draft | None = None) -> Loop:
    loop = Loop(model, make_cache(model), key=mx.random.key(0), draft=draft)
    loop.read(tokens[0].tolist(), 7)
    return loop


def write(loop: Loop, n: int) -> list[int]:
    made = loop.tokens(Sampling())
    return [next(made).token for _ in range(n)]


@pytest.mark.parametrize("name", sorted(RECURRENT))
def test_recurrent_layers_take_none(name: str):
    with pytest.raises(UnsupportedModelError, match=r"layer \d+ has a \w+, which cannot take tok"):
        with_spare_slots(name)


@pytest.mark.parametrize("name", sorted(VERIFIED - RECURRENT))
def test_spare_slots_change_nothing(name: str):
    """What lies in them is not seen, in chunks or in decode steps, by us or by the model."""
    model = with_spare_slots(name)
    tokens = tokens_of(model, 3 * E)
    ours = [feed(model, tokens, make_cache(model), cuts) for cuts in (every(1), mixed(9, 1, 1))]
    attach(model, PLAIN)
    expected = feed(model, tokens, make_cache(model), every(7))
    for logits in ours:
        assert_close(logits, expected)


@pytest.mark.parametrize("name", sorted(VERIFIED - RECURRENT))
def test_what_was_taken_back_had_never_come(name: str):
    """The logits are those of a loop that never read it: before and after wraps and epochs."""
    model = with_spare_slots(name)
    tokens, wrong = tokens_of(model, 60), tokens_of(model, R, seed=1)
    for t in (5, 12, 31, 36, 47):
        straight, back = (loop_of(model, tokens[:, :t]) for _ in range(2))
        back.read(wrong[0].tolist(), 3)
        back.rollback(R)
        assert_close(np.array(back.logits), np.array(straight.logits))
        for loop in (straight, back):
            loop.read(tokens[0, t:].tolist(), 4)
        assert_close(np.array(back.logits), np.array(straight.logits))


@pytest.mark.parametrize("name", GROUPS)
def test_groups_between_saving_copying_and_drafting(name: str, tmp_path: Path):
    """A rollback after a resume, of a fork, and the tokens that a draft guessed wrong."""
    model = with_spare_slots(name)
    tokens, wrong = tokens_of(model, 40), tokens_of(model, R, seed=1)
    expected = write(loop_of(model, tokens), 40)
    loop = loop_of(model, tokens)
    loop.read(wrong[0].tolist())
    session.save(tmp_path / "s", loop, None, WHOSE, {})
    resumed = session.resume(session.read(tmp_path / "s"), model, WHOSE)
    for other in (resumed, loop.fork(), loop):
        assert other.spare == R
        other.rollback(R)
        assert other.spare == 0
        with pytest.raises(CacheError, match="cannot take back 1 tokens, only 0"):
            other.rollback(1)
        assert write(other, 40) == expected
    draft = tiny(name, seed=1)
    attach(draft, SPARE)
    drafted = loop_of(model, tokens, Draft(draft, make_cache(draft), R))
    assert write(drafted, 30) == expected[:30]
    assert drafted.draft is not None
    assert drafted.draft.acceptance < 1.0, "nothing was taken back"
    drafted.read(wrong[0].tolist())
    drafted.rollback(R)
    assert write(drafted, 10) == expected[30:]


@pytest.mark.parametrize("name", [*GROUPS, "llama"])
def test_too_few_spare_slots_are_refused_before_the_first_round(name: str):
    model = model_of(name)
    attach(model, SinkConfig(S, W, rollback=1))
    with pytest.raises(CacheError, match=r"the model has 1: attach it with .*rollback=3"):
        check_caches(make_cache(model), 3, "model")
    check_caches(make_cache(model), 1, "model")


@pytest.mark.parametrize("name", ["falcon_h1", "qwen3_next"])
def test_what_cannot_go_back_is_not_told_to_take_spare_slots(name: str):
    """A recurrent layer, and a group of a recurrent layer and a ring."""
    model = model_of(name)
    attach(model, PLAIN)
    with pytest.raises(CacheError, match=r"cannot take tokens back, .*: layer 0 has a \w+$"):
        check_caches(make_cache(model), 3, "draft model")


@pytest.mark.parametrize("name", GROUPS[:3])
def test_a_group_goes_back_whole_or_not_at_all(name: str):
    model = with_spare_slots(name)
    loop = loop_of(model, tokens_of(model, 40))
    group = loop.caches[0]
    assert isinstance(group, CacheGroup)
    before = [part.ring for part in group.caches]
    with pytest.raises(CacheError, match=f"cannot take back {R + 1} tokens, only {R}"):
        group.trim(R + 1)
    group.caches[1].trim(1)
    with pytest.raises(CacheError, match=f"only {R - 1}"):
        group.trim(R)
    assert group.caches[0].ring == before[0]
    assert group.spare == R - 1
