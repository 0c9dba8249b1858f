"""Recall on every architecture: it equals full attention while everything fits, or is refused."""

from __future__ import annotations

import every
import numpy as np
import pytest
from feeding import assert_close, feed, tokens_of

from mlx_sink import SinkConfig, UnsupportedModelError, attach
from mlx_sink.models.architectures import VERIFIED
from mlx_sink.models.attach import detach, make_cache
from mlx_sink.models.layers import native_caches

CONFIG = SinkConfig(3, 20, recall=6 * 16, recall_block=16, recall_bits=None)
N = 100

_NAMES = """
    bailing_moe_v3 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa kimi_k25 kimi_k3 kimi_linear
    kimi_vl longcat_flash longcat_flash_ngram mamba mamba2 mistral4 plamo2 recurrent_gemma rwkv7
"""
NONE = set(_NAMES.split())
"""Latent attention that the model computes itself, native windows alone, or no attention."""

OTHER_KEYS = {"plamo", "stablelm"}
"""They attend to keys that they have made of those in the cache."""


@pytest.mark.parametrize("name", sorted(VERIFIED))
def test_full_attention_or_refused(name: str):
    if name in every.unavailable():
        pytest.skip(every.unavailable()[name])
    model = every.tiny(name)
    if name in NONE | OTHER_KEYS:
        words = "no layer of it can recall" if name in NONE else "keys that it makes of those"
        with pytest.raises(UnsupportedModelError, match=words):
            attach(model, CONFIG)
        return
    attach(model, CONFIG)
    tokens = tokens_of(model, N)
    whole = feed(model, tokens, make_cache(model))
    pieces = feed(model, tokens, make_cache(model), [1, 7, 30, 1, 1, 40, 20])
    assert_close(pieces, whole)
    detach(model)
    assert_close(whole, feed(model, tokens, native_caches(model)))
    assert np.isfinite(whole).all()
