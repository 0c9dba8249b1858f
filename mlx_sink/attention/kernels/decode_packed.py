"""Decode attention over a quantised ring, as a Metal kernel that unpacks while it loads.

The same text as `kernels.decode` but for where keys and values come from
(``metal/decode_packed.metal``): a lane unpacks its elements as it loads them, in float32, and
rounds each to the dtype of the model, as `Packed.expanded` does.
"""

from __future__ import annotations

import functools

import mlx.core as mx

from mlx_sink.attention.kernels import decode, inputs, source
from mlx_sink.attention.kernels.tables import DecodeTables
from mlx_sink.attention.packed import Packed
from mlx_sink.errors import KernelError

TEXTS = ("decode_common", "packed_rows", "decode_packed", "decode", "decode_merge")
"""Files of kernel text."""

_INPUTS = (
    *decode.INPUTS,
    "k_words",
    "k_scales",
    "k_biases",
    "v_words",
    "v_scales",
    "v_biases",
)


def decode_packed(
    queries: mx.array,
    keys: Packed,
    values: Packed,
    tables: DecodeTables,
    *,
    scale: float,
    softcap: float | None = None,
    learned_sinks: mx.array | None = None,
    splits: int | None = None,
) -> mx.array:
    """Attend from at most 8 new tokens to the live rows of a quantised ring.

    Args:
        queries: ``[B, n_heads, L, head_dim]`` after RoPE; float16, bfloat16 or float32.
        keys: Rows after RoPE, quantised; the arrays may be strided, but not within a row.
        values: Likewise; of as many rows, and in groups of the same size.
        tables: Of `tables.decode_tables`, ``packed``.
        scale: Factor on q.k.
        softcap: As in `decode.decode`.
        learned_sinks: As in `decode.decode`.
        splits: As in `decode.decode`.

    Returns:
        ``[B, n_heads, L, v_head_dim]`` in the dtype of the queries.

    Raises:
        KernelError: A shape or dtype does not fit; the message names the argument.
    """
    if keys.group_size != values.group_size or keys.n_sinks != values.n_sinks:
        raise KernelError("values must have the sinks and the group size of keys")
    launch = decode.launch_of(
        tuple(queries.shape),
        keys.shape,
        values.shape,
        (queries.dtype, keys.dtype, values.dtype),
        (tables.ranges.shape[0], tables.n, tables.live, tables.last),
        (tables.dims, tables.interleaved),
        (softcap is not None, None if learned_sinks is None else tuple(learned_sinks.shape)),
        splits,
        (keys.bits, values.bits, keys.group_size),
    )
    arrays = [
        mx.contiguous(queries),
        _plain(keys),
        _plain(values),
        tables.ranges,
        tables.turns,
        inputs.logits(learned_sinks),
        inputs.scalars(scale, softcap, keys.n_sinks),
        *_parts(keys),
        *_parts(values),
    ]
    return decode.launched(_pass_1(), launch, arrays, queries.dtype)


def _plain(rows: Packed) -> mx.array:
    """Return the sinks, or what stands for them where there are none."""
    return _none(rows.dtype) if rows.sinks is None else rows.sinks


def _parts(rows: Packed) -> list[mx.array]:
    """Return words, scales and biases, each of at least 8 elements.

    MLX hands smaller arrays over in another address space.
    """
    if rows.words is None or rows.scales is None or rows.biases is None:
        return [_none(mx.uint32), _none(rows.dtype), _none(rows.dtype)]
    parts = (rows.words, rows.scales, rows.biases)
    spare = [(0, 0), (0, 0), (0, 8), (0, 0)]
    return [mx.pad(part, spare) if part.size < 8 else part for part in parts]


@functools.cache
def _none(dtype: mx.Dtype) -> mx.array:
    return mx.zeros((1, 1, 8, 1), dtype)


@functools.cache
def _pass_1() -> source.Kernel:
    headers = ("decode_common", "packed_rows")
    return source.build(("decode_packed", "decode"), headers, _INPUTS, ("out",))


def forget() -> None:
    """Forget the kernel that was built, as `decode.forget`."""
    _pass_1.cache_clear()
