"""The rotation read from each rope module, against float64 formulas of the embeddings' papers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.rope_utils import (
    DynamicNTKScalingRoPE,
    Llama3RoPE,
    ProportionalRoPE,
    SuScaledRoPE,
    YarnRoPE,
)
from mlx_lm.models.smollm3 import NoPE

from mlx_sink import UnsupportedModelError
from mlx_sink.attention.rope import RECENT, Rotation
from mlx_sink.models.trace import rope_call

HEAD_DIM = 16
EPOCH = 32768
FARTHEST = 2 * EPOCH
"""Positions stay below two epochs and a chunk."""


def plain(dims: int, base: float = 10000.0) -> np.ndarray:
    """Radians per position of each pair, ``[dims / 2]``."""
    return base ** -(np.arange(0, dims, 2) / dims)


def llama3(factor: float, low: float, high: float, context: int) -> np.ndarray:
    """Llama 3.1's scaling: slow pairs slowed by ``factor``, fast ones kept, a ramp between."""
    frequencies = plain(HEAD_DIM)
    turns = context * frequencies / (2 * np.pi)
    ramp = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (ramp + (1 - ramp) / factor)


def yarn(factor: float, context: int, fast: float = 32, slow: float = 1) -> np.ndarray:
    """YaRN, arXiv:2309.00071 section 3.2, with the bounds rounded outwards as its code does."""

    def pair(turns: float) -> float:
        return HEAD_DIM * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(10000.0))

    low, high = max(math.floor(pair(fast)), 0), min(math.ceil(pair(slow)), HEAD_DIM - 1)
    ramp = np.clip((np.arange(HEAD_DIM // 2) - low) / (high - low), 0, 1)
    return plain(HEAD_DIM) * ((1 - ramp) + ramp / factor)


@dataclass(frozen=True)
class Case:
    """A rope module as mlx-lm makes it, and what it is in float64."""

    rope: Callable[..., mx.array]
    frequencies: np.ndarray
    interleaved: bool = False
    scale: float = 1.0


LONG_FACTOR = [1.0, 1.5, 2.0, 3.0, 4.0, 6.0]

CASES = {
    "plain": Case(nn.RoPE(HEAD_DIM), plain(HEAD_DIM)),
    "plain, base 1e6": Case(nn.RoPE(HEAD_DIM, base=1e6), plain(HEAD_DIM, 1e6)),
    "interleaved": Case(nn.RoPE(HEAD_DIM, traditional=True), plain(HEAD_DIM), True),
    "linear": Case(nn.RoPE(HEAD_DIM, scale=1 / 3), plain(HEAD_DIM) / 3),
    "partial": Case(nn.RoPE(HEAD_DIM // 4), plain(HEAD_DIM // 4)),
    "partial, interleaved": Case(
        nn.RoPE(HEAD_DIM // 2, traditional=True), plain(HEAD_DIM // 2), True
    ),
    "llama3": Case(
        Llama3RoPE(
            HEAD_DIM,
            scaling_config={
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            },
        ),
        llama3(8.0, 1.0, 4.0, 512),
    ),
    "yarn": Case(
        YarnRoPE(HEAD_DIM, scaling_factor=4.0, original_max_position_embeddings=256),
        yarn(4.0, 256),
        scale=0.1 * math.log(4.0) + 1.0,
    ),
    "yarn, interleaved": Case(
        YarnRoPE(
            HEAD_DIM, traditional=True, scaling_factor=4.0, original_max_position_embeddings=256
        ),
        yarn(4.0, 256),
        True,
        0.1 * math.log(4.0) + 1.0,
    ),
    "longrope": Case(
        SuScaledRoPE(
            len(LONG_FACTOR) * 2,
            max_position_embeddings=4096,
            original_max_position_embeddings=256,
            long_factor=LONG_FACTOR,
        ),
        plain(len(LONG_FACTOR) * 2) / LONG_FACTOR,
        scale=math.sqrt(1 + math.log(16) / math.log(256)),
    ),
    "proportional": Case(
        ProportionalRoPE(HEAD_DIM, rotated_dims=HEAD_DIM // 2),
        np.concatenate([plain(HEAD_DIM)[: HEAD_DIM // 4], np.zeros(HEAD_DIM // 4)]),
    ),
    "no positions": Case(NoPE(), np.zeros(0)),
}

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def rotate(x: np.ndarray, positions: np.ndarray, case: Case) -> np.ndarray:
    """Rotate the rows of x ``[..., L, head_dim]`` in float64, pair by pair."""
    out = x.astype(np.float64)
    pairs = len(case.frequencies)
    for i, frequency in enumerate(case.frequencies):
        a, b = (2 * i, 2 * i + 1) if case.interleaved else (i, i + pairs)
        cos, sin = np.cos(positions * frequency), np.sin(positions * frequency)
        out[..., a] = x[..., a] * cos - x[..., b] * sin
        out[..., b] = x[..., a] * sin + x[..., b] * cos
    return out


def vectors(rows: int, seed: int = 0) -> np.ndarray:
    """Return ``[2, 3, rows, HEAD_DIM]`` of ordinary size."""
    return np.random.default_rng(seed).standard_normal((2, 3, rows, HEAD_DIM)).astype(np.float32)


def read(rope: Callable[..., mx.array]) -> Rotation:
    """Return the rotation that a module asks MLX for."""
    return Rotation.of(rope_call(rope, HEAD_DIM))


@each_case
def test_reads_the_frequencies(case: Case):
    """A frequency that is off turns queries by the wrong angle, the more the longer it runs."""
    rotation = read(case.rope)
    np.testing.assert_allclose(rotation.frequencies, case.frequencies, rtol=1e-6)
    assert rotation.interleaved == case.interleaved
    assert rotation.dims == 2 * len(case.frequencies)
    assert rotation.is_identity == (not case.frequencies.any())


def test_none_is_the_identity():
    rotation = Rotation.of(None)
    assert rotation.is_identity
    x = mx.array(vectors(2))
    assert mx.array_equal(rotation.turn(x, [3, 4], key="a"), x)


@each_case
def test_turn_rotates_each_row_by_its_own_position(case: Case):
    """Also backwards: the turn towards sinks is negative once the stream is long."""
    positions = np.array([0, 1, -1, 17, -250, 1000])
    x = vectors(len(positions))
    rotation = Rotation(case.frequencies, case.interleaved)
    turned = np.array(rotation.turn(mx.array(x), positions.tolist(), key="a"))
    np.testing.assert_allclose(turned, rotate(x, positions, case), atol=2e-6)


@each_case
def test_turn_is_accurate_at_any_distance(case: Case):
    """Angles are worked out in float64: a turn of two epochs must be as good as one of 1."""
    positions = np.array([FARTHEST, -FARTHEST, 2**31, 3])
    x = vectors(len(positions))
    rotation = Rotation(case.frequencies, case.interleaved)
    turned = np.array(rotation.turn(mx.array(x), positions.tolist(), key="a"))
    np.testing.assert_allclose(turned, rotate(x, positions, case), atol=2e-6)


@each_case
@pytest.mark.parametrize("position", [0, 1, -17, 1000, FARTHEST, -FARTHEST])
def test_a_single_row_is_turned_like_many(case: Case, position: int):
    """A decode step goes another way to the same rotation, dimensions beyond `dims` included."""
    x = vectors(1)
    rotation = Rotation(case.frequencies, case.interleaved)
    turned = np.array(rotation.turn(mx.array(x), [position], key="a"))
    np.testing.assert_allclose(turned, rotate(x, np.array([position]), case), atol=2e-6)


@each_case
@pytest.mark.parametrize(("a", "b"), [(0, 5), (9, -4), (100, 400), (700, -650)])
def test_turning_after_rope_is_rope_further_on(case: Case, a: int, b: int):
    """R(b) rope(x, a) == rope(x, a + b), the module's own scale passed through."""
    x = vectors(3)
    turned = read(case.rope).turn(case.rope(mx.array(x), offset=a), [b] * 3, key="a")
    scaled = x.copy()
    scaled[..., : 2 * len(case.frequencies)] *= case.scale
    expected = rotate(scaled, a + b + np.arange(3), case)
    np.testing.assert_allclose(np.array(turned), expected, atol=3e-4)
    if a + b == 5:
        np.testing.assert_allclose(np.array(turned), expected, atol=3e-6)


@each_case
@pytest.mark.parametrize(
    ("position", "turn", "key"),
    [
        (EPOCH - 1, 0, EPOCH - 1000),
        (FARTHEST - 1, 0, FARTHEST - 1000),
        (5, EPOCH, EPOCH - 900),
        (FARTHEST - 1, 1027 - (FARTHEST - 1), 0),
    ],
    ids=["end of an epoch", "end of a long chunk", "epoch before", "sink"],
)
def test_distances_at_the_largest_positions(case: Case, position: int, turn: int, key: int):
    """What float32 positions cost: q.k of unit vectors at most 5e-4 off, up to two epochs."""
    q, k = (x / np.linalg.norm(x) for x in (vectors(1, seed)[:1, :1] for seed in (1, 2)))
    query = case.rope(mx.array(q), offset=position)
    query = np.array(read(case.rope).turn(query, [turn], key="a"))
    product = (query * np.array(case.rope(mx.array(k), offset=key))).sum()
    rotated = slice(0, 2 * len(case.frequencies))
    q[..., rotated] *= case.scale
    k[..., rotated] *= case.scale
    exact = rotate(q, np.array([position + turn - key]), case) * k
    assert product == pytest.approx(exact.sum(), abs=5e-4)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(mx.float32, 1e-6), (mx.float16, 3e-3), (mx.bfloat16, 2e-2)]
)
def test_turn_keeps_the_dtype_and_rounds_once(dtype: mx.Dtype, tolerance: float):
    """Half precision in, half precision out, the rotation itself in float32."""
    case, x = CASES["partial"], mx.array(vectors(2)).astype(dtype)
    turned = read(case.rope).turn(x, [40_000, -40_000], key="a")
    assert turned.dtype == dtype
    exact = rotate(np.array(x.astype(mx.float32)), np.array([40_000, -40_000]), case)
    np.testing.assert_allclose(np.array(turned.astype(mx.float32)), exact, atol=tolerance)
    untouched = slice(2 * len(case.frequencies), None)
    assert mx.array_equal(turned[..., untouched], x[..., untouched])


def test_tables_are_kept_by_key_and_forgotten():
    """A table under the wrong key would turn by another step's angles; one kept for ever leaks."""
    rotation, x = Rotation(plain(HEAD_DIM)), mx.array(vectors(1))
    first = rotation.turn(x, [1], key=0)
    for b in range(1, 40):
        expected = rotate(np.array(x), np.array([b + 1]), CASES["plain"])
        np.testing.assert_allclose(np.array(rotation.turn(x, [b + 1], key=b)), expected, atol=2e-6)
    assert len(rotation._recent) <= RECENT
    assert mx.array_equal(rotation.turn(x, [1], key=0), first)


class Raced(dict[Any, Any]):
    """A dictionary from which another thread takes what this one has just looked up."""

    def __iter__(self) -> Iterator[Any]:
        oldest = min(self.keys())
        del self[oldest]
        return iter([oldest])


def test_streams_in_several_threads_share_the_tables():
    """A server's streams are of one model: what one forgets another may have forgotten."""
    rotation, x = Rotation(plain(HEAD_DIM)), mx.array(vectors(2))
    rotation._recent = Raced()
    for b in range(12):
        expected = rotate(np.array(x), np.array([b, b]), CASES["plain"])
        turned = np.array(rotation.turn(x, [b, b], key=b))
        np.testing.assert_allclose(turned, expected, atol=2e-6)
    assert rotation._recent.keys() == set(range(12 - RECENT, 12))


def test_copies_share_the_rotation():
    """mlx-lm's server deep-copies caches: the tables are no part of a stream's state."""
    rotation = Rotation(plain(4))
    assert copy.deepcopy({"a": rotation})["a"] is rotation


@each_case
def test_check_accepts(case: Case):
    read(case.rope).check(case.rope, HEAD_DIM, FARTHEST)


class Unscaled(nn.RoPE):
    """Says it halves the frequencies and does not."""

    def __call__(self, x: mx.array, offset: int = 0) -> mx.array:
        return mx.fast.rope(
            x, self.dims, traditional=False, base=self.base, scale=1.0, offset=offset
        )


def test_check_goes_by_what_a_module_does():
    """What it says of itself is not read: only what it asks of MLX."""
    rope = Unscaled(HEAD_DIM, scale=0.5)
    np.testing.assert_allclose(read(rope).frequencies, plain(HEAD_DIM))
    read(rope).check(rope, HEAD_DIM, FARTHEST)


@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize("width", [HEAD_DIM, HEAD_DIM + 5])
def test_a_part_without_positions_may_come_first(traditional: bool, width: int):
    """Latent attention rotates only the end of its keys; partial rotary only its beginning."""
    rope = nn.RoPE(HEAD_DIM - 4, traditional=traditional)
    rotation = Rotation.of(rope_call(rope, HEAD_DIM), width)
    assert rotation.start == width - HEAD_DIM
    x = np.random.default_rng(0).standard_normal((1, 2, 3, width)).astype(np.float32)
    case = Case(rope, plain(HEAD_DIM - 4), traditional)
    for turns in ([7, -2, 500], [-300]):
        rows = x[:, :, : len(turns)]
        expected = rows.astype(np.float64)
        expected[..., rotation.start :] = rotate(
            rows[..., rotation.start :], np.array(turns), case
        )
        turned = np.array(rotation.turn(mx.array(rows), turns, key=len(turns)))
        np.testing.assert_allclose(turned, expected, atol=2e-6)


class NormAfter(nn.Module):
    """A norm with weights between the rotation and the product with the keys."""

    def __init__(self):
        super().__init__()
        self.rope = nn.RoPE(HEAD_DIM)
        self._freqs = mx.array(1 / plain(HEAD_DIM))
        self.weight = mx.linspace(0.5, 1.5, HEAD_DIM)

    def __call__(self, x: mx.array, offset: int = 0) -> mx.array:
        return mx.fast.rms_norm(self.rope(x, offset=offset), self.weight, 1e-5)


class Growing(nn.RoPE):
    """A rotation that also scales by the position, as xPos does."""

    def __call__(self, x: mx.array, offset: int = 0) -> mx.array:
        return super().__call__(x, offset=offset) * (1 + offset / 1000)


class Learned(nn.Module):
    """Positions that are added, not rotated."""

    def __call__(self, x: mx.array, offset: int = 0) -> mx.array:
        return x + mx.sin(mx.array(float(offset)))


@pytest.mark.parametrize(
    "rope",
    [
        DynamicNTKScalingRoPE(
            HEAD_DIM, max_position_embeddings=2048, traditional=False, base=10000.0, factor=2.0
        ),
        NormAfter(),
        Growing(HEAD_DIM),
        Learned(),
    ],
    ids=lambda rope: type(rope).__name__,
)
def test_check_refuses_what_is_no_fixed_rotation(rope: Callable[..., mx.array]):
    """Turning queries would give wrong distances in silence."""
    with pytest.raises(UnsupportedModelError) as caught:
        read(rope).check(rope, HEAD_DIM, FARTHEST)
    message = str(caught.value)
    assert message.startswith("its position embedding is not a fixed rotation: from position ")
    assert "\n" not in message


@pytest.mark.parametrize(
    "wrong",
    [
        Rotation(plain(HEAD_DIM), interleaved=True),
        Rotation(plain(HEAD_DIM, 10500.0)),
        Rotation(plain(HEAD_DIM // 2)),
        Rotation(-plain(HEAD_DIM)),
        Rotation([]),
    ],
    ids=["pairing", "base", "dims", "sign", "identity"],
)
def test_check_refuses_a_misread_rotation(wrong: Rotation):
    """The check is what stands between a misread module and wrong distances."""
    rope = nn.RoPE(HEAD_DIM)
    with pytest.raises(UnsupportedModelError, match="not a fixed rotation"):
        wrong.check(rope, HEAD_DIM, FARTHEST)


def test_check_sees_far_errors():
    """One part in 10,000 is invisible near and 6 radians at the end of two epochs."""
    with pytest.raises(UnsupportedModelError, match="not a fixed rotation"):
        Rotation(plain(HEAD_DIM) * (1 + 1e-4)).check(nn.RoPE(HEAD_DIM), HEAD_DIM, FARTHEST)
