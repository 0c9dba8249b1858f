"""Which cache each layer gets, from the cache that mlx-lm would give it.

A layer with full attention gets the sink ring; one with a sliding window or with chunked attention
a ring of that length, without sinks, at positions that stay as small; what is recurrent or
convolutional keeps mlx-lm's cache, which does not grow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import Enum
from types import FrameType
from typing import Any, cast

import mlx.nn as nn
from mlx_lm.models import cache as mlx_lm_cache

from mlx_sink.cache.group import CacheGroup
from mlx_sink.cache.sink_cache import SinkCache
from mlx_sink.config import SinkConfig
from mlx_sink.errors import UnsupportedModelError


class Kind(Enum):
    """What the tokens of a layer attend to, by the cache that mlx-lm would give it."""

    FULL = "full"
    """Everything: the layer gets the sinks."""
    WINDOW = "window"
    """A sliding window of the model's own."""
    CHUNK = "chunk"
    """Their own chunk of tokens (chunked attention)."""


Make = Callable[[SinkConfig, Kind], SinkCache]
"""Makes the next ring of a model, from what it is to keep."""


def native_caches(model: nn.Module) -> list[Any]:
    """Return the caches that mlx-lm itself gives a model.

    Raises:
        UnsupportedModelError: It says neither its caches nor its layers.
    """
    make = getattr(type(model), "make_cache", None)
    if make is not None:
        return list(make(model))
    layers: Sequence[Any] | None = getattr(model, "layers", None)
    if layers is None:
        raise UnsupportedModelError("it has no layers")
    return [mlx_lm_cache.KVCache() for _ in layers]


def size_asked_for(call: FrameType | None) -> int | None:
    """Return the ``max_kv_size`` that mlx-lm was given when it asks a model for its caches.

    ``make_prompt_cache`` does not hand it on to a model that makes its own, and says nothing.

    Args:
        call: Of the model's ``make_cache``.
    """
    caller = call and call.f_back
    if caller is None or caller.f_code is not mlx_lm_cache.make_prompt_cache.__code__:
        return None
    return caller.f_locals.get("max_kv_size")


def bounded_caches(native: Sequence[Any], config: SinkConfig, make: Make) -> list[Any]:
    """Put ours in the place of the caches that would grow.

    Args:
        native: What mlx-lm gives the model.
        config: What to keep in layers with full attention.
        make: Called for each ring, in order, with what it is to keep and the layer's kind.

    Raises:
        UnsupportedModelError: A cache is of a kind that is not known.
    """

    def bounded(cache: Any, where: str) -> Any:
        # Exactly these: a class that is derived from one of them may keep something else.
        kind = cast("type[Any]", type(cache))
        if kind is mlx_lm_cache.KVCache:
            return make(config, Kind.FULL)
        if kind is mlx_lm_cache.RotatingKVCache and not cache.keep:
            return make(window_config(config, _size(cache.max_size, where)), Kind.WINDOW)
        if kind is mlx_lm_cache.ChunkedKVCache:
            return make(window_config(config, _size(cache.chunk_size, where)), Kind.CHUNK)
        if kind is mlx_lm_cache.ArraysCache:
            return cache
        if kind is mlx_lm_cache.CacheList:
            return CacheGroup(*(bounded(part, where) for part in cache.caches))
        raise UnsupportedModelError(f"{where} wants a {kind.__name__}, which is not known")

    return [bounded(cache, f"layer {i}") for i, cache in enumerate(native)]


def _size(value: object, where: str) -> int:
    """Return the size of a cache, which is whatever config.json says."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedModelError(
            f"{where} has a window of {value!r}, which is no number of tokens"
        )
    return value


def window_config(config: SinkConfig, window: int) -> SinkConfig:
    """Return what a layer with a sliding window of its own keeps, in the same epochs.

    Epochs are the model's: some compute one position for all layers. Nothing is looked up: what
    leaves such a window the model was not trained to see.
    """
    return replace(config, num_sinks=0, window=window, recall=0)


def common_epoch(native: Sequence[Any], config: SinkConfig, limit: int | None) -> SinkConfig:
    """Return the configuration with an epoch that is long enough for every ring of the model.

    Args:
        native: What mlx-lm gives the model.
        config: What to keep.
        limit: Positions from which on the model would compute something else, or ``None``.

    Raises:
        UnsupportedModelError: The rings do not fit below ``limit``.
    """
    slots: list[int] = [config.slots]

    def note(ring: SinkConfig, kind: Kind) -> Any:
        slots.append(ring.slots)

    unbounded = replace(config, epoch=None)
    bounded_caches(native, replace(unbounded, epoch=1 << 40), note)
    epoch = max(config.epoch_length, *slots)
    if limit is not None:
        epoch = max(*slots, min(epoch, limit // 2))
        if epoch >= limit:
            raise UnsupportedModelError(
                f"its attention changes with the position from token {limit} on: "
                f"num_sinks + window must be less, not {config.capacity}"
            )
    return replace(config, epoch=epoch)
