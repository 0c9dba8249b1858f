"""Arguments of the Python API that are slightly wrong raise, and name what would work."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_sink import InputError, SinkConfig, Stream, load

WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "a string for stop strings": ("generate", {"stop": "END"}, r"use \['END'\]"),
    "numbers for stop strings": ("generate", {"stop": [1]}, "stop must be a list of strings"),
    "a function for several": ("generate", {"logits_processors": len}, "list of functions"),
    "half a token": ("generate", {"max_tokens": 1.5}, "max_tokens must be an integer"),
    "yes for a number": ("generate", {"max_tokens": True}, "max_tokens must be an integer"),
    "no token": ("generate", {"max_tokens": 0}, "at least 1, or -1 for no limit, got 0"),
    "a step of no size": ("feed", {"text": "x", "prefill_step_size": 0}, "at least 1, got 0"),
    "half a step": ("feed", {"text": "x", "prefill_step_size": 0.5}, "must be an integer"),
    "half a rollback": ("rollback", {"n": 0.5}, "n must be an integer"),
}


@pytest.fixture(scope="module")
def stream() -> Stream:
    stream = Stream(*load("demo", SinkConfig(4, 28)))
    stream.feed("Once upon a time")
    return stream


@pytest.mark.parametrize("what", WRONG)
def test_refused(what: str, stream: Stream):
    method, arguments, words = WRONG[what]
    before = stream.position
    with pytest.raises(InputError, match=words):
        getattr(stream, method)(**arguments)
    assert stream.position == before
    assert next(iter(stream.fork().generate(1, stop=["END"]))).generation_tokens == 1


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "1"])
def test_seeds(seed: Any, stream: Stream):
    with pytest.raises(InputError, match="seed must be"):
        Stream(stream.model, stream.tokenizer, seed=seed)
