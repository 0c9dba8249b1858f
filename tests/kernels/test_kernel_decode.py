"""The decode kernel's text, run on the CPU, against float64: one thing at a time.

`test_kernel_grid.py` has them together. Every case runs under the runner's checks: races, bounds,
uninitialised memory, barriers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

import host_metal
import mlx.core as mx
import numpy as np
import pytest
from decode_case import Arrays, Case, arrays, error, ring_at, run
from decode_grid import TOLERANCES, W
from hypothesis import given
from hypothesis import strategies as st

from mlx_sink.attention.kernels import decode as kernel
from mlx_sink.attention.kernels import source
from mlx_sink.attention.kernels.tables import decode_tables
from mlx_sink.attention.ring import Ring
from mlx_sink.attention.rope import Rotation
from mlx_sink.errors import KernelError

DTYPES = list(TOLERANCES)

MLX_METAL_KERNEL = mx.fast.metal_kernel
AFTER = (ring_at(4, W, 271),)
"""A ring that has wrapped, in its first epoch: the sinks need a turn."""
SWITCH = (ring_at(4, W, 215, epoch=100),)
"""15 tokens into its third epoch: most of the window lies in the second."""


@pytest.fixture(autouse=True, scope="module")
def on_the_host() -> Iterator[None]:
    """Build the kernels with the runner in the place of MLX."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx.fast, "metal_kernel", host_metal.metal_kernel)
        kernel.forget()
        yield
    kernel.forget()


def check(case: Case) -> Arrays:
    a = arrays(case)
    assert error(case, a, run(case, a)) <= TOLERANCES[case.dtype]
    return a


def report() -> host_metal.Report:
    """What the latest launch of pass 1 did."""
    built = kernel._pass_1()
    assert isinstance(built, host_metal.HostKernel)
    return built.report


# head_dim, query heads a kv head, queries: any head that 16 divides, beside those of the grid.
SHAPES = [
    (16, 1, 1), (32, 16, 8), (48, 3, 2), (112, 2, 2), (144, 5, 1), (160, 1, 2), (176, 2, 1),
    (208, 4, 1), (224, 2, 1), (240, 1, 3),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_head_dims(shape: tuple[int, int, int]):
    D, G, n = shape
    dtype = DTYPES[SHAPES.index(shape) % len(DTYPES)]
    check(Case(SWITCH, dtype, D, n_kv=1, group=G, n=n))


@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("splits", [1, 3])
def test_queries(n: int, splits: int):
    check(Case(SWITCH, mx.bfloat16, 32, group=2, n=n, splits=splits))


STATES = {
    "one live key": lambda S: ring_at(S, W, 0),
    "before the wrap": lambda S: ring_at(S, W, S + 41),
    "at the wrap": lambda S: ring_at(S, W, S + W - 1),
    "first evicted": lambda S: ring_at(S, W, S + W),
    "after the wrap": lambda S: ring_at(S, W, S + 251),
    "the epoch has just begun": lambda S: ring_at(S, W, 3 * (S + W), epoch=S + W),
    "two epochs": lambda S: ring_at(S, W, 3 * (S + W) + 19, epoch=S + W),
    "endless": lambda S: ring_at(S, W, (1 << 40) + 5, epoch=1 << 10),
    "window of one": lambda S: ring_at(S, 1, S + 9),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("S", [0, 1, 4, 100])
@pytest.mark.parametrize("n", [1, 5])
def test_states_of_the_ring(state: str, S: int, n: int):
    """Before, at and after the wrap, over epochs; more splits than keys among them."""
    splits = 1 if S % 2 else 4
    check(Case((STATES[state](S),), head_dim=32, n_kv=1, n=n, splits=splits))


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("splits", [1, 3])
def test_sequences_at_different_tokens(n: int, splits: int):
    rings = tuple(STATES[state](4) for state in ("one live key", "first evicted", "two epochs"))
    check(Case(rings, head_dim=32, n=n, splits=splits))


def test_sequences_that_share_their_tables():
    """One row of tables serves a batch whose sequences stand at the same token."""
    one = arrays(Case(SWITCH, n=2))
    both = Case(SWITCH * 3, n=2)
    a = arrays(both)
    shared = Arrays(a.q, a.k, a.v, a.learned, one.tables, a.scale)
    assert error(both, a, run(both, shared)) <= 2e-6


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("group", [2, 16])
def test_learned_sinks_and_softcap(splits: int, learned: bool, softcap: float | None, group: int):
    check(Case(SWITCH, n=3, group=group, splits=splits, learned=learned, softcap=softcap))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("rotated", [0, 2, 24, 64])
@pytest.mark.parametrize("interleaved", [False, True])
def test_kinds_of_rotation(n: int, rotated: int, interleaved: bool):
    """Partial rotary, both pairings; a layer without positions has nothing to turn."""
    check(Case(SWITCH, rotated=rotated, interleaved=interleaved, n=n))


@pytest.mark.parametrize("dims", [(192, 128), (64, 80), (16, 128)])
@pytest.mark.parametrize("group", [1, 12])
def test_values_of_another_size(dims: tuple[int, int], group: int):
    check(Case(SWITCH, mx.float16, dims[0], dims[1], group=group, splits=2))


def test_any_number_of_rows():
    """Rows beyond the last are not stored: 3 simdgroups of 5 rows share out 13."""
    check(Case(SWITCH, head_dim=192, n_kv=1, group=13))


@pytest.mark.parametrize("splits", [1, 2])
def test_large_scores_do_not_overflow(splits: int):
    """Scores far above 128 overflow exp2 in float32 unless the maximum is taken off first."""
    case = Case(SWITCH, splits=splits)
    a = arrays(case)
    a = Arrays(a.q * 100, a.k, a.v, a.learned, a.tables, a.scale)
    assert error(case, a, run(case, a)) <= 1e-4


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any ring, with the few specialisations that are compiled anyway."""
    S, window = draw(st.sampled_from([0, 1, 2, 4, 100])), draw(st.integers(1, 120))
    epoch = S + window + draw(st.integers(0, 50))

    def ring() -> Ring:
        return ring_at(S, window, draw(st.integers(0, 3 * epoch)), epoch)

    n = draw(st.sampled_from([1, 5]))
    rings = tuple(ring() for _ in range(draw(st.integers(1, 2))))
    splits, seed = draw(st.integers(1, 6)), draw(st.integers(0, 1000))
    return Case(rings, head_dim=32, n_kv=draw(st.integers(1, 3)), n=n, splits=splits, seed=seed)


@given(case=cases())
def test_any_ring(case: Case):
    check(case)


@pytest.mark.parametrize("group", [2, 16])
def test_other_schedules_give_the_same(group: int, monkeypatch: pytest.MonkeyPatch):
    """Bit by bit: nothing depends on which simdgroup comes first."""
    case = Case(SWITCH, group=group, n=2, splits=2)
    a = arrays(case)
    outs = []
    for seed in (0, 1, 2):
        with monkeypatch.context() as patch:

            def made(seed: int = seed, **given: object) -> host_metal.HostKernel:
                return host_metal.metal_kernel(seed=seed, **given)

            patch.setattr(mx.fast, "metal_kernel", made)
            kernel.forget()
            outs.append(np.array(run(case, a)))
    kernel.forget()
    np.testing.assert_array_equal(outs[0], outs[1])
    np.testing.assert_array_equal(outs[0], outs[2])


def view_of(x: mx.array, kind: str) -> mx.array:
    """The same numbers in memory of another order; what lies between is NaN."""
    B, heads, rows, dim = x.shape
    wide = mx.full((B + 1, heads + 1, rows + 5, dim + 16), mx.nan, x.dtype)
    match kind:
        case "slice":
            wide[:B, 1:, 3 : rows + 3, 16:] = x
            return wide[:B, 1:, 3 : rows + 3, 16:]
        case "rows before heads":
            return mx.contiguous(x.swapaxes(1, 2)).swapaxes(1, 2)
        case "every second":
            wide = mx.full((2 * B, heads, rows, 2 * dim), mx.nan, x.dtype)
            wide[::2, :, :, ::2] = x
            return wide[::2, :, :, ::2]
        case _:
            return mx.contiguous(x.swapaxes(2, 3)).swapaxes(2, 3)


@pytest.mark.parametrize("kind", ["slice", "rows before heads", "every second", "transposed"])
@pytest.mark.parametrize("group", [2, 16])
@pytest.mark.parametrize("dims", [(32, 32), (64, 32)])
def test_strided(kind: str, group: int, dims: tuple[int, int]):
    """Keys and values are read where they lie, and the result is that of contiguous ones."""
    rings = (SWITCH[0], AFTER[0])
    case = Case(rings, mx.float16, *dims, group=group, n=3, learned=True, splits=2)
    a = arrays(case)
    k, v = view_of(a.k, kind), view_of(a.v, kind)
    q = view_of(a.q, "rows before heads")
    learned = mx.repeat(a.learned, 2)[::2]
    strided = Arrays(q, k, v, learned, a.tables, a.scale)
    mx.eval(k, v, q, learned)
    assert memoryview(k).strides != memoryview(a.k).strides
    np.testing.assert_array_equal(np.array(run(case, strided)), np.array(run(case, a)))
    assert error(case, a, run(case, strided)) <= TOLERANCES[case.dtype]


# head_dim, query heads a kv head, queries, simd operations a key and row at most. Tiles of 8 keys
# need (9 + 3 + 8) / 8; MLX's own kernel has one simd_sum, which is five steps.
TRAFFIC = [
    (64, 1, 1, 3.0), (64, 8, 1, 3.0), (64, 16, 1, 3.0), (128, 1, 1, 3.0), (128, 4, 1, 3.0),
    (128, 8, 1, 3.0), (128, 16, 1, 3.0), (128, 8, 8, 3.0), (256, 8, 1, 3.5), (80, 4, 1, 3.0),
    *((64, 4, n, 3.0) for n in range(2, 9)),
]  # fmt: skip


@pytest.mark.parametrize("shape", TRAFFIC, ids=str)
def test_bytes(shape: tuple[int, int, int, float], record_property: pytest.RecordProperty):
    """Each live row is read once for all query heads of its kv head, and nothing else of K, V."""
    D, G, n, most = shape
    case = Case((ring_at(4, 300, 999),), mx.float16, D, n_kv=1, group=G, n=n, splits=2)
    check(case)
    keys = 304 + n - 1
    minimum = keys * D * 2
    found = report()
    assert found.buffers["k"].loaded <= 1.02 * minimum
    assert found.buffers["v"].loaded <= 1.02 * minimum
    operations = found.simd_operations / (keys * G * n)
    record_property("simd operations a key and row", round(operations, 2))
    record_property("bytes stored", found.stored)
    assert operations <= most
    assert found.stored == 2 * G * n * (D + 2) * 4


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"q": (1, 4, 64)}, "queries must be"),
        ({"q": (1, 4, 2, 64)}, "queries must have the tables' 1 rows"),
        ({"q": (1, 5, 1, 64)}, "queries must have 1 to 16 times the 2 kv heads, got 5"),
        ({"q": (1, 34, 1, 64)}, "queries must have 1 to 16 times"),
        ({"k": (2, 2, 97, 64)}, "keys must have the queries' batch"),
        ({"k": (1, 2, 97, 32)}, "keys must have the queries' head_dim of 64, got 32"),
        ({"k": (1, 2, 93, 64), "v": (1, 2, 93, 64)}, "keys must have the 94 rows"),
        ({"v": (1, 2, 96, 64)}, "values must have the keys' heads and rows"),
        ({"v": (1, 2, 97, 60)}, "values must have a head_dim that 16 divides, got 60"),
        ({"learned": (3,)}, "learned_sinks must be"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, tuple[int, ...]], named: str):
    a = arrays(Case(SWITCH))
    q, k, v, learned = (
        mx.zeros(changes[name]) if name in changes else x
        for name, x in zip(("q", "k", "v", "learned"), (a.q, a.k, a.v, None), strict=True)
    )
    with pytest.raises(KernelError, match=named):
        kernel.decode(q, k, v, a.tables, scale=1.0, learned_sinks=learned)


def test_dtypes_that_do_not_fit_are_named():
    a = arrays(Case(SWITCH))
    with pytest.raises(KernelError, match=r"keys must be .* got mlx.core.float16"):
        kernel.decode(a.q, a.k.astype(mx.float16), a.v, a.tables, scale=1.0)
    with pytest.raises(KernelError, match="splits must be 1 to 1024, got -1"):
        kernel.decode(a.q, a.k, a.v, a.tables, scale=1.0, splits=-1)


def test_at_most_eight_queries():
    with pytest.raises(KernelError, match="queries must be 1 to 8, got 9"):
        arrays(Case(AFTER, n=9))


def test_an_idle_gpu_gets_more_splits(monkeypatch: pytest.MonkeyPatch):
    """Threadgroups for every core, but at least 128 keys each."""
    monkeypatch.setattr(kernel, "_cores", lambda: 12)
    assert [kernel._splits(live, 8) for live in (1, 128, 129, 1028, 100_000)] == [1, 1, 2, 6, 6]


def test_text_is_plain():
    """MLX hands it over as ASCII, and hashes it at every call: comments would cost time."""
    for name in kernel.TEXTS:
        assert "//" not in source.text(name)
        assert max(len(line) for line in source.text(name).splitlines()) <= 99
    assert len({source.stamp(name) for name in kernel.TEXTS}) == 4


def test_a_call_costs_little_python():
    """Nothing is worked out twice. `scripts/bench/measure_kernel.py` has the microseconds."""
    a = arrays(Case(SWITCH))
    calls: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            calls.append(frame.f_code.co_name)

    def traced(q: mx.array) -> mx.array:
        # While a function is traced, MLX's own kernel may be called where there is no Metal.
        kernel.decode(q, a.k, a.v, a.tables, scale=1.0, splits=1)
        sys.setprofile(note)
        kernel.decode(q, a.k, a.v, a.tables, scale=1.0, splits=1)
        sys.setprofile(None)
        return q

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx.fast, "metal_kernel", MLX_METAL_KERNEL)
        kernel.forget()
        mx.export_function(lambda _: None, traced, a.q)
    kernel.forget()
    assert calls == ["decode", "logits", "launched"], "more than to pass the arrays on"


def test_tables_are_made_once_a_step():
    """All layers of a model ask for the same tables."""
    case = Case(SWITCH)
    layout, rotation = case.layouts[0], case.rotation
    block = layout.block(layout.ring.tokens, layout.end)
    assert decode_tables(layout, block, rotation) is decode_tables(layout, block, rotation)
    assert decode_tables(layout, block, Rotation([])) is not None
