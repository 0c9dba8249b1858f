"""Write a tiny model as llama.cpp's converter would: by its names, its fields and its conventions.

Names come from the package gguf's own table, types from its own quantisers; what the converter
does to weights is written down here from `convert_hf_to_gguf.py`, and not as the inverse of what
mlx_sink does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import _get_classes

HEADS, KV_HEADS, WIDTH, HEAD_DIM, LAYERS, VOCABULARY = 4, 2, 64, 32, 2, 96

COMMON: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 128,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "rope_theta": 5000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}

LONG = [1.0 + 0.2 * i for i in range(8)]
SHORT = [1.0 + 0.01 * i for i in range(8)]

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": COMMON | {"model_type": "llama"},
    "llama, tied": COMMON | {"model_type": "llama", "tie_word_embeddings": True},
    "llama, biases": COMMON | {"model_type": "llama", "attention_bias": True},
    "llama, linear": COMMON
    | {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama, llama3": COMMON
    | {
        "model_type": "llama",
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "qwen2": COMMON | {"model_type": "qwen2", "head_dim": WIDTH // HEADS},
    "qwen3": COMMON | {"model_type": "qwen3"},
    "qwen3, yarn": COMMON
    | {
        "model_type": "qwen3",
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    },
    "phi3": COMMON | {"model_type": "phi3", "head_dim": WIDTH // HEADS},
    "phi3, longrope": COMMON
    | {
        "model_type": "phi3",
        "head_dim": WIDTH // HEADS,
        "original_max_position_embeddings": 128,
        "rope_scaling": {
            "type": "longrope",
            "long_factor": LONG,
            "short_factor": SHORT,
            "original_max_position_embeddings": 128,
        },
    },
    "gemma": COMMON | {"model_type": "gemma", "tie_word_embeddings": True},
    "gemma2": COMMON
    | {
        "model_type": "gemma2",
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": HEAD_DIM,
        "attn_logit_softcapping": 20.0,
        "final_logit_softcapping": 10.0,
    },
    "gemma3": COMMON
    | {
        "model_type": "gemma3_text",
        "tie_word_embeddings": True,
        "num_hidden_layers": 7,
        "query_pre_attn_scalar": HEAD_DIM,
        "sliding_window": 16,
    },
}
"""Models by what llama.cpp calls their architecture, and what varies after the comma."""

Q = gguf.GGMLQuantizationType


def random_model(name: str, seed: int = 0) -> nn.Module:
    """Make a model by mlx-lm from its Hugging Face configuration, with random weights."""
    config = CONFIGS[name]
    model_class, args = _get_classes(config)
    mx.random.seed(seed)
    model = model_class(args.from_dict(config))
    if config["tie_word_embeddings"] and hasattr(model, "sanitize"):
        model.sanitize({"model.embed_tokens.weight": mx.zeros(1)})

    def random(x: mx.array) -> mx.array:
        return x + 0.3 * mx.random.normal(x.shape) if x.ndim == 1 else 3 * x

    model.update(tree_unflatten([(n, random(x)) for n, x in tree_flatten(model.parameters())]))
    mx.eval(model.parameters())
    return model


def rounded(model: nn.Module, kind: str) -> nn.Module:
    """Round a model's matrices to what a type of GGUF holds, in place.

    A model all in bfloat16 has its norms in it too.
    """
    weights = [
        (n, mx.array(_round(np.array(x), Q[kind])) if x.ndim > 1 or kind == "BF16" else x)
        for n, x in tree_flatten(model.parameters())
    ]
    model.update(tree_unflatten(weights))
    return model


def _round(x: np.ndarray, kind: Any) -> np.ndarray:
    return gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)


def interleaved(x: np.ndarray, heads: int) -> np.ndarray:
    """Do to a query or key projection what the converter does for Llama (``permute``)."""
    return (
        x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
    )


def write(path: Path, name: str, model: nn.Module, kind: str = "F32", **changes: Any) -> Path:
    """Write a model.

    Args:
        path: The file.
        name: One of `CONFIGS`.
        model: The model.
        kind: Type of its matrices.
        changes: Fields to write in place of the right ones; ``None`` for none.
    """
    architecture, config = name.partition(",")[0], CONFIGS[name]
    writer = gguf.GGUFWriter(path, architecture)
    fields = _fields(architecture, config) | _tokenizer()
    for field, value in (fields | changes).items():
        if value is not None:
            _add(writer, field, value)
    for tensor, data, of in tensors(name, model, kind):
        writer.add_tensor(tensor, data, raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors(name: str, model: nn.Module, kind: str) -> list[tuple[str, np.ndarray, Any]]:
    """Return the tensors as the converter writes them: name, data, type."""
    architecture, config = name.partition(",")[0], CONFIGS[name]
    arch = next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == architecture)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    made: list[tuple[str, np.ndarray, Any]] = []
    for hf, array in tree_flatten(model.parameters()):
        data = np.array(array.astype(mx.float32))
        if architecture == "llama" and ".q_proj." in hf:
            data = interleaved(data, HEADS)
        if architecture == "llama" and ".k_proj." in hf:
            data = interleaved(data, KV_HEADS)
        if architecture.startswith("gemma") and hf.endswith("norm.weight"):
            data = data + 1
        to = names.get_name(hf, try_suffixes=(".weight", ".bias"))
        assert to is not None, hf
        of = Q[kind] if data.ndim > 1 else Q.F32
        made.append((to, gguf.quants.quantize(data, of), of))
    extra: dict[str, list[float]] = {}
    scaling = config.get("rope_scaling", {})
    if scaling.get("type") == "longrope":
        extra = {"rope_factors_long.weight": LONG, "rope_factors_short.weight": SHORT}
    if scaling.get("rope_type") == "llama3":
        extra = {"rope_freqs.weight": _llama3_factors(config)}
    return [*made, *((n, np.array(x, np.float32), Q.F32) for n, x in extra.items())]


def _llama3_factors(config: dict[str, Any]) -> list[float]:
    """Return what the converter's ``generate_extra_tensors`` writes for Llama 3."""
    s, dim = config["rope_scaling"], config["head_dim"]
    factor, low, high, old = (
        s[k]
        for k in (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        )
    )
    factors: list[float] = []
    for i in range(0, dim, 2):
        wavelength = 2 * np.pi * config["rope_theta"] ** (i / dim)
        if wavelength < old / high:
            factors.append(1.0)
        elif wavelength > old / low:
            factors.append(factor)
        else:
            smooth = (old / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def _fields(architecture: str, config: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_theta"],
        "rope.dimension_count": config["head_dim"],
    }
    if config["head_dim"] != WIDTH // HEADS:
        fields |= {"attention.key_length": HEAD_DIM, "attention.value_length": HEAD_DIM}
    scaling = config.get("rope_scaling", {})
    kind = scaling.get("rope_type", "")
    if kind in ("linear", "yarn"):
        fields |= {"rope.scaling.type": kind, "rope.scaling.factor": scaling["factor"]}
    if "original_max_position_embeddings" in scaling and kind != "llama3":
        original = scaling["original_max_position_embeddings"]
        fields["rope.scaling.original_context_length"] = original
    if architecture == "gemma2":
        fields |= {k: config[k] for k in ("attn_logit_softcapping", "final_logit_softcapping")}
        fields["attention.sliding_window"] = 4096
    if architecture == "gemma3":
        fields["attention.sliding_window"] = config["sliding_window"]
    return {f"{architecture}.{name}": value for name, value in fields.items()}


def _tokenizer() -> dict[str, Any]:
    words = [*(chr(0x21 + i) for i in range(VOCABULARY - 6)), "ab", "abc", "Ċ"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": ["<s>", "</s>", *words, "Ġ"],
        "tokenizer.ggml.token_type": [3, 3, *[1] * (VOCABULARY - 2)],
        "tokenizer.ggml.merges": ["a b", "ab c"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


def _add(writer: Any, field: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(field, value)
    elif isinstance(value, int):
        writer.add_uint32(field, value)
    elif isinstance(value, float):
        writer.add_float32(field, value)
    elif isinstance(value, str):
        writer.add_string(field, value)
    else:
        writer.add_array(field, value)
