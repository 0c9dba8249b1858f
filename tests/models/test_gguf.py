"""GGUF against the same weights in Hugging Face form, file by file, type by type."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import gguf_mutations
import gguf_writer
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from gguf_writer import CONFIGS, random_model, rounded, write

import mlx_sink
from mlx_sink import ModelError, SinkConfig
from mlx_sink.commands.convert.convert import convert
from mlx_sink.commands.convert.quantize import Recipe
from mlx_sink.io import gguf as header
from mlx_sink.models import lazy
from mlx_sink.models.gguf import architectures, packing
from mlx_sink.models.gguf.source import opened
from mlx_sink.models.lazy import weight_bytes
from mlx_sink.models.load import find_checkpoint, load_unattached

TOKENS = mx.array(np.random.default_rng(0).integers(0, 96, (1, 40)))
EXACT = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0")


def logits(model: nn.Module) -> np.ndarray:
    return np.array(model(TOKENS).astype(mx.float32))


def loaded(path: Path) -> nn.Module:
    model = load_unattached(str(path)).model
    model.set_dtype(mx.float32)
    return model


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_logits(name: str, kind: str, tmp_path: Path):
    """As mlx-lm's own model with the weights that the file holds, in float32."""
    model = random_model(name)
    path = write(tmp_path / "m.gguf", name, model, kind)
    expected = logits(rounded(model, kind))
    assert expected.std() > 0.05, "or everything would be alike"
    np.testing.assert_allclose(logits(loaded(path)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", {"pairs_neighbours": False}),
        ("llama, biases", {"pairs_neighbours": False}),
        ("qwen3", {"pairs_neighbours": True}),
        ("gemma", {"norm_offset": 0.0}),
        ("gemma3", {"norm_offset": 0.0}),
    ],
)
def test_it_would_be_noticed(
    name: str, change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Without what the converter's conventions ask for, the logits are others."""
    model = random_model(name)
    path, expected = write(tmp_path / "m.gguf", name, model), logits(model)
    kept = architectures.ARCHITECTURES[name.partition(",")[0]]
    known = architectures.ARCHITECTURES | {name.partition(",")[0]: replace(kept, **change)}
    monkeypatch.setattr(architectures, "ARCHITECTURES", known)
    assert np.abs(logits(loaded(path)) - expected).max() > 1e-2


@pytest.mark.parametrize("kind", packing.PACKED)
def test_no_bit_is_changed(kind: str):
    """Every number of a block, the extremes among them, is what the package gguf reads."""
    random = np.random.default_rng(1)
    rows = random.normal(size=(6, 96)).astype(np.float32) * 100
    rows[0], rows[1, ::2] = 0, -1e4
    data = gguf.quants.quantize(rows, gguf.GGMLQuantizationType[kind])
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    words, scales, biases = (mx.array(x) for x in packing.packed(data, kind))
    bits = packing.PACKED[kind]
    ours = mx.dequantize(words, scales, biases, group_size=32, bits=bits)
    np.testing.assert_array_equal(np.array(ours), expected)
    assert scales.astype(mx.float16).astype(mx.float32).tolist() == scales.tolist()
    assert words.nbytes + (scales.size + biases.size) * 2 <= data.nbytes * 1.12


@pytest.mark.parametrize("kind", ["Q5_0", "Q4_K", "Q6_K"])
def test_other_types_are_expanded(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """By the package gguf; what that costs is said in a line."""
    model = random_model("llama, tied")
    path = tmp_path / "m.gguf"
    of = gguf.GGMLQuantizationType[kind]
    block, nbytes = gguf.GGML_QUANT_SIZES[of]
    made = gguf_writer.tensors("llama, tied", model, "F16")
    random = np.random.default_rng(2)
    expanded: dict[str, np.ndarray] = {}

    def tensors(*_: object) -> list[tuple[str, np.ndarray, Any]]:
        out: list[tuple[str, np.ndarray, Any]] = []
        for name, data, kind_of in made:
            if name == "blk.0.ffn_down.weight" and data.shape[1] % block == 0:
                rows = random.integers(0, 60, (data.shape[0], data.shape[1] // block * nbytes))
                data, kind_of = rows.astype(np.uint8), of
                expanded[name] = gguf.quants.dequantize(data, of)
            out.append((name, data, kind_of))
        return out

    with pytest.MonkeyPatch.context() as patch:
        if block > 128:
            patch.setitem(CONFIGS["llama, tied"], "intermediate_size", 256)
            model = random_model("llama, tied")
            made = gguf_writer.tensors("llama, tied", model, "F16")
        patch.setattr(gguf_writer, "tensors", tensors)
        write(path, "llama, tied", model)
    assert expanded
    weights = find_checkpoint(str(path)).weights
    assert weights is not None
    down = weights(False)["model.layers.0.mlp.down_proj.weight"]
    np.testing.assert_allclose(np.array(down), expanded["blk.0.ffn_down.weight"], rtol=1e-3)
    assert f"weights in {kind} are expanded from" in capsys.readouterr().err


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path / "m.gguf", "qwen3", random_model("qwen3"), "Q5_0")

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(packing, "import_module", missing)
    with pytest.raises(ModelError, match=r"of type Q5_0, which needs .* pip install 'mlx-sink"):
        load_unattached(str(path))
    assert lazy.unread(str(path)).model is not None, "its header says all that plan needs"


def split(path: Path, name: str, model: nn.Module, n: int) -> list[Path]:
    """Write a model in n files, as llama.cpp's gguf-split does: the fields in the first."""
    tensors = gguf_writer.tensors(name, model, "Q8_0")
    files = [path / f"m-{i:05}-of-{n:05}.gguf" for i in range(1, n + 1)]
    for i, file in enumerate(files):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gguf_writer, "tensors", lambda *_, i=i: tensors[i::n])
            write(file, name, model, **{"split.no": i, "split.count": n})
    return files


def test_in_several_files(tmp_path: Path):
    """Whichever is named, or the folder that holds them."""
    model = random_model("qwen3")
    files = split(tmp_path, "qwen3", model, 3)
    expected = logits(rounded(model, "Q8_0"))
    for name in (*files, tmp_path):
        np.testing.assert_allclose(logits(loaded(name)), expected, atol=1e-5)
    files[1].unlink()
    opened.cache_clear()
    with pytest.raises(ModelError, match=r"is one of 3 files, and m-00002-of-00003.gguf is miss"):
        load_unattached(str(files[0]))
    with pytest.raises(ModelError, match="is one of 3 files, whose names end in"):
        load_unattached(str(files[0].rename(tmp_path / "alone.gguf")))


def test_under_any_name(tmp_path: Path):
    """Ollama's files are called by their sums."""
    model = random_model("llama")
    path = write(tmp_path / "sha256-0123", "llama", model, "Q4_0")
    np.testing.assert_allclose(logits(loaded(path)), logits(rounded(model, "Q4_0")), atol=1e-5)


def test_as_any_other_model(tmp_path: Path):
    """Planned, streamed, saved and converted; the folder that is made is the same model."""
    model = random_model("llama, tied")
    model.set_dtype(mx.float16)  # norms, too, are what a conversion keeps
    model.set_dtype(mx.float32)
    path = write(tmp_path / "m.gguf", "llama, tied", model, "Q4_1")
    expected = logits(rounded(model, "Q4_1"))
    planned = lazy.unread(str(path))
    assert planned.dtype == "float16"
    attached, tokenizer = mlx_sink.load(str(path), SinkConfig(4, 40))
    stream = mlx_sink.Stream(attached, tokenizer, seed=1)
    stream.feed("abcabc")
    said = [r.token for r in stream.generate(20, ignore_eos=True)]
    stream.save(tmp_path / "s")
    again = mlx_sink.Stream.resume(tmp_path / "s", attached, tokenizer)
    assert [r.token for r in again.generate(5)] == [r.token for r in stream.generate(5)]
    assert len(said) == 20
    made = convert(str(path), tmp_path / "made")
    assert made.nbytes == weight_bytes(planned.model)
    np.testing.assert_allclose(logits(loaded(tmp_path / "made")), expected, atol=1e-5)
    plain = write(tmp_path / "f.gguf", "qwen3", random_model("qwen3"), "F16")
    convert(str(plain), tmp_path / "q", recipe=Recipe(quantize=True, q_group_size=32))
    assert (tmp_path / "q" / "config.json").is_file()


FORGED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown architecture": ({"general.architecture": "mamba"}, "architecture 'mamba': of GGUF"),
    "no width": ({"qwen3.embedding_length": None}, "qwen3.embedding_length is None"),
    "no heads": ({"qwen3.attention.head_count": 0}, "head_count is 0"),
    "a text for a number": ({"qwen3.block_count": "two"}, "block_count is 'two'"),
    "more layers": ({"qwen3.block_count": 3}, "has 2 layers, not 3"),
    "very many": ({"qwen3.block_count": 2**30}, "has 2 layers, not 1073741824"),
    "another width": ({"qwen3.embedding_length": 96}, "an embedding that is not 96 wide"),
    "heads of all layers": ({"qwen3.attention.head_count_kv": [1, 2]}, "head_count_kv is"),
    "experts": ({"qwen3.expert_count": 8}, "has experts, which are not read"),
    "unknown scaling": ({"qwen3.rope.scaling.type": "dynamic"}, "positions by 'dynamic'"),
    "no tokens": ({"tokenizer.ggml.tokens": None}, "has no tokenizer"),
    "too many tokens": (
        {"tokenizer.ggml.tokens": [str(i) for i in range(97)]}, "97 tokens for an embedding of 96"
    ),
    "tokens alike": ({"tokenizer.ggml.tokens": ["a"] * 96}, "spelled alike"),
    "unknown tokenizer": ({"tokenizer.ggml.model": "rwkv"}, "the model 'rwkv': gpt2 and llama"),
    "unknown cuts": ({"tokenizer.ggml.pre": "x"}, "the pre-tokenizer 'x'"),
    "no merges": ({"tokenizer.ggml.merges": None}, "no merges"),
    "merges of one": ({"tokenizer.ggml.merges": ["ab"]}, "merges that are not of two tokens"),
    "merges of nothing": ({"tokenizer.ggml.merges": ["zz yy"]}, "is damaged"),
    "types of others": ({"tokenizer.ggml.token_type": [1, 2]}, "no token_type for each of its 96"),
    "an end that is none": ({"tokenizer.ggml.eos_token_id": 96}, "a eos token 96, which is none"),
}  # fmt: skip


@pytest.mark.parametrize("change", FORGED)
def test_fields_that_make_no_sense(change: str, tmp_path: Path):
    fields, message = FORGED[change]
    path = write(tmp_path / "m.gguf", "qwen3", random_model("qwen3"), **fields)
    with pytest.raises(ModelError, match=message):
        load_unattached(str(path))


def test_factors_that_are_not_llama_3s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gguf_writer, "_llama3_factors", lambda config: [1.0, 3.0] * 8)
    path = write(tmp_path / "m.gguf", "llama, llama3", random_model("llama, llama3"))
    with pytest.raises(ModelError, match="factors that are not Llama 3's"):
        load_unattached(str(path))


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_damaged_files(first: int, tmp_path: Path):
    """Refused in one line, or loaded: nothing else, and nothing worse."""
    name = ("llama", "gemma", "qwen2", "phi3, longrope")[first // 50]
    path = write(tmp_path / "m.gguf", name, random_model(name), "Q8_0")
    sound = path.read_bytes()
    header_bytes = min(tensor.offset for tensor in header.read(path).tensors.values())
    said: set[str] = set()
    for seed in range(first, first + 50):
        path.write_bytes(gguf_mutations.damaged(sound, seed, header_bytes))
        said.add(gguf_mutations.outcome(path))
    assert len(said) > 10, "as many kinds of refusals"


def test_two_models_in_a_folder(tmp_path: Path):
    model = random_model("qwen3")
    for name in ("a.gguf", "b.gguf"):
        write(tmp_path / name, "qwen3", model)
    with pytest.raises(ModelError, match=r"holds 2 models in GGUF, a.gguf and b.gguf among them"):
        load_unattached(str(tmp_path))


def test_what_is_no_gguf(tmp_path: Path):
    (tmp_path / "m.gguf").write_bytes(b"GGML" + bytes(100))
    with pytest.raises(ModelError, match="is a file, and none of GGUF"):
        load_unattached(str(tmp_path / "m.gguf"))
    for version, message in ((1, "has version 1"), (3 << 24, "is big-endian")):
        (tmp_path / "m.gguf").write_bytes(b"GGUF" + version.to_bytes(4, "little") + bytes(100))
        opened.cache_clear()
        with pytest.raises(ModelError, match=message):
            header.read(tmp_path / "m.gguf")


def test_a_folder_beside_other_files(tmp_path: Path):
    """Repositories of GGUF often hold a config.json too; weights in safetensors go first."""
    model = random_model("qwen3")
    write(tmp_path / "m.gguf", "qwen3", model)
    (tmp_path / "config.json").write_text('{"model_type": "other"}')
    np.testing.assert_allclose(logits(loaded(tmp_path)), logits(model), atol=1e-5)
    assert lazy.unread(str(tmp_path)).config["model_type"] == "qwen3"
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load_unattached(str(tmp_path))
