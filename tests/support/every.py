"""A tiny random instance of every architecture of the installed mlx-lm.

The list is read from the package. A configuration is filled by the names of its fields
(`FIELDS`); what that rule does not reach is in `every_configs.OVERRIDES`. The
weights are random and large enough for the logits to depend on positions and on the context.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import io
import pkgutil
import sys
from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
import numpy as np
from every_configs import NO_SINGLE, OVERRIDES, SINGLE
from mlx.utils import tree_flatten, tree_unflatten

WINDOW = 6
"""The native sliding window, and the chunk of chunked attention, in tokens."""

LAYERS = "num_hidden_layers num_layers n_layers n_layer num_transformer_layers"
"""The names that the number of layers goes by."""

MIXED = {
    "first_k_dense_replace",
    "num_dense_layers",
    "sliding_window_pattern",
    "layer_group_size",
    "full_attention_interval",
}
"""Fields that make the first layer, or every other one, differ: two layers show both kinds."""

_VALUES: list[tuple[Any, str]] = [
    (64, "vocab_size num_vocab vocab_size_per_layer_input"),
    (512, "max_position_embeddings model_max_length n_positions n_ctx block_size"),
    # Widths.
    (32, "hidden_size hidden_dim n_embd d_model model_dim block_dim mamba_d_ssm"),
    (48, "intermediate_size ffn_hidden_size ff_intermediate_size n_inner block_ff_dim"),
    (48, "intermediate_size_mlp dense_intermediate_size shared_intermediate_size"),
    (24, "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size"),
    (24, "moe_shared_expert_intermediate_size share_expert_dim moe_hidden_size"),
    (24, "routed_expert_hidden_size moe_latent_size"),
    (16, "q_lora_rank kv_lora_rank o_lora_rank"),
    (8, "a_low_rank_dim v_low_rank_dim gate_low_rank_dim decay_low_rank_dim laurel_rank"),
    (8, "time_step_rank mamba_dt_rank"),
    # Heads.
    (4, "num_attention_heads num_heads n_heads n_head"),
    (4, "swa_num_attention_heads num_swa_attention_heads"),
    (2, "num_key_value_heads num_kv_heads n_kv_heads num_attention_groups n_shared_head"),
    (2, "swa_num_key_value_heads num_swa_key_value_heads"),
    (8, "head_dim global_head_dim hidden_size_per_head kv_channels v_head_dim"),
    (8, "swa_head_dim swa_v_head_dim rotary_dim qk_nope_head_dim qk_rope_head_dim"),
    (8.0, "query_pre_attn_scalar"),
    # Windows.
    (WINDOW, "sliding_window sliding_window_size window_size attention_window_size"),
    (WINDOW, "attention_chunk_size loop_window_size"),
    (2, "sliding_window_pattern layer_group_size full_attention_interval"),
    # Experts.
    (4, "num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num"),
    (2, "num_experts_per_tok num_experts_per_token top_k_experts moe_topk moe_top_k moe_k"),
    (1, "n_shared_experts num_shared_experts num_shared_expert moe_num_shared_experts"),
    (1, "n_group topk_group num_expert_group decoder_sparse_step moe_layer_freq"),
    (1, "first_k_dense_replace num_dense_layers interleave_moe_layer_step"),
    ([], "mlp_only_layers"),
    ("noaux_tc", "topk_method"),
    ("sigmoid", "scoring_func"),
    # Recurrent layers.
    (8, "state_size ssm_state_size mamba_d_state"),
    (8, "mamba_d_head mamba_head_dim linear_key_head_dim linear_value_head_dim"),
    (4, "mamba_n_heads mamba_num_heads linear_num_value_heads"),
    (2, "linear_num_key_heads n_groups mamba_n_groups group_norm_size"),
    (3, "conv_kernel conv1d_width conv_L_cache mamba_d_conv linear_conv_kernel_dim"),
    (3, "short_conv_kernel_size"),
    (2, "conv_window mamba_expand"),
    # Positions.
    (10000.0, "rope_theta swa_rope_theta rotary_emb_base"),
    (0.5, "partial_rotary_factor rotary_pct"),
    ({"rope_theta": 10000.0, "rope_type": "default"}, "rope_parameters"),
    (None, "rope_scaling"),
    # Scales.
    (1e-5, "rms_norm_eps norm_eps layer_norm_eps layer_norm_epsilon layernorm_epsilon"),
    (2.0, "logits_scaling embedding_multiplier scale_emb scale_depth"),
    (0.5, "attention_multiplier residual_multiplier"),
    (1.5, "routed_scaling_factor"),
    (1.0, "logit_scale"),
    (16, "dim_model_base"),
    (20.0, "final_logit_softcapping logits_soft_cap"),
    # Options.
    (True, "attention_bias use_qkv_bias use_bias use_conv_bias conv_bias mamba_conv_bias"),
    (True, "add_swa_attention_sink_bias add_full_attention_sink_bias use_expert_bias"),
    (True, "use_qk_norm qk_norm post_norm norm_topk_prob tie_word_embeddings"),
    (False, "mlp_bias mamba_proj_bias"),
    ("silu", "hidden_act"),
]

FIELDS: dict[str, Any] = {name: value for value, names in _VALUES for name in names.split()}
"""The value of a field of any configuration that has one of this name."""

GAIN = 1.5
"""What a projection multiplies the standard deviation of its input by."""

SPREAD = 0.2
"""Standard deviation of what is added to vectors: norms, biases, learned sinks, gates."""


@cache
def _survey() -> tuple[dict[str, ModuleType], dict[str, str]]:
    """Import every module of the package: the architectures, and why others would not import."""
    found: dict[str, ModuleType] = {}
    failed: dict[str, str] = {}
    for info in pkgutil.iter_modules(mlx_lm.models.__path__):
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                module = importlib.import_module(f"mlx_lm.models.{info.name}")
        except (ImportError, SystemExit) as error:
            failed[info.name] = said.getvalue().strip() or str(error)
        else:
            if hasattr(module, "Model") and hasattr(module, "ModelArgs"):
                found[info.name] = module
    return found, failed


def architectures() -> list[str]:
    """Return the names of all modules that define a ``Model`` and can be imported."""
    return list(_survey()[0])


def unavailable() -> dict[str, str]:
    """Return the modules that cannot be imported here, each with what it said."""
    return dict(_survey()[1])


def tiny(
    name: str,
    n_layers: int | None = None,
    dtype: mx.Dtype = mx.float32,
    seed: int = 0,
    **options: Any,
) -> nn.Module:
    """Make a random model with as few layers as show every kind of layer that it has.

    With ``n_layers`` the pattern of the layer kinds is cut or repeated, as far as the
    architecture bears it: llama4 needs four layers, and a hybrid one of each kind. ``options``
    are fields of the configuration, as in `config`. On a CPU MLX runs experts in float32 only.
    """
    return _make(name, {**OVERRIDES.get(name, {}), **options}, n_layers, dtype, seed)


def one_attention_layer(
    name: str, dtype: mx.Dtype = mx.float32, seed: int = 0, **options: Any
) -> nn.Module | None:
    """Make a random model in which one layer mixes tokens, by full attention.

    Where the architecture insists on another such layer, that layer's output projection is
    zero. Returns None where even that is impossible; `no_single_layer` says why.
    """
    if name in NO_SINGLE:
        return None
    usual = OVERRIDES.get(name, {})
    single = {"layer_types": ("full_attention",)} if "layer_types" in usual else {}
    settings = {**usual, "layers": 1, "silent": (), **single, **SINGLE.get(name, {}), **options}
    model = _make(name, settings, None, dtype, seed)
    weights = tree_flatten(model.parameters())
    silent = [(path, 0 * value) for path, value in weights if path.startswith(settings["silent"])]
    model.update(tree_unflatten(silent))
    return model


def no_single_layer(name: str) -> str | None:
    """Return why `one_attention_layer` makes no model of this architecture, or None."""
    return NO_SINGLE.get(name)


def config(name: str, options: Mapping[str, Any], n_layers: int | None = None) -> dict[str, Any]:
    """Return a configuration as a checkpoint would hold it, for ``ModelArgs.from_dict``.

    In ``options`` a tuple is a pattern, repeated to one entry per layer; a function is called
    with the number of layers, and gives a value or a range of layers. ``layers`` is their number
    where it is neither the length of the longest pattern nor that of `MIXED`. ``amend`` is a
    function that changes the new model, and ``silent`` names weights to be zero: no fields.
    """
    patterns = [len(value) for value in options.values() if isinstance(value, tuple)]
    fewest = 2 if any(field in MIXED for field in _fields(_survey()[0][name])) else 1
    n = n_layers or options.get("layers") or max(patterns, default=fewest)
    filled: dict[str, Any] = {**FIELDS, **dict.fromkeys(LAYERS.split(), n), "model_type": name}
    for key, value in options.items():
        if key in ("amend", "silent"):
            continue
        if isinstance(value, tuple):
            value = [value[i % len(value)] for i in range(n)]
        elif callable(value):
            value = value(n)
            value = list(value) if isinstance(value, range) else value
        filled[key] = value
    return copy.deepcopy({**filled, "text_config": filled})


def _fields(module: ModuleType) -> set[str]:
    """Return the configuration fields of a module and of those that it takes models from."""
    names = {getattr(value, "__module__", None) for value in vars(module).values()}
    names |= {value.__name__ for value in vars(module).values() if isinstance(value, ModuleType)}
    sources = [sys.modules[name] for name in names if name and name.startswith("mlx_lm.models.")]
    return {
        field.name
        for source in [module, *sources]
        for value in vars(source).values()
        if isinstance(value, type) and dataclasses.is_dataclass(value)
        for field in dataclasses.fields(value)
    }


def _make(
    name: str, options: Mapping[str, Any], n_layers: int | None, dtype: mx.Dtype, seed: int
) -> nn.Module:
    module = _survey()[0][name]
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(config(name, options, n_layers)))
    options.get("amend", lambda model: None)(model)
    randomize(model, seed)
    keep = getattr(model, "cast_predicate", lambda path: True)
    weights = tree_flatten(model.parameters())
    cast = [
        (path, value.astype(dtype) if value.dtype == mx.float32 and keep(path) else value)
        for path, value in weights
    ]
    model.update(tree_unflatten(cast))
    mx.eval(model.parameters())
    return model


def randomize(model: nn.Module, seed: int) -> None:
    """Replace every parameter by a random one; none stays zero, none is all the same."""
    random = np.random.default_rng(seed)
    weights = [
        (path, mx.array(_random(random, path, value)).astype(value.dtype))
        for path, value in tree_flatten(model.parameters())
    ]
    model.update(tree_unflatten(weights))


def _random(random: np.random.Generator, path: str, value: mx.array) -> np.ndarray:
    """Return random values of one parameter's shape.

    Packed weights are random bits. Recurrent layers get time steps that remember.
    """
    if not mx.issubdtype(value.dtype, mx.floating):
        return random.integers(
            0, 2 ** (8 * value.itemsize), value.shape, dtype=f"u{value.itemsize}"
        )
    if path.endswith("dt_bias"):
        value = value * 0 - 3.0
    noise = random.standard_normal(value.shape, dtype=np.float32)
    if value.ndim < 2 or path.endswith(("scales", "biases")):
        return np.array(value.astype(mx.float32)) + SPREAD * noise
    if "embed" in path and value.ndim == 2:
        return 0.5 * noise
    fan_in = value.shape[1] if "conv" in path else value.shape[-1]
    return GAIN / np.sqrt(fan_in) * noise
