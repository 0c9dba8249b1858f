"""The decode kernel's text, run on the CPU, against float64, over all that it claims to serve."""

from __future__ import annotations

from collections.abc import Iterator

import host_metal
import mlx.core as mx
import pytest
from decode_case import Case, arrays, error, run
from decode_grid import AXES, TOLERANCES, Point, all_pairs, case_of, covering, label, pairs
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_sink.attention.kernels import decode as kernel

COVERING = covering()


@pytest.fixture(autouse=True, scope="module")
def on_the_host() -> Iterator[None]:
    """Build the kernels with the runner in the place of MLX."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx.fast, "metal_kernel", host_metal.metal_kernel)
        kernel.forget()
        yield
    kernel.forget()


def check(case: Case) -> None:
    a = arrays(case)
    assert error(case, a, run(case, a)) <= TOLERANCES[case.dtype]


def test_every_two_values_meet():
    met = set().union(*map(pairs, COVERING))
    assert met == all_pairs()
    assert len(met) > 900


@pytest.mark.parametrize("point", COVERING, ids=label)
def test_grid(point: Point):
    check(case_of(point))


@settings(max_examples=settings.default.max_examples // 8)
@given(point=st.tuples(*map(st.sampled_from, AXES.values())), seed=st.integers(0, 1000))
def test_any_point(point: Point, seed: int):
    """Points that no run has seen before: each compiles a kernel of its own."""
    check(case_of(point).with_(seed=seed))
