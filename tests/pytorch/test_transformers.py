"""Checkpoints that transformers wrote, converted, against transformers on PyTorch.

The models are tiny and random, with attention sharp enough that a wrong rotary base or one key
too many shows. What is compared shares no code with us: transformers' own logits, and for streams
of one-layer models its logits of the visible tokens alone (in one layer that is StreamingLLM).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import torch
import transformers
from folder import make_folder
from tiny import cut, mixed, visible

import mlx_sink
from mlx_sink import SinkConfig
from mlx_sink.commands.convert.convert import convert
from mlx_sink.commands.convert.quantize import Recipe

TOLERANCE = 1e-3
"""As the logits of float32 are to agree; a hundredth of it is seen."""
S, W = 3, 12
N = 70
VOCABULARY = 280
LINEAR = {"rope_type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "attn_implementation": "eager",
}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("Gemma", {"head_dim": 16, "num_key_value_heads": 1}),
    # mlx-lm's Gemma 2 has no sliding windows: here they are longer than the text.
    "gemma2": ("Gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 128}),
    "granite": ("Granite", {"attention_multiplier": 0.3, "logits_scaling": 2.0}),
    "llama": ("Llama", {}),
    "llama, linear": ("Llama", {"rope": LINEAR}),
    "llama, llama3": ("Llama", {"rope": LLAMA3}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama, yarn": ("Llama", {"rope": YARN}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmo2": ("Olmo2", {}),
    "phi3": ("Phi3", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 20}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "stablelm": ("StableLm", {"rope": {"partial_rotary_factor": 0.25}, "use_qkv_bias": True}),
    "starcoder2": ("Starcoder2", {"use_bias": True, "hidden_act": "gelu"}),
}


each = pytest.mark.parametrize("name", ARCHITECTURES)


def save(path: Path, name: str, layers: int, dtype: str = "float32", **saving: Any) -> Any:
    """Write a random model as transformers does, with a tokenizer; return it."""
    family, given = ARCHITECTURES[name]
    options = {**COMMON, "num_hidden_layers": layers, **given}
    # A base that is nobody's default, so that one that is not handed over shows.
    rope = {"rope_type": "default", "rope_theta": 3000.0, **options.pop("rope", {})}
    if "no_rope_layers" in options:
        options["no_rope_layers"] = options["no_rope_layers"][:layers]
    config = getattr(transformers, f"{family}Config")(**options, rope_parameters=rope)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    if family == "Gemma":
        # transformers takes the tanh approximation whatever the configuration says; mlx-lm
        # computes GELU itself, which differs by up to 0.0005.
        for layer in model.model.layers:
            layer.mlp.act_fn = torch.nn.GELU()
    model.to(getattr(torch, dtype)).save_pretrained(path, **saving)
    other = make_folder(path.with_name(f"{path.name}-tokenizer"))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(other / file, path)
    shutil.rmtree(other)
    return model


def tokens_of(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, (1, n))


def theirs(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Return transformers' logits, ``[B, n, vocabulary]``, of a float32 model."""
    with torch.no_grad():
        logits = model(torch.tensor(tokens), use_cache=False).logits
    return logits.numpy()


def streamed(model: Any, tokens: np.ndarray, config: SinkConfig) -> np.ndarray:
    mlx_sink.attach(model, config)
    caches = model.make_cache()
    pieces = []
    for piece in cut(tokens.shape[1], mixed(17, 1, 1, 9)):
        logits = model(mx.array(tokens[:, piece]), cache=caches)
        pieces.append(np.array(logits.astype(mx.float32)))
    return np.concatenate(pieces, axis=1)


@each
def test_converted_logits_are_those_of_transformers(name: str, tmp_path: Path):
    reference = save(tmp_path / "hf", name, layers=2)
    made = convert(tmp_path / "hf", tmp_path / "mlx")
    assert made.report.layers
    model, _ = mlx_lm.load(str(made.path))
    tokens = tokens_of(N)
    expected, ours = theirs(reference, tokens), np.array(model(mx.array(tokens)))
    assert np.abs(expected).max() > 0.5
    assert np.abs(ours - expected).max() <= TOLERANCE
    # Without converting, mlx_sink reads the same model.
    direct, _ = mlx_sink.load(tmp_path / "hf")
    assert np.abs(np.array(direct(mx.array(tokens))) - expected).max() <= TOLERANCE


@each
def test_streamed_logits_are_those_of_the_visible_tokens(name: str, tmp_path: Path):
    """StreamingLLM by recomputation, in transformers: token t from what it sees, and no more."""
    reference = save(tmp_path / "hf", name, layers=1)
    made = convert(tmp_path / "hf", tmp_path / "mlx")
    model, _ = mlx_lm.load(str(made.path))
    tokens, config = tokens_of(N, seed=1), SinkConfig(S, W, epoch=24)
    full = theirs(reference, tokens)
    contexts = np.stack([tokens[0][visible(t, S, W)] for t in range(S + W, N)])
    expected = full.copy()
    expected[0, S + W :] = theirs(reference, contexts)[:, -1]
    # Full attention is far away, so agreement is no accident.
    assert np.abs(full - expected)[0, S + W :].max() > 100 * TOLERANCE
    assert np.abs(streamed(model, tokens, config) - expected).max() <= TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_keeps_its_type_and_its_weights(dtype: str, tmp_path: Path):
    save(tmp_path / "hf", "llama", layers=2, dtype=dtype)
    load = transformers.AutoModelForCausalLM.from_pretrained
    reference = load(tmp_path / "hf", dtype=torch.float32).eval()
    made = convert(tmp_path / "hf", tmp_path / "mlx")
    model, _ = mlx_lm.load(str(made.path))
    assert {str(w.dtype) for w in _weights(model)} == {f"mlx.core.{dtype}"}
    model.set_dtype(mx.float32)
    tokens = tokens_of(N)
    ours = np.array(model(mx.array(tokens)))
    assert np.abs(ours - theirs(reference, tokens)).max() <= TOLERANCE


def test_sharded_with_an_index(tmp_path: Path):
    reference = save(tmp_path / "hf", "qwen2", layers=2, max_shard_size="60KB")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    made = convert(tmp_path / "hf", tmp_path / "mlx")
    model, _ = mlx_lm.load(str(made.path))
    tokens = tokens_of(N)
    assert np.abs(np.array(model(mx.array(tokens))) - theirs(reference, tokens)).max() <= TOLERANCE


def test_dtype_and_quantisation_stay_near(tmp_path: Path):
    """8 bits are close to the original: the recipe changes the weights, not the model."""
    reference = save(tmp_path / "hf", "llama", layers=2)
    recipe = Recipe(quantize=True, q_bits=8, q_group_size=32)
    made = convert(tmp_path / "hf", tmp_path / "mlx", recipe=recipe)
    model, _ = mlx_lm.load(str(made.path))
    tokens = tokens_of(N)
    expected, ours = theirs(reference, tokens), np.array(model(mx.array(tokens)))
    assert 0 < np.abs(ours - expected).mean() < 0.1 * np.abs(expected).mean()


def test_transformers_reads_the_converted_folder(tmp_path: Path):
    """The section is in nobody's way, and the rotary settings say the same in both spellings."""
    reference = save(tmp_path / "hf", "llama, llama3", layers=2)
    made = convert(tmp_path / "hf", tmp_path / "mlx")
    again = transformers.AutoModelForCausalLM.from_pretrained(made.path).eval()
    tokens = tokens_of(N)
    assert np.abs(theirs(again, tokens) - theirs(reference, tokens)).max() <= TOLERANCE


def _weights(model: Any) -> list[mx.array]:
    from mlx.utils import tree_flatten

    return [weight for _, weight in tree_flatten(model.parameters())]
