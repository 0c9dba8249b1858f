"""The tiny models of `every` run in plain mlx-lm, and their logits show order and context.

These are checks of the tests' own material. A model here that forgot its first token, or did not
care for an order, would let a broken cache pass.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from functools import cache
from pathlib import Path
from typing import Any

import host_metal
import mlx.core as mx
import mlx.nn as nn
import mlx_lm.kernels
import mlx_lm.models
import muse_spark_ops
import numpy as np
import pytest
from every import (
    WINDOW,
    architectures,
    no_single_layer,
    one_attention_layer,
    tiny,
    unavailable,
)
from every_configs import SINGLE
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import muse_spark
from mlx_lm.models.cache import CacheList, KVCache, make_prompt_cache

TOKENS = np.random.default_rng(0).integers(0, 60, (1, 12))

CHUNK_INVARIANT = {
    "phi3small": 0,  # Its block-sparse layer adds the boolean mask to the scores: no mask at all.
    "plamo3": WINDOW,  # Its masks show one token more than its caches keep.
}
"""Up to which length mlx-lm's own model gives the same logits in chunks, where not always."""


@cache
def model(name: str) -> nn.Module:
    return tiny(name)


def feed(model: nn.Module, tokens: np.ndarray, *lengths: int) -> np.ndarray:
    """Return the logits, ``[n, vocabulary]``, of tokens fed in pieces, then the rest at once."""
    caches = make_prompt_cache(model)
    pieces = np.split(tokens, np.cumsum(lengths), axis=1)
    logits = [model(mx.array(piece), cache=caches) for piece in pieces if piece.size]
    return np.array(mx.concatenate(logits, axis=1).astype(mx.float32))[0]


def changed(*swap: int) -> np.ndarray:
    """Return `TOKENS` with two of them exchanged, or one replaced."""
    tokens = TOKENS.copy()
    tokens[0, swap] = tokens[0, swap[::-1]] if len(swap) > 1 else tokens[0, swap] + 1
    return tokens


def test_every_module_that_defines_a_model_is_there():
    """The source says it, not the import."""
    defined = set()
    for info in pkgutil.iter_modules(mlx_lm.models.__path__):
        text = (Path(mlx_lm.models.__path__[0]) / f"{info.name}.py").read_text()
        if re.search(r"^(class Model\(|from \.\w+ import Model\b(?!Args))", text, re.M):
            defined.add(info.name)
    assert defined == set(architectures()) | set(unavailable())
    assert len(defined) > 100


def test_modules_that_cannot_be_imported_say_why():
    assert all(unavailable().values())


@pytest.mark.parametrize("name", architectures())
def test_no_weight_is_zero_or_constant(name):
    for path, value in tree_flatten(model(name).parameters()):
        values = np.array(value.astype(mx.float32))
        assert np.isfinite(values).all(), path
        assert values.any(), path
        assert values.size == 1 or np.ptp(values) > 0, path


@pytest.mark.parametrize("name", ["kimi_linear", "llama", "mamba2"])
def test_a_seed_gives_the_same_model(name):
    one, again, other = (tree_flatten(tiny(name, seed=seed).parameters()) for seed in (1, 1, 2))
    for (path, a), (_, b), (_, c) in zip(one, again, other, strict=True):
        assert mx.array_equal(a, b), path
        assert not mx.array_equal(a, c), path


@pytest.mark.parametrize("name", architectures())
def test_logits_depend_on_order_and_on_the_first_token(name):
    logits = feed(model(name), TOKENS)
    assert np.isfinite(logits).all()
    assert 0.1 < logits.std() < 20
    for other in (changed(7, 8), changed(0)):
        assert np.abs(feed(model(name), other)[-1] - logits[-1]).max() > 2e-3


@pytest.mark.parametrize("name", architectures())
def test_mlx_lm_gives_the_same_logits_in_chunks(name):
    n = CHUNK_INVARIANT.get(name, TOKENS.shape[1])
    if n == 0:
        pytest.xfail("mlx-lm's own model does not")
    tokens = TOKENS[:, :n]
    whole = feed(model(name), tokens)
    for lengths in ([5], [1] * n):
        np.testing.assert_allclose(feed(model(name), tokens, *lengths), whole, atol=1e-4)


@pytest.mark.parametrize("name", CHUNK_INVARIANT)
def test_what_mlx_lm_does_not_do_is_still_so(name):
    """A version of mlx-lm that mends it drops out of the table."""
    whole = feed(model(name), TOKENS)
    assert np.abs(feed(model(name), TOKENS, *[1] * 12) - whole).max() > 1e-2


def after_disturbing(single: nn.Module, which: slice) -> np.ndarray:
    """Return the logits of the last token after some of the caches have been falsified."""
    caches = make_prompt_cache(single)
    single(mx.array(TOKENS[:, :-1]), cache=caches)
    for entry in flat(caches)[which]:
        entry.state = tree_map(
            lambda x: x[..., ::-1] if isinstance(x, mx.array) and x.ndim else x, entry.state
        )
    return np.array(single(mx.array(TOKENS[:, -1:]), cache=caches)[0, -1])


def flat(caches: list[Any]) -> list[Any]:
    """Return the caches with those inside of lists."""
    lists = [entry.caches if isinstance(entry, CacheList) else [entry] for entry in caches]
    return [entry for entries in lists for entry in entries]


@pytest.mark.parametrize("name", architectures())
def test_a_single_layer_remembers(name):
    """What the other caches hold, if an architecture has others, does not matter."""
    single = one_attention_layer(name)
    if single is None:
        assert no_single_layer(name)
        return
    caches = make_prompt_cache(single)
    usual = after_disturbing(single, slice(0))
    if "silent" in SINGLE.get(name, {}):
        np.testing.assert_allclose(after_disturbing(single, slice(-1)), usual, atol=1e-6)
    else:
        assert len(caches) == 1
        assert {type(entry) for entry in flat(caches)} == {KVCache}
    assert type(flat(caches)[-1]) is KVCache
    assert np.abs(after_disturbing(single, slice(None)) - usual).max() > 1e-2


@pytest.mark.skipif(mx.metal.is_available(), reason="here muse_spark runs its own kernels")
def test_muse_spark_without_metal_is_what_its_kernels_compute(monkeypatch):
    here = feed(model("muse_spark"), TOKENS, 5)
    with monkeypatch.context() as patch:
        patch.setattr(mx.fast, "metal_kernel", host_metal.metal_kernel)
        for info in pkgutil.iter_modules(mlx_lm.kernels.__path__):
            importlib.reload(importlib.import_module(f"mlx_lm.kernels.{info.name}"))
    importlib.reload(mlx_lm.kernels)
    for operation in muse_spark_ops.OPERATIONS:
        name = operation.__name__
        monkeypatch.setattr(muse_spark, name, getattr(mlx_lm.kernels, name))
    np.testing.assert_allclose(feed(model("muse_spark"), TOKENS, 5), here, atol=1e-5)
