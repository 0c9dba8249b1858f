"""The ways to keep a stream's context that are compared."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import KVCache, RotatingKVCache

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
"""The arms, by the names that options and results use."""

QUANTISED = {"bits8": 8, "bits4": 4}
"""Bits of the arms that quantise keys and values."""

USUAL = [name for name in NAMES if name != "bits4"]
"""What is compared unless stated."""

SAMPLED = "recompute"
"""The arm that has no caches: each of its tokens costs a whole window."""


def full_caches(model: nn.Module) -> list[Any]:
    """Return mlx-lm's own growing caches."""
    return copy.deepcopy(native_caches(model))


def rotating_caches(model: nn.Module, capacity: int, keep: int) -> list[Any]:
    """Return mlx-lm's caches, bounded by its own means where they would grow."""
    return [
        RotatingKVCache(max_size=capacity, keep=keep) if type(cache) is KVCache else cache
        for cache in full_caches(model)
    ]


def config_of(arm: str, config: SinkConfig) -> SinkConfig:
    """Return what an arm of ours keeps; all keep as many tokens."""
    if arm == "window":
        return replace(config, num_sinks=0, window=config.capacity)
    return replace(config, kv_bits=QUANTISED.get(arm))


def caches_of(arm: str, model: nn.Module, config: SinkConfig) -> list[Any]:
    """Return empty caches for one stream of an arm.

    Raises:
        UnsupportedModelError: The model cannot have them.
    """
    if arm == "full":
        return full_caches(model)
    if arm == "rotating":
        return rotating_caches(model, config.capacity, config.num_sinks)
    attach(model, config_of(arm, config))
    return make_cache(model)


def chunk_of(arm: str, chunk: int) -> int:
    """Return how many tokens an arm reads at once.

    mlx-lm's mask hides the sinks of a `RotatingKVCache` from all but the first tokens of a chunk,
    so it is fed token by token, as in decoding.
    """
    return 1 if arm == "rotating" else chunk


def nbytes(caches: Sequence[Any]) -> int:
    """Return the bytes of caches."""
    return sum(int(part.nbytes) for c in caches for part in getattr(c, "caches", [c]))
