"""Checkpoints of architectures whose configurations transformers spells otherwise than mlx-lm.

A value that does not arrive makes mlx-lm take a default of its own: these compare the logits of
the model that it builds with those of transformers. Each option is unlike every default.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm.utils import load_model
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mlx_sink.models.checkpoints.spelling import for_mlx_lm

N = 24
"""Tokens: more than a window has."""

ROPE = {"rope_type": "default", "rope_theta": 3000.0}
YARN = {
    **ROPE,
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 1,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "rope_parameters": ROPE,
}
EXPERTS = {
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
THIRD = {
    "layer_types": [
        "sliding_attention",
        "sliding_attention",
        "full_attention",
        "sliding_attention",
    ]
}
BY_KIND = {
    "rope_parameters": {
        "full_attention": ROPE | {"partial_rotary_factor": 0.5},
        "sliding_attention": ROPE | {"rope_theta": 700.0, "partial_rotary_factor": 0.5},
    }
}
MAMBA = {"mamba_d_head": 8, "mamba_n_heads": 8, "mamba_n_groups": 1, "mamba_d_state": 8}

CASES: dict[str, dict[str, Any]] = {
    "apertus": {"rope_parameters": ROPE},
    "cohere2": {**THIRD, "sliding_window": 6, "head_dim": 8, "logit_scale": 0.5},
    "deepseek_v2": {**LATENT, **EXPERTS, "first_k_dense_replace": 1},
    "exaone": {"rope_parameters": YARN},
    "exaone4": {**THIRD, "sliding_window": 6},
    "exaone_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_layer_types": ["dense", "sparse", "dense", "sparse"],
        "sliding_window": 6,
    },
    "gemma3_text": {
        **THIRD,
        "sliding_window": 6,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
            "sliding_attention": ROPE,
        },
    },
    "glm4_moe": {**EXPERTS, "first_k_dense_replace": 2},
    "glm4_moe_lite": {
        **LATENT,
        **EXPERTS,
        "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
    },
    "gpt_neox": {
        "intermediate_size": 128,
        "hidden_act": "gelu_new",
        "rope_parameters": ROPE | {"partial_rotary_factor": 0.5},
    },
    "granitemoehybrid": {
        **MAMBA,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "num_local_experts": 4,
        "shared_intermediate_size": 24,
    },
    "internlm3": {"head_dim": 8, "attention_bias": True, "mlp_bias": True},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 8},
    "mamba2": {"num_heads": 16, "head_dim": 8, "expand": 4, "n_groups": 1, "state_size": 8},
    "mellum": {
        **EXPERTS,
        **THIRD,
        "num_experts": 4,
        "head_dim": 8,
        "sliding_window": 6,
        "rope_parameters": {"full_attention": YARN, "sliding_attention": ROPE},
    },
    "mimo_v2_flash": {
        **{name: value for name, value in EXPERTS.items() if name != "n_shared_experts"},
        **BY_KIND,
        "head_dim": 8,
        "v_head_dim": 4,
        "sliding_window": 6,
    },
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "phi3": {
        "rope_parameters": {
            **ROPE,
            "rope_type": "longrope",
            "short_factor": [1.5, 1.5, 1.5, 1.5],
            "long_factor": [1.5, 1.5, 1.5, 1.5],
            "original_max_position_embeddings": 512,
        },
        "sliding_window": None,
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "solar_open": {**EXPERTS, "head_dim": 8},
}


@pytest.mark.parametrize("kind", CASES)
def test_logits(kind: str, tmp_path: Path):
    torch.manual_seed(0)
    config_class = CONFIG_MAPPING[kind]
    known = config_class().to_dict()
    sizes = {name: value for name, value in SIZES.items() if name in known}
    # transformers fills in the objects that it is given.
    config = config_class(**copy.deepcopy({**sizes, **CASES[kind]}))
    reference = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in reference.float().parameters():
            if parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
    reference.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    model, _ = load_model(tmp_path, model_config=for_mlx_lm(written))
    tokens = np.random.default_rng(0).integers(2, 60, (1, N))
    with torch.no_grad():
        expected = reference(torch.tensor(tokens), use_cache=False).logits.numpy()
    ours = np.array(model(mx.array(tokens)).astype(mx.float32))
    assert np.abs(expected).max() > 0.5
    assert np.abs(ours - expected).max() <= 5e-3
