"""What a kernel is tried on before it is trusted: random data, and what it must give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import mlx.core as mx

from mlx_sink.attention import reference
from mlx_sink.attention.ring import Layout, Ring, Turn
from mlx_sink.attention.rope import Rotation

SINKS = 4
RINGS = (
    Ring(num_sinks=SINKS, window=203, epoch=1000, tokens=741),
    Ring(num_sinks=SINKS, window=203, epoch=300, tokens=660, start=600, previous=300),
)
"""One ring has wrapped in its first epoch; the window of the other spans two epochs."""

SOFTCAP = 2.0
"""The size of a typical score."""
_LOGIT = 6.5
"""Mean of the learned logits, about that of the logarithm of the sum of the keys' weights."""


def normals(*shapes: tuple[int, ...], dtype: mx.Dtype) -> list[mx.array]:
    """Return the same random arrays every time."""
    keys = mx.random.split(mx.random.key(0), len(shapes))
    return [
        mx.random.normal(shape, key=key, stream=mx.cpu).astype(dtype, stream=mx.cpu)
        for shape, key in zip(shapes, keys, strict=True)
    ]


def rotation_of(rotated: int, interleaved: bool) -> Rotation:
    """Return a rotary embedding in which a wrong turn shows at once."""
    pairs = rotated // 2
    return Rotation([100.0 ** -(i / max(pairs, 1)) for i in range(pairs)], interleaved)


def logits_of(n_heads: int) -> mx.array:
    """Return logits that weigh about as much as all keys together: small ones would not show."""
    return mx.random.normal((n_heads,), loc=_LOGIT, key=mx.random.key(1), stream=mx.cpu)


def by_reference(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    layouts: Sequence[Layout],
    rotation: Rotation,
    scale: float,
    cap: float | None,
    logits: mx.array | None,
) -> mx.array:
    """Work out what a kernel must give, in float32 and on the CPU.

    There matrix products are not cut to TF32. Arguments as those of a kernel, and the layout of
    each sequence.
    """
    outputs: list[mx.array] = []
    with mx.stream(mx.cpu):
        for b, layout in enumerate(layouts):
            block = layout.block(layout.ring.tokens, layout.end)
            scaled = q[b : b + 1].astype(mx.float32) * scale
            # A fresh key: what a model's steps remember is not to be crowded out.
            queries = {
                turn: rotation.turn(scaled, layout.turns(turn), key=object()) for turn in Turn
            }
            keys, values = (x[b : b + 1].astype(mx.float32) for x in (k, v))
            window = layout.ring.window
            outputs.append(
                reference.attend(
                    queries, keys, values, block, window, softcap=cap, learned_sinks=logits
                )
            )
        return mx.concatenate(outputs)


def error_of(out: mx.array, wanted: mx.array) -> float:
    """Return the largest error in units of the largest output."""
    with mx.stream(mx.cpu):
        off = mx.abs(out.astype(mx.float32) - wanted).max() / mx.abs(wanted).max()
        return cast("float", off.item())
