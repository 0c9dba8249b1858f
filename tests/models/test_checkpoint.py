"""A model folder: what is looked at, and what is not held against it; its configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from folder import make_folder
from tiny import LLAMA3

import mlx_sink
from mlx_sink import ModelError
from mlx_sink.models.checkpoints import checkpoint
from mlx_sink.models.checkpoints.spelling import for_mlx_lm

PLAIN = {"rope_type": "default", "rope_theta": 3000.0}


@pytest.mark.parametrize(
    ("config", "added"),
    [
        ({}, {}),
        ({"rope_theta": 500.0}, {}),
        ({"rope_parameters": None}, {}),
        ({"rope_parameters": PLAIN}, {"rope_theta": 3000.0}),
        ({"rope_parameters": PLAIN, "rope_theta": 500.0}, {}),
        ({"rope_parameters": PLAIN, "rope_theta": None}, {"rope_theta": 3000.0}),
        (
            {"rope_parameters": LLAMA3 | {"rope_theta": 3000.0}},
            {"rope_theta": 3000.0, "rope_scaling": LLAMA3},
        ),
        (
            {"rope_parameters": PLAIN | {"partial_rotary_factor": 0.25}},
            {"rope_theta": 3000.0, "partial_rotary_factor": 0.25},
        ),
        (  # Gemma 3
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                }
            },
            {
                "rope_theta": 1e6,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                "rope_local_base_freq": 1e4,
            },
        ),
        (
            {"text_config": {"hidden_size": 8, "rope_parameters": PLAIN}},
            {
                "text_config": {
                    "hidden_size": 8,
                    "rope_parameters": PLAIN,
                    "rope_theta": 3000.0,
                }
            },
        ),
    ],
)
def test_rope_parameters(config: dict[str, Any], added: dict[str, Any]):
    before = json.dumps(config)
    assert for_mlx_lm(config) == added
    assert json.dumps(config) == before


def test_load_gives_both_spellings_the_same_model(tmp_path: Path):
    """mlx-lm alone would take its default base, and say nothing."""
    logits = []
    for name, spelling in (
        ("old", {"rope_theta": 3000.0}),
        ("new", {"rope_parameters": PLAIN}),
        ("none", {}),
    ):
        model, _ = mlx_sink.load(make_folder(tmp_path / name, **spelling))
        logits.append(np.array(model(mx.arange(40)[None])))
    old, new, none = logits
    assert np.array_equal(old, new)
    assert np.abs(old - none).max() > 0.01


def test_a_folder_of_someone_elses_files_is_sound(tmp_path: Path):
    """What else lies in a repository is nobody's business."""
    folder = make_folder(tmp_path / "model")
    for name in ("pytorch_model.bin", "model.gguf", "consolidated.safetensors", "notes.txt"):
        (folder / name).write_bytes(b"anything")
    found = checkpoint.check(folder)
    assert list(found.shards) == ["model.safetensors"]
    assert found.shards["model.safetensors"] == (folder / "model.safetensors").stat().st_size


NORM = "model.norm.weight"
STALE: dict[str, object] = {
    "of shards": {
        NORM: "model-00001-of-00002.safetensors",
        "x": "model-00002-of-00002.safetensors",
    },
    "of other tensors": {NORM: "model.safetensors", "gone": "model.safetensors"},
    "of pickles": {NORM: "pytorch_model.bin"},
    "outside": {NORM: "../model.safetensors"},
    "of numbers": {NORM: 3},
    "empty": {},
    "a list": [],
}


@pytest.mark.parametrize("case", [*STALE, "cut off", "not UTF-8"])
def test_an_index_that_is_wrong_is_ignored(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """mlx-lm reads none: a 4-bit Gemma 3 on the hub has that of the model it was made from."""
    folder = make_folder(tmp_path / "model")
    plain, _ = mlx_lm.load(str(folder))
    index = folder / "model.safetensors.index.json"
    bad = {"cut off": b'{"weight_map": {"a', "not UTF-8": b"\xff{}"}
    index.write_bytes(bad.get(case) or json.dumps({"weight_map": STALE[case]}).encode())
    model, _ = mlx_sink.load(folder)
    tokens = mx.arange(40)[None]
    assert np.array_equal(np.array(model(tokens)), np.array(plain(tokens)))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith(f"warning: {str(index)!r} is wrong, and is ignored")


def test_an_index_that_is_right_is_not_spoken_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = make_folder(tmp_path / "model")
    names = mx.load(str(folder / "model.safetensors"))
    weight_map = dict.fromkeys(names, "model.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    mlx_sink.load(folder)
    assert capsys.readouterr().err == ""


def test_weights_of_less_than_16_bits_are_not_taken_for_whole_numbers(tmp_path: Path):
    """mlx-lm loads them without a word: the bytes of FP8 become numbers from 0 to 255."""
    folder = make_folder(tmp_path / "model")
    weights = mx.load(str(folder / "model.safetensors"))
    weights = {name: mx.to_fp8(w) if w.ndim == 2 else w for name, w in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(_renamed_type(data, b"U8", b"F8_E4M3"))
    assert mlx_lm.load(str(folder))
    with pytest.raises(ModelError, match=r"has weights in F8_E4M3 .*: get them in bfloat16"):
        mlx_sink.load(folder)


def _renamed_type(data: bytes, old: bytes, new: bytes) -> bytes:
    """Write another type into the header of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].replace(b'"' + old + b'"', b'"' + new + b'"')
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def test_what_mlx_lm_prints_is_no_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Its Phi 3 says on stdout that it leaves out a kind of scaling."""
    folder = make_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    scaling = {"type": "yarn", "long_factor": [1.0], "factor": 2.0}
    model = {"model_type": "phi3", "rope_scaling": scaling}
    (folder / "config.json").write_text(json.dumps(config | model))
    with pytest.raises(ModelError, match="parameters"):  # Those are a llama's.
        mlx_sink.load(folder)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "[WARNING]" in captured.err
