"""Fields of single architectures that transformers 5 names otherwise than mlx-lm, or leaves out.

The tables are by transformers' ``model_type``. Source: the configuration and model classes of
transformers 5.24 and the model files of mlx-lm 0.32, one beside the other; a test builds every
class that both have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from mlx_sink.errors import ModelError

Config = Mapping[str, Any]
Rule = Callable[[Config], Any]
"""From a configuration to the value of a field of it, `ABSENT` where it has none to give."""

ABSENT = object()


def _list(config: Config, field: str) -> list[Any] | None:
    value = config.get(field)
    return cast("list[Any]", value) if isinstance(value, list) else None


def _dict(config: Config, field: str) -> dict[str, Any]:
    value = config.get(field)
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _constant(value: Any) -> Rule:
    return lambda config: value


def _same(name: str, otherwise: Any = ABSENT) -> Rule:
    """Take the value of another field."""
    return lambda config: otherwise if config.get(name) is None else config[name]


def _times(field: str, by: Rule) -> Rule:
    def rule(config: Config) -> Any:
        one, other = config.get(field), by(config)
        return int(one * other) if isinstance(one, int) and other is not ABSENT else ABSENT

    return rule


def _heads_of_keys(config: Config) -> Any:
    """Read ``None`` as transformers does: as many as of queries."""
    return config.get("num_attention_heads", ABSENT) if "num_key_value_heads" in config else ABSENT


def _head_dim(config: Config) -> Any:
    width, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if not (isinstance(width, int) and isinstance(heads, int) and heads > 0):
        return ABSENT
    return width // heads


def _each(field: str, kind: str, yes: Any = 1, no: Any = 0) -> Rule:
    """Take a list of kinds of layers as one flag a layer."""

    def rule(config: Config) -> Any:
        kinds = _list(config, field)
        return ABSENT if kinds is None else [yes if k == kind else no for k in kinds]

    return rule


def _renamed(field: str, **names: str) -> Rule:
    """Take a list of kinds of layers, under other names."""

    def rule(config: Config) -> Any:
        kinds = _list(config, field)
        return ABSENT if kinds is None else [names.get(str(k), k) for k in kinds]

    return rule


def _which(config: Config, field: str, kind: str) -> list[int] | None:
    """Return the layers of a kind, counted from 0."""
    kinds = _list(config, field)
    return None if kinds is None else [i for i, k in enumerate(kinds) if k == kind]


def _dense_first(config: Config) -> Any:
    """Return after how many layers the mixtures of experts begin."""
    dense = _which(config, "mlp_layer_types", "dense")
    if dense is None:
        return ABSENT
    if dense != list(range(len(dense))):
        raise ModelError("mlx-lm knows dense layers at the beginning only (mlp_layer_types)")
    return len(dense)


def _interval(config: Config) -> Any:
    """Return which of the layers have full attention, as "every n-th"."""
    full = _which(config, "layer_types", "full_attention")
    if full is None:
        return ABSENT
    layers = len(config["layer_types"])
    n = full[0] + 1 if full else layers + 1
    if full != list(range(n - 1, layers, n)):
        raise ModelError("mlx-lm knows full attention in every n-th layer only (layer_types)")
    return n


def _letters(config: Config) -> Any:
    """Return EXAONE's pattern of windowed (L) and full (G) layers, a letter a layer."""
    kinds, known = _list(config, "layer_types"), config.get("sliding_window_pattern")
    if isinstance(known, str) or config.get("sliding_window") is None or kinds is None:
        return ABSENT
    return "".join("L" if k == "sliding_attention" else "G" for k in kinds)


def _overridden(kind: str, field: str) -> Rule:
    """Take what all layers of a kind have instead of the usual value of a field."""

    def rule(config: Config) -> Any:
        layers = _which(config, "layer_types", kind) or []
        own = {int(i): part for i, part in _dict(config, "per_layer_config").items()}
        values = [own.get(i, {}).get(field) for i in layers]
        if not any(value is not None for value in values):
            return ABSENT
        if sorted(own) != layers or any(value != values[0] for value in values):
            raise ModelError(f"mlx-lm knows one {field} for all of its {kind} layers only")
        return values[0]

    return rule


def _with_theta(field: str) -> Rule:
    """Take an object, the rotary base put into it."""

    def rule(config: Config) -> Any:
        part = _dict(config, field)
        if not part or "rope_theta" in part or "rope_theta" not in config:
            return ABSENT
        return part | {"rope_theta": config["rope_theta"]}

    return rule


def _by_layer(name: str, usual: Any) -> Rule:
    """Take a rotary parameter of each layer's kind as a list."""

    def rule(config: Config) -> Any:
        kinds, rope = _list(config, "layer_types"), _dict(config, "rope_parameters")
        if kinds is None or not any(isinstance(rope.get(k), dict) for k in kinds):
            return ABSENT
        return [_dict(rope, k).get(name, usual) for k in kinds]

    return rule


def _typed(config: Config) -> Any:
    """Name the type of a scaling by its older key, too."""
    scaling = _dict(config, "rope_scaling")
    if "type" in scaling or "rope_type" not in scaling:
        return ABSENT
    return scaling | {"type": scaling["rope_type"]}


def _no_rope(config: Config) -> Any:
    """Say that there is no rotary embedding, which transformers says by ``None``."""
    field = "position_embedding_type"
    return "nope" if field in config and config[field] is None else ABSENT


def _linear_attention(config: Config) -> Any:
    full = _which(config, "layer_types", "full_attention")
    linear = _which(config, "layer_types", "linear_attention")
    if full is None or linear is None:
        return ABSENT
    return {
        "full_attn_layers": [i + 1 for i in full],
        "kda_layers": [i + 1 for i in linear],
        "num_heads": config.get("linear_num_heads"),
        "head_dim": config.get("linear_head_dim"),
        "short_conv_kernel_size": config.get("linear_conv_kernel_dim"),
    }


def _step_windows(config: Config) -> Any:
    heads = _overridden("sliding_attention", "num_attention_heads")(config)
    if heads is ABSENT:
        return ABSENT
    groups = config.get("num_key_value_heads")
    return {"num_attention_heads": heads, "num_attention_groups": groups}


def _step_experts(config: Config) -> Any:
    sparse = _which(config, "mlp_layer_types", "sparse")
    return ",".join(map(str, sparse)) if sparse else ABSENT


_ROUTER: dict[str, Rule] = {
    "topk_method": _constant("noaux_tc"),
    "scoring_func": _constant("sigmoid"),
}
_NO_SCALING: dict[str, Rule] = {"rope_scaling": _constant(None)}
_GLOBAL: dict[str, Rule] = {
    "global_head_dim": _overridden("full_attention", "head_dim"),
    "num_global_key_value_heads": _overridden("full_attention", "num_key_value_heads"),
}
_TYPED: dict[str, Rule] = {"rope_scaling": _typed}
_EVERY_NTH: dict[str, Rule] = {"full_attention_interval": _interval}

PER_LAYER = ("gemma4_text", "gemma4_unified_text", "step3p5")
"""Whose layers may differ from each other, by ``per_layer_config``."""

EVERYWHERE: dict[str, Rule] = {"num_key_value_heads": _heads_of_keys}
"""Missing fields that mean the same in all classes."""

MISSING: dict[str, dict[str, Rule]] = {
    "apertus": {
        "mlp_bias": _constant(False),
        "post_norm": _constant(False),
        "qk_norm": _constant(True),
    },
    "cohere2": {"sliding_window_pattern": _interval},
    # Its module knows YaRN only: by a factor of 1 that is no scaling.
    "deepseek_v2": {"rope_scaling": _constant({"type": "yarn", "factor": 1.0})},
    "exaone": {
        "num_layers": _same("num_hidden_layers"),
        "layer_norm_epsilon": _same("rms_norm_eps"),
    },
    "exaone4": {"head_dim": _head_dim, **_NO_SCALING},
    "exaone_moe": {
        "head_dim": _head_dim,
        "is_moe_layer": _each("mlp_layer_types", "sparse", True, False),
    },
    "falcon_h1": {"head_dim": _head_dim},
    "gemma3_text": {"sliding_window_pattern": _interval},
    "gemma4_text": _GLOBAL,
    "gemma4_unified_text": {"hidden_size_per_layer_input": _constant(0), **_GLOBAL},
    "glm4_moe": {"head_dim": _head_dim, **_NO_SCALING},
    "glm4_moe_lite": {"first_k_dense_replace": _dense_first},
    "glm_moe_dsa": {"moe_layer_freq": _constant(1), **_ROUTER},
    "gpt_neox": {
        "rotary_emb_base": _same("rope_theta"),
        "rotary_pct": _same("partial_rotary_factor"),
    },
    "internlm3": {"bias": _same("mlp_bias"), "qkv_bias": _same("attention_bias")},
    "kimi_linear": {
        "rope_theta": _constant(10000.0),  # It has no rotary embedding, and asks for a base.
        "linear_attn_config": _linear_attention,
        "first_k_dense_replace": _dense_first,
    },
    "lfm2": {"block_dim": _same("hidden_size")},
    "llama4_text": _NO_SCALING,
    "longcat_flash": {
        "attention_method": _constant("MLA"),
        "zero_expert_type": _constant("identity"),
        "mla_scale_q_lora": _constant(True),
        "mla_scale_kv_lora": _constant(True),
    },
    "mamba2": {"intermediate_size": _times("hidden_size", _same("expand"))},
    "mellum": {"num_experts": _same("num_local_experts")},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": _each("layer_types", "sliding_attention"),
        "moe_layer_freq": _each("mlp_layer_types", "sparse"),
        "add_swa_attention_sink_bias": _constant(True),
        "add_full_attention_sink_bias": _constant(False),
        "sliding_window_size": _same("sliding_window"),
        "n_shared_experts": _constant(None),
        "layernorm_epsilon": _same("rms_norm_eps"),
        "swa_rope_theta": _same("rope_local_base_freq"),
        "swa_num_attention_heads": _same("num_attention_heads"),
        "swa_num_key_value_heads": _times("num_key_value_heads", _constant(2)),
        "swa_head_dim": _same("head_dim"),
        "swa_v_head_dim": _same("v_head_dim"),
        **_ROUTER,
    },
    "minicpm3": {
        # Its module knows LongRoPE only: by factors of 1 that is no scaling.
        "rope_scaling": lambda config: {
            "original_max_position_embeddings": config.get("max_position_embeddings")
        }
    },
    "minimax_m2": {
        "shared_intermediate_size": _constant(0),  # Asked for, and not used.
        "rotary_dim": _times("head_dim", _same("partial_rotary_factor", 1.0)),
    },
    "qwen3_5_moe_text": _EVERY_NTH,
    "qwen3_5_text": _EVERY_NTH,
    "qwen3_moe": {"num_experts": _same("num_local_experts"), "head_dim": _head_dim},
    "qwen3_next": _EVERY_NTH,
    "qwen3_vl_moe_text": {
        "num_experts": _same("num_local_experts"),
        "norm_topk_prob": _constant(True),
    },
    "solar_open": {
        "intermediate_size": _same("moe_intermediate_size"),  # No layer is dense.
        "first_k_dense_replace": _constant(0),
        "partial_rotary_factor": _constant(1.0),
    },
    "step3p5": {
        "num_attention_groups": _same("num_key_value_heads"),
        "moe_num_experts": _same("n_routed_experts"),
        "moe_top_k": _same("num_experts_per_tok"),
        "moe_layers_enum": _step_experts,
        "attention_other_setting": _step_windows,
        "partial_rotary_factors": _by_layer("partial_rotary_factor", 1.0),
        "yarn_only_types": _constant(["full_attention"]),
    },
}
"""What is added where it is missing."""

CHANGED: dict[str, dict[str, Rule]] = {
    "dbrx": {"attn_config": _with_theta("attn_config")},
    "exaone4": {"sliding_window_pattern": _letters},
    "granitemoehybrid": {
        "layer_types": _renamed(
            "layer_types", linear_attention="mamba", full_attention="attention"
        ),
        "position_embedding_type": _no_rope,
    },
    "nemotron": _TYPED,
    "phi3": _TYPED,
    "qwen2_moe": _TYPED,
    "step3p5": {"rope_theta": _by_layer("rope_theta", 10000.0)},
}
"""What has a value that mlx-lm does not know."""
