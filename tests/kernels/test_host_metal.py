"""The runner gives kernels the values, types and positions that Metal does."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from host_metal import RunError, TextError, metal_kernel
from host_metal.examples import SOURCE, rms_norm_kernel, run_rms_norm

RNG = np.random.default_rng(0)
ONE = (1, 1, 1)


def run(
    source: str,
    inputs: Sequence[mx.array],
    shape: Sequence[int],
    dtype: mx.Dtype = mx.float32,
    grid: Sequence[int] = ONE,
    threadgroup: Sequence[int] | None = None,
    **call: Any,
) -> np.ndarray:
    """Run a body with inputs a, b, c ... and one output."""
    options = {k: call.pop(k) for k in ("ensure_row_contiguous", "header") if k in call}
    kernel = metal_kernel("test", list("abcdef"[: len(inputs)]), ["out"], source, **options)
    out = kernel(
        inputs=inputs,
        output_shapes=[shape],
        output_dtypes=[dtype],
        grid=grid,
        threadgroup=threadgroup or grid,
        **call,
    )[0]
    assert out.dtype == dtype
    return np.array(out.astype(mx.float32) if dtype == mx.bfloat16 else out)


# ---------------------------------------------------------------- simd operations

LANES = np.arange(32)
CLAMP_UP, CLAMP_DOWN = np.maximum(LANES - 3, 0), np.minimum(LANES + 3, 31)
SIMD = {
    "simd_sum(x)": lambda x: np.full(32, x.sum()),
    "simd_product(x)": lambda x: np.full(32, x.prod()),
    "simd_max(x)": lambda x: np.full(32, x.max()),
    "simd_min(x)": lambda x: np.full(32, x.min()),
    "simd_prefix_inclusive_sum(x)": np.cumsum,
    "simd_prefix_exclusive_sum(x)": lambda x: np.cumsum(x) - x,
    "simd_broadcast(x, 9)": lambda x: np.full(32, x[9]),
    "simd_broadcast_first(x)": lambda x: np.full(32, x[0]),
    "simd_shuffle(x, (lane * 7) % 32)": lambda x: x[LANES * 7 % 32],
    "simd_shuffle_xor(x, 5)": lambda x: x[LANES ^ 5],
    "simd_shuffle_up(x, 3)": lambda x: np.where(LANES < 3, x, x[CLAMP_UP]),
    "simd_shuffle_down(x, 3)": lambda x: np.where(LANES > 28, x, x[CLAMP_DOWN]),
    "simd_shuffle_rotate_up(x, 3)": lambda x: x[(LANES - 3) % 32],
    "simd_shuffle_rotate_down(x, 3)": lambda x: x[(LANES + 3) % 32],
    "float(simd_any(x > 1.9f))": lambda x: np.full(32, (x > 1.9).any()),
    "float(simd_all(x > 0.0f))": lambda x: np.ones(32),
    "float(simd_or(lane & 5u))": lambda x: np.full(32, 5),
    "float(simd_and(lane | 8u))": lambda x: np.full(32, 8),
    "simd_sum(float2(x, 1.0f)).y": lambda x: np.full(32, 32),
}


def test_simd_operations_over_two_simdgroups():
    stores = [f"out[{k} * 64 + i] = {e};" for k, e in enumerate(SIMD)]
    body = "uint i = thread_position_in_grid.x; uint lane = thread_index_in_simdgroup;\n"
    x = RNG.uniform(0.5, 1.5, 64).astype(np.float32)
    body += "float x = a[i];\n" + "\n".join(stores)
    out = run(body, [mx.array(x)], (len(SIMD), 64), grid=(64, 1, 1))
    for row, (expression, reference) in zip(out, SIMD.items(), strict=True):
        wanted = np.concatenate([reference(x[:32]), reference(x[32:])])
        np.testing.assert_allclose(row, wanted, rtol=1e-5, atol=1e-6, err_msg=expression)


def test_a_partial_simdgroup_has_fewer_lanes():
    body = "out[thread_position_in_grid.x] = simd_sum(1);"
    assert run(body, [mx.zeros(1)], (40,), mx.int32, (40, 1, 1)).tolist() == [32] * 32 + [8] * 8
    with pytest.raises(RunError, match="lane 7 reads lane 8, which the simdgroup does not have"):
        run("out[0] = simd_shuffle_down(1, 1);", [mx.zeros(1)], (1,), grid=(8, 1, 1))


# ---------------------------------------------------------------- numbers

MATH = {
    "exp(x)": np.exp,
    "fast::exp2(x)": np.exp2,
    "log(x)": np.log,
    "log2(x)": np.log2,
    "sqrt(x)": np.sqrt,
    "precise::rsqrt(x)": lambda x: 1 / np.sqrt(x),
    "sin(x)": np.sin,
    "fast::cos(x)": np.cos,
    "precise::tanh(x)": np.tanh,
    "floor(x)": np.floor,
    "ceil(x)": np.ceil,
    "tan(x)": np.tan,
    "trunc(x)": np.trunc,
    "round(x)": lambda x: np.floor(x + 0.5),
    "rint(x)": np.round,
    "fabs(-x)": np.abs,
    "abs(-x)": np.abs,
    "saturate(x)": lambda x: np.clip(x, 0, 1),
    "fmod(x, T(0.5f))": lambda x: np.fmod(x, 0.5),
    "copysign(x, -x)": lambda x: -x,
    "divide(x, T(2.0f))": lambda x: x / 2,
    "fmax(x, numeric_limits<T>::quiet_NaN())": lambda x: x,
    "fmin(x, numeric_limits<T>::infinity())": lambda x: x,
    "mix(x, T(2.0f), T(0.5f))": lambda x: x + (2 - x) * 0.5,
    "pow(x, x)": lambda x: x**x,
    "fma(x, x, x)": lambda x: x * x + x,
    "max(x, T(1.0f))": lambda x: np.maximum(x, 1),
    "min(x, T(1.0f))": lambda x: np.minimum(x, 1),
    "clamp(x, T(0.75f), T(1.25f))": lambda x: np.clip(x, 0.75, 1.25),
    "select(x, -x, x > T(1.0f))": lambda x: np.where(x > 1, -x, x),
    "T(isfinite(x))": np.ones_like,
    "T(signbit(-x))": np.ones_like,
    "T(metal::isinf(x / T(0.0f)))": np.ones_like,
    "T(isnan(numeric_limits<T>::quiet_NaN()))": np.ones_like,
    "T(-INFINITY) < numeric_limits<T>::lowest() ? x : T(0.0f)": lambda x: x,
}


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_mathematical_functions(dtype):
    stores = [f"out[{k} * 32 + i] = static_cast<T>({e});" for k, e in enumerate(MATH)]
    body = "uint i = thread_position_in_grid.x; T x = a[i];\n" + "\n".join(stores)
    x = mx.array(RNG.uniform(0.5, 1.5, 32)).astype(dtype)
    out = run(body, [x], (len(MATH), 32), dtype, (32, 1, 1), template=[("T", dtype)])
    exact = np.array(x.astype(mx.float32)).astype(np.float64)
    tolerance = {mx.float32: 1e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}[dtype]
    for row, (expression, reference) in zip(out, MATH.items(), strict=True):
        wanted = reference(exact)
        np.testing.assert_allclose(row, wanted, rtol=tolerance, atol=1e-6, err_msg=expression)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_and_bfloat_round_after_every_operation(dtype):
    x, y = (mx.array(RNG.standard_normal(256)).astype(dtype) for _ in range(2))
    body = "uint i = thread_position_in_grid.x; out[i] = a[i] * b[i] + a[i] / b[i] - a[i];"
    out = run(body, [x, y], (256,), dtype, (256, 1, 1), (32, 1, 1))
    wanted = x * y + x / y - x
    assert np.array_equal(out, np.array(wanted.astype(mx.float32)).astype(out.dtype))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_conversions_of_extreme_values(dtype):
    values = [
        1e38,
        -3.4e38,
        np.inf,
        -np.inf,
        np.nan,
        1e-40,
        0.0,
        65504,
        65520,
        1 + 2**-8,
        1 + 3 * 2**-8,
    ]
    x = mx.array(np.array(values, np.float32))
    body = "uint i = thread_position_in_grid.x; out[i] = static_cast<T>(a[i]);"
    grid = (len(values), 1, 1)
    out = run(body, [x], x.shape, dtype, grid, template=[("T", dtype)])
    np.testing.assert_array_equal(
        out, np.array(x.astype(dtype).astype(mx.float32)).astype(out.dtype)
    )


def test_literals_are_float_and_integers_have_metals_sizes():
    body = """
        out[0] = sizeof(0.1); out[1] = sizeof(long); out[2] = sizeof(half);
        out[3] = sizeof(float3); out[4] = sizeof(packed_float3); out[6] = sizeof(uint3);
        out[5] = char(-1) < 0; out[11] = abs(-5) + clamp(9, 2, 4) + max(2u, 3u) + min(1l, 2l);
        out[7] = ushort(65535) + 1; out[8] = clz(1u);
        out[9] = ctz(8); out[10] = popcount(7u);
    """
    out = run(body, [mx.zeros(1)], (12,), mx.int32)
    assert out.tolist() == [4, 8, 2, 16, 12, 1, 16, 65536, 31, 3, 3, 13]


def test_vectors():
    body = """
        float4 p = float4(1, 2, 3, 4); float2 q = p.zw; p.xy = q; p.zw = p.wz;
        half4 h = half4(p); uint2 u = uint2(7u, 9u); u = u % 4u; p += 1.0f;
        float4 r = float4(h) * 2.0f + float4(1.0f, float3(q, 5.0f));
        vec<float, 2> s = vec<float, 2>(dot(p, r), max(float2(1, 2), float2(0, 3)).y);
        thread float4& t = r; t.w = -1.0f;
        for (int k = 0; k < 4; ++k) { out[k] = p[k]; out[4 + k] = r[k]; }
        out[8] = s.x; out[9] = s.y; out[10] = u.y; out[11] = any(p < float4(0)) ? 1 : 0;
        out[12] = as_type<float>(as_type<uint>(1.5f)); out[13] = as_type<half2>(0x3c004000u).x;
        const device packed_float3* packed = (const device packed_float3*)a;
        float3 last = packed[1]; out[14] = last.z;
        uchar4 bytes = as_type<uchar4>(0x04030201u); out[15] = bytes.w;
    """
    out = run(body, [mx.arange(8).astype(mx.float32)], (16,))
    p, r = [4, 5, 5, 4], [2 * 3 + 1, 2 * 4 + 3, 2 * 4 + 4, 2 * 3 + 5]
    assert out.tolist() == [*p, *r[:3], -1, np.dot(p, r), 3, 1, 0, 1.5, 2, 5, 4]


# ---------------------------------------------------------------- launches

POSITIONS = """
    uint3 p = thread_position_in_grid; uint3 n = threads_per_grid;
    uint at = ((p.z * n.y + p.y) * n.x + p.x) * 6;
    out[at] = thread_index_in_threadgroup; out[at + 1] = threads_per_threadgroup.x;
    out[at + 2] = threadgroup_position_in_grid.x; out[at + 3] = threadgroups_per_grid.x;
    out[at + 4] = simdgroups_per_threadgroup; out[at + 5] = thread_position_in_threadgroup.z;
"""


def test_positions_in_a_ragged_grid():
    out = run(POSITIONS, [mx.zeros(1)], (3, 5, 37, 6), mx.int32, (37, 5, 3), (16, 2, 2))
    z, y, x = np.indices((3, 5, 37))
    wide = np.where(x < 32, 16, 5)
    tall, deep = np.where(y < 4, 2, 1), np.where(z < 2, 2, 1)
    wanted = [
        (z % 2 * tall + y % 2) * wide + x % 16,
        wide,
        x // 16,
        np.full_like(x, 3),
        -(-wide * tall * deep // 32),
        z % 2,
    ]
    assert np.array_equal(out, np.stack(wanted, -1))


def test_a_threadgroup_is_never_larger_than_the_grid():
    body = "out[thread_position_in_grid.x] = threads_per_threadgroup.x;"
    assert run(body, [mx.zeros(1)], (4,), mx.int32, (4, 1, 1), (256, 1, 1)).tolist() == [4] * 4


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.int64])
def test_strided_inputs_come_with_their_strides(dtype):
    x = mx.arange(60).reshape(3, 4, 5).transpose(2, 0, 1).astype(dtype)[:, ::2]
    x = mx.concatenate([x, x], axis=2)[:, :, 1:6]
    body = """
        uint e = thread_position_in_grid.x; uint m = a_shape[1]; uint n = a_shape[2];
        long at = e / n / m * a_strides[0] + e / n % m * a_strides[1] + e % n * a_strides[2];
        out[e] = a[at] + T(a_ndim - 3);
    """
    call = {"grid": (x.size, 1, 1), "template": [("T", dtype)]}
    for contiguous in (False, True):
        out = run(body, [x], x.shape, dtype, ensure_row_contiguous=contiguous, **call)
        assert np.array_equal(out, np.array(x.astype(mx.float32)).astype(out.dtype))
    with pytest.raises(NotImplementedError, match="negative strides"):
        run(body, [x[::-1]], x.shape, dtype, ensure_row_contiguous=False, **call)


def test_inputs_of_all_kinds():
    body = "out[0] = int(a[1]) + int(b) + int(c[0]) + int(d[1]) + int(e[2]) + f;"
    inputs = [
        mx.array([0, 200], mx.uint8),
        mx.array(2.5, mx.float16),
        mx.array([True]),
        mx.array([0, -3], mx.int16),
        mx.arange(100, dtype=mx.uint32),
        7,
    ]
    assert run(body, inputs, (1,), mx.int32).tolist() == [200 + 2 + 1 - 3 + 2 + 7]


def test_init_value_fills_outputs():
    body = "out[1] += 2;"
    out = run(body, [mx.zeros(1)], (3,), mx.float16, init_value=0.5)
    assert out.tolist() == [0.5, 2.5, 0.5]


def test_verbose_prints_what_mlx_generates(capsys):
    kernel = metal_kernel("shown", ["a"], ["out"], "out[0] = a[0];")
    call = {
        "output_shapes": [(1,)],
        "output_dtypes": [mx.float32],
        "grid": ONE,
        "threadgroup": ONE,
    }
    kernel(inputs=[mx.zeros(1)], verbose=True, **call)
    assert "[[kernel]] void custom_kernel_shown" in capsys.readouterr().out


def test_small_inputs_are_constant_for_helpers():
    """MLX passes fewer than 8 elements as `constant`, which a helper for `device` refuses."""
    header = "METAL_FUNC float first(const device float* p) { return p[0]; }\n"
    assert run("out[0] = first(a);", [mx.ones(8)], (1,), header=header).tolist() == [1]
    with pytest.raises(TextError, match=r"test\.metal:1: \[strict\] no matching function"):
        run("out[0] = first(a);", [mx.ones(7)], (1,), header=header)


# ---------------------------------------------------------------- counts


def test_counts_are_what_the_kernel_asks_for():
    rows, D, simdgroups = 3, 256, 2
    kernel = rms_norm_kernel()
    x = mx.random.normal((rows, D)).astype(mx.float16)
    run_rms_norm(kernel, x, x[0], simdgroups)
    report, threads = kernel.report, rows * simdgroups * 32
    assert vars(report.buffers["x"]) == {"loaded": x.nbytes, "stored": 0, "distinct": x.nbytes}
    weight = {"loaded": rows * D * 2, "stored": 0, "distinct": D * 2}
    assert vars(report.buffers["weight"]) == weight
    assert vars(report.buffers["eps"]) == {"loaded": threads * 4, "stored": 0, "distinct": 4}
    assert vars(report.buffers["out"]) == {"loaded": 0, "stored": x.nbytes, "distinct": 0}
    assert vars(report.buffers["rms"]) == {"loaded": 0, "stored": rows * 4, "distinct": 0}
    assert report.loaded == x.nbytes + rows * D * 2 + threads * 4
    assert report.stored == x.nbytes + rows * 4
    assert report.simd == {"simd_sum": rows * simdgroups}
    assert report.simd_operations == rows * simdgroups
    assert report.counts == {
        "threads": threads,
        "threadgroups": rows,
        "threadgroup_barriers": rows,
        "simdgroup_barriers": 0,
        "threadgroup_bytes": 16,
        "threadgroup_loaded": threads * simdgroups * 4,
        "threadgroup_stored": rows * simdgroups * 4,
    }


def test_counts_show_a_second_read_of_the_same_memory():
    body = "uint i = thread_position_in_grid.x; out[i] = a[i] + a[i ^ 1];"
    kernel = metal_kernel("twice", ["a"], ["out"], body)
    call = {"output_shapes": [(64,)], "output_dtypes": [mx.float32]}
    kernel(inputs=[mx.ones(64)], grid=(64, 1, 1), threadgroup=(32, 1, 1), **call)
    traffic = kernel.report.buffers["a"]
    assert (traffic.loaded, traffic.distinct) == (512, 256)


# ---------------------------------------------------------------- other machines


def test_portable_fibers_give_the_same(monkeypatch):
    """Processors other than x86-64 switch stacks by swapcontext: the same results and faults."""
    x = mx.random.normal((3, 256), key=mx.random.key(0))
    skipped = SOURCE.replace("if (sg == 0 && lane == 0)", "if (simd_any(sg == 0) && lane == 0)")
    skipped = skipped.replace("rms[row] = scale", "rms[row] = simd_max(scale)")
    usual = run_rms_norm(rms_norm_kernel(), x, x[0])
    monkeypatch.setenv("HOST_METAL_UCONTEXT", "1")
    portable = run_rms_norm(rms_norm_kernel(), x, x[0])
    assert all(mx.array_equal(a, b) for a, b in zip(usual, portable, strict=True))
    with pytest.raises(RunError, match="simd-divergence"):
        run_rms_norm(rms_norm_kernel(skipped), x, x[0])
