"""Streams over models whose layers have caches of several kinds: copied, saved, gone on with."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from every import tiny

from mlx_sink import SessionError, SinkConfig, attach
from mlx_sink.io import tensors as store
from mlx_sink.stream import session
from mlx_sink.stream.loop import Loop, Sampling

KINDS = {
    "deepseek_v3": "latent keys",
    "falcon_h1": "a state and a ring in one layer",
    "gemma3n": "layers that lend their keys",
    "gemma3_text": "windows of the model's own",
    "gpt_oss": "learned sinks",
    "llama4": "chunked attention",
    "longcat_flash": "two rings in one layer",
    "nemotron-nas": "a layer without keys",
    "qwen3_next": "recurrent layers",
}
WHOSE = {"model": "a", "tokenizer": "b"}

each_kind = pytest.mark.parametrize("name", KINDS, ids=[f"{n}: {k}" for n, k in KINDS.items()])


def loop_over(name: str) -> tuple[nn.Module, Loop]:
    model = tiny(name)
    attach(model, SinkConfig(3, 10, epoch=17))
    return model, Loop(model, model.make_cache(), key=mx.random.key(0))


def read(loop: Loop, n: int, seed: int) -> None:
    loop.read(np.random.default_rng(seed).integers(0, 60, n).tolist(), 7)


def write(loop: Loop, n: int) -> list[int]:
    tokens = loop.tokens(Sampling())
    return [next(tokens)[0] for _ in range(n)]


@each_kind
def test_a_fork_goes_its_own_way(name: str):
    """Neither may write into what the other one holds."""
    _, loop = loop_over(name)
    read(loop, 40, 0)
    fork, other = loop.fork(), loop.fork()
    read(other, 30, 1)
    expected = write(loop, 20)
    assert write(fork, 20) == expected


@each_kind
def test_a_saved_stream_goes_on(name: str, tmp_path: Path):
    model, loop = loop_over(name)
    read(loop, 40, 0)
    session.save(tmp_path / "s", loop, None, WHOSE, {})
    expected = write(loop, 20)
    restored = session.resume(session.read(tmp_path / "s"), model, WHOSE)
    assert restored.position == 40
    assert write(restored, 20) == expected


def test_a_session_of_other_caches_is_refused(tmp_path: Path):
    _, loop = loop_over("gemma3_text")
    read(loop, 20, 0)
    session.save(tmp_path / "s", loop, None, WHOSE, {})
    model, _ = loop_over("qwen3_next")
    with pytest.raises(SessionError, match="does not fit the model"):
        session.resume(session.read(tmp_path / "s"), model, WHOSE)


@each_kind
def test_arrays_of_other_shapes_are_refused_or_go_on(name: str, tmp_path: Path):
    """Twice as long along each axis: only a ring may have more rows than it uses."""
    model, loop = loop_over(name)
    read(loop, 20, 0)
    good, bad, refused = tmp_path / "good", tmp_path / "bad", 0
    session.save(good, loop, None, WHOSE, {})
    held, arrays = store.read(good)
    cases = [(key, axis) for key, array in arrays.items() for axis in range(array.ndim)]
    for key, axis in cases:
        store.write(bad, held, arrays | {key: mx.repeat(arrays[key], 2, axis=axis)})
        try:
            restored = session.resume(session.read(bad), model, WHOSE)
        except SessionError:
            refused += 1
        else:
            write(restored, 2)
            read(restored, 20, 1)
    assert refused > 0.6 * len(cases)
