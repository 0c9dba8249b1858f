"""A decode call on a quantised ring: `decode_case`, and what is held of its keys and values."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
from decode_case import Arrays, Case, arrays

from mlx_sink.attention.kernels.decode_packed import decode_packed
from mlx_sink.attention.kernels.tables import DecodeTables, decode_tables
from mlx_sink.attention.packed import Packed, packed

Bits = tuple[int, int]
Given = tuple[Arrays, Packed, Packed]


def quantised(case: Case, bits: Bits, size: int) -> Given:
    """Arrays of a call, quantised; scales of rows that no token of the call owns hold NaN."""
    a, S = arrays(case), case.rings[0].num_sinks
    rows: list[Packed] = []
    for x, b in ((a.k, bits[0]), (a.v, bits[1])):
        dead = mx.isnan(x[..., :1])
        held = packed(mx.where(dead, 0, x), S, b, size)
        if held.scales is not None:
            held = replace(held, scales=mx.where(dead[:, :, S:], mx.nan, held.scales))
        rows.append(held if held.sinks is None else replace(held, sinks=x[:, :, :S]))
    blocks = [lay.block(lay.ring.tokens, lay.end) for lay in case.layouts]
    each = [
        decode_tables(lay, block, case.rotation, packed=True)
        for lay, block in zip(case.layouts, blocks, strict=True)
    ]
    tables = each[0] if len(each) == 1 else DecodeTables.stack(each)
    k, v = (r.expanded() for r in rows)
    return Arrays(a.q, k, v, a.learned, tables, a.scale), *rows


def run(case: Case, given: Given) -> mx.array:
    a, k, v = given
    return decode_packed(
        *(a.q, k, v, a.tables),
        scale=a.scale,
        softcap=case.softcap,
        learned_sinks=a.learned,
        splits=case.splits,
    )
