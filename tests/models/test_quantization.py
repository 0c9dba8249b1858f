"""Weights that other tools quantised: counted as they will be, or refused by the tool's name."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
import pytest
from folder import make_folder
from mlx.utils import tree_flatten
from tiny import build as tiny

import mlx_sink
from mlx_sink import ModelError
from mlx_sink.commands.entry import command
from mlx_sink.measure.estimate import estimate
from mlx_sink.models.checkpoints import quantization
from mlx_sink.models.lazy import build, weight_bytes

WIDE = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 280, "num_hidden_layers": 2}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True}
ORDER = [0, 4, 1, 5, 2, 6, 3, 7]
"""Which place in a word AutoAWQ puts each of eight weights in."""


def packed(values: mx.array) -> mx.array:
    """Pack numbers of 4 bits as AutoAWQ does, ``[rows, columns]`` to ``[rows, columns / 8]``."""
    rows, columns = values.shape
    eights = values.reshape(rows, columns // 8, 8).astype(mx.uint32)
    return mx.sum(eights << mx.array([4 * place for place in ORDER]), axis=-1).astype(mx.uint32)


def awq(path: Path, **config: Any) -> Path:
    """Write a random llama as AutoAWQ does: linear layers but the last one in 4 bits."""
    make_folder(path, **WIDE, **config)
    model = tiny("llama", layers=2, head_dim=32, **{k: WIDE[k] for k in WIDE if "layers" not in k})
    weights: dict[str, mx.array] = {}
    for name, weight in tree_flatten(model.parameters()):
        stem = name.removesuffix(".weight")
        if weight.ndim == 2 and "embed" not in name and "lm_head" not in name:
            n_out, n_in = weight.shape
            groups = n_in // AWQ["group_size"]
            weights[f"{stem}.qweight"] = packed(mx.random.randint(0, 16, (n_in, n_out)))
            weights[f"{stem}.qzeros"] = packed(mx.random.randint(0, 16, (groups, n_out)))
            weights[f"{stem}.scales"] = mx.random.uniform(shape=(groups, n_out)).astype(mx.float16)
        else:
            weights[name] = weight.astype(mx.float16)
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    return path


def said(path: Path, **fields: Any) -> Path:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return path


def bytes_of(folder: Path) -> int:
    return sum(w.nbytes for w in mx.load(str(folder / "model.safetensors")).values())


@pytest.mark.parametrize("tied", [True, False])
def test_awq_is_counted_as_it_is_loaded(tied: bool, tmp_path: Path):
    """From the configuration alone, and from the files; and it is what is written."""
    fields = {"tie_word_embeddings": tied, "head_dim": 32, "torch_dtype": "float16"}
    folder = awq(tmp_path / "awq", quantization_config=AWQ, **fields)
    if not tied:
        weights = dict(mx.load(str(folder / "model.safetensors")))
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        mx.save_safetensors(str(folder / "model.safetensors"), weights)
    model, _ = mlx_sink.load(folder)
    held = sum(w.nbytes for _, w in tree_flatten(model.parameters()))
    assert {type(layer.mlp.up_proj) for layer in model.layers} == {nn.QuantizedLinear}
    (tmp_path / "alone").mkdir()
    alone = tmp_path / "alone" / "config.json"
    alone.write_bytes((folder / "config.json").read_bytes())
    assert estimate(str(alone), window=20).weights.nbytes == held
    assert estimate(str(folder), window=20).weights.nbytes == held
    made = tmp_path / "made"
    assert command("convert").main(["--hf-path", str(folder), "--mlx-path", str(made)]) == 0
    assert bytes_of(made) == held
    # Unquantised it would be another number by far.
    alone.write_text(json.dumps(json.loads(alone.read_text()) | {"quantization_config": None}))
    assert estimate(str(alone), window=20).weights.nbytes > 2 * held


MISTRAL_7B = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
LINEAR = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
REST = 2 * 32000 * 4096 + 65 * 4096
"""Weights of Mistral 7B in its linear layers, and in the others."""

GROUPS = {"group_0": {"weights": {"num_bits": 4, "group_size": 128}, "targets": ["Linear"]}}


@pytest.mark.parametrize(
    ("settings", "bits"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, 4.25),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 4.25),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, 5.0),
        ({"quant_method": "mxfp4"}, 4.25),
        ({"quant_method": "mxfp8"}, 8.25),
        ({"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [32, 32]}, 8.25),
        (None, 16.0),
    ],
    ids=str,
)
def test_seven_billion_weights(settings: dict[str, Any] | None, bits: float):
    """The 4-bit conversions that people look for take about 4.2 GB, not 14.5."""
    nbytes = weight_bytes(build(MISTRAL_7B | {"quantization_config": settings}))
    assert nbytes == LINEAR * bits / 8 + REST * 2


def test_layers_that_are_left_out():
    kept = {"modules_to_not_convert": ["self_attn"]}
    settings = {"quant_method": "awq", "bits": 4, "group_size": 128} | kept
    attention = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024)
    nbytes = weight_bytes(build(MISTRAL_7B | {"quantization_config": settings}))
    assert nbytes == (LINEAR - attention) * 4.25 / 8 + (REST + attention) * 2


def test_what_is_expanded_counts_as_what_it_becomes():
    """DeepSeek's FP8 in blocks becomes bfloat16."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = json.loads(CONFIG_MAPPING["deepseek_v3"](num_hidden_layers=4).to_json_string())
    blocks = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    plain = weight_bytes(build(config, "bfloat16"))
    assert weight_bytes(build(config | {"quantization_config": blocks}, "bfloat16")) == plain
    ints = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    ints |= {"config_groups": GROUPS, "ignore": ["lm_head", "re:.*self_attn.*"]}
    less = weight_bytes(build(config | {"quantization_config": ints}, "bfloat16"))
    assert 0.35 * plain < less < 0.45 * plain


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "bitsandbytes (4 bits)",
    ),
    "bitsandbytes, 8": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        "bitsandbytes (8 bits)",
    ),
    "blocks of FP8": (
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "fp8 (blocks of 128 x 128)",
    ),
    "FP8": ({"quant_method": "fp8"}, "quantised with fp8,"),
    "FP8 of compressed-tensors": (
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        "compressed-tensors (float-quantized)",
    ),
    "integers of compressed-tensors": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        "compressed-tensors (pack-quantized)",
    ),
    "ModelOpt": ({"quant_method": "modelopt", "quant_algo": "FP8"}, "modelopt (FP8)"),
    "AWQ of 8 bits": ({"quant_method": "awq", "bits": 8}, "awq (8 bits)"),
    "GPTQ of 3 bits": ({"quant_method": "gptq", "bits": 3}, "gptq (3 bits)"),
    "GPTQ by activations": (
        {"quant_method": "gptq", "bits": 4, "desc_act": True},
        "gptq (desc_act)",
    ),
    **{
        name: ({"quant_method": name}, f"quantised with {name},")
        for name in ("hqq", "aqlm", "eetq")
    },
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, "quantised with fbgemm_fp8,"),
    "quanto": ({"quant_method": "quanto", "weights": "int4"}, "quantised with quanto,"),
    "no name": ({"bits": 4}, "a tool without a name (4 bits)"),
}


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose linear layers are bytes, as most tools leave them."""
    folder = make_folder(tmp_path_factory.mktemp("models") / "half")
    weights = mx.load(str(folder / "model.safetensors"))
    packed = {n: w.astype(mx.uint8) if "proj" in n else w for n, w in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), packed)
    return folder


@pytest.mark.parametrize("name", ["generate", "convert", "compare", "plan"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_named(case: str, name: str, half: Path, tmp_path: Path):
    settings, words = REFUSED[case]
    said(half, quantization_config=settings)
    text = tmp_path / "text.txt"
    text.write_text("the cat and the dog went to the sea. " * 40)
    argv = {
        "generate": ["--model", str(half), "-p", "x"],
        "convert": ["--hf-path", str(half), "--mlx-path", str(tmp_path / "made")],
        "compare": ["--model", str(half), "--text", str(text), "--output", str(tmp_path / "run")],
        "plan": ["--model", str(half)],
    }
    with pytest.raises(ModelError) as caught:
        command(name).main(argv[name])
    assert words in str(caught.value)
    assert "which mlx-lm does not read for llama: use a conversion for MLX" in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["text.txt"]


def test_in_the_text_model_and_in_a_file_of_its_own(half: Path):
    """Where mlx-lm looks for it, too."""
    bits = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    said(half, quantization_config=None, text_config={"quantization_config": bits})
    with pytest.raises(ModelError, match=r"bitsandbytes \(4 bits\)"):
        mlx_sink.load(half)
    said(half, text_config=None)
    (half / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    with pytest.raises(ModelError, match=r"modelopt \(FP8\)"):
        mlx_sink.load(half)
    (half / "hf_quant_config.json").unlink()


def test_a_configuration_that_was_left_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Merged after it was trained in 4 bits: the weights are whole, and mlx-lm loads them."""
    folder = make_folder(tmp_path / "merged")
    said(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert mlx_sink.load(folder)
    assert "says that bitsandbytes (4 bits) quantised the weights" in capsys.readouterr().err
    assert estimate(str(folder), window=20).weights.nbytes == bytes_of(folder)


def test_a_packing_that_does_not_fit_is_named(tmp_path: Path):
    """GPTQ's, which mlx-lm takes for AWQ's."""
    folder = awq(tmp_path / "gptq", head_dim=32, tie_word_embeddings=True)
    said(folder, quantization_config=AWQ | {"quant_method": "gptq"})
    weights = dict(mx.load(str(folder / "model.safetensors")))
    for name in [name for name in weights if name.endswith("qweight")]:
        weights[name] = mx.zeros(
            (weights[name].shape[0] // 8, weights[name].shape[1] * 8), mx.uint32
        )
        weights[name.replace("qweight", "g_idx")] = mx.zeros((8,), mx.int32)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    with pytest.raises(ModelError, match=r"g_idx.*quantised with gptq \(4 bits\)"):
        mlx_sink.load(folder)


def test_the_lists_are_those_of_the_installed_mlx_lm():
    """Which modules expand or unpack such weights, by their own words."""
    sources = {
        info.name: inspect.getsource(importlib.import_module(f"mlx_lm.models.{info.name}"))
        for info in pkgutil.iter_modules(mlx_lm.models.__path__)
        if info.name not in ("olmo",)
    }
    expand = {name for name, text in sources.items() if "from_fp8(weight" in text}
    # These take over the weights of a module above.
    assert expand | {"glm_moe_dsa", "kimi_k25"} == quantization.EXPANDED
    unpack = {name for name, text in sources.items() if "weight_packed" in text}
    assert unpack | {"kimi_k25"} == quantization.PACKED
    assert {n for n, t in sources.items() if "_weight_scale_2" in t} == quantization.MODELOPT
    assert "Model(DSV32Model)" in sources["glm_moe_dsa"]
    assert "DeepseekV3LM.sanitize" in sources["kimi_k25"]
