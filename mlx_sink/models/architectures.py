"""What is known of single architectures of mlx-lm; nothing else in mlx_sink knows one by name.

An architecture is a module of ``mlx_lm.models``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mlx_sink.attention.dispatch import sink_attention
from mlx_sink.attention.rope import RopeCall
from mlx_sink.cache.sink_cache import SinkCache

# fmt: off
VERIFIED = frozenset({
    "Klear", "afmoe", "apertus", "baichuan_m1", "bailing_moe", "bailing_moe_v3", "bitnet",
    "cohere", "cohere2", "dbrx", "deepseek", "deepseek_v2", "deepseek_v3", "deepseek_v32",
    "dots1", "ernie4_5", "ernie4_5_moe", "exaone", "exaone4", "exaone_moe", "falcon_h1",
    "gear", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma4", "gemma4_text",
    "glm", "glm4", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt_neox", "gpt_oss", "gptj",
    "granite", "granitemoe", "granitemoehybrid", "helium", "internlm2", "internlm3", "jamba",
    "kimi_k25", "kimi_k3", "kimi_linear", "kimi_vl", "laguna", "lfm2", "lfm2-vl", "lfm2_moe",
    "lille-130m", "llama", "llama4", "llama4_text", "longcat_flash", "longcat_flash_ngram",
    "mamba", "mamba2", "mellum", "mimo", "mimo_v2_flash", "minicpm", "minicpm3", "minimax",
    "ministral3", "mistral3", "mistral4", "mixtral", "muse_glimmer", "muse_spark", "nanbeige",
    "nanochat", "nemotron", "nemotron-nas", "nemotron_h", "olmo2", "olmo3", "olmo_hybrid",
    "olmoe", "openelm", "phi", "phi3", "phimoe", "phixtral", "pixtral", "plamo", "plamo2",
    "plamo3", "prism_hadamard_qwen35", "qwen", "qwen2", "qwen2_moe", "qwen2_vl", "qwen3",
    "qwen3_5", "qwen3_5_moe", "qwen3_moe", "qwen3_next", "qwen3_vl", "qwen3_vl_moe",
    "recurrent_gemma", "rwkv7", "seed_oss", "smollm3", "solar_open", "spark2_5", "stablelm",
    "starcoder2", "step3p5", "talkie", "telechat3", "youtu_llm",
})
# fmt: on
"""Architectures for which the tests show the contract. `attach` checks any other itself."""

_LEARNED_POSITIONS = "its positions are learned and added to the tokens: no turn changes them"
_NORM_AFTER = (
    "a norm with weights comes after the rotation, so that its attention depends on the absolute "
    "position"
)
_ROTATED_STATE = (
    "its linear attention sums up keys that are rotated by their absolute position; that state "
    "would have to be turned at every new epoch"
)

REFUSED = {
    "afm7": _NORM_AFTER,
    "bailing_hybrid": _ROTATED_STATE,
    "bailing_moe_linear": _ROTATED_STATE,
    "deepseek_v41": "it compresses keys by their absolute position, in caches of its own kind",
    "gpt2": _LEARNED_POSITIONS,
    "gpt_bigcode": _LEARNED_POSITIONS,
    "hunyuan": _NORM_AFTER,
    "hunyuan_v1_dense": _NORM_AFTER,
    "iquestloopcoder": "its gates read queries that are rotated by their absolute position",
    "minimax_m3_vl": "it selects blocks of keys by their place in an unbounded cache",
    "olmo": "mlx-lm's module needs a package of its own, and fails on more than one token",
    "phi3small": "it selects blocks of keys by their absolute position",
}
"""Architectures that cannot keep the contract, and why."""


def refusal(name: str | None) -> str | None:
    """Return why an architecture is refused without a look at the model, or ``None``."""
    return None if name is None else REFUSED.get(name)


# Attention that changes with the position.


def _scaled_from(args: Any) -> int | None:
    """Ministral 3, Mistral 4: queries grow with the logarithm of ``position // this``."""
    parameters: dict[str, Any] = getattr(args, "rope_parameters", None) or {}
    return parameters.get("original_max_position_embeddings")


def _tempered_from(args: Any) -> int | None:
    """Llama 4: layers without positions scale by ``(position + 1) // floor_scale``."""
    tuned = getattr(args, "attn_temperature_tuning", False)
    return int(args.floor_scale) - 1 if tuned else None


_LIMITS: dict[str, Callable[[Any], int | None]] = {
    "llama4": _tempered_from,
    "ministral3": _scaled_from,
    "mistral4": _scaled_from,
}


def position_limit(model: nn.Module) -> int | None:
    """Return the positions below which a model computes the same at each, if there is an end."""
    limits: list[int] = []
    for module in cast("list[Any]", model.modules()):
        limit = _LIMITS.get(type(module).__module__.rpartition(".")[2])
        args = getattr(module, "args", None)
        if limit is not None and args is not None:
            limits += [n for n in [limit(args)] if n is not None]
    return min(limits, default=None)


# Kernels of mlx-lm that rotate.


def _of_qk_norm_rope(*args: Any, **options: Any) -> RopeCall:
    width = int(options["head_dim"])
    return RopeCall(width, width, True, float(options["rope_base"]), 1.0, None)


FUSED_ROPES: dict[str, Callable[..., RopeCall]] = {"qk_norm_rope": _of_qk_norm_rope}
"""Functions that model files import by name, and the rotation that a call of them has inside."""


# Attention that a model computes on its own, in a way that `aligned` does not serve.


def _softcapped(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
    """Gemma 2's attention on our caches; its own takes no doubled heads, which `aligned` makes."""
    B, L, _ = x.shape

    def heads(projected: mx.array, n: int) -> mx.array:
        return mx.reshape(projected, (B, L, n, -1)).swapaxes(1, 2)

    q, k = heads(self.q_proj(x), self.n_heads), heads(self.k_proj(x), self.n_kv_heads)
    q, k = self.rope(q, offset=cache.offset), self.rope(k, offset=cache.offset)
    k, v = cache.update_and_fetch(k, heads(self.v_proj(x), self.n_kv_heads))
    if cache.leaves_to_model(k, None):  # it is only watched
        return self.o_proj(mx.zeros((B, L, q.shape[1] * v.shape[3]), x.dtype))
    out = sink_attention(
        q,
        k,
        v,
        layout=cache.take_layout(k),
        packed=cache.take_packed(k),
        archived=cache.take_archived(),
        rotation=cache.rotation,
        scale=self.scale,
        softcap=self.attn_logit_softcapping,
    )
    return self.o_proj(mx.reshape(out.swapaxes(1, 2), (B, L, -1)))


ATTENTIONS: dict[str, tuple[str, Callable[..., mx.array]]] = {"gemma2": ("Attention", _softcapped)}
"""Modules, the class in each, and what serves instead of its ``__call__`` over our caches."""


def adapt(names: dict[str, Any]) -> None:
    """Put our attention in the place of a module's own, for our caches only; idempotent."""
    name, ours = ATTENTIONS.get(names["__name__"].rpartition(".")[2], ("", None))
    kind = names.get(name)
    if ours is None or kind is None or hasattr(kind, "_own_call"):
        return
    own = kind._own_call = kind.__call__

    def call(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        return (ours if isinstance(cache, SinkCache) else own)(self, x, mask=mask, cache=cache)

    kind.__call__ = call
