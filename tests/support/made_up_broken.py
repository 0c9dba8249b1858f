"""Attention that does not keep the contract, each kind with the line that refuses it.

What keeps it is in `made_up`.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from made_up import HEAD_DIM, Attention, FastProducts, OwnProducts, Shares


class Embedded(Attention):
    """Learned absolute positions."""

    embedded = True

    def rotate(self, q: mx.array, k: mx.array, position: int) -> tuple[mx.array, mx.array]:
        return q, k


class Alibi(Attention):
    """ALiBi, with distances counted from the cache's offset."""

    def multiply(self, q: mx.array, k: mx.array, v: mx.array, mask: Any, cache: Any) -> mx.array:
        end = k.shape[2] if cache is None else max(cache.offset, k.shape[2])
        distances = mx.arange(end - q.shape[2], end)[:, None] - mx.arange(k.shape[2])
        slopes = mx.array([0.5, 0.25, 0.12, 0.06])[:, None, None]
        bias = mx.where(distances >= 0, -slopes * distances, -mx.inf)
        return super().multiply(q, k, v, bias, cache)


class NormAfter(Attention):
    """A norm with weights after the rotation: what it weighs depends on the position."""

    def rotate(self, q: mx.array, k: mx.array, position: int) -> tuple[mx.array, mx.array]:
        q, k = super().rotate(q, k, position)
        return mx.fast.rms_norm(q, 1 + self.weight, 1e-5), mx.fast.rms_norm(k, None, 1e-5)


class OwnWindow(Attention):
    """A sliding window that no cache knows of, in a mask of its own."""

    def multiply(self, q: mx.array, k: mx.array, v: mx.array, mask: Any, cache: Any) -> mx.array:
        n, L = k.shape[2], q.shape[2]
        behind = mx.arange(n - L, n)[:, None] - mx.arange(n)
        return super().multiply(q, k, v, (behind >= 0) & (behind < 5), cache)


class Growing(Attention):
    """Queries grow with the logarithm of the position."""

    start = 4

    def rotate(self, q: mx.array, k: mx.array, position: int) -> tuple[mx.array, mx.array]:
        positions = mx.arange(position, position + q.shape[2])[:, None]
        q, k = super().rotate(q, k, position)
        return q * (1 + mx.log(1 + positions // self.start)), k


class GrowingLate(Growing):
    """The same, far beyond the few tokens of a check."""

    start = 5000


class KeysWeighed(Attention):
    """Keys are weighed by dimension after they were fetched."""

    def multiply(self, q: mx.array, k: mx.array, v: mx.array, mask: Any, cache: Any) -> mx.array:
        return super().multiply(q, k * (1 + self.weight), v, mask, cache)


class KeysSummed(Attention):
    """Every key takes its neighbour's in, by their order in the cache."""

    def multiply(self, q: mx.array, k: mx.array, v: mx.array, mask: Any, cache: Any) -> mx.array:
        return super().multiply(q, k + mx.roll(k, 1, axis=2), v, mask, cache)


class Turned(Attention):
    """Dynamic: the embedding changes once the text is long."""

    def rotate(self, q: mx.array, k: mx.array, position: int) -> tuple[mx.array, mx.array]:
        slower = 2.0 if position > 4000 else 1.0
        return tuple(
            mx.fast.rope(
                x, HEAD_DIM, traditional=False, base=100.0, scale=1 / slower, offset=position
            )
            for x in (q, k)
        )


class TwoRopes(Attention):
    """Two embeddings on one head."""

    def rotate(self, q: mx.array, k: mx.array, position: int) -> tuple[mx.array, mx.array]:
        q, k = super().rotate(q, k, position)
        return tuple(
            mx.concatenate(
                [
                    x[..., :4],
                    mx.fast.rope(
                        x[..., 4:], 4, traditional=True, base=9.0, scale=1.0, offset=position
                    ),
                ],
                axis=-1,
            )
            for x in (q, k)
        )


class Forgetful(Attention):
    """The last layer feeds its cache with nothing, and sees the call's tokens only."""

    def attend(self, q: mx.array, k: mx.array, v: mx.array, mask: Any, cache: Any) -> mx.array:
        if self.layer == 0:
            return super().attend(q, k, v, mask, cache)
        causal = None if q.shape[2] == 1 else "causal"
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.35, mask=causal)


class Twice(Attention):
    """Feeds its cache twice."""

    def attend(self, q: mx.array, k: mx.array, v: mx.array, mask: Any, cache: Any) -> mx.array:
        if cache is not None:
            cache.update_and_fetch(k, v)
        return super().attend(q, k, v, None if q.shape[2] == 1 else "causal", cache)


class Fickle(Attention):
    """Looks at what its cache holds in the first two calls only."""

    def attend(self, q: mx.array, k: mx.array, v: mx.array, mask: Any, cache: Any) -> mx.array:
        calls = vars(self).get("calls", 0)
        object.__setattr__(self, "calls", calls + 1)
        if calls < 2:
            return super().attend(q, k, v, mask, cache)
        cache.update_and_fetch(k, v)
        return mx.repeat(v, 2, axis=1)


class NoKeys(Attention):
    """Calls the attention with keys that no cache has seen."""

    def attend(self, q: mx.array, k: mx.array, v: mx.array, mask: Any, cache: Any) -> mx.array:
        return self.multiply(q, k, v, mask, cache)


class Hoarder(Attention):
    """Keeps its keys itself."""

    held: tuple[mx.array, mx.array] | None = None

    def attend(self, q: mx.array, k: mx.array, v: mx.array, mask: Any, cache: Any) -> mx.array:
        held = vars(self).get("held_rows")
        if held is not None and cache is not None:
            k, v = (mx.concatenate(pair, axis=2) for pair in zip(held, (k, v), strict=True))
        object.__setattr__(self, "held_rows", (k, v))
        n, L = k.shape[2], q.shape[2]
        mask = mx.arange(n - L, n)[:, None] >= mx.arange(n)
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.35, mask=mask)


class Counting(Attention):
    """Counts its tokens itself."""

    def position(self, cache: Any) -> int:
        return 0 if cache is None else getattr(cache, "tokens", cache.offset)


class Cut(Attention):
    """Sees only the oldest keys of its cache, by their place in it."""

    def multiply(self, q: mx.array, k: mx.array, v: mx.array, mask: Any, cache: Any) -> mx.array:
        if mask is not None:
            mask = mask[:, :4] | (mx.arange(mask.shape[0])[:, None] < 0)
        return OwnProducts.multiply(self, q, k[:, :, :4], v[:, :, :4], mask, cache)

    scores = OwnProducts.scores


class Noisy(Attention):
    """Leaves its dropout on."""

    def multiply(self, q: mx.array, k: mx.array, v: mx.array, mask: Any, cache: Any) -> mx.array:
        out = super().multiply(q, k, v, mask, cache)
        return out + 0.1 * mx.random.normal(out.shape)


class NotANumber(Attention):
    """Gives NaN from a long text on."""

    def multiply(self, q: mx.array, k: mx.array, v: mx.array, mask: Any, cache: Any) -> mx.array:
        out = super().multiply(q, k, v, mask, cache)
        return out * mx.nan if q.shape[2] > 20 else out


class Fails(Attention):
    """Asks a cache for what ours do not have."""

    def position(self, cache: Any) -> int:
        return 0 if cache is None else cache.its_own_position


class FailsLater(Attention):
    """Fails once the text is longer than it was made for, with more than a line."""

    def position(self, cache: Any) -> int:
        position = super().position(cache)
        if 7 < position < 100:
            raise ValueError("too long:\nmore than 7")
        return position


class SharesAlone(Shares):
    """Shares keys, and multiplies them itself."""

    multiply = OwnProducts.multiply
    scores = OwnProducts.scores


class SharesOnce(Shares):
    """The first layer multiplies its keys itself, the last one leaves it to mlx-lm's function."""

    def multiply(self, q: mx.array, k: mx.array, v: mx.array, mask: Any, cache: Any) -> mx.array:
        own = FastProducts if self.layer == 0 else Attention
        return own.multiply(self, q, k, v, mask, cache)


class SharesMasked(Shares):
    """Shares keys, under a mask of its own."""

    def multiply(self, q: mx.array, k: mx.array, v: mx.array, mask: Any, cache: Any) -> mx.array:
        if mask is not None:
            mask = mx.array(mask) & True
        return super().multiply(q, k, v, mask, cache)


class AsksWindow(Attention):
    """Asks a cache that has no window for the mask of one."""

    def attend(self, q: mx.array, k: mx.array, v: mx.array, mask: Any, cache: Any) -> mx.array:
        if mask is not None and cache is not None:
            mask = cache.make_mask(q.shape[2], window_size=5, return_array=True)
        return super().attend(q, k, v, mask, cache)


CHECK = "it is not known, and a check of the contract fails: "
PLAIN = CHECK + "it differs from plain mlx-lm (logits differ by "
CALLS = CHECK + "calls of [1] tokens change the result (logits differ by "
FAR = CHECK + "at position 6144 it is another (logits differ by "

BREAKS: dict[type[Attention], str] = {
    Embedded: CALLS,
    Alibi: CALLS,
    NormAfter: CALLS,
    OwnWindow: CALLS,
    Growing: CALLS,
    GrowingLate: FAR,
    KeysWeighed: CALLS,
    KeysSummed: PLAIN,
    Turned: "its position embedding is not a fixed rotation: it changes with the position",
    TwoRopes: "a layer has more than one position embedding",
    Forgetful: CALLS,
    Twice: "keys are not taken in once for each call (layer 0)",
    Fickle: "layer 0 does not attend to the keys it keeps",
    NoKeys: "attention was called with keys of another layer or call",
    Hoarder: PLAIN,
    Counting: CALLS,
    Cut: CALLS,
    Noisy: PLAIN,
    NotANumber: PLAIN + "nan of their spread)",
    Fails: "its forward pass fails with a bounded cache (AttributeError: 'WatchedCache'",
    FailsLater: CHECK[:-2] + " (ValueError: too long: more than 7)",
    SharesAlone: CHECK[:-2] + " (ValueError: ",
    SharesOnce: "layer 0 does not attend to the keys it keeps",
    SharesMasked: "it multiplies queries and keys in a way that is not known (layer 0)",
    AsksWindow: "the model wants a window of 5 tokens for this layer",
}
"""What does not keep the contract, and how the line begins with which it is refused."""
