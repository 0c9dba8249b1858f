"""A Llama in float64 with the contract written out: what any token of a stream must say.

It shares no code with mlx_sink, keeps no cache, and turns no query: each pair of a query and a
key that it sees is multiplied under the angle of its distance.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]


def needed(layers: int, window: int) -> int:
    """Return how many of the newest tokens the last one's logits depend on, sinks aside."""
    return layers * (window - 1) + 1


def logprobs(
    weights: dict[str, Any], args: Any, sinks: list[int], recent: list[int], end: int, window: int
) -> Array:
    """Return the log probabilities after the last token of a stream, ``[vocabulary]``.

    Args:
        weights: Of an mlx-lm Llama with tied embeddings, flat, as float64.
        args: Its arguments.
        sinks: The first tokens of the stream.
        recent: The newest tokens; at least `needed`, or all.
        end: Tokens in the stream.
        window: W.
    """
    S = len(sinks)
    first = max(end - len(recent), S)
    index = np.concatenate([np.arange(S), np.arange(first, end)])
    x = weights["model.embed_tokens.weight"][[*sinks, *recent[len(recent) - (end - first) :]]]
    query, key = index[:, None], index[None]
    seen = (key <= query) & ((key < S) | (key > query - window))
    far = np.where(key < S, np.minimum(query, S + window - 1) - key, query - key)
    for layer in range(args.num_hidden_layers):
        at = f"model.layers.{layer}."
        x = x + _attention(_norm(x, weights[at + "input_layernorm.weight"], args), weights,
                           at + "self_attn.", args, seen, far)  # fmt: skip
        h = _norm(x, weights[at + "post_attention_layernorm.weight"], args)
        gate, up = (h @ weights[f"{at}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weights[at + "mlp.down_proj.weight"].T
    last = _norm(x[-1], weights["model.norm.weight"], args)
    logits = weights["model.embed_tokens.weight"] @ last
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def _norm(x: Array, weight: Array, args: Any) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + args.rms_norm_eps) * weight


def _attention(
    x: Array, weights: dict[str, Any], at: str, args: Any, seen: Array, far: Array
) -> Array:
    n, D = len(x), args.head_dim
    group = args.num_attention_heads // args.num_key_value_heads
    q, k, v = ((x @ weights[f"{at}{c}_proj.weight"].T).reshape(n, -1, D) for c in "qkv")
    angle = args.rope_theta ** (-np.arange(D // 2) / (D // 2)) * far[..., None]
    cos, sin = np.cos(angle), np.sin(angle)
    out = np.empty_like(q)
    for head in range(args.num_attention_heads):
        (a, b), (c, d) = np.split(q[:, head], 2, -1), np.split(k[:, head // group], 2, -1)
        # R(distance) q . k, in halves: (a cos - b sin) c + (a sin + b cos) d.
        scores = np.einsum("qkd,qd,kd->qk", cos, a, c) + np.einsum("qkd,qd,kd->qk", cos, b, d)
        scores += np.einsum("qkd,qd,kd->qk", sin, a, d) - np.einsum("qkd,qd,kd->qk", sin, b, c)
        scores = np.where(seen, scores * D**-0.5, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, head] = (p / p.sum(-1, keepdims=True)) @ v[:, head // group]
    return out.reshape(n, -1) @ weights[at + "o_proj.weight"].T
