"""The runner's simdgroup_matrix: its numbers, what it counts, and the misuse that it names."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from host_metal import HostKernel, RunError, TextError, metal_kernel

DTYPES = [mx.float32, mx.float16, mx.bfloat16]

# What lies where: the two elements of each lane, as MLX's own kernels have them.
LANE = np.arange(32)
ROW = (LANE // 4 & 4) + LANE // 2 % 4
COLUMN = (LANE // 4 & 2) * 2 + LANE % 2 * 2

PRODUCT = """
    simdgroup_matrix<T, 8, 8> x, y;
    simdgroup_matrix<float, 8, 8> sum = make_filled_simdgroup_matrix<float, 8, 8>(0.5f);
    threadgroup T tile[8 * 12];
    const uint lane = thread_index_in_simdgroup;
    for (uint i = lane; i < 64; i += 32) {
      tile[i / 8 * 12 + i % 8] = b[i];
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    simdgroup_load(x, a, 16, ulong2(4, 1));
    simdgroup_load(y, tile, 12, ulong2(0, 0), true);
    simdgroup_multiply_accumulate(sum, x, y, sum);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int e = 0; e < 2; ++e) {
      elements[lane * 2 + e] = sum.thread_elements()[e];
    }
    simdgroup_store(sum, out, 8, ulong2(0, 0), true);
"""
A = mx.random.normal((9, 16), key=mx.random.key(0))
B = mx.random.normal((8, 8), key=mx.random.key(1))


def run(source: str, dtype: mx.Dtype = mx.float32, threads: int = 32) -> list[np.ndarray]:
    return [np.array(x) for x in launch(built(source), dtype, threads)]


def built(source: str, **options: Any) -> HostKernel:
    # None of the repository's files: a line of theirs that is the same would be named instead.
    return metal_kernel("matrix", ["a", "b"], ["out", "elements"], source, files={}, **options)


def launch(kernel: HostKernel, dtype: mx.Dtype, threads: int = 32) -> list[mx.array]:
    return kernel(
        inputs=[A.astype(dtype), B.astype(dtype)],
        template=[("T", dtype)],
        grid=(threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(8, 8), (64,)],
        output_dtypes=[mx.float32, mx.float32],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product(dtype: mx.Dtype):
    """Origins, rows that lie apart, transposition, and the lanes' own elements."""
    out, elements = run(PRODUCT, dtype)
    a, b = (np.array(x.astype(dtype).astype(mx.float32), np.float64) for x in (A, B))
    wanted = a[1:9, 4:12] @ b.T + 0.5
    np.testing.assert_allclose(out, wanted.T, atol=1e-5)
    pairs = np.stack([wanted[ROW, COLUMN], wanted[ROW, COLUMN + 1]], axis=1)
    np.testing.assert_allclose(elements.reshape(32, 2), pairs, atol=1e-5)


def test_multiply_alone_and_elements_that_lanes_set():
    """A kernel may fill fragments by the lane map, as MLX's own attention does."""
    source = """
        simdgroup_float8x8 x, y, z;
        const uint lane = thread_index_in_simdgroup;
        const uint row = (lane / 4 & 4) + lane / 2 % 4;
        const uint column = (lane / 4 & 2) * 2 + lane % 2 * 2;
        for (uint e = 0; e < 2; ++e) {
          x.thread_elements()[e] = b[row * 8 + column + e];
          y.thread_elements()[e] = b[row * 8 + column + e];
          elements[lane * 2 + e] = 0.0f;
        }
        simdgroup_multiply(z, x, y);
        simdgroup_store(z, out);
    """
    kernel = built(source)
    out, _ = launch(kernel, mx.float32)
    np.testing.assert_allclose(np.array(out), np.array(B @ B), atol=1e-5)
    assert kernel.report.simd == {"simdgroup_multiply": 1, "simdgroup_store": 1}
    assert kernel.report.fragment_products == 1


def test_counts():
    """Operations once for a simdgroup, bytes once for each element."""
    kernel = built(PRODUCT)
    launch(kernel, mx.float16)
    report = kernel.report
    assert report.simd == {
        "simdgroup_load": 2, "simdgroup_multiply_accumulate": 1, "simdgroup_store": 1,
    }  # fmt: skip
    assert report.fragment_products == 1
    assert report.buffers["a"].loaded == report.buffers["a"].distinct == 64 * 2
    assert report.buffers["out"].stored == 64 * 4
    assert report.counts["threadgroup_loaded"] == 64 * 2


# What is planted: the kind that names it, good text, bad text, a part of the line that shows it.
LOAD = "simdgroup_load(x, a, 16, ulong2(4, 1));"
MISUSE = {
    "a product in a branch that half the lanes take": (
        "simd-divergence", "simdgroup_multiply_accumulate(sum",
        "if (lane < 16) simdgroup_multiply_accumulate(sum", None,
    ),
    "a load that one lane skips": (
        "simd-divergence", LOAD, f"if (lane != 3) {LOAD}", "simdgroup_load(y",
    ),
    "lanes that name other memory": (
        "simd-divergence", LOAD, "simdgroup_load(x, a + lane, 16);", None,
    ),
    "lanes that name other rows": (
        "simd-divergence", LOAD, "simdgroup_load(x, a, 8 + lane / 31);", None,
    ),
    "a load beyond an input": (
        "out-of-bounds", LOAD, "simdgroup_load(x, a, 16, ulong2(4, 2));", None,
    ),
    "a load before an input": ("out-of-bounds", LOAD, "simdgroup_load(x, a - 1, 16);", None),
    "a load before a threadgroup variable": (
        "out-of-bounds", "simdgroup_load(y, tile, 12", "simdgroup_load(y, tile - 1, 12", None,
    ),
    "a store beyond an output": (
        "out-of-bounds", "simdgroup_store(sum, out, 8", "simdgroup_store(sum, out, 9", None,
    ),
    "a load of what nobody has written": (
        "uninitialised", "i < 64; i += 32", "i < 63; i += 32", "simdgroup_load(y",
    ),
    "a load of what other lanes write, without a barrier": (
        "race", "simdgroup_barrier(mem_flags::mem_threadgroup);\n    simdgroup_load(x",
        "\n    simdgroup_load(x", "simdgroup_load(y",
    ),
    "a barrier for other memory": (
        "race", "simdgroup_barrier(mem_flags::mem_threadgroup);\n    simdgroup_load(x",
        "simdgroup_barrier(mem_flags::mem_device);\n    simdgroup_load(x", "simdgroup_load(y",
    ),
    "memory written again while it is loaded": (
        "race", "simdgroup_barrier(mem_flags::mem_threadgroup);\n    for (int e",
        "tile[lane / 8 * 12 + lane % 8] = x.thread_elements()[0];\n    for (int e", "tile[lane",
    ),
    "stored twice": (
        "race", "simdgroup_store(sum, out",
        "simdgroup_store(sum, out); simdgroup_store(sum, out", None,
    ),
    "a lane that reads what all have stored": (
        "race", "ulong2(0, 0), true);\n\n", "ulong2(0, 0), true);\n out[lane] += 1.0f;\n",
        "out[lane]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_named_with_its_line(name: str):
    kind, good, bad, noticed = MISUSE[name]
    source = PRODUCT + "\n\n"
    assert source.count(good) == 1
    planted = source.replace(good, bad)
    shown = bad if noticed is None else noticed
    line = planted[: planted.index(shown)].count("\n") + 1
    with pytest.raises(RunError) as caught:
        launch(built(planted), mx.float16)
    assert caught.value.kind == kind, caught.value
    assert caught.value.where == f"matrix.metal:{line}", caught.value


def test_two_simdgroups_on_one_fragment():
    with pytest.raises(RunError, match=r"\[race\].*simdgroup"):
        run(PRODUCT, threads=64)


def test_a_simdgroup_with_fewer_lanes():
    with pytest.raises(RunError, match=r"simdgroup_load needs 32 lanes, the simdgroup has 16"):
        run("simdgroup_matrix<T, 8, 8> x; simdgroup_load(x, a); out[0] = b[0];"
            "elements[0] = x.thread_elements()[0];", threads=16)  # fmt: skip


def test_memory_that_its_type_does_not_align():
    source = PRODUCT.replace("a, 16,", "(const device float*)((const device char*)a + 2), 16,")
    with pytest.raises(RunError, match=r"\[misaligned\] simdgroup_load"):
        launch(built(source, strict=False), mx.float32)


REFUSED = {
    "a fragment of integers": ("matrix<T, 8, 8> x, y", "matrix<int, 8, 8> x, y"),
    "another size": ("simdgroup_matrix<float, 8, 8> sum", "simdgroup_matrix<float, 4, 4> sum"),
    "a load into other elements": ("simdgroup_load(x, a, 16", "simdgroup_load(sum, a, 16"),
    "a store to an input": ("simdgroup_store(sum, out, 8", "simdgroup_store(x, a, 8"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_the_strict_pass(name: str):
    good, bad = REFUSED[name]
    assert PRODUCT.count(good) == 1
    planted = PRODUCT.replace(good, bad)
    with pytest.raises(TextError) as caught:
        launch(built(planted), mx.float16)
    assert caught.value.kind == "strict", caught.value


def test_private_memory_cannot_be_loaded():
    source = PRODUCT.replace("threadgroup T tile[8 * 12];", "T tile[8 * 12];")
    with pytest.raises(TextError, match=r"\[strict\] no matching function"):
        launch(built(source), mx.float16)
