"""Check a model that mlx_sink does not know against the contract.

A few dozen random tokens go through the model under a very small configuration, with its own
weights: what it computes must be mlx-lm's result until the first eviction, and must not depend on
how the tokens are cut into calls or on how many came before. Calls that are cut elsewhere begin
their epochs elsewhere, so what looks at absolute positions in any way shows; what changes at large
ones only shows when the tokens begin there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_sink.cache.group import leaves
from mlx_sink.cache.sink_cache import SinkCache
from mlx_sink.config import SinkConfig
from mlx_sink.errors import SinkError, UnsupportedModelError, one_line
from mlx_sink.models.cache_plan import CachePlan
from mlx_sink.models.layers import native_caches
from mlx_sink.models.trace import forward
from mlx_sink.models.vocabulary import vocabulary

CONFIG = SinkConfig(2, 6, epoch=11)
TOKENS = 40
TOLERANCE = {mx.float32: 1e-3}
HALF = 0.1
"""Largest difference in units of the logits' spread, in float32 and in the short dtypes."""
FAR = 1e-2
"""The same at large positions, where float32 angles have fewer digits."""

_evaluate: Callable[..., None] = cast("Any", mx).eval


def verify(model: nn.Module, plan: CachePlan) -> None:
    """Run the checks.

    Args:
        model: The model.
        plan: Its caches.

    Raises:
        UnsupportedModelError: One of them fails.
    """
    try:
        _verify(model, plan)
    except UnsupportedModelError:
        raise
    except SinkError as error:
        raise UnsupportedModelError(str(error)) from None
    except Exception as error:
        # A model that is not known may fail in any way.
        raise UnsupportedModelError(
            f"it is not known, and a check of the contract fails ({one_line(error)})"
        ) from None


def _verify(model: nn.Module, plan: CachePlan) -> None:
    probe = forward(model, mx.zeros((1, 1), mx.int32), plan.caches(CONFIG))
    tokens = np.random.default_rng(0).integers(0, vocabulary(model), TOKENS)
    tolerance = TOLERANCE.get(probe.dtype, HALF)

    def logits(caches: Sequence[Any], cuts: Iterable[int], n: int = TOKENS) -> np.ndarray:
        done, parts = 0, list[mx.array]()
        for length in cycle(cuts):
            if done >= n:
                break
            piece = mx.array(tokens[done : min(done + length, n)][None])
            parts.append(forward(model, piece, caches))
            _evaluate(parts[-1], [cache.state for cache in caches])
            done += length
        return np.asarray(mx.concatenate(parts, axis=1)[0].astype(mx.float32), np.float32)

    def compare(actual: np.ndarray, expected: np.ndarray, what: str, least: float = 0) -> None:
        difference = float(np.abs(actual - expected).max()) / max(float(expected.std()), 1e-6)
        if not difference <= max(tolerance, least):
            raise UnsupportedModelError(
                f"it is not known, and a check of the contract fails: {what} "
                f"(logits differ by {difference:.2g} of their spread)"
            )

    whole = logits(plan.caches(CONFIG), [TOKENS])
    n = _unevicted(plan.caches(CONFIG))
    compare(whole[:n], logits(native_caches(model), [n], n), "it differs from plain mlx-lm")
    for cuts in ([1], [5, 1, 1, 13], [9, 2]):
        pieces = logits(plan.caches(CONFIG), cuts)
        compare(pieces, whole, f"calls of {cuts} tokens change the result")
    # Without sinks, whose positions are the first: then all of a stream can begin anywhere.
    without_sinks = replace(CONFIG, num_sinks=0)
    near, far = plan.caches(without_sinks), plan.caches(without_sinks)
    for cache in leaves(far):
        if isinstance(cache, SinkCache):
            start = TOKENS - plan.farthest
            cache.ring = replace(cache.ring, epoch=plan.farthest + 1, start=start)
    what = f"at position {plan.farthest} it is another"
    compare(logits(far, [TOKENS]), logits(near, [TOKENS]), what, FAR)


def _unevicted(caches: Sequence[Any]) -> int:
    """Return the tokens up to which no sink ring evicts any: window rings do as mlx-lm's."""
    rings = [cache.ring for cache in leaves(caches) if isinstance(cache, SinkCache)]
    return min([ring.capacity for ring in rings if ring.num_sinks], default=TOKENS)
