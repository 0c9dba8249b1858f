"""What docs/limits.md says of mlx-lm's own bounded cache is what mlx-lm does."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache
from tiny import VOCABULARY, build

S, CAPACITY = 4, 12
TOKENS = [(7 * i + 3) % VOCABULARY for i in range(40)]


def rotating(model: nn.Module) -> list[Any]:
    return [RotatingKVCache(max_size=CAPACITY, keep=S) for _ in model.layers]


def last(model: nn.Module, caches: list[Any], tokens: list[int], chunk: int) -> mx.array:
    """Return the logits of the last token of a text that is read in chunks."""
    for i in range(0, len(tokens), chunk):
        logits = model(mx.array([tokens[i : i + chunk]]), cache=caches)
    return logits[0, -1]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build("llama", 2)


def test_llama_ignores_max_kv_size(model: nn.Module):
    """It has a ``make_cache`` of its own, which is not told of it."""
    assert {type(cache) for cache in make_prompt_cache(model, max_kv_size=CAPACITY)} == {KVCache}


def test_sinks_are_hidden_from_all_but_the_first_tokens_of_a_chunk():
    """Another first token changes what the last one says only if it is read token by token."""
    others = [(token + 1) % VOCABULARY for token in TOKENS[:1]] + TOKENS[1:]
    one_layer = build("llama")
    changes = [
        mx.abs(
            last(one_layer, rotating(one_layer), TOKENS, chunk)
            - last(one_layer, rotating(one_layer), others, chunk)
        ).max()
        for chunk in (1, 20)
    ]
    assert changes[0] > 1e-3
    assert changes[1] == 0


def test_the_result_depends_on_the_chunk_size(model: nn.Module):
    by_one, by_ten = (last(model, rotating(model), TOKENS, chunk) for chunk in (1, 10))
    assert mx.abs(by_one - by_ten).max() > 1e-2


def test_positions_grow_and_a_chunk_is_kept_beside_the_cache(model: nn.Module):
    caches = rotating(model)
    last(model, caches, TOKENS, 20)
    assert caches[0].offset == len(TOKENS)
    assert caches[0].keys.shape[2] == CAPACITY + 20 - 1
