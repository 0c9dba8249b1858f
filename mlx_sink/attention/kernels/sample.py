"""What a kernel is checked and timed on: random arrays on sink rings, and what they must give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import mlx.core as mx

from mlx_sink.attention import reference
from mlx_sink.attention.layout import Layout, blocks_of, layout_of
from mlx_sink.attention.packed import Packed, packed
from mlx_sink.attention.ring import Ring
from mlx_sink.attention.rope import Rotation

RINGS = (
    Ring(num_sinks=4, window=203, epoch=1000, tokens=741),
    Ring(num_sinks=4, window=203, epoch=300, tokens=660, start=600, previous=300),
)
"""The rings of a check. One has wrapped in its first epoch; the window of the other spans two."""
SOFTCAP = 2.0
"""The size of a typical score."""
_MEAN_LOGIT = 6.5
"""Of learned sinks: about the logarithm of the sum of the keys' weights. Small ones would not
show."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A call of the attention on random arrays.

    Attributes:
        queries: ``[B, n_heads, n, head_dim]``.
        keys: ``[B, n_kv_heads, rows, head_dim]``.
        values: ``[B, n_kv_heads, rows, v_head_dim]``.
        layouts: Which token each query and row is, for each sequence.
        rotation: A rotary embedding in which a wrong turn shows at once.
        scale: Factor on q.k: sharp, so that the softmax picks a few keys.
        options: Softcap and learned sinks, if the variant has them.
        packed: Keys and values as a quantised ring has them; they then stand for those above.
    """

    queries: mx.array
    keys: mx.array
    values: mx.array
    layouts: tuple[Layout, ...]
    rotation: Rotation
    scale: float
    options: reference.Extras
    packed: tuple[Packed, Packed] | None = None

    def quantised(self, k_bits: int, v_bits: int, group_size: int) -> Sample:
        """Return the sample on quantised rings."""
        num_sinks = self.layouts[0].ring.num_sinks
        keys = packed(self.keys, num_sinks, k_bits, group_size)
        return replace(self, packed=(keys, packed(self.values, num_sinks, v_bits, group_size)))

    def rows(self) -> tuple[mx.array, mx.array]:
        """Return keys and values as the model sees them."""
        if self.packed is None:
            return self.keys, self.values
        return self.packed[0].expanded(), self.packed[1].expanded()

    def by_operations(self, queries: mx.array) -> mx.array:
        """Attend in plain operations, as `sink_attention` does where no kernel serves.

        Args:
            queries: In place of the sample's own.
        """
        keys, values = self.rows()
        if len(self.layouts) == 1:
            return self._attend(self.layouts[0], queries, keys, values)
        outputs = [
            self._attend(layout, *(x[b : b + 1] for x in (queries, keys, values)))
            for b, layout in enumerate(self.layouts)
        ]
        return mx.concatenate(outputs)

    def _attend(
        self, layout: Layout, queries: mx.array, keys: mx.array, values: mx.array
    ) -> mx.array:
        turned = reference.Turned(queries, layout, self.rotation, self.scale)
        outputs = [
            reference.attend(turned.of(block), keys, values, block, **self.options)
            for block in blocks_of(layout, reference.BLOCK)
        ]
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)

    def error(self, *outputs: mx.array) -> float:
        """Return the largest error of a kernel's outputs, in units of the largest that is right.

        What is right is computed in float32, and on the CPU, where matrix products are not cut to
        TF32. NaN if any output is.
        """
        with mx.stream(mx.cpu):
            q, k, v = (x.astype(mx.float32) for x in (self.queries, *self.rows()))
            expected = replace(self, keys=k, values=v, packed=None).by_operations(q)
            errors = mx.stack([mx.abs(out.astype(mx.float32) - expected) for out in outputs])
            return cast("float", (errors.max() / mx.abs(expected).max()).item())


def random_sample(
    dtype: mx.Dtype,
    *,
    n: int,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    rotated: int,
    interleaved: bool,
    softcap: bool,
    learned_sinks: bool,
    rings: Sequence[Ring] = RINGS,
) -> Sample:
    """Return a random sample for a variant of a kernel, the same every time.

    Args:
        dtype: Of queries, keys and values.
        n: Queries of each sequence.
        n_heads: Query heads.
        n_kv_heads: Heads of keys and values.
        head_dim: Of queries and keys.
        v_head_dim: Of values.
        rotated: Dimensions that the rotary embedding rotates.
        interleaved: As in `Rotation`.
        softcap: With a softcap.
        learned_sinks: With learned sinks.
        rings: The state of each sequence.
    """
    layouts = tuple(layout_of(ring, n) for ring in rings)
    rows = max(run.row + run.length for layout in layouts for run in layout.runs)
    shapes = (n_heads, n, head_dim), (n_kv_heads, rows, head_dim), (n_kv_heads, rows, v_head_dim)
    with mx.stream(mx.cpu):
        keys = mx.random.split(mx.random.key(0), len(shapes))
        q, k, v = (
            mx.random.normal((len(rings), *shape), key=key).astype(dtype)
            for shape, key in zip(shapes, keys, strict=True)
        )
        logits = mx.random.normal((n_heads,), loc=_MEAN_LOGIT, key=mx.random.key(1))
    return Sample(
        q,
        k,
        v,
        layouts,
        _rotation(rotated, interleaved),
        2.0 * head_dim**-0.5,
        {
            "softcap": SOFTCAP if softcap else None,
            "learned_sinks": logits if learned_sinks else None,
        },
    )


def _rotation(rotated: int, interleaved: bool) -> Rotation:
    """Return a rotary embedding of low base, in which a wrong turn shows at once."""
    pairs = rotated // 2
    return Rotation([100.0 ** -(i / max(pairs, 1)) for i in range(pairs)], interleaved)
