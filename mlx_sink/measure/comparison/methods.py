"""The methods that are compared: ways to keep a stream's context."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import CacheList, KVCache, RotatingKVCache

from mlx_sink.config import SinkConfig
from mlx_sink.models.attach import attach, make_cache
from mlx_sink.models.layers import native_caches

NAMES = {
    "full": "full attention",
    "window": "window, no sinks",
    "recompute": "recompute (sampled)",
    "rotating": "mlx-lm RotatingKVCache",
    "ours": "mlx_sink",
    "bits8": "mlx_sink, 8 bits",
    "bits4": "mlx_sink, 4 bits",
}
"""What each method is called for people, by its name in options and results."""

QUANTISED = {"bits8": 8, "bits4": 4}
"""Bits of the methods that quantise keys and values."""

USUAL = [name for name in NAMES if name != "bits4"]
"""The methods that are compared unless others are named."""

SAMPLED = "recompute"
"""The method without caches: each of its tokens costs a whole window, so it reads only samples."""


def full_caches(model: nn.Module) -> list[Any]:
    """Return mlx-lm's own growing caches."""
    return copy.deepcopy(native_caches(model))


def rotating_caches(model: nn.Module, capacity: int, keep: int) -> list[Any]:
    """Return mlx-lm's caches, a `RotatingKVCache` in the place of each that would grow."""

    def bounded(cache: Any) -> Any:
        if type(cache) is KVCache:
            return RotatingKVCache(max_size=capacity, keep=keep)
        if type(cache) is CacheList:
            return CacheList(*map(bounded, cache.caches))
        return cache

    return [bounded(cache) for cache in full_caches(model)]


def config_of(method: str, config: SinkConfig) -> SinkConfig:
    """Return the settings of a method of mlx_sink; all of them keep as many tokens."""
    if method == "window":
        return replace(config, num_sinks=0, window=config.capacity)
    return replace(config, kv_bits=QUANTISED.get(method))


def caches_of(method: str, model: nn.Module, config: SinkConfig) -> list[Any]:
    """Return a method's empty caches for one stream.

    Raises:
        UnsupportedModelError: The model cannot have them.
    """
    if method == "full":
        return full_caches(model)
    if method == "rotating":
        return rotating_caches(model, config.capacity, config.num_sinks)
    attach(model, config_of(method, config))
    return make_cache(model)


def chunk_of(method: str, chunk: int) -> int:
    """Return how many tokens a method reads at once.

    mlx-lm's mask hides the sinks of a `RotatingKVCache` from all but the first tokens of a chunk,
    so it is fed token by token, as in decoding.
    """
    return 1 if method == "rotating" else chunk


def nbytes(caches: Sequence[Any]) -> int:
    """Return the bytes that caches hold."""
    return sum(int(cache.nbytes) for cache in caches)
