"""The contract on real weights: thirty layers, grouped queries, a sink that training grew.

A token costs a tenth of a second on a CPU, so texts are short and windows shorter.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import gguf
import host_metal
import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from decode_case import Case, arrays, error, ring_at, run
from decode_grid import TOLERANCES
from tiny import recompute, visible
from tiny import run as logits_of

from mlx_sink import SinkConfig, Stream, attach
from mlx_sink.attention.kernels import decode as kernel
from mlx_sink.commands.generate.command import main
from mlx_sink.io.gguf import read
from mlx_sink.models.attach import detach
from mlx_sink.models.gguf.source import opened

TEXT = (
    "Once upon a time there was a small harbour town where the fishermen mended their nets in "
    "the evening and told each other stories of the sea, of storms and of far islands."
)
CONFIG = SinkConfig(4, 20, epoch=30)


@pytest.fixture
def tokens(real: tuple[nn.Module, Any]) -> np.ndarray:
    return np.array([real[1].encode(TEXT)])


def short(model: nn.Module, layers: int) -> nn.Module:
    """Return a model of the first layers alone; it shares its weights."""
    cut = copy.copy(model)
    cut.model = copy.copy(model.model)
    cut.model.layers = model.model.layers[:layers]
    cut.args = copy.copy(model.args)
    cut.args.num_hidden_layers = layers
    return cut


def test_weights_are_those_of_the_file(real_file: Path):
    """Bit for bit what the package gguf reads, in the order of Hugging Face."""
    tensors = read(real_file).tensors
    weights = opened(real_file).weights()
    for name, ours, heads in (
        ("token_embd", "model.embed_tokens", 0),
        ("blk.7.ffn_down", "model.layers.7.mlp.down_proj", 0),
        ("blk.29.attn_q", "model.layers.29.self_attn.q_proj", 9),
        ("blk.0.attn_k", "model.layers.0.self_attn.k_proj", 3),
    ):
        tensor = tensors[f"{name}.weight"]
        kind = gguf.GGMLQuantizationType[tensor.kind]
        rows = gguf.quants.dequantize(np.array(tensor.data()), kind)
        if heads:
            rows = rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
        parts = [weights[f"{ours}.{part}"] for part in ("weight", "scales", "biases")]
        bits = 8 if tensor.kind == "Q8_0" else 4
        np.testing.assert_array_equal(
            np.array(mx.dequantize(*parts, group_size=32, bits=bits)), rows
        )


def test_tokens_are_mlx_lms_up_to_the_wrap(real: tuple[nn.Module, Any], tokens: np.ndarray):
    model, tokenizer = real
    detach(model)
    prompt = tokens[0].tolist()
    expected = [
        response.token
        for response in mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=16)
    ]
    attach(model, SinkConfig(4, len(prompt) + 12))
    stream = Stream(model, tokenizer, seed=0)
    stream.feed(prompt)
    assert [r.token for r in stream.generate(16)] == expected


def test_equals_the_recompute_oracle(real: tuple[nn.Module, Any], tokens: np.ndarray):
    """In its first layer alone: plain mlx-lm fed what each token sees."""
    model = short(real[0], 1)
    config = SinkConfig(4, 8, epoch=14)
    expected = recompute(model, tokens, config)
    attach(model, config)
    ours = logits_of(model, tokens, model.make_cache(), [10, 1, 1, 7])
    np.testing.assert_allclose(ours, expected, atol=1e-4 * expected.std(), rtol=0)
    assert len(visible(30, 4, 8)) == 12


def test_cuts_change_nothing(real: tuple[nn.Module, Any], tokens: np.ndarray):
    """All thirty layers, over the wrap and into the second epoch."""
    model = real[0]
    attach(model, CONFIG)
    whole = logits_of(model, tokens, model.make_cache())
    for cuts in ([1] * 12, [9, 1, 1, 13]):
        pieces = logits_of(model, tokens, model.make_cache(), cuts)
        np.testing.assert_allclose(pieces, whole, atol=2e-4 * whole.std(), rtol=0)


def test_saved_forked_and_taken_back(
    real: tuple[nn.Module, Any], tokens: np.ndarray, tmp_path: Path
):
    model, tokenizer = real
    attach(model, SinkConfig(4, 20, rollback=4, epoch=30))
    stream = Stream(model, tokenizer, seed=3)
    stream.feed(tokens[0].tolist())
    stream.save(tmp_path / "s")
    expected = [r.token for r in stream.generate(6, ignore_eos=True)]
    stream.rollback(4)
    assert [r.token for r in stream.generate(4, ignore_eos=True)] == expected[2:]
    resumed = Stream.resume(tmp_path / "s", model, tokenizer)
    assert [r.token for r in resumed.generate(6, ignore_eos=True)] == expected


@pytest.mark.parametrize(("bits", "most"), [(8, 0.05), (4, 0.8)])
def test_a_quantised_ring(real: tuple[nn.Module, Any], tokens: np.ndarray, bits: int, most: float):
    """Its logits stay near those of a plain one, after the wrap too."""
    model = short(real[0], 8)
    attach(model, CONFIG)
    plain = logits_of(model, tokens, model.make_cache())
    attach(model, SinkConfig(4, 20, epoch=30, kv_bits=bits))
    ours = logits_of(model, tokens, model.make_cache(), [11])
    difference = np.sqrt(np.square(ours - plain).mean()) / plain.std()
    assert 0 < difference < most


def test_recall_reaches_what_left_the_window(real: tuple[nn.Module, Any], tokens: np.ndarray):
    """While everything fits, thirty layers give what full attention gives."""
    model = real[0]
    detach(model)
    expected = np.array(model(mx.array(tokens)))
    attach(model, SinkConfig(4, 16, recall=32, recall_block=16, recall_bits=None))
    ours = logits_of(model, tokens, model.make_cache(), [25, 1, 1])
    np.testing.assert_allclose(ours, expected, atol=2e-4 * expected.std(), rtol=0)


@pytest.mark.parametrize("n", [1, 3])
def test_the_kernel_on_its_shape(n: int):
    """Nine heads on three of 64: the decode kernel's text, on the CPU, against float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx.fast, "metal_kernel", host_metal.metal_kernel)
        kernel.forget()
        case = Case((ring_at(4, 92, 271),), mx.float16, 64, n_kv=3, group=3, n=n)
        made = arrays(case)
        assert error(case, made, run(case, made)) <= TOLERANCES[case.dtype]
    kernel.forget()


def test_a_chat_of_twenty_turns(
    real_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Through the command: the stream outgrows its window, and the cache stays as it is."""
    positions: list[int] = []
    for turn in range(20):
        argv = ["--model", str(real_file), "--session", str(tmp_path / "s"), "--json"]
        argv += ["--prompt", f"Say {turn}.", "--max-tokens", "3", "--window", "60"]
        assert main(argv) == 0
        told = capsys.readouterr()
        statistics = json.loads(told.err.splitlines()[-1])
        positions.append(statistics["position"])
        assert told.out.strip()
        assert statistics["cache_bytes"] <= statistics["cache_bytes_full"]
    assert positions == sorted(set(positions))
    assert positions[-1] > 2 * 64
    assert statistics["cache_bytes"] == statistics["cache_bytes_full"]
