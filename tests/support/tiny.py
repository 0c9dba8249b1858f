"""What the tests share: tiny random models of every family, streams, and the contract in numpy.

The models are random, but their attention is sharp (`_sharpen`), so that one key too many or a
distance that is off by one moves the logits by far more than the tolerances.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, repeat
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache
from mlx_lm.utils import _get_classes

from mlx_sink import SinkConfig, attach
from mlx_sink.cache.sink_cache import SinkCache

TOLERANCE = 1e-4
"""Largest error in float32 logits, as in the contract; on a CPU a tenth of it is seen."""

VOCABULARY = 61

COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.2],
    "long_factor": [1.0, 2.0, 4.0],
}

FAMILIES: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 16, "num_key_value_heads": 1},
    "granite": {
        "max_position_embeddings": 512,
        "logits_scaling": 2.0,
        "attention_multiplier": 0.4,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "attention_bias": True,
        "mlp_bias": False,
    },
    "llama": {"max_position_embeddings": 512},
    "llama, head_dim of its own": {"head_dim": 20, "attention_bias": True},
    "llama, interleaved": {"rope_traditional": True},
    "llama, linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "llama, llama3": {"rope_scaling": LLAMA3},
    "llama, multi-head": {"num_key_value_heads": 4},
    "llama, multi-query": {"num_key_value_heads": 1},
    "llama, yarn": {"rope_scaling": YARN},
    "llama, yarn interleaved": {"rope_scaling": YARN, "rope_traditional": True},
    "mistral": {"sliding_window": 4096},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo2": {},
    "phi3": {},
    "phi3, partial longrope": {
        "partial_rotary_factor": 0.75,
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 64,
        "rope_scaling": LONGROPE,
    },
    "qwen2": {},
    "qwen3": {"head_dim": 16, "max_position_embeddings": 512},
    "qwen3, yarn": {"head_dim": 16, "max_position_embeddings": 512, "rope_scaling": YARN},
    "smollm3": {"no_rope_layer_interval": 2},
    "smollm3, no positions": {"no_rope_layer_interval": 1},
    "stablelm": {"partial_rotary_factor": 0.25, "use_qkv_bias": True},
    "stablelm, per-head norm": {
        "partial_rotary_factor": 0.5,
        "use_qkv_bias": False,
        "use_parallel_residual": True,
        "qk_layernorm": True,
    },
    "starcoder2": {},
}
"""Dense architectures with full attention in every layer, and the options that change it.

The part before the comma is the configuration's ``model_type``.
"""


def build(family: str, layers: int = 1, seed: int = 0, **options: Any) -> nn.Module:
    """Make a random model as mlx-lm's loader would; ``options`` go into its configuration."""
    name = family.partition(",")[0]
    settings = {"num_hidden_layers": layers, **FAMILIES.get(family, {}), **options}
    model_class, args_class = _get_classes({"model_type": name})
    args = args_class.from_dict({"model_type": name, **COMMON, **settings})
    mx.random.seed(seed)
    model = model_class(args)
    _sharpen(model)
    mx.eval(model.parameters())
    return model


def _sharpen(model: nn.Module) -> None:
    """Make the attention pick: random projections alone would spread it evenly."""
    for layer in getattr(model, "layers", []):
        if "self_attn" in layer:
            layer.self_attn.apply(lambda weight: 2.5 * weight if weight.ndim == 2 else weight)


def random_tokens(n: int, seed: int = 0, batch: int = 1) -> np.ndarray:
    """Return random tokens, ``[batch, n]``."""
    return np.random.default_rng(seed).integers(0, VOCABULARY, (batch, n))


def cut(n: int, lengths: Iterable[int]) -> Iterator[slice]:
    """Cut ``range(n)`` into slices of the given lengths, and what they leave into one."""
    first = 0
    for length in chain(lengths, [n]):
        if first >= n:
            return
        yield slice(first, min(first + length, n))
        first += length


def every(length: int) -> Iterator[int]:
    """Return cuts of one length for ever."""
    return repeat(length)


def mixed(*lengths: int, seed: int = 0, most: int = 24) -> Iterator[int]:
    """Return the given cuts, then random ones, half of them decode steps."""
    random = np.random.default_rng(seed)
    return chain(
        lengths, (1 if random.random() < 0.5 else int(random.integers(2, most)) for _ in repeat(0))
    )


def run(
    model: nn.Module,
    tokens: np.ndarray,
    caches: Sequence[Any],
    lengths: Iterable[int] = (),
) -> np.ndarray:
    """Feed tokens ``[B, n]`` in pieces and return all logits, ``[B, n, vocabulary]`` float32."""
    n = tokens.shape[1]
    pieces: list[mx.array] = []
    for piece in cut(n, lengths):
        logits = model(mx.array(tokens[:, piece]), cache=caches)
        mx.eval(logits, [cache.keys for cache in caches])
        pieces.append(logits.astype(mx.float32))
    return np.array(mx.concatenate(pieces, axis=1))


def stream(
    model: nn.Module,
    config: SinkConfig,
    tokens: np.ndarray,
    lengths: Iterable[int] = (),
) -> np.ndarray:
    """Attach, make a new cache, and `run`."""
    attach(model, config)
    return run(model, tokens, model.make_cache(), lengths)


def plain(model: nn.Module, tokens: np.ndarray, lengths: Iterable[int] = ()) -> np.ndarray:
    """`run` with mlx-lm's own unbounded cache: full attention."""
    return run(model, tokens, [KVCache() for _ in model.layers], lengths)


def visible(t: int, S: int, W: int) -> list[int]:
    """Return which tokens token t attends to, in order: the contract, word for word."""
    return sorted({i for i in range(S) if i <= t} | {a for a in range(t - W + 1, t + 1) if a >= 0})


def distance(t: int, a: int, S: int, W: int) -> int:
    """Return how far token ``a`` is from token t for RoPE: the contract, word for word."""
    return min(t, S + W - 1) - a if a < S else t - a


def recompute(model: nn.Module, tokens: np.ndarray, config: SinkConfig) -> np.ndarray:
    """Return the oracle's logits, ``[1, n, vocabulary]``: independent of mlx_sink.

    Token t's come from the model without any cache, fed only the tokens that t sees, from
    position 0. In a model with one attention layer this is what a stream must give.
    """
    S, W, n = config.num_sinks, config.window, tokens.shape[1]
    full = min(config.capacity, n)
    rows = [np.array(model(mx.array(tokens[:, :full])).astype(mx.float32))]
    if n > full:
        contexts = tokens[0][np.array([visible(t, S, W) for t in range(full, n)])]
        rows.append(np.array(model(mx.array(contexts))[:, -1].astype(mx.float32))[None])
    return np.concatenate(rows, axis=1)


def moved(cache: SinkCache, tokens: int, start: int | None = None) -> None:
    """Move a cache's stream by a number of tokens, and its epochs by as many unless stated."""
    ring, epochs = cache.ring, tokens if start is None else start
    cache.ring = replace(
        ring,
        tokens=ring.tokens + tokens,
        start=ring.start + epochs,
        previous=ring.previous + epochs,
    )
