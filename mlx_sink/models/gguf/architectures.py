"""What a GGUF file calls the parts of a model, and what mlx-lm calls them.

llama.cpp's converter changes three things, which are undone here: it interleaves the rows of
Llama's query and key projections (its rotary embedding pairs neighbours), adds 1 to the norms of
Gemma, and leaves out an output head that is the embedding.

Source: https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py and
gguf-py/gguf/constants.py
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_sink.errors import ModelError

TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}

LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

PHI3 = LAYER | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
GEMMA_2 = LAYER | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

ROPE_FREQS, ROPE_LONG, ROPE_SHORT = "rope_freqs", "rope_factors_long", "rope_factors_short"
ROPE_TENSORS = (ROPE_FREQS, ROPE_LONG, ROPE_SHORT)

GEMMA_LARGEST = {"gemma2": 46, "gemma3": 62}
"""Layers of the 27B models, whose attention is scaled by the width of the model over its heads:
the file does not say it, and llama.cpp knows them by this too."""

GEMMA_3_PATTERN = 6
"""Every sixth layer of Gemma 3 has full attention; the file does not say it."""


class Metadata:
    """The fields of a file, by the names that its architecture gives them.

    Args:
        fields: As in `io.gguf.Header`.
        where: What to call the file in an error.
    """

    def __init__(self, fields: Mapping[str, Any], where: str):
        self._fields, self.where = fields, where
        self.architecture = self._text("general.architecture")

    def _text(self, name: str) -> str:
        value = self._fields.get(name)
        if not isinstance(value, str):
            raise ModelError(f"{self.where} says no {name}")
        return value

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field of the architecture, or else of the file."""
        return self._fields.get(f"{self.architecture}.{name}", self._fields.get(name, default))

    def integer(self, name: str, default: int | None = None) -> int:
        """Return a field that is a number of something, or the same one for every layer."""
        value = self.get(name, default)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        if type(value) is not int or not 0 < value < 1 << 31:
            raise ModelError(f"{self.where}: {self.architecture}.{name} is {shown(value)}")
        return value

    def real(self, name: str, default: float | None = None) -> float:
        """Return a field that is a positive number."""
        value = self.get(name, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ModelError(f"{self.where}: {self.architecture}.{name} is {shown(value)}")
        return float(value)


def shown(value: object) -> str:
    """Return a value for an error: a long one is named by its kind."""
    text = repr(value)
    return text if len(text) < 80 else f"a {type(value).__name__}"


@dataclass(frozen=True, slots=True)
class Architecture:
    """How one architecture is kept in GGUF.

    Attributes:
        model_type: What mlx-lm calls it.
        layer: Names of a layer's parts.
        pairs_neighbours: The rows of query and key projections are interleaved.
        norm_offset: What is added to the weights of norms.
        half: float16 holds its activations.
        config: Returns what config.json says beyond the fields that all have.
    """

    model_type: str
    layer: Mapping[str, str]
    pairs_neighbours: bool = False
    norm_offset: float = 0.0
    half: bool = True
    config: Callable[[Metadata], dict[str, Any]] = lambda metadata: {}


def _gemma(m: Metadata) -> dict[str, Any]:
    return {"head_dim": m.integer("attention.key_length")}


def _scalar(m: Metadata) -> float:
    """Return what the attention of Gemma 2 and 3 is scaled by the root of."""
    heads, layers = m.integer("attention.head_count"), m.integer("block_count")
    if layers == GEMMA_LARGEST[m.architecture]:
        return m.integer("embedding_length") / heads
    return m.integer("attention.key_length")


def _gemma2(m: Metadata) -> dict[str, Any]:
    return _gemma(m) | {
        "attn_logit_softcapping": m.real("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": m.real("final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": _scalar(m),
        "sliding_window": m.integer("attention.sliding_window", 4096),
    }


def _gemma3(m: Metadata) -> dict[str, Any]:
    return _gemma(m) | {
        "query_pre_attn_scalar": _scalar(m),
        "sliding_window": m.integer("attention.sliding_window"),
        "sliding_window_pattern": GEMMA_3_PATTERN,
        "rope_local_base_freq": 10000.0,
    }


def _phi3(m: Metadata) -> dict[str, Any]:
    heads, width = m.integer("attention.head_count"), m.integer("embedding_length")
    dims = m.integer("rope.dimension_count", width // heads)
    original = m.integer("rope.scaling.original_context_length", m.integer("context_length"))
    return {
        "partial_rotary_factor": dims * heads / width,
        "original_max_position_embeddings": original,
    }


ARCHITECTURES = {
    "llama": Architecture("llama", LAYER, pairs_neighbours=True),
    "qwen2": Architecture("qwen2", LAYER),
    "qwen3": Architecture("qwen3", LAYER),
    "phi3": Architecture("phi3", PHI3, config=_phi3),
    "gemma": Architecture("gemma", LAYER, norm_offset=1.0, half=False, config=_gemma),
    "gemma2": Architecture("gemma2", GEMMA_2, norm_offset=1.0, half=False, config=_gemma2),
    "gemma3": Architecture("gemma3_text", GEMMA_2, norm_offset=1.0, half=False, config=_gemma3),
}


def architecture_of(metadata: Metadata) -> Architecture:
    """Return how a file's architecture is kept.

    Raises:
        ModelError: It is not one that is known.
    """
    found = ARCHITECTURES.get(metadata.architecture)
    if found is None:
        raise ModelError(
            f"{metadata.where} is of the architecture {metadata.architecture!r}: of GGUF "
            f"{', '.join(ARCHITECTURES)} are read; use the repository that it was made from"
        )
    if metadata.get("expert_count"):
        raise ModelError(
            f"{metadata.where} has experts, which are not read from GGUF: use the repository that "
            "it was made from"
        )
    return found


def name_of(tensor: str, architecture: Architecture) -> str | None:
    """Return what mlx-lm calls a tensor, without its last part; ``None`` if that is not known."""
    stem, _, _ = tensor.rpartition(".")
    if stem in TOP:
        return TOP[stem]
    match = re.fullmatch(r"blk\.(\d{1,5})\.(\w+)", stem)
    if match is None or match[2] not in architecture.layer:
        return None
    return f"model.layers.{int(match[1])}.{architecture.layer[match[2]]}"


def config_of(
    metadata: Metadata,
    architecture: Architecture,
    tensors: Mapping[str, tuple[int, ...]],
    factors: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Return the config.json of a model.

    Args:
        metadata: What the file says.
        architecture: How it is kept.
        tensors: Shapes of the tensors, by their names in the file.
        factors: The tensors of the rotary embedding, by their names without ``.weight``.

    Raises:
        ModelError: A field is missing or makes no sense.
    """
    m = metadata
    heads, width = m.integer("attention.head_count"), m.integer("embedding_length")
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding) != 2:
        raise ModelError(f"{m.where} has no embedding (token_embd.weight)")
    head_dim = m.integer("attention.key_length", max(1, width // heads))
    config: dict[str, Any] = {
        "model_type": architecture.model_type,
        "hidden_size": width,
        "num_hidden_layers": m.integer("block_count"),
        "intermediate_size": m.integer("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": m.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": m.real("attention.layer_norm_rms_epsilon"),
        "vocab_size": embedding[0],
        "rope_theta": m.real("rope.freq_base", 10000.0),
        "max_position_embeddings": m.integer("context_length"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
    }
    scaling = _scaling(m, config, factors)
    return config | ({"rope_scaling": scaling} if scaling else {}) | architecture.config(m)


def _scaling(
    m: Metadata, config: Mapping[str, Any], factors: Mapping[str, np.ndarray]
) -> dict[str, Any] | None:
    """Return the ``rope_scaling`` of config.json, if there is any."""
    kind = m.get("rope.scaling.type", "none")
    if ROPE_LONG in factors or ROPE_SHORT in factors:
        if not {ROPE_LONG, ROPE_SHORT} <= factors.keys():
            raise ModelError(f"{m.where} has one of {ROPE_LONG} and {ROPE_SHORT}, not both")
        long, short = ([float(x) for x in factors[name]] for name in (ROPE_LONG, ROPE_SHORT))
        original = m.integer("rope.scaling.original_context_length")
        return {
            "type": "longrope",
            "rope_type": "longrope",
            "long_factor": long,
            "short_factor": short,
            "original_max_position_embeddings": original,
        }
    if ROPE_FREQS in factors:
        return _llama3(m, config, factors[ROPE_FREQS])
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ModelError(f"{m.where} scales positions by {shown(kind)}, which is not known")
    factor = m.real("rope.scaling.factor")
    if kind == "linear":
        return {"type": kind, "rope_type": kind, "factor": factor}
    original = m.integer("rope.scaling.original_context_length")
    return {
        "type": kind,
        "rope_type": kind,
        "factor": factor,
        "original_max_position_embeddings": original,
    }


def _llama3(m: Metadata, config: Mapping[str, Any], factors: np.ndarray) -> dict[str, Any]:
    """Return Llama 3's scaling, of which a file holds only the factor of every frequency.

    Those of all its models come of one rule with numbers that only the largest factor varies.
    """
    factor = float(factors.max())
    scaling: dict[str, Any] = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    dims = m.integer("rope.dimension_count", config["head_dim"])
    wavelength = 2 * math.pi * config["rope_theta"] ** (np.arange(0, dims, 2) / dims)
    smooth = (8192 / wavelength - 1.0) / 3.0
    between = 1 / ((1 - smooth) / factor + smooth)
    expected = np.where(wavelength < 8192 / 4, 1.0, np.where(wavelength > 8192, factor, between))
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise ModelError(f"{m.where} scales frequencies by factors that are not Llama 3's")
    return scaling
