"""The hook: attention over our caches is ours, in the modules that define a model's attention.

mlx-lm's model files import ``scaled_dot_product_attention`` by name, so the name is replaced in
each of them. For caches that are not ours the original is called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mlx_sink.attention.dispatch import sink_attention
from mlx_sink.cache.kv_sharing import lender_of
from mlx_sink.cache.sink_cache import SinkCache
from mlx_sink.models.architectures import adapt

HOOKED = "scaled_dot_product_attention"
MARK = "_hooked_by_mlx_sink"


def hook(model: nn.Module) -> None:
    """Hook every module of Python that defines a part of the model and imports the function."""
    for names in namespaces(model):
        adapt(names)
        if HOOKED in names:
            _hook(names)


def namespaces(model: nn.Module) -> list[dict[str, Any]]:
    """Return what is global where a model, its parts and what they are derived from are defined.

    Read from their functions: the module of a model file that comes with the weights has no
    name by which Python would know it.
    """
    namespaces: dict[int, dict[str, Any]] = {}
    for kind in {type(part) for part in cast("list[nn.Module]", model.modules())}:
        for base in kind.__mro__:
            for value in vars(base).values():
                if isinstance(value, FunctionType):
                    namespaces[id(value.__globals__)] = value.__globals__
    return list(namespaces.values())


def owner_of(keys: mx.array, cache: object) -> SinkCache | None:
    """Return the cache that handed out keys, in the first place the one that is named.

    ``None`` if none of ours did and none of ours is named.
    """
    named = cache if isinstance(cache, SinkCache) else None
    if named is not None and named.handed_out(keys):
        return named
    lender = lender_of(keys)
    return lender if isinstance(lender, SinkCache) else named


def _hook(names: dict[str, Any]) -> None:
    original: Callable[..., mx.array] = names[HOOKED]
    if getattr(original, MARK, False):
        return

    @functools.wraps(original)
    def hooked(
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: Any = None,
        scale: float = 1.0,
        mask: mx.array | str | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        owner = owner_of(keys, cache)
        if owner is None or owner.leaves_to_model(keys, mask):
            return original(
                queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks
            )
        layout, packed, archived = owner.take(keys, mask)
        return sink_attention(
            queries,
            keys,
            values,
            layout=layout,
            packed=packed,
            archived=archived,
            rotation=owner.rotation,
            scale=scale,
            learned_sinks=sinks,
        )

    setattr(hooked, MARK, True)
    names[HOOKED] = hooked
