"""Rows of keys or values, quantised in MLX's format; the sinks' rows are not quantised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """Rows of which those of the sinks are plain, and the others quantised as MLX does.

    Element e of a row is ``scale * q + bias``, where q has `bits` bits of word
    ``e * bits // 32``, from bit ``e * bits % 32`` on, and ``scale`` and ``bias`` are those of
    group ``e // group_size``.

    Attributes:
        sinks: The first rows, ``[B, n_kv_heads, at most num_sinks, head_dim]``, if any.
        words: The rows after them, ``[B, n_kv_heads, rows, head_dim * bits / 32]`` uint32, if any.
        scales: ``[B, n_kv_heads, rows, head_dim / group_size]`` in the dtype of the sinks.
        biases: As scales.
        bits: 4 or 8.
        group_size: Elements that share a scale.
    """

    sinks: mx.array | None
    words: mx.array | None
    scales: mx.array | None
    biases: mx.array | None
    bits: int
    group_size: int

    @property
    def n_sinks(self) -> int:
        """Rows that are plain."""
        return 0 if self.sinks is None else self.sinks.shape[2]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of `expanded`."""
        if self.words is None:
            return () if self.sinks is None else tuple(self.sinks.shape)
        B, heads, rows, words = self.words.shape
        return B, heads, self.n_sinks + rows, words * 32 // self.bits

    @property
    def dtype(self) -> mx.Dtype:
        """That of `expanded`."""
        like = self.scales if self.sinks is None else self.sinks
        return mx.float32 if like is None else like.dtype

    def expanded(self) -> mx.array:
        """Return the rows as the model sees them, ``[B, n_kv_heads, all rows, head_dim]``.

        They are worked out in float32 and rounded once. Nothing is computed before it is used.
        """
        ring: list[mx.array] = []
        if self.words is not None and self.scales is not None and self.biases is not None:
            exact = (x.astype(mx.float32) for x in (self.scales, self.biases))
            rows = mx.dequantize(self.words, *exact, group_size=self.group_size, bits=self.bits)
            ring.append(rows.astype(self.scales.dtype))
        parts = [*([] if self.sinks is None else [self.sinks]), *ring]
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)


def packed(rows: mx.array, n_sinks: int, bits: int, group_size: int) -> Packed:
    """Quantise rows ``[B, n_kv_heads, rows, head_dim]``, all but the first ``n_sinks``."""
    parts = mx.quantize(rows[:, :, n_sinks:], group_size=group_size, bits=bits)
    return assembled([rows[:, :, :n_sinks]], parts, bits, group_size)


def assembled(
    sinks: Sequence[mx.array], ring: Sequence[mx.array], bits: int, group_size: int
) -> Packed:
    """Put together rows that are quantised already; arrays without a row are left out.

    Args:
        sinks: The plain rows as one array, or nothing.
        ring: Words, scales and biases, or nothing.
        bits: As in `Packed`.
        group_size: As in `Packed`.
    """
    # Arrays without a row can be neither expanded nor handed to a kernel.
    plain = sinks[0] if sinks and sinks[0].shape[2] else None
    words, scales, biases = ring if ring and ring[0].shape[2] else (None, None, None)
    return Packed(plain, words, scales, biases, bits, group_size)
