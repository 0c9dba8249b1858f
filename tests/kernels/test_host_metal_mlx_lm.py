"""Kernels that mlx-lm ships run unmodified and match mlx-lm's own references.

They were written for, and tested on, Apple's compiler and GPUs: that they pass every check, and
give the right numbers, is the evidence that the runner's Metal is Metal.
"""

import importlib.util
from types import ModuleType

import mlx.core as mx
import pytest
from host_metal import metal_kernel
from mlx import nn

EPS = 1e-5
TOLERANCE = {mx.float32: 2e-6, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A copy of an mlx-lm module whose kernels are made by the runner."""
    spec = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        patch.setattr(mx.fast, "metal_kernel", metal_kernel)
        patch.setattr(mx.metal, "is_available", lambda: True)
        spec.loader.exec_module(module)
    return module


def normal(*shape: int, seed: int = 0, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def assert_close(actual: mx.array, wanted: mx.array, tolerance: float) -> None:
    assert actual.dtype == wanted.dtype
    error = mx.abs(actual.astype(mx.float32) - wanted.astype(mx.float32))
    scale = mx.maximum(mx.abs(wanted.astype(mx.float32)), 1.0)
    assert mx.max(error / scale).item() <= tolerance


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_qk_norm_rope(dtype, monkeypatch):
    module = load("mlx_lm.kernels.qk_norm_rope", monkeypatch)
    B, L, HQ, HK, D, base, scale = 2, 3, 3, 1, 64, 10000.0, 0.125
    qkvg = normal(B, L, 2 * (HQ + HK) * D, dtype=dtype)
    offset = mx.array([5, 1000])
    q, k = module.qk_norm_rope(
        qkvg,
        n_heads=HQ,
        n_kv_heads=HK,
        head_dim=D,
        eps=EPS,
        query_scale=scale,
        rope_base=base,
        offset=offset,
    )
    heads = qkvg[..., : (HQ + HK) * D].reshape(B, L, HQ + HK, D)
    normed = mx.fast.rms_norm(heads, None, EPS)
    rotate = {"traditional": True, "base": base, "scale": 1.0, "offset": offset}
    wanted_q = (normed[:, :, :HQ].astype(mx.float32) * scale).astype(dtype)
    for actual, wanted in ((q, wanted_q), (k, normed[:, :, HQ:])):
        wanted = mx.fast.rope(wanted.swapaxes(1, 2), D, **rotate).swapaxes(1, 2)
        assert_close(actual, wanted, max(TOLERANCE[dtype], 2e-4))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_rms_norm_sigmoid_gate_on_strided_inputs(dtype, monkeypatch):
    module = load("mlx_lm.kernels.rms_norm_sigmoid_gate", monkeypatch)
    B, H, L, D = 2, 3, 2, 80
    x = normal(B, L, H, D, dtype=dtype).swapaxes(1, 2)
    gate = normal(B, L, 2 * H * D, seed=1, dtype=dtype)[..., : H * D]
    out = module.rms_norm_sigmoid_gate(x, gate, eps=EPS)
    normed = mx.fast.rms_norm(x.astype(mx.float32), None, EPS).swapaxes(1, 2).reshape(B, L, H * D)
    assert_close(
        out, (normed * mx.sigmoid(gate.astype(mx.float32))).astype(dtype), TOLERANCE[dtype]
    )


def test_norm_add_norm_shares_sums_through_threadgroup_memory(monkeypatch):
    module = load("mlx_lm.kernels.norm_add_norm", monkeypatch)
    D = 1024  # 128 threads a row
    stream = normal(3, D)
    norm = nn.RMSNorm(D, EPS)
    norm.weight = normal(D, seed=1)
    normed = module.pre_norm(stream, norm, dtype=mx.float16)
    assert_close(normed, norm(stream).astype(mx.float16), TOLERANCE[mx.float16])
    report = module._pre_norm_kernel.report
    assert report.counts["threadgroup_barriers"] == 3
    assert report.simd == {"simd_sum": 3 * 4 * 2}  # rows, simdgroups, sums


@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("has_mask", [False, True])
def test_gated_delta_step(vectorized, has_mask, monkeypatch):
    module = load("mlx_lm.models.gated_delta", monkeypatch)
    B, T, Hk, Hv, Dk, Dv = 1, 3, 1, 2, 64, 8
    q, k = normal(B, T, Hk, Dk) / 8, normal(B, T, Hk, Dk, seed=1) / 8
    v, state = normal(B, T, Hv, Dv, seed=2), normal(B, Hv, Dv, Dk, seed=3)
    g = mx.sigmoid(normal(B, T, Hv, *([Dk] if vectorized else []), seed=4))
    beta = mx.sigmoid(normal(B, T, Hv, seed=5))
    # All true: for a masked step all 32 lanes store the same zero, which is a race to the runner.
    mask = mx.ones((B, T), mx.bool_) if has_mask else None
    actual = module.gated_delta_kernel(q, k, v, g, beta, state, mask)
    wanted = module.gated_delta_ops(q, k, v, g, beta, state, mask)
    for one, other in zip(actual, wanted, strict=True):
        assert_close(one, other, TOLERANCE[mx.float32])
