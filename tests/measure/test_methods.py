"""The methods that are compared keep what they say, whatever caches a layer has."""

from __future__ import annotations

import mlx.core as mx
import pytest
from every import tiny

from mlx_sink.measure.comparison.methods import full_caches, nbytes, rotating_caches


@pytest.mark.parametrize("name", ["llama", "falcon_h1", "longcat_flash", "deepseek_v32"])
def test_a_rotating_cache_is_bounded_in_groups_too(name: str):
    """mlx-lm's caches of a layer with two lie in a list of their own."""
    model, held = tiny(name), list[int]()
    for caches in (rotating_caches(model, 20, 4), full_caches(model)):
        for n in range(300):
            model(mx.zeros((1, 1), mx.int32), cache=caches)
            mx.eval([cache.state for cache in caches])
            if n in (100, 299):
                held.append(nbytes(caches))
    early, late, full_early, full_late = held
    assert early == late
    assert full_late > full_early
