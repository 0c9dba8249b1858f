"""A call with random arrays, and what it must give in float64.

The reference knows the contract (who sees whom, at which distance) and what a ring says about
where a token was rotated; it has no ranges, turns, tiles or splits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np
from tiny import distance, visible

from mlx_sink.attention.kernels.decode import decode
from mlx_sink.attention.kernels.tables import DecodeTables, decode_tables
from mlx_sink.attention.layout import Layout, layout_of
from mlx_sink.attention.ring import Ring
from mlx_sink.attention.rope import Rotation

BASE = 100.0
"""Of the rotary embedding: small, so that a wrong turn shows within a few tokens."""


@dataclass(frozen=True)
class Case:
    """One call. The ring of every sequence of the batch is given: they may differ."""

    rings: tuple[Ring, ...]
    dtype: mx.Dtype = mx.float32
    head_dim: int = 64
    v_head_dim: int | None = None
    n_kv: int = 2
    group: int = 2
    n: int = 1
    splits: int | None = 1
    learned: bool = False
    softcap: float | None = None
    rotated: int | None = None
    interleaved: bool = False
    seed: int = field(default=0, compare=False)

    @property
    def layouts(self) -> list[Layout]:
        return [layout_of(ring, self.n) for ring in self.rings]

    @property
    def rotation(self) -> Rotation:
        dims = self.head_dim if self.rotated is None else self.rotated
        return Rotation(BASE ** -(np.arange(0, dims, 2) / dims), self.interleaved)

    def with_(self, **changes: object) -> Case:
        return replace(self, **changes)


def ring_at(S: int, W: int, tokens: int, epoch: int = 0) -> Ring:
    """A ring after ``tokens`` tokens; its epoch began at the last multiple of ``epoch``."""
    epoch = epoch or 10 * (S + W)
    start = tokens // epoch * epoch
    return Ring(S, W, epoch, tokens, start, max(start - epoch, 0))


@dataclass(frozen=True)
class Arrays:
    q: mx.array
    k: mx.array
    v: mx.array
    learned: mx.array | None
    tables: Any
    scale: float


def tables_of(layout: Layout, rotation: Rotation) -> DecodeTables:
    return decode_tables(layout, layout.block(layout.ring.tokens, layout.end), rotation)


def arrays(case: Case, make: Callable[[Layout, Rotation], Any] = tables_of) -> Arrays:
    """Random arrays, and the tables that `make` makes; rows that no token owns hold NaN."""
    random = np.random.default_rng(case.seed)
    B, H = len(case.rings), case.n_kv * case.group
    D, DV = case.head_dim, case.v_head_dim or case.head_dim
    rows = max(run.row + run.length for lay in case.layouts for run in lay.runs) + 3

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    k, v = normal(B, case.n_kv, rows, D), normal(B, case.n_kv, rows, DV)
    for b, layout in enumerate(case.layouts):
        hole = np.ones(rows, bool)
        for run in layout.runs:
            hole[run.row : run.row + run.length] = False
        k[b, :, hole], v[b, :, hole] = np.nan, np.nan
    rotation = case.rotation
    each = [make(layout, rotation) for layout in case.layouts]
    return Arrays(
        mx.array(normal(B, H, case.n, D)).astype(case.dtype),
        mx.array(k).astype(case.dtype),
        mx.array(v).astype(case.dtype),
        mx.array(normal(H)) if case.learned else None,
        each[0] if B == 1 else type(each[0]).stack(each),
        2.0 * D**-0.5,  # sharp: the softmax picks a few keys
    )


def run(case: Case, given: Arrays | None = None) -> mx.array:
    a = given or arrays(case)
    return decode(
        a.q,
        a.k,
        a.v,
        a.tables,
        scale=a.scale,
        softcap=case.softcap,
        learned_sinks=a.learned,
        splits=case.splits,
    )


def exact(case: Case, a: Arrays) -> np.ndarray:
    """What the call must give, ``[B, n_heads, n, v_head_dim]`` in float64."""
    q, k, v = (as_float64(x) for x in (a.q, a.k, a.v))
    out = np.empty((*q.shape[:3], v.shape[3]))
    for b, layout in enumerate(case.layouts):
        row_of = {run.token + i: run.row + i for run in layout.runs for i in range(run.length)}
        for j in range(case.n):
            tokens, further = _seen(layout.ring, j)
            rows = [row_of[token] for token in tokens]
            each, which = np.unique(further, return_inverse=True)
            turned = [_turned(q[b, :, j], by, case.rotation) for by in each]
            for h in range(q.shape[1]):
                key, value = k[b, h // case.group, rows], v[b, h // case.group, rows]
                scores = (np.stack([x[h] for x in turned])[which] * key).sum(-1) * a.scale
                if case.softcap is not None:
                    scores = case.softcap * np.tanh(scores / case.softcap)
                sink = float(a.learned[h].item()) if a.learned is not None else -np.inf
                top = max(scores.max(), sink)
                weights = np.exp(scores - top)
                out[b, h, j] = weights @ value / (weights.sum() + np.exp(sink - top))
    return out


def _seen(ring: Ring, j: int) -> tuple[list[int], list[int]]:
    """The tokens that query j sees, and how much further than its position it must turn."""
    t, S, W = ring.tokens + j, ring.num_sinks, ring.window
    tokens = list(visible(t, S, W))
    position = t - ring.start
    further = []
    for a in tokens:
        began = 0 if a < S else ring.start if a >= ring.start else ring.previous
        further.append(distance(t, a, S, W) - (position - (a - began)))
    return tokens, further


def _turned(q: np.ndarray, by: int, rotation: Rotation) -> np.ndarray:
    out, dims = q.copy(), rotation.dims
    if by == 0:
        return out
    pairs = np.arange(dims // 2)
    first = 2 * pairs if rotation.interleaved else pairs
    second = first + (1 if rotation.interleaved else dims // 2)
    turn = (q[..., first] + 1j * q[..., second]) * np.exp(1j * by * rotation.frequencies)
    out[..., first], out[..., second] = turn.real, turn.imag
    return out


def as_float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def error(case: Case, a: Arrays, out: mx.array) -> float:
    """Largest error in units of the largest output."""
    wanted = exact(case, a)
    assert out.dtype == case.dtype
    assert tuple(out.shape) == wanted.shape
    got = as_float64(out)
    assert np.isfinite(got).all(), "a slot that holds no token was used"
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())
