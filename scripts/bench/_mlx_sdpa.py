"""MLX's own decode attention, `sdpa_vector`, for the runner: its text is in the headers of MLX.

Only for counting what it does beside our kernel; it knows no ranges, no turns and no sinks.
"""

from __future__ import annotations

from pathlib import Path

import host_metal
import mlx.core as mx

_FILE = "include/mlx/backend/metal/kernels/sdpa_vector.h"
_INPUTS = [
    *("queries", "keys", "values", "gqa_factor", "N"),
    *("k_head_stride", "k_seq_stride", "v_head_stride", "v_seq_stride", "scale"),
]
_HEADER = """
template <typename U> struct Limits { static constexpr constant U finite_min = -3.4e38f; };
"""
# What MLX passes by attributes, and what its function constants leave out: masks and sinks.
_OPENING = """
const uint3 tid = threadgroup_position_in_grid, tpg = threadgroups_per_grid;
const uint simd_gid = simdgroup_index_in_threadgroup, simd_lid = thread_index_in_simdgroup;
constexpr bool query_transposed = false, do_causal = false, has_sinks = false;
constexpr bool bool_mask = false, float_mask = false;
const device bool* bmask = nullptr;
const device T* fmask = nullptr;
const device T* sinks = nullptr;
constexpr int mask_head_stride = 0, mask_kv_seq_stride = 0, mask_q_seq_stride = 0, num_q_heads = 1;
"""


def run(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, host_metal.Report] | None:
    """Run it on one kv head; None where MLX would not, or where it has no such text.

    Args:
        q: ``[1, n_heads, L, head_dim]``, contiguous as the others. MLX serves head sizes that 32
            divides, and at most 32 query rows for each kv head.
        k: ``[1, 1, N, head_dim]``.
        v: ``[1, 1, N, head_dim]``.
    """
    body = _body()
    (_, G, L, D), N = q.shape, k.shape[2]
    if body is None or D % 32 or G * L > 32:
        return None
    # 1,024 threads, and pointers that name no address space: not our manner, and not to be judged.
    kernel = host_metal.metal_kernel(
        "sdpa_vector", _INPUTS, ["out"], _OPENING + body, _HEADER, strict=False, lint=False
    )
    strides = [mx.array(n, mx.uint64) for n in (N * D, D, N * D, D)]
    (out,) = kernel(
        inputs=[q, k, v, mx.array(G), mx.array(N), *strides, mx.array(D**-0.5)],
        template=[("T", q.dtype), ("D", D), ("V", D)],
        grid=(1024 * G, L, 1),
        threadgroup=(1024, 1, 1),
        output_shapes=[q.shape],
        output_dtypes=[q.dtype],
    )
    return out, kernel.report


def _body() -> str | None:
    path = Path(mx.__file__).parent / _FILE
    text = path.read_text() if path.is_file() else ""
    _, found, rest = text.partition("void sdpa_vector(")
    _, begun, rest = rest.partition(") {\n")
    body, ended, _ = rest.partition("\n}\n")
    return body if found and begun and ended else None
