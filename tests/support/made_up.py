"""An architecture that mlx-lm does not have, and what models might do in their attention.

`Attention` keeps the contract; what is derived from it does one thing otherwise. Those that keep
it all the same are here (`KEEPS`), the others in `made_up_broken`.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from every import randomize
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention

VOCABULARY, WIDTH, HEADS, KV_HEADS, HEAD_DIM = 40, 32, 4, 2, 8


class Attention(nn.Module):
    """Grouped-query attention with RoPE, as most models have it."""

    embedded = False
    """Whether positions are learned, and added to the tokens."""

    def __init__(self, layer: int):
        super().__init__()
        self.layer = layer
        self.q_proj = nn.Linear(WIDTH, HEADS * HEAD_DIM)
        self.kv_proj = nn.Linear(WIDTH, 2 * KV_HEADS * HEAD_DIM)
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, WIDTH)
        self.rope = nn.RoPE(HEAD_DIM, base=100.0)
        self.weight = mx.zeros(HEAD_DIM)

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        B, L, _ = x.shape
        q = self.q_proj(x).reshape(B, L, HEADS, -1).swapaxes(1, 2)
        kv = self.kv_proj(x).reshape(B, L, 2 * KV_HEADS, -1).swapaxes(1, 2)
        k, v = mx.split(kv, 2, axis=1)
        out = self.attend(*self.rotate(2 * q, k, self.position(cache)), v, mask, cache)
        return self.o_proj(out.swapaxes(1, 2).reshape(B, L, -1))

    def position(self, cache: Any) -> int:
        return 0 if cache is None else cache.offset

    def rotate(self, q: mx.array, k: mx.array, position: int) -> tuple[mx.array, mx.array]:
        return self.rope(q, offset=position), self.rope(k, offset=position)

    def attend(self, q: mx.array, k: mx.array, v: mx.array, mask: Any, cache: Any) -> mx.array:
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        return self.multiply(q, k, v, mask, cache)

    def multiply(self, q: mx.array, k: mx.array, v: mx.array, mask: Any, cache: Any) -> mx.array:
        return scaled_dot_product_attention(q, k, v, cache=cache, scale=0.35, mask=mask)


class Model(nn.Module):
    """Layers of one kind of attention; the first may have another."""

    model_type = "made_up"

    def __init__(
        self, kind: type[Attention], layers: int = 2, first: type[Attention] | None = None
    ):
        super().__init__()
        mx.random.seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(256, WIDTH) if kind.embedded else None
        self.layers = [(first or kind)(0), *(kind(i) for i in range(1, layers))]
        self.norms = [nn.RMSNorm(WIDTH) for _ in self.layers]
        self.out = nn.Linear(WIDTH, VOCABULARY)
        randomize(self, 0)

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        x, caches = self.embed(tokens), cache or [None] * len(self.layers)
        if self.positions is not None:
            position = self.layers[0].position(caches[0])
            x = x + self.positions(position + mx.arange(x.shape[1]))
        mask = create_attention_mask(x, caches[0], return_array=True)
        for layer, norm, c in zip(self.layers, self.norms, caches, strict=True):
            x = x + layer(norm(x), mask, c)
        return self.out(x)


# What keeps the contract.


class OwnProducts(Attention):
    """Multiplies queries and keys by itself."""

    def multiply(self, q: mx.array, k: mx.array, v: mx.array, mask: Any, cache: Any) -> mx.array:
        k, v = (mx.repeat(x, HEADS // KV_HEADS, axis=1) for x in (k, v))
        scores = self.scores(0.35 * q, k)
        if mask is not None:
            scores = mx.where(mask, scores, -mx.inf)
        return mx.softmax(scores, axis=-1) @ v

    def scores(self, q: mx.array, k: mx.array) -> mx.array:
        return q @ k.swapaxes(-1, -2)


class Capped(OwnProducts):
    """Gemma 2's softcap."""

    def scores(self, q: mx.array, k: mx.array) -> mx.array:
        return mx.tanh(q @ k.swapaxes(-1, -2))


class FastProducts(Attention):
    """Calls MLX's fused attention, past the function that is hooked."""

    def multiply(self, q: mx.array, k: mx.array, v: mx.array, mask: Any, cache: Any) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.35, mask=mask)


class Learned(Attention):
    """A learned sink a head, as gpt-oss has it."""

    def multiply(self, q: mx.array, k: mx.array, v: mx.array, mask: Any, cache: Any) -> mx.array:
        sinks = self.weight[:HEADS]
        return scaled_dot_product_attention(
            q, k, v, cache=cache, scale=0.35, mask=mask, sinks=sinks
        )


class NormBefore(Attention):
    def rotate(self, q: mx.array, k: mx.array, position: int) -> tuple[mx.array, mx.array]:
        q, k = (mx.fast.rms_norm(x, self.weight, 1e-5) for x in (q, k))
        return super().rotate(q, k, position)


class EqualNormAfter(Attention):
    """A norm after the rotation, but without weights: it does not know the position."""

    def rotate(self, q: mx.array, k: mx.array, position: int) -> tuple[mx.array, mx.array]:
        q, k = super().rotate(q, k, position)
        return mx.fast.rms_norm(q, None, 1e-5), mx.fast.rms_norm(k, None, 1e-5)


class Still(Attention):
    """No positions at all."""

    def rotate(self, q: mx.array, k: mx.array, position: int) -> tuple[mx.array, mx.array]:
        return q, k


class EveryOther(Attention):
    """Layers with and without positions."""

    def rotate(self, q: mx.array, k: mx.array, position: int) -> tuple[mx.array, mx.array]:
        return super().rotate(q, k, position) if self.layer % 2 else (q, k)


class Absent(Attention):
    """The last layer mixes no tokens, and leaves its cache empty."""

    def attend(self, q: mx.array, k: mx.array, v: mx.array, mask: Any, cache: Any) -> mx.array:
        return mx.repeat(v, 2, axis=1) if self.layer else super().attend(q, k, v, mask, cache)


class Swapped(Attention):
    """Keeps keys in the place of the values, as latent attention keeps its rotated part."""

    def attend(self, q: mx.array, k: mx.array, v: mx.array, mask: Any, cache: Any) -> mx.array:
        if cache is not None:
            v, k = cache.update_and_fetch(v, k)
        return self.multiply(q, k, v, mask, cache)


class Places(Attention):
    """The same rotation, in the first layer at the end of a head and in the last at its start."""

    def rotate(self, q: mx.array, k: mx.array, position: int) -> tuple[mx.array, mx.array]:
        still = 0 if self.layer else 4

        def rotated(x: mx.array) -> mx.array:
            options = {"traditional": True, "base": 9.0, "scale": 1.0}
            moved = mx.fast.rope(x[..., still:], 4, offset=position, **options)
            return mx.concatenate([x[..., :still], moved], axis=-1)

        return rotated(q), rotated(k)


class KeysAfter(Attention):
    """The keys are scaled after they were fetched: all of them alike, so nothing depends on it."""

    def multiply(self, q: mx.array, k: mx.array, v: mx.array, mask: Any, cache: Any) -> mx.array:
        return super().multiply(q, 1.5 * k, v, mask, cache)


class Feeder(Attention):
    """The last layer fills its cache and does not look at it: that costs bytes, no more."""

    def attend(self, q: mx.array, k: mx.array, v: mx.array, mask: Any, cache: Any) -> mx.array:
        if self.layer and cache is not None:
            cache.update_and_fetch(k, v)
        return mx.repeat(v, 2, axis=1) if self.layer else super().attend(q, k, v, mask, cache)


class Shares(Attention):
    """The last layer attends to the keys of the one before, and names no cache."""

    rows: Any = None
    at = 0

    def position(self, cache: Any) -> int:
        if self.layer == 0:
            Shares.at = super().position(cache)
        return Shares.at

    def attend(self, q: mx.array, k: mx.array, v: mx.array, mask: Any, cache: Any) -> mx.array:
        if self.layer:
            return self.multiply(q, *Shares.rows, mask, None)
        Shares.rows = (k, v) if cache is None else cache.update_and_fetch(k, v)
        return self.multiply(q, *Shares.rows, mask, cache)


KEEPS = [
    Attention,
    OwnProducts,
    Capped,
    FastProducts,
    Learned,
    NormBefore,
    EqualNormAfter,
    Still,
    EveryOther,
    Absent,
    Swapped,
    Places,
    KeysAfter,
    Feeder,
    Shares,
]
