"""What `every` needs to know of single architectures of mlx-lm.

Values have the forms that `every.config` describes. Keep an entry as short as it can be.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import muse_spark_ops
from mlx.utils import tree_map
from mlx_lm.models.bitlinear_layers import BitLinear

_ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
_SLIDING = ("sliding_attention", "full_attention")
_BY_TYPE = {
    kind: {**_ROPE, "rope_theta": theta} for kind, theta in zip(_SLIDING, (1e3, 1e4), strict=True)
}
_SCALED = {**_ROPE, "llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 512}
_LFM2 = {
    "layer_types": ("conv", "full_attention"),
    "block_multiple_of": 8,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
}
_KIMI = {
    "linear_attn_config": {
        "num_heads": 4,
        "head_dim": 8,
        "short_conv_kernel_size": 3,
        "kda_layers": [1, 3],
    },
}
_GEMMA4 = {
    "layers": 4,
    "layer_types": _SLIDING,
    "num_kv_shared_layers": lambda n: n // 2,
    "hidden_size_per_layer_input": 8,
    "rope_parameters": None,
    "partial_rotary_factor": 1.0,
}
_LONGCAT = {
    "attention_method": "MLA",
    "zero_expert_type": "identity",
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
}
# Many heads: with few, scores of exactly 0 tie, and which tokens then count depends on the cuts.
_INDEX = {"index_n_heads": 16, "index_head_dim": 16, "index_topk": 8}


def _plain_linear(model: nn.Module) -> None:
    """Put full-precision layers for bitnet's packed ones, which run on Metal alone."""
    model.update_modules(
        tree_map(
            lambda layer: (
                nn.Linear(layer.in_features, layer.out_features, "bias" in layer)
                if isinstance(layer, BitLinear)
                else layer
            ),
            model.leaf_modules(),
            is_leaf=nn.Module.is_module,
        )
    )


def _no_dummy_tokens(model: nn.Module) -> None:
    """Forget the ids, all above 100000, whose logits phi3small makes minus infinity."""
    model._dummy_tokenizer_ids = mx.array([], dtype=mx.int32)


OVERRIDES: dict[str, dict[str, Any]] = {
    "Klear": {"layers": 2, "mlp_only_layers": [0]},
    "afm7": {"layers": 2, "num_kv_reuse_layers": lambda n: n // 2},
    "afmoe": {"layer_types": _SLIDING},
    "baichuan_m1": {
        "layers": 2,
        "tie_word_embeddings": False,
        "sliding_window_layers": lambda n: range(0, n, 2),
    },
    "bitnet": {"amend": _plain_linear},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "mscale_all_dim": 0.7,
        },
    },
    "deepseek_v32": _INDEX,
    "deepseek_v41": {
        "layers": 3,
        "compress_ratios": (0, 2, 2),
        "kv_source_layer_ids": lambda n: range(1, n, 3),
        "index_source_layer_ids": lambda n: range(1, n, 3),
        **_INDEX,
        "index_topk": 4,
        "o_groups": 2,
    },
    "exaone4": {"layers": 2, "sliding_window_pattern": "LG"},
    "exaone_moe": {"layer_types": _SLIDING, "is_moe_layer": (False, True)},
    "falcon_h1": {"lm_head_multiplier": 1.0, "key_multiplier": 1.0},
    "gear": {"layer_types": ("conv_mixer", *_SLIDING)},
    "gemma3n": {
        **_GEMMA4,
        "activation_sparsity_pattern": (0.5, 0.0),
        "altup_num_inputs": 2,
        "altup_active_idx": 0,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "rope_local_base_freq": 1e3,
    },
    "gemma4": _GEMMA4,
    "gemma4_text": _GEMMA4,
    "glm_moe_dsa": _INDEX,
    "gpt_oss": {"layer_types": _SLIDING},
    "granitemoehybrid": {"layer_types": ("mamba", "attention")},
    "hunyuan": {
        "layers": 2,
        "use_cla": True,
        "cla_share_factor": 2,
        "use_mixed_mlp_moe": True,
        "rope_scaling": {"type": "dynamic", "alpha": 4.0, "factor": 1.0},
    },
    "jamba": {
        "layers": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "kimi_k3": {
        **_KIMI,
        "layers": 2,
        "hidden_act": "situ",
        "activation_situ_beta": 2.0,
        "attn_res_block_size": 2,
        "mla_use_output_gate": True,
    },
    "kimi_linear": _KIMI,
    "laguna": {"layer_types": _SLIDING, "rope_parameters": _BY_TYPE},
    "lfm2": _LFM2,
    "lfm2-vl": _LFM2,
    "lfm2_moe": _LFM2,
    "lille-130m": {"n_embd": 96},
    "llama": {"layer_types": _SLIDING},
    "llama4": {
        "layers": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "floor_scale": 512,
    },
    "llama4_text": {"no_rope_layers": (1, 0)},
    "longcat_flash": _LONGCAT,
    "longcat_flash_ngram": {
        **_LONGCAT,
        "ngram_vocab_size_ratio": 2,
        "emb_neighbor_num": 3,
        "emb_split_num": 2,
    },
    "mamba2": {"time_step_limit": [0.001, 100.0]},
    "mellum": {"layer_types": _SLIDING, "rope_parameters": _BY_TYPE},
    "mimo_v2_flash": {"hybrid_layer_pattern": (1, 0), "moe_layer_freq": (0, 1)},
    "minicpm3": {
        "rope_scaling": {
            "original_max_position_embeddings": 64,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 2.0, 3.0, 4.0],
        },
    },
    "minimax_m3_vl": {
        **_INDEX,
        "index_n_heads": 2,
        "layer_types": ("full_attention", "sparse_attention"),
        "moe_layer_freq": (0, 1),
        "index_block_size": 2,
        "index_topk_blocks": 4,
    },
    "ministral3": {"layer_types": _SLIDING, "rope_parameters": _SCALED},
    "mistral4": {"rope_parameters": _SCALED},
    "muse_glimmer": {"layer_types": _SLIDING},
    "muse_spark": {
        "layer_types": _SLIDING,
        "layer_rope_theta": (1e4, 0.0),
        "num_shared_experts": 0,
        "amend": lambda model: muse_spark_ops.install(),
        "post_norm_eps": 1e-8,
        "output_multiplier": 1.0,
    },
    "nanbeige": {"num_loops": 2},
    "nemotron-nas": {
        "block_configs": (
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"replace_with_linear": True}, "ffn": {"no_op": True}},
            {"attention": {"no_op": True}, "ffn": {"replace_with_linear": True}},
        ),
    },
    "nemotron_h": {"layers_block_type": ("mamba", "attention", "mlp", "moe")},
    "olmo3": {"layer_types": _SLIDING},
    "olmo_hybrid": {
        "linear_allow_neg_eigval": True,
        "layer_types": ("linear_attention", "full_attention"),
    },
    "openelm": {
        "ffn_dim_divisor": 8,
        "num_query_heads": (4,),
        "num_kv_heads": (2,),
        "ffn_multipliers": (1.5,),
    },
    "phi3small": {
        "layers": 2,
        "dense_attention_every_n_layers": 2,
        "gegelu_limit": 20.0,
        "blocksparse_block_size": 32,
        "blocksparse_num_local_blocks": 1,
        "blocksparse_vert_stride": 2,
        "amend": _no_dummy_tokens,
    },
    "plamo2": {"layers": 2},
    "prism_hadamard_qwen35": {
        "num_experts": 0,
        "intermediate_size": 128,
        "tensor_namespace": "mlx-vlm-qwen3_5",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [
            {
                "path": "model.layers.0.mlp.down_proj",
                "embedding": False,
                "dtype": "float16",
                "block": 0,
            }
        ],
    },
    "qwen3_5": {"num_experts": 0},
    "recurrent_gemma": {"block_types": ("recurrent", "attention")},
    "smollm3": {"layers": 2, "no_rope_layer_interval": 2},
    "spark2_5": {"layer_types": _SLIDING, "rope_parameters": _BY_TYPE, "hidden_act": "gelu"},
    "step3p5": {"layer_types": _SLIDING},
}
"""What `every.FIELDS` does not do."""


def _silent(*paths: str, **options: Any) -> dict[str, Any]:
    """Return options for an architecture that insists on a layer before the one wanted."""
    return {"layers": 2, "layer_types": _SLIDING, "silent": paths, **options}


_SILENT_LINEAR = _silent("language_model.model.layers.0.linear_attn.out_proj")

SINGLE: dict[str, dict[str, Any]] = {
    "afm7": {"num_kv_reuse_layers": 0},
    "bailing_hybrid": {"layer_group_size": 1},
    "bailing_moe_linear": _silent("model.layers.0.attention.dense"),
    "bailing_moe_v3": {"layer_group_size": 1},
    "cohere2": {"sliding_window_pattern": 1},
    "exaone4": {"sliding_window_pattern": None},
    "falcon_h1": {"silent": ("model.layers.0.mamba.out_proj",)},
    "gemma3": {"sliding_window_pattern": 1},
    "gemma3_text": {"sliding_window_pattern": 1},
    "gemma3n": _silent("model.language_model.layers.0.self_attn.o_proj", num_kv_shared_layers=0),
    "gemma4": {"num_kv_shared_layers": 0},
    "gemma4_text": {"num_kv_shared_layers": 0},
    "gpt_oss": _silent("model.layers.0.self_attn.o_proj"),
    "granitemoehybrid": {"layer_types": ("attention",)},
    "jamba": _silent("model.layers.0.mamba.out_proj"),
    "kimi_k3": {"linear_attn_config": {**_KIMI["linear_attn_config"], "kda_layers": []}},
    "kimi_linear": _silent("model.layers.0.self_attn.o_proj"),
    "lfm2": _silent("model.layers.0.conv.out_proj", **_LFM2),
    "lfm2-vl": _silent("language_model.model.layers.0.conv.out_proj", **_LFM2),
    "lfm2_moe": _silent("model.layers.0.conv.out_proj", **_LFM2),
    "llama4": _silent(
        *(f"language_model.model.layers.{i}.self_attn.o_proj" for i in range(3)), layers=4
    ),
    "longcat_flash": {"silent": ("model.layers.0.self_attn.0.o_proj",)},
    "longcat_flash_ngram": {
        "silent": ("model.layers.0.self_attn.0.o_proj", "model.ngram_embeddings.post_projs"),
    },
    "mimo_v2_flash": _silent("model.layers.0.self_attn.o_proj"),
    "nanbeige": {"num_loops": 1},
    "nemotron_h": _silent(
        "backbone.layers.0.mixer.out_proj", layers_block_type=("mamba", "attention")
    ),
    "olmo3": _silent("model.layers.0.self_attn.o_proj"),
    "plamo2": {"mamba_enabled": False, "mamba_step": 1},
    "plamo3": {"sliding_window_pattern": 1},
    "prism_hadamard_qwen35": _SILENT_LINEAR,
    "qwen3_5": _SILENT_LINEAR,
    "qwen3_5_moe": _SILENT_LINEAR,
    "qwen3_next": _silent("model.layers.0.linear_attn.out_proj"),
}
"""What one layer of full attention needs beyond its number and ``layer_types``."""

NO_SINGLE: dict[str, str] = {
    "baichuan_m1": "its keys and values mix every token with the one before",
    "deepseek_v41": "all its layers have a native window, and some compressed groups of tokens",
    "iquestloopcoder": "its layers run twice, the second time over the keys of the first",
    "mamba": "it has no attention",
    "mamba2": "it has no attention",
    "recurrent_gemma": "all its attention has a native window",
    "rwkv7": "it has no attention",
}
"""Why an architecture cannot have a single layer of full attention."""
