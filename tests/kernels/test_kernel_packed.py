"""The decode kernel on a quantised ring, its text run on the CPU, against float64.

The reference attends to what the quantised rows stand for (`Packed.expanded`, which is held
against the layout of MLX's words in `test_storage.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import host_metal
import mlx.core as mx
import numpy as np
import pytest
from decode_case import Case, error, ring_at
from packed_case import Bits, Given, quantised, run

from mlx_sink.attention.kernels import decode as plain
from mlx_sink.attention.kernels import decode_packed as kernel
from mlx_sink.attention.kernels import source
from mlx_sink.errors import KernelError

TOLERANCES = {mx.float32: 2e-6, mx.float16: 4e-3, mx.bfloat16: 2e-2}
W = 90
AFTER = (ring_at(4, W, 271),)
SWITCH = (ring_at(4, W, 215, epoch=100),)


@pytest.fixture(autouse=True, scope="module")
def on_the_host() -> Iterator[None]:
    """Build the kernels with the runner in the place of MLX."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx.fast, "metal_kernel", host_metal.metal_kernel)
        plain.forget()
        kernel.forget()
        yield
    plain.forget()
    kernel.forget()


def check(case: Case, bits: Bits = (8, 4), size: int = 32) -> Given:
    given = quantised(case, bits, size)
    assert error(case, given[0], run(case, given)) <= TOLERANCES[case.dtype]
    return given


# head_dim, query heads a kv head, queries, group size.
SHAPES = [
    (32, 1, 1, 32), (64, 1, 1, 64), (64, 7, 8, 32), (96, 3, 1, 32), (96, 8, 3, 32),
    (128, 1, 1, 128), (128, 4, 2, 64), (128, 8, 2, 32), (160, 2, 1, 32), (192, 2, 1, 64),
    (192, 8, 2, 32), (256, 2, 1, 64), (256, 4, 2, 128),
]  # fmt: skip


@pytest.mark.parametrize("bits", [(8, 8), (4, 4)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_head_dims(bits: Bits, shape: tuple[int, int, int, int]):
    D, G, n, size = shape
    dtype = (mx.float32, mx.float16, mx.bfloat16)[(D // 32 + G + n) % 3]
    check(Case(SWITCH, dtype, D, n_kv=1, group=G, n=n), bits, size)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("bits", [(8, 4), (4, 8)], ids=str)
@pytest.mark.parametrize("group", [1, 16])
def test_dtypes_and_bits(dtype: mx.Dtype, bits: Bits, group: int):
    """Keys and values of different bits, in registers and through threadgroup memory."""
    check(Case(AFTER, dtype, 64, group=group, n=2, splits=2), bits)


STATES = {
    "one live key": lambda S: ring_at(S, W, 0),
    "sinks alone": lambda S: ring_at(S, W, max(S - 1, 0)),
    "the first of the ring": lambda S: ring_at(S, W, S),
    "before the wrap": lambda S: ring_at(S, W, S + 41),
    "first evicted": lambda S: ring_at(S, W, S + W),
    "two epochs": lambda S: ring_at(S, W, 3 * (S + W) + 19, epoch=S + W),
    "endless": lambda S: ring_at(S, W, (1 << 40) + 5, epoch=1 << 10),
    "window of one": lambda S: ring_at(S, 1, S + 9),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("S", [0, 1, 4, 100])
@pytest.mark.parametrize("n", [1, 5])
def test_states_of_the_ring(state: str, S: int, n: int):
    """Sinks are plain and all others quantised, from the first token on."""
    splits = 1 if S % 2 else 4
    check(Case((STATES[state](S),), head_dim=32, n_kv=1, n=n, splits=splits), (8, 8))


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("splits", [1, 3])
def test_sequences_at_different_tokens(n: int, splits: int):
    rings = tuple(STATES[state](4) for state in ("before the wrap", "first evicted", "two epochs"))
    check(Case(rings, head_dim=32, n=n, splits=splits))


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_learned_sinks_and_softcap(learned: bool, softcap: float | None):
    check(Case(SWITCH, n=3, splits=3, learned=learned, softcap=softcap))


@pytest.mark.parametrize("group", [1, 12])
def test_values_of_another_size(group: int):
    check(Case(SWITCH, mx.float16, 192, 128, group=group, splits=2), (4, 8), 64)


@pytest.mark.parametrize("group", [2, 16])
def test_strided(group: int):
    """Slices of a larger ring are read where they lie."""
    case = Case((SWITCH[0], AFTER[0]), mx.float16, 64, group=group, n=3, splits=2)
    a, k, v = quantised(case, (8, 4), 32)

    def within(x: mx.array) -> mx.array:
        B, heads, rows, dim = x.shape
        wide = mx.full((B + 1, heads + 1, rows + 5, dim), 1 if x.dtype == mx.uint32 else mx.nan)
        wide = wide.astype(x.dtype)
        wide[:B, 1:, 3 : rows + 3] = x
        mx.eval(wide)
        return wide[:B, 1:, 3 : rows + 3]

    names = ("sinks", "words", "scales", "biases")
    views = [replace(x, **{name: within(getattr(x, name)) for name in names}) for x in (k, v)]
    np.testing.assert_array_equal(np.array(run(case, (a, *views))), np.array(run(case, (a, k, v))))


# head_dim, query heads a kv head, queries, bits of keys and of values.
TRAFFIC = [
    (64, 1, 1, 8, 8), (64, 8, 1, 4, 4), (64, 16, 1, 8, 4), (128, 4, 1, 8, 8), (128, 4, 1, 4, 4),
    (128, 16, 1, 4, 8), (128, 8, 8, 8, 4), (256, 8, 1, 4, 4), (96, 4, 2, 8, 8),
]  # fmt: skip


@pytest.mark.parametrize("shape", TRAFFIC, ids=str)
def test_bytes(shape: tuple[int, int, int, int, int], record_property: pytest.RecordProperty):
    """Each packed row is read once for all query heads of its kv head, scales by few lanes."""
    D, G, n, k_bits, v_bits = shape
    case = Case((ring_at(4, 300, 999),), mx.float16, D, n_kv=1, group=G, n=n, splits=2)
    check(case, (k_bits, v_bits))
    built = kernel._pass_1()
    assert isinstance(built, host_metal.HostKernel)
    keys, found = 300 + n - 1, built.report.buffers
    for name, bits in (("k", k_bits), ("v", v_bits)):
        words = keys * D * bits // 8
        assert words <= found[f"{name}_words"].loaded <= 1.02 * words
        assert found[name].loaded <= 1.02 * 4 * D * 2
        groups = keys * D // 32 * 2
        for part in ("scales", "biases"):
            # Every lane loads its group's: one access of memory for all the lanes of a group.
            assert groups == found[f"{name}_{part}"].distinct
            assert found[f"{name}_{part}"].loaded <= 16 * groups
    total = sum(found[x].distinct for x in found if x.startswith(("k", "v")) and "str" not in x)
    record_property("bytes a key and value, all heads of the kv head", total / (keys + 4))


def test_what_does_not_fit_is_named():
    a, k, v = quantised(Case(SWITCH), (8, 8), 32)
    with pytest.raises(KernelError, match="values must have the sinks and the group size of keys"):
        kernel.decode_packed(a.q, k, replace(v, group_size=64), a.tables, scale=1.0)
    short = replace(
        k, words=k.words[:, :, :9], scales=k.scales[:, :, :9], biases=k.biases[:, :, :9]
    )
    with pytest.raises(KernelError, match="values must have the keys' heads and rows"):
        kernel.decode_packed(a.q, short, v, a.tables, scale=1.0)
    with pytest.raises(KernelError, match=r"keys must be .* got mlx.core.float32 where queries"):
        kernel.decode_packed(a.q.astype(mx.float16), k, v, a.tables, scale=1.0)


def test_arrays_of_fewer_than_eight_elements():
    """MLX would hand them over in another address space."""
    case = Case((ring_at(1, 2, 5),), head_dim=32, n_kv=1, group=1)
    check(case, (8, 4))


def test_text_is_plain():
    for name in kernel.TEXTS:
        assert "//" not in source.text(name)
        assert max(len(line) for line in source.text(name).splitlines()) <= 99
