"""The contract for every architecture that the installed mlx-lm has, found by listing it."""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from checkout import ROOT
from every import architectures, no_single_layer, one_attention_layer, tiny, unavailable
from feeding import assert_close, feed, tokens_of
from mlx_lm.generate import generate_step
from tiny import every as each
from tiny import mixed, recompute

from mlx_sink import SinkConfig, UnsupportedModelError, attach
from mlx_sink.cache.group import leaves
from mlx_sink.cache.sink_cache import SinkCache
from mlx_sink.models.architectures import REFUSED, VERIFIED
from mlx_sink.models.layers import native_caches

S, W, E = 3, 10, 17
CONFIG = SinkConfig(S, W, epoch=E)
"""Wraps after 13 tokens, begins a new epoch every 17 or so."""

LONG = 70
"""Tokens of several wraps and epochs."""
STEPS = 2 * E + 6
"""Tokens that are also read one by one: three epochs and as many wraps."""

model_of = cache(tiny)
one_layer_of = cache(one_attention_layer)


def test_every_architecture_is_verified_or_refused():
    """None may be left to chance: a new one in mlx-lm must enter one of the lists."""
    assert VERIFIED | set(REFUSED) == set(architectures()) | set(unavailable())
    assert not VERIFIED & set(REFUSED)


@pytest.mark.parametrize("name", sorted(VERIFIED))
def test_equals_mlx_lm_up_to_the_first_wrap(name: str):
    model = model_of(name)
    tokens = tokens_of(model, S + W)
    theirs = feed(model, tokens, native_caches(model))
    attach(model, CONFIG)
    for cuts in ((), each(1), mixed(4, 1, 1)):
        assert_close(feed(model, tokens, model.make_cache(), cuts), theirs)


@pytest.mark.parametrize("name", sorted(VERIFIED))
def test_does_not_depend_on_the_cuts(name: str):
    """Over several wraps and epochs, in chunks of every kind and token by token."""
    model = model_of(name)
    tokens = tokens_of(model, LONG)
    attach(model, CONFIG)
    whole = feed(model, tokens, model.make_cache())
    for cuts in (each(7), mixed(S + W, 1, 1, 2 * E + 1, seed=1)):
        assert_close(feed(model, tokens, model.make_cache(), cuts), whole)
    steps = feed(model, tokens[:, :STEPS], model.make_cache(), each(1))
    assert_close(steps, whole[:, :STEPS])


@pytest.mark.parametrize("name", [n for n in sorted(VERIFIED) if no_single_layer(n) is None])
def test_equals_the_recompute_oracle(name: str):
    """A model with one attention layer, fed only what a token sees, from position 0."""
    model = one_layer_of(name)
    tokens = tokens_of(model, 40)
    oracle = recompute(model, tokens, CONFIG)
    attach(model, CONFIG)
    for cuts in ((), mixed(S + W, 1, 1, 11)):
        assert_close(feed(model, tokens, model.make_cache(), cuts), oracle)


@pytest.mark.parametrize("name", sorted(VERIFIED))
def test_bytes_stay(name: str):
    """What is held after 2 capacities is held after 20, and is what the report says."""
    model = model_of(name)
    report, caches = attach(model, CONFIG), model.make_cache()
    held: list[int] = []
    for n in (2 * CONFIG.capacity, 18 * CONFIG.capacity):
        feed(model, tokens_of(model, n), caches, mixed(n // 2, 1, 1, n // 3))
        held.append(sum(c.nbytes for c in caches))
    assert held[0] == held[1] == report.nbytes
    for ring in leaves(caches):
        if isinstance(ring, SinkCache) and not ring.empty():
            assert ring.tokens == 20 * CONFIG.capacity
            assert ring.offset < E + 18 * CONFIG.capacity


@pytest.mark.parametrize("name", sorted(VERIFIED))
def test_mlx_lm_generates_with_it(name: str):
    """mlx-lm's own loop, which knows nothing of us, gives what the model says."""
    model = model_of(name)
    prompt = tokens_of(model, 20, seed=1)
    attach(model, CONFIG)
    theirs = [t for t, _ in generate_step(mx.array(prompt[0]), model, max_tokens=25)]
    text = np.concatenate([prompt, [theirs[:-1]]], axis=1)
    logits = feed(model, text, model.make_cache())[0, prompt.shape[1] - 1 :]
    assert logits.argmax(axis=-1).tolist() == theirs


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_the_others_are_refused_by_name(name: str):
    if name in unavailable():
        pytest.skip(f"mlx-lm cannot import it here: {unavailable()[name]}")
    model = tiny(name)
    with pytest.raises(UnsupportedModelError) as caught:
        attach(model, CONFIG)
    message = str(caught.value)
    assert message.endswith(f"is not supported: {REFUSED[name]}")
    assert "\n" not in message
    assert "make_cache" not in vars(model)


def test_the_table_of_the_docs_is_up_to_date():
    """`python scripts/dev/models_table.py > docs/models.md` writes it."""
    import models_table

    assert (ROOT / "docs/models.md").read_text(encoding="utf-8") == models_table.table()
