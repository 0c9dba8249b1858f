"""How many tokens a model can read, whatever its configuration and its head say."""

from __future__ import annotations

import threading
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from every import tiny
from mlx_lm.tuner.lora import LoRAEmbedding
from tiny import VOCABULARY, build

from mlx_sink import SinkConfig, attach
from mlx_sink.models.vocabulary import vocabulary

KINDS = [
    "llama",
    "gemma3n",
    "gpt_oss",
    "jamba",
    "llama4",
    "longcat_flash_ngram",
    "mamba2",
    "nemotron-nas",
    "phi",
    "prism_hadamard_qwen35",
    "qwen3_vl",
    "rwkv7",
]


@pytest.mark.parametrize("name", KINDS)
def test_the_rows_of_the_embedding(name: str):
    """For dense, sparse, recurrent, packed and multimodal models: no name is looked up."""
    model = tiny(name)
    make = getattr(model, "make_cache", None)
    cache = None if make is None else make()
    assert vocabulary(model) == model(mx.zeros((1, 1), mx.int32), cache=cache).shape[-1]


class Padded(nn.Module):
    """A model whose head is wider or narrower than its embedding."""

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.scale = nn.Linear(8, 32)
        self.head = nn.Linear(32, width)
        self.table = nn.Embedding(rows, 32)

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        scale = self.scale(mx.zeros((1, 1, 8)))
        return self.head(scale * self.table(tokens))


@pytest.mark.parametrize(("rows", "width"), [(40, 64), (64, 40), (40, 40)])
def test_not_the_width_of_the_logits(rows: int, width: int):
    assert vocabulary(Padded(rows, width)) == rows


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_embeddings(bits: int):
    """Their rows are as many; what is in a row is packed."""
    model = build("llama", hidden_size=64, intermediate_size=64, vocab_size=96)
    nn.quantize(model, group_size=32, bits=bits)
    assert isinstance(model.model.embed_tokens, nn.QuantizedEmbedding)
    assert vocabulary(model) == 96


def test_adapted_embeddings():
    model = build("llama")
    model.model.embed_tokens = LoRAEmbedding.from_base(model.model.embed_tokens)
    assert vocabulary(model) == VOCABULARY


def test_a_model_that_looks_tokens_up_in_another_way():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = mx.zeros((17, 23))

        def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
            return self.rows[tokens]

    assert vocabulary(Own()) == 23


def test_nothing_is_left_behind():
    """No class stays changed, attached or not, and other threads run on meanwhile."""
    model = build("llama", layers=2)
    calls = (nn.Embedding.__call__, nn.Linear.__call__)
    attach(model, SinkConfig(2, 8))
    before = mx.array(model(mx.array([[1, 2, 3]]), cache=model.make_cache()))
    failures: list[Exception] = []

    def run() -> None:
        try:
            with mx.stream(mx.new_stream(mx.cpu)):
                for _ in range(20):
                    mx.eval(model(mx.array([[1, 2, 3]]), cache=model.make_cache()))
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while thread.is_alive():
        assert vocabulary(model) == VOCABULARY
    thread.join()
    assert not failures
    assert (nn.Embedding.__call__, nn.Linear.__call__) == calls
    assert mx.array_equal(model(mx.array([[1, 2, 3]]), cache=model.make_cache()), before)
