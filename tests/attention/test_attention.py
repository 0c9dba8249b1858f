"""The attention over a ring against brute force in float64, one query at a time.

The brute force places each visible token at its position within the cache, as the paper does,
and rotates it there: no ring, no epochs, no turns, no blocks.
"""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from brute_force import (
    BASE,
    Extras,
    Heads,
    Stream,
    attended,
    brute_force,
    rotation_of,
)
from tiny import every, mixed

from mlx_sink import SinkConfig
from mlx_sink.attention.dispatch import sink_attention
from mlx_sink.attention.layout import blocks_of, layout_of
from mlx_sink.attention.ring import Ring

TOLERANCES = {mx.float32: 1e-5, mx.float16: 1e-2, mx.bfloat16: 8e-2}
"""Largest error of outputs of size about 1; half precision rounds q and k after RoPE as well."""


def check(
    heads: Heads,
    config: SinkConfig,
    lengths: Iterable[int],
    *,
    n: int = 48,
    batch: int = 1,
    dtype: mx.Dtype = mx.float32,
    rope: nn.RoPE | None = None,
    extras: Extras | None = None,
) -> None:
    """Compare a stream with brute force; the scale makes the softmax pick a few keys."""
    stream = Stream.random(heads, n, batch, dtype)
    scale = 1.5 * heads.head_dim**-0.5
    ours = attended(stream, config, rope, lengths, scale, extras)
    exact = brute_force(stream, config, rope, scale, extras)
    np.testing.assert_allclose(ours, exact, atol=TOLERANCES[dtype], rtol=0)


SHAPES = {
    "MHA": Heads(2, 2),
    "GQA": Heads(4, 2),
    "MQA": Heads(4, 1),
    "head_dim 64": Heads(4, 2, 64, 64),
    "values narrower": Heads(4, 2, 16, 8),
    "values wider": Heads(2, 1, 8, 24),
}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("heads", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("S", [0, 1, 4])
def test_equals_brute_force(dtype: mx.Dtype, heads: Heads, S: int):
    """Chunks and decode steps, before, at and after the wrap, over several epochs."""
    config = SinkConfig(S, 7, epoch=S + 9)
    lengths = mixed(S + 6, 1, 1, 1, 9, 1, 3)
    check(heads, config, lengths, dtype=dtype, rope=nn.RoPE(heads.head_dim, base=BASE))


@pytest.mark.parametrize("block", [1, 2, 5, 8, 256], indirect=True)
@pytest.mark.parametrize("lengths", [1, 2, 11, 48])
@pytest.mark.parametrize("S", [0, 3])
def test_blocks_change_nothing(block: int, lengths: int, S: int):
    """A chunk is cut into blocks, and each must meet exactly its own keys."""
    check(Heads(), SinkConfig(S, 6, epoch=13), every(lengths), rope=nn.RoPE(8, base=BASE))


@pytest.mark.parametrize("block", [4, 256], indirect=True)
@pytest.mark.parametrize("longer", [0, 1, 5, 1000])
@pytest.mark.parametrize(("S", "W"), [(0, 1), (1, 1), (5, 1), (5, 3), (2, 16), (0, 16)])
def test_windows_and_epochs(block: int, longer: int, S: int, W: int):
    """Windows shorter than the sinks, and of one token; epochs as short as the capacity."""
    config = SinkConfig(S, W, epoch=S + W + longer)
    check(Heads(2, 1), config, mixed(S + W, 1, 1, 1, seed=S + W), rope=nn.RoPE(8, base=BASE))


ROPES = {
    "none": None,
    "interleaved": nn.RoPE(8, traditional=True, base=BASE),
    "partial": nn.RoPE(4, base=BASE),
    "partial, interleaved": nn.RoPE(6, traditional=True, base=BASE),
}


@pytest.mark.parametrize("block", [4, 256], indirect=True)
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES.keys())
@pytest.mark.parametrize("S", [0, 3])
def test_kinds_of_rope(block: int, rope: nn.RoPE | None, S: int):
    check(Heads(), SinkConfig(S, 6, epoch=12), mixed(8, 1, 10, 1, 1), rope=rope)


@pytest.mark.parametrize("batch", [2, 3])
@pytest.mark.parametrize("block", [4, 256], indirect=True)
def test_batches(batch: int, block: int):
    """Rows of a batch must not mix when query heads are folded into rows."""
    lengths = mixed(8, 1, 10, 1, 1)
    check(Heads(), SinkConfig(2, 6, epoch=12), lengths, batch=batch, rope=nn.RoPE(8, base=BASE))


EXTRAS = {
    "softcap": Extras(softcap=1.5),
    "learned": Extras(learned_sinks=(0.5, -1.0, 3.0, 1.5)),
    "both": Extras(1.5, (0.5, -1.0, 3.0, 1.5)),
    "logits above all scores": Extras(learned_sinks=(200.0, -200.0, 9.0, 0.0)),
}


@pytest.mark.parametrize("block", [4, 256], indirect=True)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("rope", [nn.RoPE(8, base=BASE), None], ids=["rope", "no positions"])
@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS.keys())
def test_softcap_and_learned_sinks(
    block: int, dtype: mx.Dtype, rope: nn.RoPE | None, extras: Extras
):
    """In chunks and steps, before and after the wrap, where MLX's kernel serves and elsewhere."""
    lengths = mixed(8, 1, 10, 1, 1)
    config = SinkConfig(2, 6, epoch=12)
    check(Heads(), config, lengths, batch=2, dtype=dtype, rope=rope, extras=extras)


def test_one_softmax_over_all_ranges():
    """Equal values come out unchanged: the weights of all ranges together sum to 1."""
    stream = Stream.random(Heads(), 40)
    same = Stream(stream.q, stream.k, mx.ones_like(stream.v))
    out = attended(same, SinkConfig(3, 5, epoch=9), nn.RoPE(8), mixed(7, 1, 1), 1.0)
    np.testing.assert_allclose(out, 1.0, atol=1e-6)


def test_large_scores_do_not_overflow():
    """Scores far above 88 overflow exp in float32 unless the maximum is taken off first."""
    stream = Stream.random(Heads(), 40)
    config, rope = SinkConfig(3, 5, epoch=9), nn.RoPE(8, base=BASE)
    out = attended(stream, config, rope, mixed(7, 1, 1), 200.0)
    np.testing.assert_allclose(out, brute_force(stream, config, rope, 200.0), atol=2e-3)


@pytest.mark.parametrize("block", [16], indirect=True)
def test_rows_that_no_query_of_a_block_sees_are_not_touched(block: int):
    """What makes long chunks cheap: NaN in keys outside a block's ranges would show."""
    S, W, n = 2, 8, 64
    layout = layout_of(Ring(S, W, epoch=100, tokens=50), n)
    last = blocks_of(layout, block)[-1]
    seen = {r.row + i for r in last.ranges for i in range(r.length)}
    rows = sum(run.length for run in layout.runs)
    stream = Stream.random(Heads(), rows)
    hole = mx.array([row not in seen for row in range(rows)])[None, None, :, None]
    keys, values = (mx.where(hole, mx.nan, x) for x in (stream.k, stream.v))
    out = sink_attention(
        stream.q[:, :, -n:],
        keys,
        values,
        layout=layout,
        rotation=rotation_of(nn.RoPE(8)),
        scale=1.0,
    )
    assert len(seen) == S + W - 1 + block
    assert not mx.isnan(out[:, :, -block:]).any()
    assert mx.isnan(out[:, :, :block]).any(), "the holes are where earlier blocks look"
