"""Every kind of decode call that the kernel claims to serve, as points of a grid of nine axes.

The whole grid is half a million calls, of which each kind is compiled: the tests take points
among which every two values of any two axes meet (`covering`), ``scripts/dev/sweep_kernel.py``
takes random ones, as many as there is time for.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
from decode_case import Case, ring_at

from mlx_sink.attention.ring import Ring

W = 90
"""Keys enough that several tiles go to a simdgroup, and some to more than one split."""

Rings = tuple[Ring, ...]
STATES: dict[str, Callable[[int], Rings]] = {
    "one live key": lambda S: (ring_at(S, W, 0),),
    "before the wrap": lambda S: (ring_at(S, W, S + 41),),
    "at the wrap": lambda S: (ring_at(S, W, S + W - 1),),
    "after the wrap": lambda S: (ring_at(S, W, S + 251),),
    "epoch switch": lambda S: (ring_at(S, W, 3 * (S + W) + 19, epoch=S + W),),
    "ragged batch": lambda S: (
        ring_at(S, W, 0),
        ring_at(S, W, S + W),
        ring_at(S, W, 3 * (S + W) + 19, epoch=S + W),
    ),
}

AXES: dict[str, tuple[Any, ...]] = {
    "dtype": (mx.float32, mx.float16, mx.bfloat16),
    "head_dim": (64, 80, 96, 128, 192, 256),
    "group": tuple(range(1, 17)),
    "n": tuple(range(1, 9)),
    "state": tuple(STATES),
    "num_sinks": (0, 1, 4, 100),
    "splits": (1, 4),
    "learned": (False, True),
    "softcap": (None, 1.5),
}
TOLERANCES = {mx.float32: 2e-6, mx.float16: 4e-3, mx.bfloat16: 2e-2}
"""Largest error, in units of the largest output."""

Point = tuple[Any, ...]
"""A value of each axis."""


def case_of(point: Point) -> Case:
    """The call that stands at a point."""
    values = dict(zip(AXES, point, strict=True))
    rings = STATES[values.pop("state")](values.pop("num_sinks"))
    return Case(rings, **values)


def label(point: Point) -> str:
    return "-".join(str(value).replace("mlx.core.", "") for value in point)


def pairs(point: Point) -> set[tuple[int, Any, int, Any]]:
    """The values of a point, two by two, with the numbers of their axes."""
    return {(i, a, j, b) for (i, a), (j, b) in itertools.combinations(enumerate(point), 2)}


def all_pairs() -> set[tuple[int, Any, int, Any]]:
    """What has to meet: every value of an axis and every value of every other."""
    axes = itertools.combinations(enumerate(AXES.values()), 2)
    return {(i, a, j, b) for (i, x), (j, y) in axes for a in x for b in y}


def covering() -> list[Point]:
    """Points among which all pairs meet, always the same: greedily, the best of some at random."""
    chance = random.Random(0)
    points: list[Point] = []
    # In an order of their own: that of a set changes from run to run.
    missing = dict.fromkeys(sorted(all_pairs(), key=str))
    while missing:
        i, a, j, b = next(iter(missing))
        candidates = []
        for point in itertools.islice(random_points(chance), 40):
            fixed = list(point)
            fixed[i], fixed[j] = a, b
            candidates.append(tuple(fixed))
        best = max(candidates, key=lambda point: sum(pair in missing for pair in pairs(point)))
        points.append(best)
        for pair in pairs(best):
            missing.pop(pair, None)
    return points


def random_points(chance: random.Random) -> Iterator[Point]:
    """Points of the grid at random, without end."""
    while True:
        yield tuple(chance.choice(values) for values in AXES.values())
