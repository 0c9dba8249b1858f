"""Tiny configurations of every architecture of mlx-lm, for `every`."""

from __future__ import annotations

from typing import Any

WINDOW = 6
"""The native sliding window, and the chunk of chunked attention."""

LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_transformer_layers")
"""The names that the number of layers goes by."""

_ROPE = {"rope_theta": 10000.0, "rope_type": "default"}

FIELDS: dict[str, Any] = {
    **dict.fromkeys("vocab_size num_vocab vocab_size_per_layer_input".split(), 64),
    **dict.fromkeys(
        "max_position_embeddings model_max_length n_positions n_ctx block_size".split(), 512
    ),
    # Widths.
    **dict.fromkeys("hidden_size hidden_dim n_embd d_model model_dim block_dim".split(), 32),
    **dict.fromkeys(
        "intermediate_size ffn_hidden_size ff_intermediate_size n_inner intermediate_size_mlp "
        "dense_intermediate_size shared_intermediate_size block_ff_dim".split(),
        48,
    ),
    **dict.fromkeys(
        "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size "
        "moe_shared_expert_intermediate_size share_expert_dim moe_hidden_size "
        "routed_expert_hidden_size moe_latent_size".split(),
        24,
    ),
    # Heads.
    **dict.fromkeys(
        "num_attention_heads num_heads n_heads n_head swa_num_attention_heads "
        "num_swa_attention_heads".split(),
        4,
    ),
    **dict.fromkeys(
        "num_key_value_heads num_kv_heads n_kv_heads num_attention_groups "
        "swa_num_key_value_heads num_swa_key_value_heads n_shared_head".split(),
        2,
    ),
    **dict.fromkeys(
        "head_dim global_head_dim hidden_size_per_head kv_channels swa_head_dim v_head_dim "
        "swa_v_head_dim rotary_dim query_pre_attn_scalar".split(),
        8,
    ),
    **dict.fromkeys("qk_nope_head_dim".split(), 8),
    **dict.fromkeys("qk_rope_head_dim".split(), 8),
    # Latent attention and other low ranks.
    **dict.fromkeys("q_lora_rank kv_lora_rank o_lora_rank".split(), 16),
    **dict.fromkeys(
        "a_low_rank_dim v_low_rank_dim gate_low_rank_dim decay_low_rank_dim laurel_rank "
        "time_step_rank mamba_dt_rank".split(),
        8,
    ),
    # Windows and which layers have them.
    **dict.fromkeys(
        "sliding_window sliding_window_size window_size attention_window_size "
        "attention_chunk_size loop_window_size".split(),
        WINDOW,
    ),
    # Experts.
    **dict.fromkeys(
        "num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num".split(),
        4,
    ),
    **dict.fromkeys(
        "num_experts_per_tok num_experts_per_token top_k_experts moe_topk moe_top_k moe_k".split(),
        2,
    ),
    **dict.fromkeys(
        "n_shared_experts num_shared_experts num_shared_expert n_group topk_group "
        "num_expert_group moe_num_shared_experts decoder_sparse_step moe_layer_freq "
        "first_k_dense_replace num_dense_layers interleave_moe_layer_step".split(),
        1,
    ),
    "mlp_only_layers": [],
    # Recurrent layers.
    **dict.fromkeys("state_size ssm_state_size mamba_d_state".split(), 8),
    **dict.fromkeys(
        "conv_kernel conv1d_width conv_L_cache mamba_d_conv linear_conv_kernel_dim "
        "short_conv_kernel_size".split(),
        3,
    ),
    **dict.fromkeys("mamba_n_heads mamba_num_heads linear_num_value_heads".split(), 4),
    **dict.fromkeys("linear_num_key_heads n_groups mamba_n_groups group_norm_size".split(), 2),
    **dict.fromkeys(
        "mamba_d_head mamba_head_dim linear_key_head_dim linear_value_head_dim".split(), 8
    ),
    "mamba_expand": 2,
    "mamba_d_ssm": 32,
    "conv_window": 2,
    # Positions.
    **dict.fromkeys("rope_theta swa_rope_theta rotary_emb_base".split(), 10000.0),
    **dict.fromkeys("partial_rotary_factor rotary_pct".split(), 0.5),
    "rope_parameters": _ROPE,
    "rope_scaling": None,
    # Scales.
    **dict.fromkeys(
        "rms_norm_eps norm_eps layer_norm_eps layer_norm_epsilon layernorm_epsilon".split(), 1e-5
    ),
    **dict.fromkeys("logits_scaling embedding_multiplier scale_emb scale_depth".split(), 2.0),
    **dict.fromkeys("attention_multiplier residual_multiplier".split(), 0.5),
    "routed_scaling_factor": 1.5,
    "logit_scale": 1.0,
    "dim_model_base": 16,
    "final_logit_softcapping": 20.0,
    "logits_soft_cap": 20.0,
    # Options.
    **dict.fromkeys(
        "attention_bias use_qk_norm qk_norm norm_topk_prob tie_word_embeddings "
        "use_conv_bias conv_bias mamba_conv_bias use_bias post_norm use_expert_bias "
        "add_swa_attention_sink_bias add_full_attention_sink_bias use_qkv_bias".split(),
        True,
    ),
    **dict.fromkeys("mlp_bias mamba_proj_bias".split(), False),
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "hidden_act": "silu",
}

OVERRIDES: dict[str, dict[str, Any]] = {}
SINGLE: dict[str, dict[str, Any]] = {}
NO_SINGLE: dict[str, str] = {}
