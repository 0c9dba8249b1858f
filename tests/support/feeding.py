"""Tokens for a model, fed to it in pieces, and its logits compared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tiny import TOLERANCE, cut


def tokens_of(model: nn.Module, n: int, seed: int = 0) -> np.ndarray:
    vocabulary = model(mx.zeros((1, 1), mx.int32)).shape[-1]
    return np.random.default_rng(seed).integers(0, vocabulary, (1, n))


def feed(
    model: nn.Module, tokens: np.ndarray, caches: Sequence[Any], cuts: Iterable[int] = ()
) -> np.ndarray:
    """Feed tokens ``[1, n]`` in pieces and return all logits, ``[1, n, vocabulary]`` float32."""
    pieces: list[mx.array] = []
    for piece in cut(tokens.shape[1], cuts):
        pieces.append(model(mx.array(tokens[:, piece]), cache=caches).astype(mx.float32))
        mx.eval(pieces[-1], [c.state for c in caches])
    return np.array(mx.concatenate(pieces, axis=1))


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE * max(1.0, theirs.std()), rtol=0)
