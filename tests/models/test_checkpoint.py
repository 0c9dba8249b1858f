"""A configuration in transformers 5's spelling, in mlx-lm's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from folder import make_folder
from tiny import LLAMA3

import mlx_sink
from mlx_sink.models import checkpoint
from mlx_sink.models.checkpoint import for_mlx_lm

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
