"""What mlx-lm's fused Metal kernels compute for muse_spark, in MLX's own operations.

That architecture has no other path. `install` puts these functions in the place of the kernels
where there is no Metal; `test_every_tiny` compares the two through `host_metal`.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import muse_spark


def qk_norm(
    qkvg: mx.array,
    *,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    eps: float,
    query_scale: float,
) -> list[mx.array]:
    """Return queries and keys, ``[B, L, H, D]``, of the projections in front of ``qkvg``."""
    heads = n_heads + n_kv_heads
    qk = mx.unflatten(qkvg[..., : heads * head_dim], -1, (heads, head_dim))
    qk = mx.fast.rms_norm(qk, None, eps)
    return [qk[..., :n_heads, :] * query_scale, qk[..., n_heads:, :]]


def qk_norm_rope(
    qkvg: mx.array, *, rope_base: float, offset: int | mx.array, **options: Any
) -> list[mx.array]:
    """`qk_norm`, then RoPE on neighbouring pairs."""
    rotate = {"traditional": True, "base": rope_base, "scale": 1.0, "offset": offset}
    return [
        mx.fast.rope(x.swapaxes(1, 2), x.shape[-1], **rotate).swapaxes(1, 2)
        for x in qk_norm(qkvg, **options)
    ]


def rms_norm_sigmoid_gate(x: mx.array, gate: mx.array, *, eps: float) -> mx.array:
    """Normalise each head of ``x``, ``[B, H, L, D]``, and gate it: ``[B, L, H D]``."""
    x = mx.fast.rms_norm(x.swapaxes(1, 2), None, eps)
    return mx.flatten(x, -2) * mx.sigmoid(gate)


def norm_add_norm(
    branch: mx.array,
    stream: mx.array,
    *,
    alpha: mx.array,
    beta: mx.array,
    post_weight: mx.array | None,
    post_eps: float,
    next_norm: nn.RMSNorm | None,
) -> tuple[mx.array, mx.array | None]:
    """Return the stream with the normalised branch added, and that normalised again."""
    scaled = branch if post_weight is None else post_weight * branch
    stream = alpha * stream + beta * mx.fast.rms_norm(scaled, None, post_eps)
    return stream, None if next_norm is None else next_norm(stream).astype(branch.dtype)


def pre_norm(stream: mx.array, norm: nn.RMSNorm, *, dtype: mx.Dtype) -> mx.array:
    """Return the normalised stream."""
    return norm(stream).astype(dtype)


def expert_routing(
    logits: mx.array,
    expert_bias: mx.array,
    *,
    top_k: int,
    multiplier: float,
    score_eps: float,
    route_scale: float,
) -> list[mx.array]:
    """Return the experts of each token, best first, and their weights."""
    scores = mx.sigmoid(logits * multiplier)
    chosen = mx.argsort(-(scores + expert_bias), axis=-1)[..., :top_k]
    weights = mx.take_along_axis(scores, chosen, axis=-1)
    return [chosen, weights / (weights.sum(-1, keepdims=True) + score_eps) * route_scale]


def post_expert_norm_combine(
    experts: mx.array, weights: mx.array, *, norm_weight: mx.array, eps: float
) -> mx.array:
    """Return the weighted sum, ``[..., D]``, of normalised outputs, ``[..., K, D]``."""
    normed = mx.fast.rms_norm(experts * norm_weight, None, eps)
    return (normed * weights[..., None]).sum(axis=-2).astype(experts.dtype)


OPERATIONS = (
    qk_norm,
    qk_norm_rope,
    rms_norm_sigmoid_gate,
    norm_add_norm,
    pre_norm,
    expert_routing,
    post_expert_norm_combine,
)


def install() -> None:
    """Make muse_spark run without Metal; where Metal is, it keeps its kernels."""
    if not mx.metal.is_available():
        for operation in OPERATIONS:
            setattr(muse_spark, operation.__name__, operation)
