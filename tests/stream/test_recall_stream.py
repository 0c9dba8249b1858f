"""Recall through a stream: questions and answers look up, what is read does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from tiny import TOLERANCE, build, random_tokens

import mlx_sink
from mlx_sink import SessionError, SinkConfig, Stream, attach
from mlx_sink.cache.group import leaves

CONFIG = SinkConfig(3, 20, recall=32, recall_block=16, recall_bits=None, rollback=6, epoch=80)
READ, ASKED = random_tokens(150, seed=1)[0].tolist(), random_tokens(12, seed=2)[0].tolist()


TOKENIZER: Any = mlx_sink.load("demo")[1]


@pytest.fixture
def model() -> nn.Module:
    model = build("llama", layers=2, seed=3)
    attach(model, CONFIG)
    return model


def logits_of(stream: Stream) -> np.ndarray:
    logits = stream._loop.logits
    assert logits is not None
    return np.array(logits)


def by_hand(model: nn.Module, flags: list[bool], tokens: list[int]) -> np.ndarray:
    """Feed tokens one by one, each with its own flag, and return the last logits."""
    caches = model.make_cache()
    logits = mx.zeros(0)
    for token, flag in zip(tokens, flags, strict=True):
        for cache in leaves(caches):
            cache.recalls = flag
        logits = model(mx.array([[token]]), cache=caches)[:, -1]
        mx.eval(logits, [cache.state for cache in caches])
    return np.array(logits)


def close(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return bool(np.abs(ours - theirs).max() <= TOLERANCE)


def test_questions_look_up_and_what_is_read_does_not(model: nn.Module):
    tokens = [*READ, *ASKED]
    stream = Stream(model, TOKENIZER)
    stream.feed(READ, prefill_step_size=40)
    stream.feed(ASKED, recall=True)
    reading = [False] * len(READ)
    assert close(logits_of(stream), by_hand(model, reading + [True] * len(ASKED), tokens))
    stream = Stream(model, TOKENIZER)
    stream.feed(tokens)
    assert close(logits_of(stream), by_hand(model, [False] * len(tokens), tokens))
    assert not close(logits_of(stream), by_hand(model, [True] * len(tokens), tokens))


def test_always(model: nn.Module):
    attach(model, replace(CONFIG, recall_mode="always"))
    stream = Stream(model, TOKENIZER)
    stream.feed(READ, prefill_step_size=33)
    assert close(logits_of(stream), by_hand(model, [True] * len(READ), READ))


def test_what_is_made_looks_up(model: nn.Module):
    stream = Stream(model, TOKENIZER)
    stream.feed(READ)
    made = [response.token for response in stream.generate(20, ignore_eos=True)]
    flags = [False] * len(READ) + [True] * 20
    assert close(logits_of(stream), by_hand(model, flags, [*READ, *made]))


@pytest.mark.parametrize("n", [1, 4, 6])
@pytest.mark.parametrize("asked", [2, 12])
def test_rollback_knows_who_looked_up(model: nn.Module, n: int, asked: int):
    """The token that is newest then is read again, as what it was: read, or asked."""
    stream = Stream(model, TOKENIZER)
    stream.feed(READ)
    stream.feed(ASKED[:asked], recall=True)
    stream.rollback(n)
    left = [*READ, *ASKED[:asked]][:-n]
    flags = [i >= len(READ) for i in range(len(left))]
    assert close(logits_of(stream), by_hand(model, flags, left))
    other = by_hand(
        model, [not flags[-1] if i == len(left) - 1 else f for i, f in enumerate(flags)], left
    )
    assert not close(logits_of(stream), other)


def test_saved_and_forked(model: nn.Module, tmp_path: Path):
    """A copy and a resumed stream go on as the stream itself, and take back as it would."""
    stream = Stream(model, TOKENIZER, seed=4)
    stream.feed(READ)
    stream.feed(ASKED, recall=True)
    stream.save(tmp_path / "s")
    others = [stream.fork(), Stream.resume(tmp_path / "s", model, TOKENIZER)]
    expected = continued(stream)
    for other in others:
        assert continued(other) == expected


def continued(stream: Stream) -> tuple[Any, ...]:
    stream.rollback(5)
    made = [response.token for response in stream.generate(40, ignore_eos=True)]
    return made, logits_of(stream).tolist(), stream.archived


@pytest.mark.parametrize(
    "options",
    [{"recall": 48}, {"recall_block": 32}, {"recall_layers": (1,)}, {"recall_memory": 10**6}],
    ids=str,
)
def test_a_session_of_other_settings(model: nn.Module, tmp_path: Path, options: dict[str, Any]):
    stream = Stream(model, TOKENIZER)
    stream.feed(READ)
    stream.save(tmp_path / "s")
    attach(model, replace(CONFIG, window=40, **options))
    with pytest.raises(SessionError, match="was made with"):
        Stream.resume(tmp_path / "s", model, TOKENIZER)


def test_what_can_be_looked_up(model: nn.Module):
    """By the index in the stream; and what is forgotten for good."""
    stream = Stream(model, TOKENIZER)
    assert stream.archived is not None
    assert (len(stream.archived.tokens), stream.archived.nbytes) == (0, 0)
    stream.feed(READ)
    assert stream.archived.tokens == range(3, 3 + 16 * 7)
    one = stream.caches[0].archive.bytes_per_block
    attach(model, replace(CONFIG, recall_memory=2 * one * 5))
    stream = Stream(model, TOKENIZER)
    stream.feed(READ)
    assert stream.archived is not None
    assert stream.archived.tokens == range(3 + 16 * 4, 3 + 16 * 7)
    assert stream.archived.nbytes == 2 * one * 5
    attach(model, replace(CONFIG, recall=0))
    assert Stream(model, TOKENIZER).archived is None


@pytest.mark.parametrize("ahead", [1, 3])
def test_a_draft_changes_no_text(model: nn.Module, ahead: int):
    """What is guessed, read at once and partly taken back looks up as what is made one by one."""
    draft = build("llama", layers=1, seed=9)
    attach(draft, SinkConfig(3, 20, rollback=6, epoch=80))
    texts: list[list[int]] = []
    for options in ({}, {"draft_model": draft, "num_draft_tokens": ahead}):
        stream = Stream(model, TOKENIZER, seed=1, **options)
        stream.feed(READ)
        texts.append([response.token for response in stream.generate(120, ignore_eos=True)])
    assert texts[0] == texts[1]
